"""Checks that a learner runs after each task: they name the mistake and keep the solution."""

import functools
import importlib.util
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace


class Mistake(AssertionError):
    """An answer is wrong, and the message says how. Jupyter shows the message alone."""

    def _render_traceback_(self):
        return [f"Not yet right: {self}"]


def _reporting(name, check):
    @functools.wraps(check)
    def checked(*answer):
        try:
            check(*answer)
        except NotImplementedError as error:
            raise Mistake(f"{name}: nothing is written here yet.") from error
        print(f"{name}: right.")

    return checked


def load_checks(name):
    """The checks of one exercise, as attributes: load_checks("11_lora").lora_forward(answer).

    Every public function of checks/<name>.py is a check. It raises Mistake, or says "right".
    """
    path = Path(__file__).with_name(f"{name}.py")
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("[0-9]*.py"))
        raise ValueError(f"There are no checks {name!r}; there are {', '.join(known)}.")
    folder = str(path.parent.parent)
    if folder not in sys.path:  # the files of checks say `from checks import Mistake`
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(f"checks_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return SimpleNamespace(
        **{
            key: _reporting(key, value)
            for key, value in vars(module).items()
            if inspect.isfunction(value)
            and value.__module__ == module.__name__
            and not key.startswith("_")
        }
    )
