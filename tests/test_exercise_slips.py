"""What happens to everybody: a forgotten return, an error, an endless loop, a task left out."""

import ast
import json
import signal
import subprocess
import sys

import pytest
from exercise_cells import (
    ROOT,
    code_cells,
    headings,
    is_answer,
    is_graded,
    run,
    run_all,
    solved,
    task_cells,
    tasks,
    unwritten,
)  # fmt: skip

import checks
from checks import Mistake, limits, progress
from make_exercises import solution_names

exercises = pytest.mark.parametrize("name", solution_names())


@exercises
def test_a_missing_task_costs_no_other_unless_its_heading_says_so(name):
    cells, told = task_cells("solutions", name), headings(name)
    sources = [cell.source for cell in cells]
    answers = [i for i, cell in enumerate(cells) if is_answer(cell)]
    graded = [i for i, cell in enumerate(cells) if is_graded(cell)]
    assert len(answers) == len(graded) == len(told)
    for missing, place in enumerate(answers, start=1):
        errors = run_all([*sources[:place], unwritten(sources[place]), *sources[place + 1 :]])
        for task, i in enumerate(graded, start=1):
            if task == missing:
                assert "nothing is written here yet" in str(errors[i])
            elif missing in told[task].builds_on:
                assert errors[i] is None or "Solve that task first" in str(errors[i])
            else:
                assert errors[i] is None, f"task {task} without task {missing}: {errors[i]!r}"


class Slip(ast.NodeTransformer):
    """Changes what a function of the answer does; of a class, its forward."""

    def __init__(self, change):
        self.change = change

    def visit_FunctionDef(self, node):
        return self.change(node) if node.name != "__init__" else node


def slipped(source, change):
    return ast.unparse(ast.fix_missing_locations(Slip(change).visit(ast.parse(source))))


def without_return(node):
    class Drop(ast.NodeTransformer):
        def visit_Return(self, node):
            return ast.Expr(node.value or ast.Constant(None))

        def visit_FunctionDef(self, inner):
            return self.generic_visit(inner) if inner is node else inner

    return Drop().visit(node)


def with_body(text):
    def change(node):
        node.body = ast.parse(text).body
        return node

    return change


def messages(name, change):
    """What each check says to an answer that is right but for one change: {task: message}."""
    said = {}
    for task in tasks(name):
        space = solved(name)
        exec(compile(slipped(task.source, change), "<answer>", "exec"), space)  # noqa: S102
        with pytest.raises(Mistake) as caught:
            exec(task.visible, space)  # noqa: S102
        said[task.check] = str(caught.value)
    return said


@exercises
def test_a_forgotten_return_is_a_sentence(name):
    for task, said in messages(name, without_return).items():
        # An answer may stumble itself over the None of one of its own functions.
        own = "NoneType" in said and "your code raised TypeError" in said and "in line" in said
        assert own or "returned None. Is a `return` missing?" in said, f"{task}: {said}"


@exercises
def test_an_error_in_the_answer_is_a_sentence_with_its_place(name):
    change = with_body("x = 1\nraise KeyError('color')")
    for task, said in messages(name, change).items():
        assert "color" in said, f"{task}: {said}"


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_an_endless_loop_ends(handler, monkeypatch):
    before = signal.signal(signal.SIGINT, handler)
    monkeypatch.setattr(limits, "LIMIT", 0.5)
    monkeypatch.setattr(checks, "LIMIT", 0.5)
    endless = with_body("while True:\n    pass")
    said = messages("04_memory_math", endless)
    assert signal.signal(signal.SIGINT, before) == handler
    assert len(said) == 4
    assert all("running after 0.5 seconds in line" in text for text in said.values()), said


def test_an_interrupt_by_the_learner_stays_one():
    with pytest.raises(KeyboardInterrupt), limits.time_limit():
        raise KeyboardInterrupt


def test_progress_counts_each_task_once(tmp_path, monkeypatch):
    path = tmp_path / "progress.json"
    monkeypatch.setenv("MINIPEFT_PROGRESS", str(path))
    assert progress.overview().count("0 of") == len(solution_names()) == len(progress.tasks())
    run(task_cells("solutions", "04_memory_math"))
    first = path.read_text()
    run(task_cells("solutions", "04_memory_math"))
    assert path.read_text() == first and set(json.loads(first)) == {"04_memory_math"}
    assert "4 of 4  all solved" in progress.overview()
    path.write_text("[]")
    assert "all solved" not in progress.overview()
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    progress.note_solved("04_memory_math", "kept_bytes")
    assert path.read_text() == "[]", "grading writes no progress"
    monkeypatch.delenv("NBGRADER_EXECUTION")
    monkeypatch.setenv("MINIPEFT_PROGRESS", str(tmp_path / "none" / "progress.json"))
    progress.note_solved("04_memory_math", "kept_bytes")  # nowhere to write: no error


def test_progress_is_one_command():
    script = ROOT / "exercises" / "checks" / "progress.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == solution_names()


def test_run_all_goes_on_past_an_open_task():
    for name in solution_names():
        cells = code_cells("exercises", name)
        for cell in cells[next(i for i, c in enumerate(cells) if "nbgrader" in c.metadata) :]:
            assert cell.metadata.tags == ["raises-exception"]
        assert not any("sys.path" in cell.source for cell in cells)


def test_a_package_without_exercises_says_so(tmp_path, monkeypatch):
    from minipeft import exercises as package

    assert package.progress() == progress.overview()
    monkeypatch.setattr(package, "FOLDER", tmp_path)
    for call in (package.progress, lambda: package.load_checks("11_lora")):
        with pytest.raises(ValueError, match="There are no exercises in .* Install minipeft from"):
            call()
