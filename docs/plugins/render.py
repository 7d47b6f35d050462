"""Writes what is generated in this folder: `reference.md`, and the listings of the other pages.

    python docs/plugins/render.py

The reference is read from the sources of the plugin API, by their syntax: what is written there stands here. A name
without a docstring is an error. A listing stands between `<!-- file: PATH -->` and the end of its fence; its text is
that file's. `tests/checks/test_plugin_docs.py` fails when a page is not current.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
API = ROOT / "proxy" / "guestpass" / "plugin.py"
MODEL = ROOT / "proxy" / "guestpass" / "model.py"

LISTING = re.compile(r"(<!-- file: (\S+) -->\n\n```(\w+)\n).*?(^```$)", re.MULTILINE | re.DOTALL)

# Kinds first, in the order of a visitor's way; then what they are given, and what they answer.
CHAPTERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Kinds", ("Authenticator", "Revoker", "BackendChooser", "RequestFilter", "Notifier", "Observer")),
    ("What they have in common", ("Plugin", "PluginConfig", "Host", "Storage", "Answer", "settled")),
    (
        "What hooks are given",
        ("SignIn", "RequestContext", "Choice", "Message", "Event", "Client", "Share", "Incoming"),
    ),
    ("Sessions, gateways", ("Session", "SessionKind", "Candidate", "Scope")),
    (
        "What hooks answer",
        (
            "Step",
            "Form",
            "Field",
            "Action",
            "Passkey",
            "Unproven",
            "Redirect",
            "Identity",
            "Revocation",
            "Static",
            "Rate",
            "Edits",
            "Reply",
        ),
    ),
    ("Errors", ("Denied", "NotDelivered", "Invalid", "InvalidEmail")),
    (
        "Settings and addresses",
        ("Secret", "ConfigPath", "canonical_address", "is_loopback", "parse_scope", "API_VERSION"),
    ),
)

# Defined elsewhere, in one line here.
ELSEWHERE = {
    "InvalidEmail": "Raised by `canonical_address` for what is no email address.",
    "is_loopback": (
        "`is_loopback(host: str) -> bool`: whether a name or an address is this machine's own, so that nothing "
        "sent there leaves it: what goes elsewhere in the clear is a mistake."
    ),
    "canonical_address": (
        "`canonical_address(address: str) -> str`: the one form in which addresses are compared and kept. "
        "Raises InvalidEmail."
    ),
    "Invalid": "Raised by `parse_scope`; its `message` and `hint` are for the operator.",
    "parse_scope": (
        "`parse_scope(text: str) -> Scope`: a rule as settings have it, `GET /x/**` or `/x/**`. Raises Invalid."
    ),
    "API_VERSION": "The version of this API, which a plugin's `api_version` must be: `1`.",
    "Step": "`Form | Redirect | Identity`",
}


class Undocumented(Exception):
    """A name of the API has no docstring."""


def documented(path: Path) -> dict[str, tuple[ast.stmt, str]]:
    """Statements of a module by the name that they define, with the text after an assignment."""
    found: dict[str, tuple[ast.stmt, str]] = {}
    body = ast.parse(path.read_text("utf-8")).body
    for statement, after in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found[statement.name] = statement, ast.get_docstring(statement) or ""
        for target in _targets(statement):
            found[target] = statement, _text(after)
    return found


def _targets(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.Assign):
        return [t.id for t in statement.targets if isinstance(t, ast.Name)]
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return [statement.target.id]
    return []


def _text(statement: ast.stmt) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return textwrap.dedent(str(statement.value.value)).strip()
    return ""


def _prose(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """As it is written, without `self`."""
    arguments = ast.unparse(function.args).removeprefix("self").removeprefix(", ")
    returns = f" -> {ast.unparse(function.returns)}" if function.returns is not None else ""
    prefix = "async " if isinstance(function, ast.AsyncFunctionDef) else ""
    return f"{prefix}{function.name}({arguments}){returns}"


def entry(name: str, statement: ast.stmt, doc: str) -> Iterator[str]:
    yield f"### {name}"
    if not isinstance(statement, ast.ClassDef):
        text = doc or ELSEWHERE.get(name, "")
        if not text:
            raise Undocumented(name)
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"`{signature(statement)}`"
        yield _prose(text)
        return
    bases = [
        ast.unparse(b) for b in statement.bases if ast.unparse(b) not in ("ABC", "Protocol", "BaseModel")
    ]
    if bases:
        yield f"A `{bases[0]}`."
    if not doc and not _is_data(statement):
        raise Undocumented(name)
    if doc:
        yield _prose(doc)
    rows = list(_fields(statement))
    if rows:
        yield "\n".join(("| field | type | default | |", "|---|---|---|---|", *rows))
    for part in statement.body:
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and not part.name.startswith("_"):
            yield from _method(name, statement, part)


def _is_data(statement: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(d) for d in statement.decorator_list)


def _method(owner: str, cls: ast.ClassDef, part: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    doc = ast.get_docstring(part) or ""
    is_property = any(ast.unparse(d) == "property" for d in part.decorator_list)
    if not doc:
        raise Undocumented(f"{owner}.{part.name}")
    shown = f"{part.name}: {ast.unparse(part.returns)}" if is_property and part.returns else signature(part)
    must = " Must be there." if any("abstractmethod" in ast.unparse(d) for d in part.decorator_list) else ""
    yield f"`{shown}`{must}"
    if doc:
        yield textwrap.indent(_prose(doc), "> ", lambda line: True)


def _fields(statement: ast.ClassDef) -> Iterator[str]:
    body = statement.body
    for part, after in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            kind = ast.unparse(part.annotation).replace("|", "\\|")
            kind = re.sub(r"ClassVar\[(.*)\]", r"\1", kind)
            default = f"`{_default(part.value)}`" if part.value is not None else ""
            about = " ".join(_text(after).split()).replace("|", "\\|")
            yield f"| `{part.target.id}` | `{kind}` | {default} | {about} |"
        elif (
            isinstance(part, ast.Assign)
            and ast.unparse(statement.bases[0] if statement.bases else part) == "StrEnum"
        ):
            yield f"| `{ast.unparse(part.targets[0])}` | | `{ast.unparse(part.value)}` | |"


def _default(value: ast.expr) -> str:
    text = ast.unparse(value).replace("|", "\\|")
    return "{}" if "default_factory=dict" in text else text


def reference() -> str:
    names = {**documented(MODEL), **documented(API)}
    out = [
        "# Reference of the plugin API",
        "Generated from `guestpass.plugin` by `docs/plugins/render.py`. `from guestpass.plugin import …` is all that a "
        "plugin imports of Guestpass. See [Plugins](../plugins.md) for what it is about.",
        "Times are seconds since the epoch.",
    ]
    for chapter, entries in CHAPTERS:
        out.append(f"## {chapter}")
        for name in entries:
            if name in names and name not in ("Step", "API_VERSION"):
                out += entry(name, *names[name])
            else:
                out += [f"### {name}", ELSEWHERE[name]]
    return "\n\n".join(out) + "\n"


def with_listings(page: str) -> str:
    """A page with the text of every file that it lists."""

    def listing(match: re.Match[str]) -> str:
        return f"{match[1]}{(ROOT / match[2]).read_text('utf-8').rstrip()}\n{match[4]}"

    return LISTING.sub(listing, page)


def pages() -> dict[Path, str]:
    """What every page should say."""
    found = {path: with_listings(path.read_text("utf-8")) for path in sorted(HERE.glob("*.md"))}
    return {**found, HERE / "reference.md": reference()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, "utf-8")
