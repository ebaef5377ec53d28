"""A mock interview: questions graded by rubric, drills, one coding task, one silent bug.

    interview = mock("senior", "en", minutes=30, seed=1)
    interview                      # the parts, with their minutes
    interview.ask(1); interview.reveal(1); interview.tick(1, [1, 3])
    interview.code(4, my_function) # the coding task
    interview.answer(7, 12.5)      # a drill
    interview.report()

`show` of minipeft.interview.widgets does the same with buttons and a countdown.
Free text is never graded: you tick the points of the rubric that you named.
"""

import random
from dataclasses import dataclass, field
from typing import Any

from minipeft.interview import repetition
from minipeft.interview.bank import LANGUAGES, LEVELS, filled_in, raw_bank
from minipeft.interview.bugs import load_bugs
from minipeft.interview.coding import coding_tasks
from minipeft.interview.drills import WHITEBOARD, draw
from minipeft.interview.values import REPOSITORY
from minipeft.refusals import require, shown

DRILL_MINUTES = 3
HEADINGS = {
    "en": {"question": "Question", "drill": "Drill", "code": "Live coding", "bug": "Find the bug",
           "derive": "Derive"},
    "zh": {"question": "问答", "drill": "计算", "code": "编程", "bug": "找错", "derive": "推导"},
}  # fmt: skip
MINUTES = {"en": "min", "zh": "分钟"}
CHAPTERS = {"en": {}, "zh": {"drills": "计算", "outside": "课程之外"}}  # all others are numbers
REPORT = {
    "en": ("Chapter", "Points", "Read again", "Not graded yet: {}. Cards due: {}.", ", "),
    "zh": ("章节", "得分", "复习", "未评分：{}。到期卡片：{}。", "、"),
}
BUG_RUBRIC = {
    "en": ["Found the line", "Said what it does and why nothing raises", "Gave the fix"],
    "zh": ["找到了出错的那一行", "说清楚它做了什么、为什么不报错", "给出了正确的写法"],
}


@dataclass
class Part:
    """One part of a mock interview. kind: "question", "derive", "drill", "code" or "bug"."""

    kind: str
    id: str
    chapter: str
    minutes: int
    text: str
    solution: str
    rubric: list[str]
    item: Any
    share: float | None = None  # of its points, once it is graded
    noted: bool = False  # whether its card has been moved


@dataclass
class Mock:
    """A mock interview under way; parts are counted from 1."""

    level: str
    language: str
    minutes: int
    parts: list[Part] = field(default_factory=list)

    def __repr__(self) -> str:
        names, unit = HEADINGS[self.language], MINUTES[self.language]
        lines = [f"{i:2}. {names[part.kind]} ({part.minutes} {unit})"
                 for i, part in enumerate(self.parts, start=1)]  # fmt: skip
        return "\n".join([*lines, f"    {sum(part.minutes for part in self.parts)} {unit}"])

    def ask(self, number: int) -> str:
        """The text of a part, in Markdown. Raises ValueError for a part that does not exist."""
        return self._part(number).text

    def reveal(self, number: int) -> str:
        """The answer of a part and its rubric, in Markdown. Raises ValueError as `ask` does."""
        part = self._part(number)
        points = "\n".join(f"{i}. {point}" for i, point in enumerate(part.rubric, start=1))
        return f"{part.solution}\n\n{points}".strip()

    def tick(self, number: int, points: list[int]) -> float:
        """Grade a part by the points of its rubric that you named, counted from 1.

        Returns their share. Raises ValueError for a part without a rubric and for unknown points.
        """
        part = self._part(number)
        require(part.rubric, f"Part {number} has no rubric; use answer or code for it.")
        known = range(1, len(part.rubric) + 1)
        require(isinstance(points, (list, tuple, set)), "points is a list, as [1, 3] or [].")
        wrong = [point for point in points if point not in known]
        require(
            not wrong, f"The rubric has the points 1 to {len(part.rubric)}, not {shown(wrong)}."
        )
        return self._grade(part, len(set(points)) / len(part.rubric))

    def answer(self, number: int, value: float | str) -> bool:
        """Grade a drill: right within 10 %. Raises ValueError for another part or no number."""
        part = self._part(number)
        require(part.kind == "drill", f"Part {number} is not a drill.")
        return bool(self._grade(part, float(part.item.right(value))))

    def code(self, number: int, *answer: Any) -> bool:
        """Grade a coding task by the check of its exercise, which says what is wrong.

        Raises ValueError for another part.
        """
        part = self._part(number)
        require(part.kind == "code", f"Part {number} is not a coding task.")
        names = part.item.call.partition("(")[2].rstrip(")")
        given = len(answer) == names.count(",") + 1
        require(given, f"Part {number} is graded by code({number}, {names}).")
        try:
            part.item.check(*answer)
        except AssertionError as mistake:
            print(f"Not yet right: {mistake}")
            return bool(self._grade(part, 0.0))
        return bool(self._grade(part, 1.0))

    def chapters(self) -> dict[str, tuple[float, int]]:
        """{chapter: (points, parts)} of what has been graded; each part counts one point."""
        found: dict[str, tuple[float, int]] = {}
        for part in self.parts:
            if part.share is not None:
                points, parts = found.get(part.chapter, (0.0, 0))
                found[part.chapter] = (points + part.share, parts + 1)
        return found

    def report(self) -> str:
        """Points by chapter with links to the lessons, and the cards that are due, in Markdown."""
        lessons = {path.name[:2]: path.name for path in (REPOSITORY / "notebooks").glob("*.ipynb")}
        words, names = REPORT[self.language], CHAPTERS[self.language]
        lines = [f"| {words[0]} | {words[1]} | {words[2]} |", "|---|---|---|"]
        for chapter, (points, parts) in sorted(self.chapters().items()):
            weak = chapter in lessons and points < 0.75 * parts
            again = f"[{chapter}]({lessons[chapter]})" if weak else ""
            name = names.get(chapter, chapter)
            lines.append(f"| {name} | {points:.2f} / {parts} | {again} |")
        waiting = [str(i) for i, part in enumerate(self.parts, start=1) if part.share is None]
        lines += ["", words[3].format(words[4].join(waiting) or "-", len(repetition.due()))]
        return "\n".join(lines)

    def _part(self, number):
        count = len(self.parts)
        known = isinstance(number, int) and 1 <= number <= count
        require(known, f"There are the parts 1 to {count}, not {shown(number)}.")
        return self.parts[number - 1]

    def _grade(self, part, share):
        part.share = share
        if part.kind in ("question", "derive") and not part.noted:  # the first grade counts
            repetition.note(part.id, share >= 0.75)
            part.noted = True
        return share


def mock(level: str = "senior", language: str = "en", minutes: int = 30, seed: int = 0) -> Mock:
    """A mock interview of at most this many minutes.

    One coding task of at most a third of the time, one silent bug, one derivation, two drills, and
    questions for the rest. Cards that are due come first, at any level; the same seed and the same
    due cards draw the same interview. Raises ValueError for an unknown level or language, and for
    minutes that are not a whole number from 30 to 180.
    """
    require(level in LEVELS, f"level={shown(level)} is none of {', '.join(LEVELS)}.")
    require(language in LANGUAGES, f'language={shown(language)} is neither "en" nor "zh".')
    fits = isinstance(minutes, int) and 30 <= minutes <= 180
    require(fits, f"minutes={shown(minutes)} is not a whole number from 30 to 180.")
    rng = random.Random(seed)
    bank = raw_bank()
    easy_enough = LEVELS[: LEVELS.index(level) + 1]
    chosen = Mock(level, language, minutes)
    codable = LEVELS[: LEVELS.index(level) + 2]  # the easiest coding tasks are at senior level
    tasks = [task for task in coding_tasks() if task.level in codable]
    tasks = [task for task in tasks if task.minutes <= min(15, minutes // 3)]
    bugs = [bug for bug in load_bugs(language) if bug["level"] in easy_enough]
    bugs = [bug for bug in bugs if bug["minutes"] <= 4]
    waiting = repetition.due()
    derivations = [row for row in bank if row["kind"] == "derive" and row["minutes"] <= 6]
    derivations = [row for row in derivations if row["id"] in waiting] or [
        row for row in derivations if row["level"] in easy_enough
    ]
    last = [_coding(rng.choice(tasks), language), _bug(rng.choice(bugs), language)]
    last += [_question(rng.choice(derivations), language)]
    kinds = rng.sample(WHITEBOARD, 2)
    last += [_drill(kind, rng.randrange(10**6), language) for kind in kinds]

    rows = [row for row in bank if row["kind"] != "derive"]
    rows = [row for row in rows if row["level"] == level or row["id"] in waiting]
    rng.shuffle(rows)
    rows.sort(key=lambda row: row["id"] not in waiting)
    left = minutes - sum(part.minutes for part in last)
    for row in rows:
        if row["minutes"] <= left:
            chosen.parts.append(_question(row, language))
            left -= row["minutes"]
    chosen.parts += last
    return chosen


def _question(raw, language):
    row = filled_in(raw, language)  # numbers are looked up for what is asked alone
    kind = "derive" if row["kind"] == "derive" else "question"
    solution = f"{row['short']}\n\n{row['answer']}"
    return Part(kind, row["id"], row["chapter"], row["minutes"], row["question"], solution,
                row["rubric"], row)  # fmt: skip


def _drill(kind, seed, language):
    drill = draw(seed, kind)
    return Part("drill", kind, "drills", DRILL_MINUTES, drill.question[language],
                drill.steps[language], [], drill)  # fmt: skip


def _coding(task, language):
    text = f"{task.text[language]}\n\n```python\n{task.starter}\n```"
    solution = f"`solutions/{task.exercise}.ipynb`"
    return Part("code", task.name, task.exercise[:2], task.minutes, text, solution, [], task)


def _bug(bug, language):
    asked = f"{bug['symptom']}\n\n```python\n{bug['program']}\n```"
    changes = (("-", bug["wrong"]), ("+", bug["right"]))
    lines = [f"{sign} {line}" for sign, text in changes for line in text.splitlines()]
    solution = "\n".join(["```diff", *lines, "```", "", bug["explanation"]])
    return Part("bug", bug["id"], bug["chapter"], bug["minutes"], asked, solution,
                BUG_RUBRIC[language], bug)  # fmt: skip
