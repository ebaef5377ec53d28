"""Silent bugs: each program runs and is wrong, and is right with one line replaced."""

import contextlib
import io
import re

import pytest
import torch

from minipeft.interview.bank import LANGUAGES, LEVELS
from minipeft.interview.bugs import load_bugs

BUGS = {language: {bug["id"]: bug for bug in load_bugs(language)} for language in LANGUAGES}
EACH = pytest.mark.parametrize("name", BUGS["en"])
KEYS = {"id", "chapter", "level", "minutes", "program", "symptom", "wrong", "right", "explanation",
        "shows"}  # fmt: skip


def shows(source, expression):
    """Run a program, and evaluate an expression over its variables."""
    space = {}
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(source, "<program>", "exec"), space)  # noqa: S102
    assert printed.getvalue().strip(), "it says something"
    return bool(eval(expression, space))  # noqa: S307


def test_there_are_twenty():
    assert len(BUGS["en"]) >= 20 and BUGS["en"].keys() == BUGS["zh"].keys()
    assert len({bug["chapter"] for bug in BUGS["en"].values()}) >= 8


@EACH
def test_a_bug_is_complete(name):
    bug, chinese = BUGS["en"][name], BUGS["zh"][name]
    assert bug.keys() == KEYS and bug["level"] in LEVELS and 2 <= bug["minutes"] <= 15
    assert bug["id"].startswith(f"{bug['chapter']}-bug-")
    assert bug["program"].count(bug["wrong"]) == 1 and bug["wrong"] != bug["right"]
    assert len(bug["program"].splitlines()) <= 30
    assert max(map(len, bug["program"].splitlines())) <= 100
    for key in ("symptom", "explanation"):
        assert not re.search("[\u4e00-\u9fff]", bug[key])
        assert re.search("[\u4e00-\u9fff]", chinese[key])
    assert "#" not in bug["wrong"], "no comment gives it away"


@EACH
def test_the_program_is_wrong_and_one_line_makes_it_right(name):
    bug = BUGS["en"][name]
    assert not shows(bug["program"], bug["shows"]), "the bug does not show"
    fixed = bug["program"].replace(bug["wrong"], bug["right"])
    assert shows(fixed, bug["shows"]), "the fix does not fix it"
