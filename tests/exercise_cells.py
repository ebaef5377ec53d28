"""The cells of solutions and exercises, and running them as a kernel would."""

import contextlib
import importlib.util
import io
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
sys.path.insert(0, str(ROOT / "exercises"))


def code_cells(folder, name):
    notebook = nbformat.read(ROOT / folder / f"{name}.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown(path):
    """All text of a notebook, cell after cell."""
    notebook = nbformat.read(path, as_version=4)
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


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


def wrong_answers(name):
    path = ROOT / "tests" / "wrong_answers" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"wrong_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.WRONG
