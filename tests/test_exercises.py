"""Solutions pass, exercises as handed out fail, each wrong answer is told what is wrong with it."""

import ast
import re

import pytest
from exercise_cells import (
    ROOT,
    code_cells,
    is_answer,
    is_graded,
    solved,
    task_cells,
    tasks,
    wrong_answers,
)  # fmt: skip

import minipeft
from checks import Mistake, load_checks
from make_exercises import exercise_texts, solution_names

NAMES = solution_names()
exercises = pytest.mark.parametrize("name", NAMES)


def test_there_are_exercises():
    numbers = {name[:2] for name in NAMES}
    assert {f"{number:02}" for number in (*range(1, 13), 14)} <= numbers


def test_no_exercise_has_drifted_from_its_solution():
    for name, text in exercise_texts(NAMES).items():
        handed_out = (ROOT / "exercises" / f"{name}.ipynb").read_text(encoding="utf-8")
        assert handed_out == text, f"run `make exercises`: {name} is not what its solution gives"


@exercises
def test_the_exercise_hides_the_solution_and_the_hidden_tests(name):
    handed_out = (ROOT / "exercises" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert "YOUR CODE HERE" in handed_out
    assert "BEGIN SOLUTION" not in handed_out and "HIDDEN TESTS" not in handed_out
    solved = [c for c in code_cells("solutions", name) if is_answer(c)]
    graded = [c for c in code_cells("solutions", name) if is_graded(c)]
    assert len(solved) >= 3 and len(graded) >= 3
    assert all("### BEGIN HIDDEN TESTS" in cell.source for cell in graded)
    assert all(cell.metadata.nbgrader.points > 0 for cell in graded)
    ids = [
        c.metadata.nbgrader.grade_id
        for c in code_cells("solutions", name)
        if "nbgrader" in c.metadata
    ]
    assert len(ids) == len(set(ids))
    assert not any(cell.outputs for cell in code_cells("exercises", name))


@exercises
def test_an_exercise_never_imports_what_it_asks_for(name):
    asked, imported = set(), set()
    for cell in code_cells("solutions", name):
        tree = ast.parse(cell.source)
        if "### BEGIN SOLUTION" in cell.source:
            kinds = (ast.FunctionDef, ast.ClassDef)
            asked |= {node.name for node in tree.body if isinstance(node, kinds)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minipeft"):
                imported |= {alias.name for alias in node.names}
    assert asked and not asked & imported
    # Nor anything else of the module that has the answer, under whatever name.
    modules = {"01": "batching", "02": "batching", "03": "training", "04": "memory"}
    modules["14"] = "distributed"
    module = modules.get(name[:2], name[3:])
    handed_out = "\n".join(cell.source for cell in code_cells("exercises", name))
    assert f"minipeft.{module}" not in handed_out
    origins = {getattr(getattr(minipeft, key, None), "__module__", "") for key in imported}
    assert f"minipeft.{module}" not in origins


@exercises
def test_the_solution_passes_every_check(name):
    checks = load_checks(name)
    space = {}
    used = set()
    for cell in task_cells("solutions", name):
        exec(compile(cell.source, "<cell>", "exec"), space)  # noqa: S102
        if is_graded(cell):
            used |= set(re.findall(r"checks\.(\w+)\(", cell.source))
    assert used == set(vars(checks)), "every check is used by a task, and no other is called"


@exercises
def test_the_exercise_as_handed_out_fails_every_check(name):
    space = {}
    for cell in task_cells("exercises", name):
        try:
            exec(compile(cell.source, "<cell>", "exec"), space)  # noqa: S102
        except AssertionError:
            assert is_graded(cell)
        except NotImplementedError:  # a cell that uses what is not written yet
            assert "raises-exception" in cell.metadata.tags
        else:
            assert not is_graded(cell), f"passes with nothing written: {cell.source}"


WRONG = [(name, i) for name in NAMES for i in range(len(wrong_answers(name)))]


@pytest.mark.parametrize("name,i", WRONG, ids=[f"{name}-{i}" for name, i in WRONG])
def test_a_wrong_answer_gets_its_own_message(name, i):
    rows = wrong_answers(name)
    check, source, fragment = rows[i]
    (task,) = [task for task in tasks(name) if task.check == check]
    space = solved(name)  # the other tasks are solved
    exec(compile(source, "<answer>", "exec"), space)  # noqa: S102
    with pytest.raises(Mistake) as caught:
        exec(task.visible, space)  # noqa: S102
    assert fragment in str(caught.value)
    for j, (other_check, _, other) in enumerate(rows):
        assert j == i or other_check != check or other not in str(caught.value), "shared message"


@exercises
def test_each_check_knows_several_mistakes(name):
    rows = wrong_answers(name)
    assert len(rows) >= 5
    assert {check for check, _, _ in rows} == set(vars(load_checks(name)))
    messages = [(check, fragment) for check, _, fragment in rows]
    assert len(messages) == len(set(messages)), "two mistakes share one message"


def test_a_mistake_is_shown_as_one_sentence():
    shown = Mistake("the scaling is missing")._render_traceback_()
    assert shown == ["Not yet right: the scaling is missing"]
    with pytest.raises(ValueError, match="There are no checks '99_none'"):
        load_checks("99_none")
