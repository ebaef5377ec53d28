"""The interview bank: complete, the same in both languages, and every number has a source."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from exercise_cells import sections

from minipeft.interview.bank import (
    FOLDER,
    KINDS,
    LANGUAGES,
    LEVELS,
    PLACE,
    filled_in,
    load_bank,
    raw_bank,
)  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]
ROWS = raw_bank()
IDS = {row["id"] for row in ROWS}
TEXTS = ("question", "short", "answer", "wrong", "why_wrong", "limits")
KEYS = {
    "id", "chapter", "level", "kind", "minutes", "frequency", *TEXTS, "rubric", "follow_ups",
    "values", "evidence", "status",
}  # fmt: skip
EACH = pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
CHAPTERS = {path.name[:2] for path in (ROOT / "notebooks").glob("*.ipynb")} | {"outside"}


def both(row, language):
    """All texts of a question in one language, as a list, numbers still by name."""
    return [row[key][language] for key in TEXTS] + row["rubric"][language]


@EACH
def test_a_question_is_complete(row):
    assert row.keys() == KEYS
    assert row["id"].startswith(f"{row['chapter']}-") and row["chapter"] in CHAPTERS
    assert row["level"] in LEVELS and row["kind"] in KINDS and 1 <= row["minutes"] <= 20
    assert row["frequency"] in ("***", "**", "*", "o")
    assert row["status"] in ("measured", "arithmetic", "literature")
    for language in LANGUAGES:
        assert all(text.strip() for text in both(row, language)), language
        assert 3 <= len(row["rubric"][language]) <= 5
    assert len(row["rubric"]["en"]) == len(row["rubric"]["zh"])
    assert set(row["follow_ups"]) <= IDS - {row["id"]}
    assert len(row["short"]["en"].split()) <= 75, "thirty seconds"
    assert len(row["short"]["zh"]) <= 170, "thirty seconds"


@EACH
def test_english_is_english_and_chinese_is_chinese(row):
    for english, chinese in zip(both(row, "en"), both(row, "zh"), strict=True):
        assert not re.search("[\u4e00-\u9fff]", english)
        assert re.search("[\u4e00-\u9fff]", chinese)
        prose = re.sub(r"`[^`]*`|\$[^$]*\$|\[\[[^\]]*\]\]", "", chinese)
        touching = re.findall("[\u4e00-\u9fff][A-Za-z0-9]|[A-Za-z0-9%][\u4e00-\u9fff]", prose)
        assert not touching, touching
        assert not re.search("[\u4e00-\u9fff][,;:?!]|[\u4e00-\u9fff]\\.", prose), "full-width marks"


@EACH
def test_a_number_that_could_drift_has_a_source(row):
    used = set()
    for language in LANGUAGES:
        given = row["question"][language]
        for text in both(row, language):
            used |= {place[1] for place in PLACE.finditer(text)}
            rest = PLACE.sub("", text)
            rest = re.sub(r"`[^`]*`|\$[^$]*\$|arXiv:? ?[\d.]+", "", rest)
            for number in re.findall(r"(?<![A-Za-z\d.,-])(?:\d+[.,]\d+|\d{3,}|\d+(?= ?%))", rest):
                year = re.fullmatch(r"(19|20)\d\d", number)
                assert year or number in given, f"{number} stands in the text itself"
    assert used <= set(row["values"])
    if row["status"] == "measured":
        kinds = {key for source in row["values"].values() for key in source}
        assert kinds & {"cell", "file", "estimate"}, "measured, but nothing was"


@EACH
def test_a_number_is_of_one_device(row):
    """Else a second device's rows in the same file would make it ambiguous."""
    for source in row["values"].values():
        if source.get("file", "").startswith("benchmarks/results/"):
            with open(ROOT / source["file"], encoding="utf-8") as file:
                columns = file.readline().strip().split(",")
            assert "device" not in columns or "device" in source["where"], source


@EACH
def test_the_numbers_are_found_and_the_same_in_both_languages(row):
    # A single digit may be a word in one of them: four, 4.
    number = re.compile(r"\d+(?:[.,]\d+)+|\d{2,}")
    numbers = lambda texts: Counter(number.findall(" ".join(texts)))  # noqa: E731
    english, chinese = (filled_in(row, language) for language in LANGUAGES)
    for key in (*TEXTS, "rubric"):
        one, other = ([shown[key]] if key != "rubric" else shown[key]
                      for shown in (english, chinese))  # fmt: skip
        assert numbers(one) == numbers(other), key
        assert "[[" not in " ".join([*one, *other])


@EACH
def test_the_evidence_exists_and_the_usual_wrong_answer_lies_outside_it(row):
    evidence = row["evidence"]
    if row["status"] == "literature":
        assert re.search(r"\(?(19|20)\d\d\)?", evidence["paper"])
        assert evidence.keys() <= {"paper", "value", "tolerance", "wrong_value"}
    else:
        assert evidence.keys() <= {"notebook", "section", "value", "tolerance", "wrong_value"}
        assert sections(ROOT / "notebooks" / evidence["notebook"]).count(evidence["section"]) == 1
    if row["kind"] == "numeric":
        assert {"value", "tolerance"} <= evidence.keys()
    if "value" in evidence:
        values = filled_in(row, "en")["values"]
        right, tolerance = values[evidence["value"]], evidence["tolerance"]
        assert 0 < tolerance <= 0.2, "relative"
        if "wrong_value" in evidence:
            wrong = values[evidence["wrong_value"]]
            assert abs(wrong - right) > tolerance * abs(right), "the wrong answer would pass"


def test_the_bank_is_whole():
    assert len(IDS) == len(ROWS)
    for language in LANGUAGES:
        questions = [row["question"][language] for row in ROWS]
        assert len(set(questions)) == len(questions)
    for path in FOLDER.glob("*.jsonl"):
        with open(path, encoding="utf-8") as file:
            assert {json.loads(line)["chapter"] for line in file} == {path.stem}
    assert {row["chapter"] for row in ROWS} == {path.stem for path in FOLDER.glob("*.jsonl")}


def test_the_bank_can_be_searched():
    assert {row["level"] for row in load_bank(level="junior")} == {"junior"}
    assert {row["kind"] for row in load_bank("zh", kind="numeric")} == {"numeric"}
    assert all(row["chapter"] == "11" for row in load_bank(chapter="11"))
    some = load_bank(search="LoRA")
    assert some and len(some) < len(ROWS)
    with pytest.raises(ValueError, match='neither "en" nor "zh"'):
        load_bank("de")
    for wrong, said in (
        ({"level": "expert"}, "level='expert'"), ({"chapter": "4"}, "chapter='4'"),
        ({"search": 3}, "search=3"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            load_bank(**wrong)
