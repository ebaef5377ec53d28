"""The bank of interview questions in data/interview, one file for each chapter.

A number that could drift never stands in a text itself. It has a name and a source (values.py), and
the text says `[[name:.1f]]`.
"""

import json
import re

from minipeft.interview.values import REPOSITORY, values_of
from minipeft.refusals import require, shown

FOLDER = REPOSITORY / "data" / "interview"
LANGUAGES = ("en", "zh")
LEVELS = ("junior", "senior", "research")
KINDS = ("concept", "numeric", "debug", "code", "derive", "judge")
PLACE = re.compile(r"\[\[(\w+)(?::([^\]]*))?\]\]")


def load_bank(
    language: str = "en", chapter: str = "", level: str = "", kind: str = "", search: str = ""
) -> list[dict]:
    """Questions in one language, with their numbers filled in: a list of dicts.

    Keys: id, chapter, level, kind, minutes, question, short (the answer in thirty seconds), answer,
    rubric (a list), follow_ups (ids), wrong (the usual wrong answer), why_wrong, evidence, status,
    limits, and values ({name: number}).
    chapter ("04"), level, kind and search (words that must all occur) choose among them.
    Raises ValueError for a language, chapter, level or kind that does not exist.
    """
    require(language in LANGUAGES, f'language={shown(language)} is neither "en" nor "zh".')
    for name, value, known in (("level", level, LEVELS), ("kind", kind, KINDS)):
        require(not value or value in known, f"{name}={shown(value)} is none of {shown(known)}.")
    rows = raw_bank()
    chapters = sorted({row["chapter"] for row in rows})
    require(chapter in ("", *chapters), f"chapter={shown(chapter)} is none of {shown(chapters)}.")
    require(isinstance(search, str), f"search={shown(search)} is not text.")
    words = search.casefold().split()
    found = []
    for row in rows:
        text = f"{row['question'][language]} {row['answer'][language]}".casefold()
        if (
            chapter in ("", row["chapter"])
            and level in ("", row["level"])
            and kind in ("", row["kind"])
            and all(word in text for word in words)
        ):
            found.append(filled_in(row, language))
    return found


def raw_bank() -> list[dict]:
    """All questions as they stand in the files, both languages, numbers by name."""
    require(FOLDER.is_dir(), f"There is no interview bank in {FOLDER}; use the repository.")
    rows = []
    for path in sorted(FOLDER.glob("*.jsonl")):
        with open(path, encoding="utf-8") as file:
            rows += [json.loads(line) for line in file]
    return rows


def filled_in(row: dict, language: str) -> dict:
    """A question in one language, every `[[name:format]]` replaced by its number."""
    values = values_of(row["values"])

    def fill(text):
        return PLACE.sub(lambda place: format(values[place[1]], place[2] or "g"), text)

    shown_row = {}
    for key, value in row.items():
        if isinstance(value, dict) and value.keys() == set(LANGUAGES):
            value = value[language]
            value = [fill(each) for each in value] if isinstance(value, list) else fill(value)
        shown_row[key] = value
    return shown_row | {"values": values}
