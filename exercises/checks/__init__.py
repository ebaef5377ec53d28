"""Checks that a learner runs after each task: they name the mistake and keep the solution."""

import contextlib
import functools
import importlib.util
import inspect
import linecache
import sysconfig
import traceback
from pathlib import Path
from types import SimpleNamespace

import minipeft
from checks.limits import LIMIT, TooLong, time_limit
from checks.progress import note_solved

OURS = (
    Path(__file__).parent, Path(minipeft.__file__).parent,
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)  # fmt: skip


class Mistake(AssertionError):
    """An answer is wrong, and the message says how. Jupyter shows the message alone."""

    def _render_traceback_(self):
        return [f"Not yet right: {self}"]


def load_checks(name):
    """The checks of one exercise, as attributes: load_checks("11_lora").lora_forward(answer).

    Every public function of checks/<name>.py is a check. It raises Mistake, or says "right".
    """
    path = Path(__file__).with_name(f"{name}.py")
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("[0-9]*.py"))
        raise ValueError(f"There are no checks {name!r}; there are {', '.join(known)}.")
    spec = importlib.util.spec_from_file_location(f"checks_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return SimpleNamespace(
        **{
            key: _reporting(name, key, value)
            for key, value in vars(module).items()
            if inspect.isfunction(value)
            and value.__module__ == module.__name__
            and not key.startswith("_")
        }
    )


def _reporting(exercise, task, check):
    """The check, which says "right" or raises Mistake, whatever the answer does."""

    @functools.wraps(check)
    def checked(*answer):
        returned_none = []
        try:
            with _watched(answer, returned_none) as watched, time_limit():
                check(*watched)
        except (Exception, SystemExit, TooLong) as error:
            said = _unwritten(error, answer[0])
            none = (
                f"{returned_none[0]} returned None. Is a `return` missing?" if returned_none else ""
            )
            if said is None and isinstance(error, Mistake):
                if not none:
                    raise
                raise Mistake(f"{error} {none}") from error
            if said is None:
                said = none if none and not _places(error) else _explained(error)
            raise Mistake(f"{task}: {said}") from error
        print(f"{task}: right.")
        note_solved(exercise, task)

    return checked


@contextlib.contextmanager
def _watched(answers, names):
    """The answers, such that the names of those that return None come into the list `names`."""

    def watch(function):
        @functools.wraps(function)
        def watched(*args, **kwargs):
            value = function(*args, **kwargs)
            if value is None:
                names.append(function.__qualname__)
            return value

        return watched

    methods = [
        (each, each.forward) for each in answers if "forward" in getattr(each, "__dict__", {})
    ]
    for each, forward in methods:
        each.forward = watch(forward)
    try:
        yield [watch(each) if inspect.isfunction(each) else each for each in answers]
    finally:
        for each, forward in methods:
            each.forward = forward


def _unwritten(error, answer):
    """One sentence if the error comes from a task in which nothing is written, else None."""
    while error is not None:
        theirs = _places(error) if isinstance(error, NotImplementedError) else []
        if theirs:
            missing = theirs[-1][0].co_qualname.split(".")[0]
            if missing == getattr(answer, "__name__", missing):
                return "nothing is written here yet."
            return (
                f"this task needs {missing}, where nothing is written yet. Solve that task first."
            )
        error = error.__context__
    return None


def _explained(error):
    """One sentence for an error that the check did not foresee."""
    theirs = _places(error)
    place = ""
    if theirs:
        code, line = theirs[-1]
        text = linecache.getline(code.co_filename, line).strip()
        place = f" in line {line - code.co_firstlineno + 1} of {code.co_qualname}"
        place += f", `{text}`" if text else ""
    if isinstance(error, TooLong):
        return f"still running after {LIMIT} seconds{place}. Does a loop never end?"
    if theirs:
        return f"your code raised {in_one_line(error)}{place}."
    return f"what your code returned does not fit here ({in_one_line(error)})."


def in_one_line(error):
    """An error as Python names it, with the first line of what it says."""
    return f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")


def first_line(error):
    return str(error).strip().partition("\n")[0]


def _places(error):
    """(code, line number) of each frame of the learner's own code that an error went through."""
    found = ((frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__))
    return [(code, line) for code, line in found if not _is_ours(code.co_filename)]


def _is_ours(filename):
    """Whether code is the course's or a library's, and not the learner's."""
    path = Path(filename)
    return filename.startswith("<frozen") or any(path.is_relative_to(folder) for folder in OURS)
