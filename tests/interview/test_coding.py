"""Coding tasks: the Chinese texts say what the exercises say in English."""

import json
import re
from collections import Counter

import pytest

from minipeft.interview.bank import FOLDER
from minipeft.interview.coding import coding_tasks

TASKS = coding_tasks()
CODE, FORMULA = r"`[^`]+`", r"\$\$.+?\$\$|\$[^$]+\$"
SIZE = r"\w+(?: \+ \w+)?"
EACH = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def prose(text):
    return re.sub(f"{FORMULA}|{CODE}|<[^>]*>", "", text, flags=re.S)


@EACH
def test_both_languages_have_the_same_code_formulas_shapes_and_numbers(task):
    english, chinese = task.text["en"], task.text["zh"]
    for pattern in (CODE, FORMULA):
        one, other = (Counter(re.findall(pattern, text, re.S)) for text in (english, chinese))
        assert one == other, (one - other, other - one)
    for pattern in (r"\d+(?:\.\d+)?", rf"\({SIZE}(?:, ?(?:{SIZE})?)+\)"):
        one, other = (
            Counter(re.findall(pattern, prose(text), re.A)) for text in (english, chinese)
        )
        assert one == other, (one - other, other - one)


@EACH
def test_a_chinese_text_is_chinese(task):
    text = prose(task.text["zh"])
    assert task.text["zh"].startswith("**") and "思路" in text
    assert not re.search(r"[A-Za-z]+ [A-Za-z]+ [A-Za-z]+ [A-Za-z]+", text)
    assert not re.findall("[\u4e00-\u9fff][A-Za-z0-9]|[A-Za-z0-9%][\u4e00-\u9fff]", text)
    assert not re.search("[\u4e00-\u9fff][,;:?!]|[\u4e00-\u9fff]\\.", text), "full-width marks"


def test_a_text_needs_no_exercise_around_it():
    for task in TASKS:
        assert not re.search(r"`Found`|You have all the parts|\?\.\*\*", task.text["en"])


def test_every_chinese_text_is_used_once():
    with open(FOLDER / "coding" / "tasks_zh.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert all(row.keys() == {"exercise", "name", "title", "text", "hint"} for row in rows)
    for row in rows:
        assert any(row["text"] in task.text["zh"] for task in TASKS), row["name"]
    assert len({(row["exercise"], row["name"]) for row in rows}) == len(rows)
