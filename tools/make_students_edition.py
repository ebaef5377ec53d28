"""The course for students: python tools/make_students_edition.py FOLDER

Copies what students need of this repository to a new FOLDER: the lessons, the package, the data and
the exercises, without solutions, hidden tests, known wrong answers and the tools of the authors.
docs/students.md becomes its README. The teacher's edition, with nbgrader, is made by
tools/make_exercises.py.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHOLE = ("notebooks", "minipeft", "data", "exercises", "benchmarks", "docs")
SINGLE = ("LICENSE", "CONTRIBUTING.md", "environment.yml", "pyproject.toml", ".gitignore")
FIXTURES = (
    "tests/fixtures/h100-memory.csv",
    "tests/families.csv",
)  # a notebook and a page need them


def students_files():
    """The files of the repository that belong to the edition, as paths relative to it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        raise SystemExit(f"{ROOT} is not a clone made with git, so its files are not known.")
    files = [Path(name) for name in listed.stdout.split("\0") if name]
    kept, teachers = {*SINGLE, *FIXTURES}, Path("docs/teaching.md")
    files.remove(teachers)
    return [path for path in files if path.parts[0] in WHOLE or path.as_posix() in kept]


def makefile(text):
    """The Makefile with the target `lab`, and what it needs, alone."""
    head, rest = text.split("\n.PHONY", 1)
    head = re.sub(r"# make test .*\n", "", head)
    needed = re.compile(r"lab:|assets:|\$\(VENV\)/(pyvenv|lab)")
    rules = [rule for rule in re.split(r"\n(?=\S)", rest) if needed.match(rule)]
    return "\n\n".join([head.rstrip(), ".PHONY: lab assets", *map(str.rstrip, rules)]) + "\n"


def make(folder):
    """Write the edition into a folder that is new or empty."""
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty; name a new folder for the students' edition.")
    for path in students_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path)
    (folder / "docs" / "students.md").rename(folder / "README.md")
    readme = folder / "exercises" / "README.md"
    text = readme.read_text(encoding="utf-8")
    learners = text[: text.index("## For teachers")]
    learners = learners[: learners.index("`solutions/` has")]
    readme.write_text(learners.rstrip() + "\n", encoding="utf-8")
    (folder / "Makefile").write_text(makefile((ROOT / "Makefile").read_text()), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tools/make_students_edition.py FOLDER")
    make(Path(sys.argv[1]).resolve())
    print(f"{sys.argv[1]}: the students' edition; share this folder, not the repository.")
