"""Courses graded with nbgrader: every reference solution, made-up students, and a class."""

import csv
import os
import random
import re
import subprocess
import sys
import time
import zipfile

import nbformat
import pytest
from exercise_cells import ROOT, code_cells, headings, tasks, wrong_answers
from make_students_edition import make as make_students_edition
from nbgrader.api import Gradebook

from make_exercises import make_course, nbgrader, solution_names

exercises = pytest.mark.parametrize("name", solution_names())


def handed_in(course, name, changed, without=()):
    """The notebook handed out, with other sources in the cells with these grade ids."""
    notebook = nbformat.read(course / "release" / name / f"{name}.ipynb", as_version=4)
    for cell in list(notebook.cells):
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id")
        cell.source = changed.get(grade_id, cell.source)
        if grade_id in without:
            notebook.cells.remove(cell)
    return notebook


def submit(course, student, name, changed, without=()):
    folder = course / "submitted" / student / name
    folder.mkdir(parents=True)
    nbformat.write(handed_in(course, name, changed, without), folder / f"{name}.ipynb")


def graded(course, name, student):
    """The points of one student after autograding, or None if nbgrader gave up."""
    result = nbgrader(course).autograde(name, student, force=True, create=True)
    if not result["success"]:
        return None
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as book:
        return book.find_submission(name, student).score


def warning_aloud(source):
    """The answer, which writes to stderr where it is defined and where a check calls it."""
    lines = source.splitlines()
    head = next(i for i, line in enumerate(lines) if line.lstrip().startswith("def "))
    end = next(i for i in range(head, len(lines)) if lines[i].rstrip().endswith(":"))
    indent = re.match(r" *", lines[end + 1])[0]
    lines.insert(end + 1, f"{indent}__import__('sys').stderr.write('a warning')")
    return "\n".join([*lines, "", "import warnings", "warnings.warn('old')"])


@exercises
def test_all_points_for_the_reference_solution_and_half_for_half(name, tmp_path):
    make_course(tmp_path, [name], seed=11)
    rows = tasks(name)
    answers = {task.grade_id: task.answer for task in rows}
    first = rows[0].grade_id
    submit(tmp_path, "ada", name, answers | {first: warning_aloud(answers[first])})
    # Cleo solves every second task, and those that it builds on count only if they are solved.
    told = headings(name)
    solved = {i for i in range(1, len(rows) + 1, 2) if not told[i].builds_on - set(range(1, i, 2))}
    submit(tmp_path, "cleo", name, {rows[i - 1].grade_id: rows[i - 1].answer for i in solved})
    assert graded(tmp_path, name, "ada") == sum(task.points for task in rows)
    assert graded(tmp_path, name, "cleo") == sum(rows[i - 1].points for i in solved) > 0


# In 11 only what depends on the exercise: nbgrader's ways with a broken cell are the same in both.
# That no graded cell of any exercise passes with nothing written, test_exercises.py holds.
ODD = {"04_memory_math": None, "11_lora": ("deleted_answer", "deleted_check", "renamed")}


@pytest.mark.parametrize("name", ODD)
def test_odd_submissions_get_the_points_of_their_right_tasks(name, tmp_path):
    make_course(tmp_path, [name], seed=12)
    rows = tasks(name)
    answers = {task.grade_id: task.answer for task in rows}
    points = {task.grade_id: task.points for task in rows}
    total = sum(points.values())
    # The last task on which no other builds is the one that is spoilt.
    told = headings(name)
    number = max(i for i in told if not any(i in each.builds_on for each in told.values()))
    last = rows[number - 1].grade_id
    what = re.search(r"^(?:def|class) (\w+)", answers[last], re.M)[1]
    body = re.sub(r"^(def|class) \w+", rf"\1 my_{what}", answers[last], count=1, flags=re.M)
    endless = f"def {what}(*args, **kwargs):\n    while True:\n        pass"
    odd = {
        "deleted_answer": ({}, [last], total - points[last]),
        "renamed": ({last: body}, [], total - points[last]),
        "syntax": ({last: f"def {what}(:\n    pass"}, [], total - points[last]),
        "endless": ({last: endless}, [], total - points[last]),
        "deleted_check": ({}, [f"test_{last}"], total),
        "prints": ({last: f"{answers[last]}\nprint('x' * 10)"}, [], total),
        "crash": ({last: "import os\nos._exit(1)"}, [], None),
    }
    assert any(
        cell.metadata.get("nbgrader", {}).get("grade_id") == f"test_{last}"
        for cell in code_cells("solutions", name)
    )
    submit(tmp_path, "nothing", name, {})
    assert graded(tmp_path, name, "nothing") == 0
    for student in ODD[name] or odd:
        changed, without, expected = odd[student]
        submit(tmp_path, student, name, answers | changed, without)
        assert graded(tmp_path, name, student) == expected, student


def test_feedback_shows_no_hidden_test(tmp_path):
    name = "11_lora"
    make_course(tmp_path, [name], seed=13)
    rows = tasks(name)
    # An answer that only the hidden test finds wrong: it is right at its first calls.
    (late,) = [task.grade_id for task in rows if task.check == "count"]
    cheat = {task.grade_id: task.answer for task in rows}
    cheat[late] += (
        "\n\n_right, _calls = count, []\n\ndef count(*args, **kwargs):\n"
        "    import inspect\n"
        "    learner = inspect.currentframe().f_back.f_code.co_filename\n"
        "    value = _right(*args, **kwargs)\n"
        "    print('seen', value)\n"
        "    return value if 'checks' in learner else -1\n"
    )
    submit(tmp_path, "ada", name, cheat)
    spoilt = next(row[1] for row in wrong_answers(name) if row[0] == rows[0].check)
    wrong = {rows[0].grade_id: spoilt}
    submit(tmp_path, "bob", name, wrong)
    others = [task.points for task in rows if task.grade_id != late]
    assert graded(tmp_path, name, "ada") == sum(others)
    assert graded(tmp_path, name, "bob") == 0
    for student in ("ada", "bob"):
        result = nbgrader(tmp_path).generate_feedback(name, student, force=True)
        assert result["success"], result["log"]
        page = (tmp_path / "feedback" / student / name / f"{name}.html").read_text(encoding="utf-8")
        assert "HIDDEN TESTS" not in page and "seed = 13" not in page
        assert ">seen" not in page and "\nseen" not in page
        said = "A hidden test fails." if student == "ada" else "Not yet right:"
        assert said in page


SEARCH = """
import contextlib, json, pathlib
import minipeft
places = [pathlib.Path.cwd(), pathlib.Path(minipeft.__file__).resolve()]
for folder in {folder for place in places for folder in [place, *place.parents]}:
    for path in [*folder.glob("solutions/11_*.ipynb"), *folder.glob("source/11_*/*.ipynb")]:
        print("found it")
        for cell in json.loads(path.read_text())["cells"]:
            with contextlib.suppress(Exception):
                exec("".join(cell["source"]))
"""


def test_a_submission_that_looks_for_solutions_finds_none(tmp_path, monkeypatch):
    name = "11_lora"
    course, edition = tmp_path / "course", tmp_path / "edition"
    make_course(course, [name], seed=14)
    make_students_edition(edition)
    for student in ("eve", "mallory"):
        submit(course, student, name, {tasks(name)[0].grade_id: SEARCH})
    # On the authors' own checkout it finds them, so the search works.
    assert graded(course, name, "eve") > 0
    monkeypatch.setenv("PYTHONPATH", str(edition))  # what a grading machine should have installed
    assert graded(course, name, "mallory") == 0
    for student, found in (("eve", True), ("mallory", False)):
        path = course / "autograded" / student / name / f"{name}.ipynb"
        cells = nbformat.read(path, as_version=4).cells
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        assert any("found it" in output.get("text", "") for output in outputs) == found


def test_a_course_needs_a_seed_and_an_empty_folder(tmp_path):
    tool = [sys.executable, str(ROOT / "tools" / "make_exercises.py")]
    told = subprocess.run([*tool, str(tmp_path / "new")], capture_output=True, text=True)
    assert told.returncode and "--seed NUMBER" in told.stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "grades.csv").write_text("mine")
    told = subprocess.run([*tool, str(tmp_path / "full"), "--seed", "1"], capture_output=True,
                          text=True)  # fmt: skip
    assert told.returncode and "is not empty" in told.stderr


# CLASS_SIZE=30 makes the class of the README; three students are enough to hold the way.
SIZE = int(os.environ.get("CLASS_SIZE", "3"))


def test_a_class_from_the_platforms_zip_to_the_export(tmp_path):
    name = "11_lora"
    make_course(tmp_path, [name], seed=15)
    rows, told, rng = tasks(name), headings(name), random.Random(15)
    private = (tmp_path / ".gitignore").read_text().split()
    assert {"gradebook.db", "submitted/", "autograded/"} <= set(private)

    expected, archive = {}, tmp_path / "downloaded" / name / "archive"
    archive.mkdir(parents=True)
    with zipfile.ZipFile(archive / "class.zip", "w") as platform:
        for student in range(1001, 1001 + SIZE):
            changed, right = {}, set()
            for number, task in enumerate(rows, start=1):
                spoilt = [source for each, source, _ in wrong_answers(name) if each == task.check]
                how = rng.choice(["right", "right", "wrong", "missing"])
                if how == "right" and told[number].builds_on <= right:
                    changed[task.grade_id] = task.answer
                    right.add(number)
                elif how == "wrong":
                    changed[task.grade_id] = f"{task.answer}\n\n{rng.choice(spoilt)}"
            text = nbformat.writes(handed_in(tmp_path, name, changed))
            moodle = f"Ada Student{student}_{student}_assignsubmission_file_/{name}.ipynb"
            canvas = f"studentada_{student}_77_{name}-1.ipynb"
            platform.writestr(moodle if student % 2 else canvas, text)
            expected[str(student)] = sum(rows[i - 1].points for i in right)
        # The others are graded even if one student's kernel dies and one hands in nothing.
        dies = {rows[0].grade_id: "import os; os._exit(1)"}
        crash = nbformat.writes(handed_in(tmp_path, name, dies))
        platform.writestr(f"A Crash_1000_assignsubmission_file_/{name}.ipynb", crash)
        expected |= {"1000": 0, "2000": 0}
    with Gradebook(f"sqlite:///{tmp_path / 'gradebook.db'}") as book:
        book.add_student("2000")

    minutes = {}
    for step in (
        f"zip_collect {name}", f"autograde {name}", f"generate_feedback {name}", "export",
    ):  # fmt: skip
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "nbgrader", *step.split()], cwd=tmp_path,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == (1 if "autograde" in step else 0), done.stderr  # the dead kernel
        minutes[step.split()[0]] = (time.monotonic() - start) / 60
    with open(tmp_path / "grades.csv", newline="", encoding="utf-8") as file:
        exported = {row["student_id"]: row for row in csv.DictReader(file)}
    assert {student: float(row["score"]) for student, row in exported.items()} == expected
    states = {"1000": "not graded", "2000": "not handed in"}
    assert all(row["state"] == states.get(student, "graded") for student, row in exported.items())
    assert len(list((tmp_path / "feedback").glob(f"*/{name}/{name}.html"))) == SIZE
    print(SIZE, "students:", {step: f"{value:.1f} min" for step, value in minutes.items()})
