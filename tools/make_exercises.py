"""Exercises from solutions, by nbgrader's own generator.

    python tools/make_exercises.py                        writes exercises/NN_name.ipynb for each
    python tools/make_exercises.py FOLDER --seed NUMBER   makes an nbgrader course in a new FOLDER

solutions/NN_name.ipynb is the one source. A course has release/NN_name/NN_name.ipynb to hand out
and gradebook.db, which holds the hidden tests; they draw their numbers from the seed. The solutions
are not in it: nbgrader does not need them to grade, and a submission could run them.
"""

import argparse
import logging
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbgrader.apps import NbGraderAPI
from traitlets.config import PyFileConfigLoader

ROOT = Path(__file__).resolve().parents[1]
# What students hand in, and their grades, belong in no repository.
PRIVATE = "gradebook.db\ngrades.csv\nsubmitted/\nautograded/\nfeedback/\n"


def with_seed(text, seed):
    """A hidden test that draws its numbers from this seed."""
    return re.sub(r"^seed = 0\b", f"seed = {seed}", text, flags=re.MULTILINE)


def layout(course, names, seed=0):
    """Write the named solutions to source/NAME/NAME.ipynb below `course`, with this seed."""
    course.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "tools" / "nbgrader_config.py", course)
    (course / ".gitignore").write_text(PRIVATE)
    for name in names:
        notebook = nbformat.read(ROOT / "solutions" / f"{name}.ipynb", as_version=4)
        for cell in notebook.cells:
            if "### BEGIN HIDDEN TESTS" in cell.source:
                cell.source = with_seed(cell.source, seed)
        (course / "source" / name).mkdir(parents=True)
        nbformat.write(notebook, course / "source" / name / f"{name}.ipynb")


def nbgrader(course):
    """nbgrader's interface to the course in this folder."""
    # nbgrader calls its neighbor `alembic` by name; it must be found without an active venv.
    beside = str(Path(sys.executable).parent)
    if beside not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = beside + os.pathsep + os.environ["PATH"]
    config = PyFileConfigLoader("nbgrader_config.py", path=str(course)).load_config()
    config.CourseDirectory.root = str(course)
    config.CourseDirectory.db_url = f"sqlite:///{course / 'gradebook.db'}"
    api = NbGraderAPI(config=config)
    api.log.setLevel(logging.ERROR)
    return api


def release(course, name):
    """Let nbgrader make release/NAME/NAME.ipynb: no solutions, no hidden tests, no outputs."""
    result = nbgrader(course).generate_assignment(name, force=True, create=True)
    if not result["success"]:
        raise SystemExit(f"nbgrader could not generate {name}:\n{result['log']}\n{result['error']}")
    path = course / "release" / name / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    first = next(i for i, cell in enumerate(cells) if cell.metadata.get("nbgrader"))
    for cell in cells[first:]:  # "Run All" goes on past a mistake
        cell.metadata["tags"] = ["raises-exception"]
    nbformat.write(notebook, path)
    return path


def make_course(course, names, seed):
    """An nbgrader course in a new folder."""
    layout(course, names, seed)
    for name in names:
        release(course, name)
    shutil.rmtree(course / "source")


def exercise_texts(names):
    """{name: text of the exercise notebook}, the same bytes each time."""
    with tempfile.TemporaryDirectory() as folder:
        layout(Path(folder), names)
        texts = {}
        for name in names:
            notebook = nbformat.read(release(Path(folder), name), as_version=4)
            notebook.metadata["language_info"] = {"name": "python"}
            texts[name] = nbformat.writes(notebook) + "\n"
        return texts


def solution_names():
    return sorted(path.stem for path in (ROOT / "solutions").glob("[0-9]*.ipynb"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", help="make an nbgrader course in this new folder")
    parser.add_argument("--seed", type=int, help="hidden tests draw their numbers from it")
    options = parser.parse_args()
    names = solution_names()
    if options.folder:
        course = Path(options.folder).resolve()
        if course.exists() and any(course.iterdir()):
            raise SystemExit(f"{course} is not empty; name a new folder for the course.")
        if options.seed is None:
            raise SystemExit("Choose a number that your students do not know: --seed NUMBER")
        make_course(course, names, options.seed)
        print(f"{course}: an nbgrader course with the assignments {', '.join(names)}.")
        return
    for name, text in exercise_texts(names).items():
        path = ROOT / "exercises" / f"{name}.ipynb"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            beside = path.with_suffix(".new")
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, path)
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
