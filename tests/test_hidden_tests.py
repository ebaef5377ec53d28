"""What "right." promises: the points. And what a task tells about itself."""

import ast
import contextlib
import io
import re

import pytest
from exercise_cells import (
    ROOT,
    answers,
    code_cells,
    headings,
    is_answer,
    is_graded,
    markdown,
    run,
    solved,
    tasks,
    with_seed,
)  # fmt: skip
from mutants import mutants

import checks
from checks import limits
from make_exercises import solution_names

exercises = pytest.mark.parametrize("name", solution_names())
HEADING = re.compile(
    r"## Task (\d+)\. .+ \((\d+) points?, (\d+) minutes, difficulty ([123])"
    r"(, builds on tasks? \d+(, \d+)*( and \d+)?)?\)"
)


def error(source, space):
    """What running a test in this namespace raises, or None."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), limits.time_limit():
            exec(compile(source, "<test>", "exec"), dict(space))  # noqa: S102
    except (Exception, SystemExit, limits.TooLong) as raised:
        return raised
    return None


@exercises
def test_a_task_says_its_points_minutes_and_difficulty_and_has_a_hint(name):
    text = markdown(ROOT / "solutions" / f"{name}.ipynb")
    parts = [part for part in re.split(r"^(?=## )", text, flags=re.M) if part[:7] == "## Task"]
    told = [HEADING.fullmatch(part.partition("\n")[0]) for part in parts]
    assert all(told), [part.partition("\n")[0] for part in parts]
    found = tasks(name)
    assert [int(each[1]) for each in told] == list(range(1, len(found) + 1))
    assert [int(each[2]) for each in told] == [task.points for task in found]
    assert all(int(each[3]) <= 25 for each in told), "a longer task is split"
    points, minutes = (sum(int(each[i]) for each in told) for i in (2, 3))
    assert f"{len(told)} tasks, {points} points, about {minutes} minutes." in text
    for part in parts:
        folded = re.findall(r"<details><summary>Hint</summary>\n\n(.+?)\n\n</details>", part, re.S)
        assert len(folded) == 1 and len(folded[0].split()) >= 8, part[:60]


@exercises
def test_an_exercise_ends_on_a_real_model(name):
    end = code_cells("solutions", name)
    last = max(i for i, cell in enumerate(end) if is_graded(cell))
    asked = {
        node.name
        for cell in end if is_answer(cell) for node in ast.parse(cell.source).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }  # fmt: skip
    source = "\n".join(cell.source for cell in end[last + 1 :])
    names = {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)}
    assert asked & names, "what the learner wrote is used"
    assert "load_base(" in source and "tiny-" not in source
    assert "\n## On a real model" in "\n" + markdown(ROOT / "solutions" / f"{name}.ipynb")


@exercises
def test_a_hidden_test_stands_alone_and_draws_from_the_teachers_seed(name):
    cells, told = code_cells("solutions", name), headings(name)
    before = cells[: next(i for i, cell in enumerate(cells) if is_answer(cell))]
    found = tasks(name)
    for number, task in enumerate(found, start=1):
        assert task.hidden.startswith("seed = 0  # another in each teacher's course\n")
        nodes = [node for node in ast.walk(ast.parse(task.hidden)) if isinstance(node, ast.Name)]
        used = any(node.id == "seed" and isinstance(node.ctx, ast.Load) for node in nodes)
        assert used, f"{task.check}: the seed is not used"
        needed = [found[i - 1].source for i in sorted(told[number].builds_on)]
        space = run(before)
        for source in [*needed, task.source]:
            exec(compile(source, "<answer>", "exec"), space)  # noqa: S102
        for seed in range(3):
            raised = error(with_seed(task.hidden, seed), space)
            assert raised is None, f"{task.check}, seed {seed}: {raised!r}"


@exercises
def test_an_answer_written_another_way_is_right(name):
    found = {task.check: task for task in tasks(name)}
    rows = answers("right", name)
    assert {check for check, _ in rows} == set(found), "one for each task"
    for i, (check, source) in enumerate(rows):
        space = solved(name)
        exec(compile(source, "<answer>", "exec"), space)  # noqa: S102
        assert error(found[check].visible, space) is None, f"{check}, {i}"
        for seed in range(2):
            raised = error(with_seed(found[check].hidden, seed), space)
            assert raised is None, f"{check}, {i}, seed {seed}: {raised!r}"


@exercises
def test_what_fails_a_hidden_test_fails_the_visible_check(name, monkeypatch):
    """Over every small change to the reference answer. (Known wrong answers fail the check by
    tests/test_exercises.py.)"""
    monkeypatch.setattr(limits, "LIMIT", 5)
    monkeypatch.setattr(checks, "LIMIT", 5)
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")  # writes no progress
    tried, promises = 0, []
    for task in tasks(name):
        for told, source in mutants(task.source):
            space = solved(name)
            try:
                exec(compile(source, "<mutant>", "exec"), space)  # noqa: S102
            except Exception:  # noqa: S112
                continue  # the learner sees this without any check
            tried += 1
            if error(task.visible, space) is None:
                for seed in range(3):
                    if (raised := error(with_seed(task.hidden, seed), space)) is not None:
                        promises.append(f"{task.check}, {told}, seed {seed}: {raised!r}")
                        break
    assert tried > 50
    assert not promises, "\n".join(promises)
