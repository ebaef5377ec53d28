"""The cells of solutions and exercises, and running them as a kernel would."""

import contextlib
import functools
import importlib.util
import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
sys.path.insert(0, str(ROOT / "exercises"))

from make_exercises import with_seed  # noqa: E402, F401


def code_cells(folder, name):
    notebook = nbformat.read(ROOT / folder / f"{name}.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def task_cells(folder, name):
    """The code cells as far as the last check. What follows uses a real model: see make nbval."""
    cells = code_cells(folder, name)
    return cells[: max(i for i, cell in enumerate(cells) if is_graded(cell)) + 1]


def markdown(path):
    """All text of a notebook, cell after cell."""
    notebook = nbformat.read(path, as_version=4)
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def sections(path):
    """The texts of a notebook's headings, as a browser shows them."""
    plain = re.sub(r"```.*?```", "", markdown(path), flags=re.S)
    found = re.findall(r"^#{1,6} +(.*?) *$", plain, re.M)
    return [re.sub(r"[`*]", "", line) for line in found]


@functools.cache
def tasks(name):
    """The tasks of one exercise, each with its answer, its visible check and its hidden test."""
    cells, found = code_cells("solutions", name), []
    for i, cell in enumerate(cells):
        if is_answer(cell):
            graded = next(each for each in cells[i:] if is_graded(each))
            visible, rest = graded.source.split("### BEGIN HIDDEN TESTS\n")
            hidden, after = rest.split("### END HIDDEN TESTS")
            assert not after.strip(), "nothing follows the hidden tests"
            found.append(SimpleNamespace(
                grade_id=cell.metadata.nbgrader.grade_id, source=cell.source,
                answer=re.sub(r" *### (BEGIN|END) SOLUTION\n?", "", cell.source),
                visible=visible, hidden=hidden, points=graded.metadata.nbgrader.points,
                check=re.search(r"^checks\.(\w+)\(", visible, re.M)[1],
            ))  # fmt: skip
    return found


@functools.cache
def _solved(name):
    return run([cell for cell in task_cells("solutions", name) if not is_graded(cell)])


def solved(name):
    """A namespace in which all tasks of an exercise are solved, and none is checked."""
    return dict(_solved(name))


def is_graded(cell):
    return cell.metadata.get("nbgrader", {}).get("grade", False)


def is_answer(cell):
    return "### BEGIN SOLUTION" in cell.source


def run(cells):
    """Run cells one after another in one namespace. Returns the namespace."""
    space = {}
    for cell in cells:
        exec(compile(cell.source, "<cell>", "exec"), space)  # noqa: S102
    return space


def run_all(sources):
    """Run cells as "Run All" does, past errors: [the error of each cell, or None]."""
    space, errors = {}, []
    for source in sources:
        errors.append(None)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(source, "<cell>", "exec"), space)  # noqa: S102
        except Exception as error:
            errors[-1] = error
    return errors


def unwritten(source):
    """A solution's cell as it is handed out."""
    body = r"( *)### BEGIN SOLUTION.*?### END SOLUTION"
    return re.sub(body, r"\1raise NotImplementedError()", source, flags=re.DOTALL)


def answers(kind, name):
    """Known answers to one exercise, of the kind "wrong" or "right"."""
    path = ROOT / "tests" / f"{kind}_answers" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{kind}_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, kind.upper())


def wrong_answers(name):
    return answers("wrong", name)


def headings(name):
    """{number of a task: its heading, and the numbers of the tasks it builds on}"""
    told = {}
    for line in re.finditer(
        r"^## Task (\d+)\..*$", markdown(ROOT / "solutions" / f"{name}.ipynb"), re.M
    ):
        found = re.search(r"builds on tasks? ([\d, and]+)", line[0])
        needs = {int(number) for number in re.findall(r"\d+", found[1])} if found else set()
        told[int(line[1])] = SimpleNamespace(heading=line[0], builds_on=needs)
    return told
