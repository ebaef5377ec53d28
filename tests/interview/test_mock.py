"""Mock interviews: what they hold, how they are graded, and the cards they leave behind."""

import datetime
import json
import re

import pytest

from minipeft.interview import repetition
from minipeft.interview.bank import LANGUAGES, LEVELS
from minipeft.interview.coding import ASKED, coding_tasks
from minipeft.interview.mock import mock
from minipeft.interview.values import REPOSITORY


@pytest.fixture(autouse=True)
def cards(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIPEFT_CARDS", str(tmp_path / "cards.json"))
    monkeypatch.setenv("MINIPEFT_PROGRESS", "")
    return tmp_path / "cards.json"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_an_interview_has_its_parts_in_its_time(level, language):
    interview = mock(level, language, minutes=45, seed=1)
    kinds = [part.kind for part in interview.parts]
    assert kinds.count("drill") == 2
    assert all(kinds.count(kind) == 1 for kind in ("code", "bug", "derive"))
    assert kinds.count("question") >= 2
    assert 35 <= sum(part.minutes for part in interview.parts) <= 45
    for seed in range(20):
        half = mock(level, language, minutes=30, seed=seed)
        assert [part.kind for part in half.parts].count("question") >= 1
        assert sum(part.minutes for part in half.parts) <= 30
    assert repr(interview) == repr(mock(level, language, minutes=45, seed=1))
    texts = [interview.ask(i) for i in range(1, len(kinds) + 1)]
    assert len(set(texts)) == len(texts)
    other = mock(level, language, minutes=45, seed=2)
    assert texts != [other.ask(i) for i in range(1, len(other.parts) + 1)]


def test_each_kind_is_graded_right_and_wrong(capsys, cards):
    interview = mock("senior", "en", minutes=60, seed=3)
    place = {part.kind: i for i, part in enumerate(interview.parts, start=1)}
    question, drill, code = place["question"], place["drill"], place["code"]
    everything = list(range(1, len(interview.parts[question - 1].rubric) + 1))
    assert interview.tick(question, everything) == 1 and interview.tick(question, []) == 0
    assert interview.answer(drill, interview.parts[drill - 1].item.answer)
    assert not interview.answer(drill, -1)
    assert interview.code(code, lambda *args: None) is False
    assert "Not yet right:" in capsys.readouterr().out
    report = interview.report()
    assert "| drills | 0.00 / 1 |" in report and "Not graded yet" in report
    (card,) = json.loads(cards.read_text()).items()
    assert card[0] == interview.parts[question - 1].id and card[1]["box"] == 0  # grades count once
    assert interview.reveal(code) == f"`solutions/{interview.parts[code - 1].item.exercise}.ipynb`"
    for call in (lambda: interview.tick(drill, [1]), lambda: interview.answer(question, 1),
                 lambda: interview.code(drill, 1), lambda: interview.tick(question, [99]),
                 lambda: interview.ask(99), lambda: interview.ask(0), lambda: interview.ask(1.0),
                 lambda: interview.tick(question, 1), lambda: interview.code(code)):  # fmt: skip
        with pytest.raises(ValueError, match=r"\w+ .*\."):
            call()


def test_every_coding_task_can_be_set():
    tasks = coding_tasks()
    assert len(tasks) == len(ASKED) >= 12
    for task in tasks:
        assert "YOUR CODE HERE" in task.starter and "SOLUTION" not in task.starter
        space = {}
        exec(f"import math, torch\nfrom torch import nn\n{task.starter}", space)  # noqa: S102
        with pytest.raises(AssertionError, match="nothing is written"):
            task.check(*task.answer_in(space))
        with pytest.raises(NameError, match="defines no"):
            task.answer_in({})


def test_what_cannot_be_drawn_is_refused():
    for arguments, said in (
        (("expert",), "level='expert'"),
        (("senior", "de"), 'neither "en" nor "zh"'),
        (("senior", "en", 5), "minutes=5 is not a whole number from 30 to 180"),
        (("senior", "en", "45"), "minutes='45'"),
    ):
        with pytest.raises(ValueError, match=said):
            mock(*arguments)


def test_cards_wait_longer_after_each_right_answer_and_begin_again_after_a_wrong_one():
    day = datetime.date(2030, 1, 1)
    waits = []
    for right in (True, True, True, False, True):
        repetition.note("11-x", right, day)
        waits.append((datetime.date.fromisoformat(repetition.cards()["11-x"]["due"]) - day).days)
    assert waits == [1, 2, 4, 1, 2]
    assert repetition.due(day) == [] and repetition.due(day + datetime.timedelta(2)) == ["11-x"]


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": {"box": 9, "due": "2030-01-01"}}',
                                  '{"a": {"box": 1, "due": "soon"}}'])  # fmt: skip
def test_a_broken_file_of_cards_is_an_empty_one(cards, text):
    cards.write_text(text)
    assert repetition.cards() == {}
    repetition.note("11-x", True)
    assert list(repetition.cards()) == ["11-x"]


def test_cards_that_are_due_come_first():
    day = datetime.date.today() - datetime.timedelta(9)
    parts = mock("senior", "en", 45, seed=5).parts
    wanted = [part for part in parts if part.kind == "question"][-1]
    repetition.note(wanted.id, False, day)
    (derived,) = [part for part in parts if part.kind == "derive"]
    repetition.note(derived.id, False, day)
    for level in LEVELS:
        ids = [part.id for part in mock(level, "en", 45, seed=6).parts]
        assert ids[0] == wanted.id and derived.id in ids


def test_a_weak_chapter_is_linked_to_its_lesson():
    interview = mock("senior", "en", 45, seed=7)
    for number, part in enumerate(interview.parts, start=1):
        if part.rubric:
            interview.tick(number, [])
    chapters = {part.chapter for part in interview.parts if part.rubric} - {"outside"}
    for link in re.findall(r"\]\((.*?)\)", interview.report()):
        assert (REPOSITORY / "notebooks" / link).is_file()
        chapters.discard(link[:2])
    assert not chapters
