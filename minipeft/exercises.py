"""The checks of the exercises and what a learner has solved, from wherever a notebook runs."""

import sys
from pathlib import Path
from types import SimpleNamespace

from minipeft.refusals import require

FOLDER = Path(__file__).resolve().parents[1] / "exercises"


def load_checks(name: str) -> SimpleNamespace:
    """The checks of one exercise, each a function: load_checks("11_lora").merge(answer).

    Raises ValueError for an unknown name, and where minipeft was installed without its exercises.
    """
    _find_checks()
    from checks import load_checks

    return load_checks(name)


def progress() -> str:
    """A line for each exercise: how many of its tasks you have solved, and which are open.

    Checks note each right answer in exercises/progress.json. Raises ValueError where minipeft was
    installed without its exercises.
    """
    _find_checks()
    from checks.progress import overview

    return overview()


def _find_checks() -> None:
    require(
        (FOLDER / "checks").is_dir(),
        f"There are no exercises in {FOLDER}. Install minipeft from its repository: "
        'pip install -e ".[course]" in the folder of the README.',
    )
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
