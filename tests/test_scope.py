"""Path limits: what a pattern admits, and that a path which servers read differently is refused."""

import pytest

from guestpass.errors import Invalid
from guestpass.model import Scope
from guestpass.scope import admits, ambiguous, check_path, parse_scope


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("GET /x/**", Scope("GET", "/x/**")),
        ("/x", Scope("*", "/x")),
        ("* /x", Scope("*", "/x")),
        ("  post   /a/*/b ", Scope("POST", "/a/*/b")),
        ("M-SEARCH /x", Scope("M-SEARCH", "/x")),
    ],
)
def test_rules(text, rule):
    assert parse_scope(text) == rule


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GET",
        "GET x",
        "GET POST /x",
        "G=T /x",
        "GET /x/../y",
        "GET /x//y",
        "GET /%2e%2e/x",
        "GET /x%2Fy",
        "GET /x;v=1",
        "GET /x\\y",
        "GET /\u00fc",
        "GET /x#y",
        "GET /" + "x" * 2000,
    ],
)
def test_what_is_no_rule(text):
    with pytest.raises(Invalid):
        parse_scope(text)


@pytest.mark.parametrize(
    ("rule", "method", "target", "admitted"),
    [
        ("GET /x/**", "GET", "/x", True),
        ("GET /x/**", "GET", "/x/", True),
        ("GET /x/**", "GET", "/x/a/b", True),
        ("GET /x/**", "GET", "/x/a?q=/y", True),
        ("GET /x/**", "HEAD", "/x/a", True),
        ("GET /x/**", "POST", "/x/a", False),
        ("GET /x/**", "GET", "/xy", False),
        ("GET /x/**", "GET", "/X/a", False),
        ("GET /x/**", "GET", "/", False),
        ("GET /x/**", "GET", "/y?/x/a", False),
        ("POST /x", "HEAD", "/x", False),
        ("* /x", "DELETE", "/x", True),
        ("* /x", "DELETE", "/x/", False),
        ("* /a/*/c", "GET", "/a/b/c", True),
        ("* /a/*/c", "GET", "/a//c", False),
        ("* /a/*/c", "GET", "/a/b/b/c", False),
        ("* /f*.js", "GET", "/foo.js", True),
        ("* /f*.js", "GET", "/foo/x.js", False),
        ("* /f.js", "GET", "/fxjs", False),
        ("* /a/**/z", "GET", "/a/z", True),
        ("* /a/**/z", "GET", "/a/b/c/z", True),
        ("* /**", "GET", "/", True),
        ("* /**", "GET", "/anything/at/all", True),
        ("* /", "GET", "/", True),
        ("* /", "GET", "/x", False),
    ],
)
def test_what_a_rule_admits(rule, method, target, admitted):
    assert admits([parse_scope(rule)], method, target) is admitted


@pytest.mark.parametrize(
    "path",
    [
        "/x/../y",
        "/x/..",
        "/./x",
        "/x/.",
        "//x",
        "/x//y",
        "/x%2e%2E/y",
        "/x%2fy",
        "/x%5Cy",
        "/x%252f",
        "/x%00",
        "/x;y",
        "/x\\y",
        "/x/%c0%ae%C0%AE/y",
        "/x%c1%9cy",
        "/x%e0%80%afy",
        "/x%F0%80%80%afy",
    ],
)
def test_ambiguous_paths_are_refused_under_any_limit(path):
    assert ambiguous(path)
    assert not admits([Scope("*", "/**")], "GET", path)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/x",
        "/x/",
        "/.well-known/x",
        "/a..b",
        "/...",
        "/x%20y",
        "/x?a=//..",
        "/~u/@v",
        "/%C3%A9%e0%a4%85%F0%9F%99%82",
    ],
)
def test_plain_paths_are_not(path):
    assert not ambiguous(path.partition("?")[0])
    assert admits([Scope("*", "/**")], "GET", path)


def test_a_share_without_rules_is_not_decided_here():
    assert not admits([], "GET", "/x")


def test_check_path_names_what_is_wrong():
    with pytest.raises(Invalid, match="the landing page: the path must begin with '/'"):
        check_path("x", what="the landing page")
    check_path("/x?y=%2f", what="a query may hold anything")
