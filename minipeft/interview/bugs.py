"""Silent bugs: short programs that run, print something plausible, and are wrong."""

import json

from minipeft.interview.bank import FOLDER, LANGUAGES
from minipeft.refusals import require, shown


def load_bugs(language: str = "en") -> list[dict]:
    """All bugs in one language: a list of dicts.

    Keys: id, chapter, level, minutes, program (its source), symptom (what somebody noticed), wrong
    (the line at fault), right (what should stand there), explanation, and shows: an expression over
    the program's variables that is true only once the bug is fixed.
    Raises ValueError for a language that does not exist.
    """
    require(language in LANGUAGES, f'language={shown(language)} is neither "en" nor "zh".')
    with open(FOLDER / "bugs" / "silent.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [
        row | {key: row[key][language] for key in ("symptom", "explanation")} for row in rows
    ]  # fmt: skip
