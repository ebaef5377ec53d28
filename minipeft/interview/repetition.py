"""Spaced repetition with boxes: a right answer moves a card up, a wrong one back to the first.

A new card is due the next day. The file is interview_cards.json in the folder of the course;
MINIPEFT_CARDS names another one.
"""

import contextlib
import datetime
import json
import os
from pathlib import Path

from minipeft.interview.values import REPOSITORY

DAYS = (1, 2, 4, 8, 16, 32)  # until a card in this box is due again


def cards() -> dict[str, dict]:
    """{question id: {"box": 0 to 5, "due": date}}; empty if the file cannot be read."""
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: card for key, card in found.items() if _is_card(card)}


def note(question: str, right: bool, today: datetime.date | None = None) -> None:
    """Put a card into its next box. A file that cannot be written stops nobody."""
    found, today = cards(), today or datetime.date.today()
    box = min(found[question]["box"] + 1, len(DAYS) - 1) if right and question in found else 0
    due = today + datetime.timedelta(days=DAYS[box])
    found[question] = {"box": box, "due": due.isoformat()}
    path = _path()
    if path.exists() and not path.is_file():  # a device, for example, must not be replaced
        return
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    with contextlib.suppress(OSError):
        beside.write_text(json.dumps(found, indent=1), encoding="utf-8")
        os.replace(beside, path)


def due(today: datetime.date | None = None) -> list[str]:
    """The ids of all cards that are due, the longest due first."""
    day = (today or datetime.date.today()).isoformat()
    found = [(card["due"], question) for question, card in cards().items() if card["due"] <= day]
    return [question for _, question in sorted(found)]


def _is_card(card):
    if not isinstance(card, dict) or card.get("box") not in range(len(DAYS)):
        return False
    try:
        return bool(datetime.date.fromisoformat(card.get("due")))
    except (TypeError, ValueError):
        return False


def _path():
    return Path(os.environ.get("MINIPEFT_CARDS") or REPOSITORY / "interview_cards.json")
