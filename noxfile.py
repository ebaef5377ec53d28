"""Sessions with an environment of their own. `nox -s adapterhub` writes tests/fixtures/adapterhub.

minipeft itself needs none of this: the fixtures are kept in the repository.
"""

from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent


@nox.session
def adapterhub(session):
    """What AdapterHub's library computes, for tests/test_adapters.py to compare with."""
    session.install("torch==2.13.0")
    session.install("adapters==1.3.0", "transformers==4.57.6")
    session.run(
        "python", "tests/scripts/adapterhub_fixture.py", *session.posargs or
        ["tests/fixtures/adapterhub"], env={"OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
    )  # fmt: skip


@nox.session
def core(session):
    """The package without an extra: imports, trains, saves, loads, reads the instructions."""
    session.install("torch==2.13.0")
    session.install(".")
    with session.chdir(session.create_tmp()):  # so that the repository is not on the path
        session.run("python", str(ROOT / "tests/scripts/core_install.py"),
                    env={"PYTHONPATH": "", "MINIPEFT_CACHE": ""})  # fmt: skip
