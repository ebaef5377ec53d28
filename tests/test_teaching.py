"""The teacher's page names lessons, sections and tasks that exist."""

import re

import pytest
from exercise_cells import ROOT, markdown

TEXT = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
LESSONS = {path.name[:2]: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
PARTS = {part[:2]: part for part in re.split(r"^## ", TEXT, flags=re.M) if part[:2].isdigit()}


def headings(path, pattern):
    return {int(number) for number in re.findall(pattern, markdown(path), re.M)}


def test_every_lesson_has_its_part():
    assert list(PARTS) == list(LESSONS)


@pytest.mark.parametrize("number", sorted(LESSONS))
def test_a_part_is_complete_and_names_what_exists(number):
    part = PARTS[number]
    for item in ("Goals", "45 minutes", "Live", "Misconceptions", "Discuss"):
        assert f"- **{item}.**" in part, f"{number} lacks {item}"
    sections = headings(LESSONS[number], r"^## (\d+)\. ")
    lines = [line for line in part.splitlines() if not line.startswith("- **Exercise")]
    spans = re.findall(r"[Ss]ections? (\d+)(?: to (\d+))?", "\n".join(lines))
    named = {int(n) for span in spans for n in span if n}
    assert named <= sections, f"{number}: there are no sections {sorted(named - sections)}"
    exercise = list((ROOT / "exercises").glob(f"{number}_*.ipynb"))
    assert bool(exercise) == ("- **Exercise.**" in part)
    if exercise:
        line = re.search(r"- \*\*Exercise\.\*\* (.*)", part)[1]
        tasks = headings(exercise[0], r"^## Task (\d+)\.")
        assert {int(n) for n in re.findall(r"\d+", line)} == tasks, f"{number}: {line}"
