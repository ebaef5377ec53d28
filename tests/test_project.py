"""The project's files agree with each other, and with the rules that the project gives itself."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALL = (ROOT / "docs/install.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_blocks(text):
    return "\n".join(re.findall(r"```[a-z]*\n(.*?)```", text, re.S))


def test_ci_runs_exactly_the_readmes_test_command():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    commands = [
        line for line in lines if line and not line.startswith(("#", "set ", "cd ", "export"))
    ]
    assert commands == ["make test"]
    assert "make test" in code_blocks(README).splitlines()
    assert "make lab" in code_blocks(README).splitlines()


def test_conda_pip_and_make_install_the_same_project():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PYPROJECT["project"]["name"]
    (pip_lines,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert pip_lines == ["-e .[test]"], "conda must install what pyproject.toml lists, and no more"
    (python,) = [d for d in environment["dependencies"] if str(d).startswith("python=")]
    minimum = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    as_tuple = lambda version: tuple(map(int, version.split(".")))  # noqa: E731
    assert as_tuple(python.removeprefix("python=")) >= as_tuple(minimum)
    assert f"Python {minimum}" in README
    assert "conda env create -f environment.yml" in code_blocks(INSTALL)
    makefile = (ROOT / "Makefile").read_text()
    for line in ('pip install -e ".[course]"', "python -m minipeft.assets", "jupyter lab"):
        assert line in code_blocks(INSTALL), f"the lines for Windows lack: {line}"
        assert line in makefile
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert set(re.findall(r"-e \"?\.\[(\w+)\]", makefile + README + INSTALL)) <= set(extras)


def test_every_make_target_that_the_readme_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M))
    assert {"lab", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.M), f"the README names make {target}"


@pytest.mark.parametrize("page", ["README.md", "docs/install.md", "docs/package.md"])
def test_every_link_of_a_page_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8")):
        if "://" not in link:
            assert ((ROOT / page).parent / link).exists(), (
                f"{page} links to {link}, which is not there"
            )


def test_every_path_that_contributing_names_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = [name for name in re.findall(r"`([\w./]+)`", text) if "/" in name and "N" not in name]
    assert len(paths) > 15
    for name in paths:
        places = (ROOT / name, ROOT / "minipeft" / name)
        assert any(p.exists() for p in places), f"CONTRIBUTING names {name}, which is not there"


def test_the_map_table_lists_each_notebook_with_its_files():
    rows = dict(re.findall(r"^\| (\d\d) \|(.*)$", README, re.M))
    assert sorted(rows) == [path.name[:2] for path in NOTEBOOKS]
    for path in NOTEBOOKS:
        row = rows[path.name[:2]]
        assert f"notebooks/{path.name}" in row
        solution = ROOT / "solutions" / path.name
        assert solution.exists() == (f"exercises/{path.name}" in row)
        assert solution.exists() == (ROOT / "exercises" / path.name).exists()
        if solution.exists():
            assert (ROOT / "exercises/checks" / f"{path.stem}.py").exists()
            assert (ROOT / "tests/wrong_answers" / f"{path.stem}.py").exists()


def tracked_files():
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("this is not a git checkout, so there is no list of its files")
    return [ROOT / line for line in git.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_pickle_no_remote_code_no_home_folder():
    unsafe = re.compile(
        r"import pickle|pickle\.load|torch\.load\(|trust_remote_code\s*=\s*True|"
        + r"/home/\w+/|/ro"
        + r"ot/|/Users/\w+/"
    )
    for path in tracked_files():
        if path.suffix in {".py", ".ipynb", ".md", ".toml", ".yml", ".json"}:
            found = unsafe.search(path.read_text(encoding="utf-8"))
            if path != Path(__file__):
                assert not found, f"{path.relative_to(ROOT)}: {found.group()}"


def test_an_installation_has_every_folder_of_the_package():
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "minipeft").rglob("__init__.py")
    }
    assert listed == folders | {"minipeft.data"}
