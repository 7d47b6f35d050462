"""What people read."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from guestpass.cli.output import Output, count, fields, plain, table, when
from guestpass.errors import ShareNotFound


def test_a_table_is_aligned():
    assert (
        table(("id", "name"), [("s1", "A longer name"), ("s22", "")]) == "ID   NAME\ns1   A longer name\ns22"
    )


def test_fields_leave_out_what_is_empty():
    assert fields([("Name", "x"), ("Message", ""), ("Expires", None), ("Live", 0)]) == "Name  x\nLive  0"


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "a\nb", "a\u202eb", "a\x9bb"])
def test_names_cannot_drive_the_terminal(text):
    assert all(c.isprintable() for c in plain(text))


def test_quotes_emoji_and_commas_stay():
    assert plain('"Näme", 🎈') == '"Näme", 🎈'


@pytest.mark.parametrize(
    ("delta", "says"),
    [
        (timedelta(days=7), "in 7 days"),
        (timedelta(hours=12), "in 12 hours"),
        (timedelta(days=-1, minutes=-1), "1 day ago"),
        (timedelta(minutes=-5, seconds=-30), "5 minutes ago"),
        (timedelta(0), "now"),
    ],
)
def test_times(delta, says):
    assert when((datetime.now(UTC) + delta).isoformat()).endswith(f"({says})")


def test_times_that_are_none():
    assert when(None) == "never"
    assert when("not a time") == "not a time"


def test_counts():
    assert [count(n, "stream") for n in (0, 1, 2)] == ["0 streams", "1 stream", "2 streams"]


def test_an_error_for_people_and_for_scripts(capsys):
    error = ShareNotFound("there is no share x", hint="See `guestpass share list`.")
    Output(json=False).error(error)
    assert capsys.readouterr() == ("", "guestpass: there is no share x\n  See `guestpass share list`.\n")
    Output(json=True).error(error)
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == {
        "error": {
            "code": "share_not_found",
            "message": "there is no share x",
            "hint": "See `guestpass share list`.",
        }
    }


def test_a_result_is_one_or_the_other(capsys):
    Output(json=False).result({"a": "ü"}, "one", "two")
    assert capsys.readouterr().out == "one\ntwo\n"
    Output(json=True).result({"a": "ü"}, "one", "two")
    assert json.loads(capsys.readouterr().out) == {"a": "ü"}
    Output(json=True).say("on the way")
    assert capsys.readouterr().out == ""
