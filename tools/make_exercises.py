"""Exercises from solutions, by nbgrader's own generator.

    python tools/make_exercises.py             writes exercises/NN_name.ipynb for each solution
    python tools/make_exercises.py FOLDER      lays out an nbgrader course in a new FOLDER

solutions/NN_name.ipynb is the one source. nbgrader wants each assignment in a folder of its own, so
a course for a teacher has source/NN_name/NN_name.ipynb and release/NN_name/NN_name.ipynb; the name
of the assignment is that of the notebook.
"""

import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbgrader.apps import NbGraderAPI
from traitlets.config import PyFileConfigLoader

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """# A course made from minipeft's solutions: see exercises/README.md.
c = get_config()
c.CourseDirectory.course_id = "minipeft"
# nbgrader gives no points to a cell that writes to stderr, so a library's warning would cost some.
c.IgnorePattern.enabled = True
c.IgnorePattern.pattern = "(?s).*"
# A check gives up after 30 seconds by itself, with a sentence; this is for all that is no check.
c.Execute.timeout = 120
"""
# What students hand in, and their grades, belong in no repository.
PRIVATE = "gradebook.db\ngrades.csv\nsubmitted/\nautograded/\nfeedback/\n"


def layout(course, names, solutions=ROOT / "solutions"):
    """Copy the named solutions to source/NAME/NAME.ipynb below `course`."""
    course.mkdir(parents=True, exist_ok=True)
    (course / "nbgrader_config.py").write_text(CONFIG)
    (course / ".gitignore").write_text(PRIVATE)
    for name in names:
        folder = course / "source" / name
        folder.mkdir(parents=True)
        shutil.copy2(solutions / f"{name}.ipynb", folder)


def nbgrader(course):
    """nbgrader's interface to the course in this folder."""
    # nbgrader calls its neighbour `alembic` by name; it must be found without an active venv.
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


def exercise_texts(names, solutions=ROOT / "solutions"):
    """{name: text of the exercise notebook}, the same bytes each time."""
    with tempfile.TemporaryDirectory() as folder:
        layout(Path(folder), names, solutions)
        texts = {}
        for name in names:
            notebook = nbformat.read(release(Path(folder), name), as_version=4)
            notebook.metadata["language_info"] = {"name": "python"}
            texts[name] = nbformat.writes(notebook) + "\n"
        return texts


def solution_names():
    return sorted(path.stem for path in (ROOT / "solutions").glob("[0-9]*.ipynb"))


def main(arguments):
    names = solution_names()
    if arguments:
        course = Path(arguments[0]).resolve()
        if course.exists() and any(course.iterdir()):
            raise SystemExit(f"{course} is not empty; name a new folder for the course.")
        layout(course, names)
        for name in names:
            release(course, name)
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
    main(sys.argv[1:])
