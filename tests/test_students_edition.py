"""The students' edition has what students need and nothing that answers an exercise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from exercise_cells import code_cells, is_answer
from make_students_edition import make

from make_exercises import solution_names


@pytest.fixture(scope="module")
def edition(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students") / "minipeft"
    make(folder)
    return folder


def test_nothing_in_it_answers_an_exercise(edition):
    files = [path for path in edition.rglob("*") if path.is_file()]
    assert not any("solutions" in path.parts or "wrong_answers" in path.parts for path in files)
    texts = {path: path.read_text(encoding="utf-8") for path in files
             if path.suffix in {".ipynb", ".py", ".md", ".csv"}}  # fmt: skip
    for path, text in texts.items():
        assert "BEGIN SOLUTION" not in text and "HIDDEN TESTS" not in text, path
    written = "\n".join(texts.values())
    for name in solution_names():
        for cell in code_cells("solutions", name):
            if is_answer(cell):
                body = re.search(r"### BEGIN SOLUTION\n(.*?)### END", cell.source, re.DOTALL)[1]
                assert len(body) < 200 or body not in written, f"{name} is answered"


def test_every_link_of_a_page_leads_somewhere(edition):
    pages = [*edition.glob("*.md"), *edition.glob("docs/*.md"), *edition.glob("exercises/*.md")]
    assert len(pages) > 3
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]+)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"
    for path in edition.glob("notebooks/**/*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
        for link in re.findall(r"\]\(([^)#:]+\.ipynb)", text):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_an_exercise_finds_its_checks_in_it(edition):
    code = "from minipeft.exercises import load_checks, progress; load_checks('11_lora')"
    code += "; print(progress(), __import__('checks').__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=edition / "exercises",
        env=os.environ | {"PYTHONPATH": str(edition)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "11_lora" in done.stdout and str(edition / "exercises" / "checks") in done.stdout


def test_lab_is_all_its_makefile_does(edition):
    done = subprocess.run(
        ["make", "-n", "lab"], cwd=edition, capture_output=True, text=True, check=True
    )
    assert "jupyter lab" in done.stdout and "minipeft.assets" in done.stdout
    assert not re.search(r"^(test|exercises|nbval)", (edition / "Makefile").read_text(), re.M)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is not empty"):
        make(tmp_path)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["mine.txt"]
