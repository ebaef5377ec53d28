"""A learner's first hour: `make lab` serves, and a notebook runs all its cells in JupyterLab."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from chromium import CHROMIUM, DRIVER

ROOT = Path(__file__).resolve().parents[1]


def wait_for(condition, seconds, what):
    """Ask until `condition()` is true; return its value, or fail and say what was waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            value = condition()
        except Exception:  # noqa: BLE001 - a page that is still loading may raise anything
            value = None
        if value:
            return value
        time.sleep(1)
    pytest.fail(f"waited {seconds} s in vain for {what}")


@pytest.fixture
def lab(tmp_path):
    """Start `make lab` on a copy of the course; yield (address of the server, folder it serves)."""
    course = tmp_path / "course"
    unwanted = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "*.egg-info")
    shutil.copytree(ROOT, course, ignore=unwanted)  # JupyterLab saves what it runs
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--no-browser",
        f"--port={port}",
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=letmein",
        "--ServerApp.allow_root=True",
    ]
    log = open(tmp_path / "lab.log", "w")
    server = subprocess.Popen(
        # The environment that runs the tests is set up already: -o tells make to leave it alone.
        ["make", "lab", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/lab.stamp"]
        + [f"LAB_OPTIONS={' '.join(options)}"],
        cwd=course,
        # What this user had open and chose in JupyterLab before is none of this test's business.
        env=os.environ
        | {
            "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
            "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
        },
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(
            lambda: (
                server.poll() is not None
                or urllib.request.urlopen(f"{address}/api/status?token=letmein").status == 200
            ),
            180,
            "the JupyterLab server",
        )
        assert server.poll() is None, (tmp_path / "lab.log").read_text()[-3000:]
        yield address, course
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
        log.close()


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium that asks nothing of any address but the one it is sent to."""
    if not (CHROMIUM and DRIVER):
        if os.environ.get("CI") == "true":
            pytest.fail("CI must have chromium and chromedriver; `make browser` installs them")
        pytest.skip("there is no chromium with chromedriver on this machine")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-quic",
        "--window-size=1400,1800",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def click(browser, text, selector):
    """Click the first visible element of `selector` that reads `text`."""
    from selenium.webdriver.common.by import By

    def found():
        for element in browser.find_elements(By.CSS_SELECTOR, selector):
            if element.text.strip() == text and element.is_displayed():
                element.click()
                return True

    wait_for(found, 60, f"'{text}' in JupyterLab")


@pytest.mark.browser
def test_notebook_01_runs_all_cells_in_jupyterlab(lab, browser, tmp_path):
    address, course = lab
    path = course / "notebooks" / "01_tokens_and_padding.ipynb"
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:  # the outputs of the committed run must not pass for new ones
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    path.write_text(json.dumps(notebook))

    def code_cells():
        cells = json.loads(path.read_text())["cells"]
        return [c for c in cells if c["cell_type"] == "code" and "".join(c["source"]).strip()]

    def kernel_is(state):
        sessions = json.load(urllib.request.urlopen(f"{address}/api/sessions?token=letmein"))
        mine = [one for one in sessions if one["path"] == "notebooks/01_tokens_and_padding.ipynb"]
        return mine and mine[0]["kernel"]["execution_state"] == state

    browser.get(f"{address}/lab/tree/notebooks/01_tokens_and_padding.ipynb?token=letmein")
    wait_for(lambda: kernel_is("idle"), 120, "an idle kernel")
    click(browser, "Run", ".lm-MenuBar-itemLabel")
    click(browser, "Run All Cells", ".lm-Menu-itemLabel")
    wait_for(lambda: kernel_is("busy"), 60, "the first cell to start")

    def finished():
        for _ in range(3):  # between two cells the kernel is idle for a moment, too
            if not kernel_is("idle"):
                return False
            time.sleep(1)
        click(browser, "File", ".lm-MenuBar-itemLabel")
        click(browser, "Save Notebook", ".lm-Menu-itemLabel")
        time.sleep(2)
        failed = any(o["output_type"] == "error" for c in code_cells() for o in c["outputs"])
        return failed or all(cell["execution_count"] for cell in code_cells())

    wait_for(finished, 900, "the notebook to finish")
    browser.save_screenshot(str(tmp_path / "lab.png"))
    outputs = [output for cell in code_cells() for output in cell["outputs"]]
    errors = [f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]
    assert not errors, errors
    assert all(cell["execution_count"] for cell in code_cells()), "a cell was not run"
    assert any("image/png" in output.get("data", {}) for output in outputs)


def type_into(browser, element, text):
    """Set the value of a widget's field, as typing does."""
    script = """
        const [field, text] = arguments, kind = Object.getPrototypeOf(field);
        Object.getOwnPropertyDescriptor(kind, "value").set.call(field, text);
        for (const name of ["input", "change"])
            field.dispatchEvent(new Event(name, {bubbles: true}));
    """
    browser.execute_script(script, element, text)


@pytest.mark.browser
def test_a_mock_interview_is_taken_in_both_languages(lab, browser, tmp_path, monkeypatch):
    """Each part gets a wrong and a right answer; what the widgets say is what the package says."""
    import nbformat
    from exercise_cells import answers
    from selenium.webdriver.common.by import By

    from minipeft.interview.mock import mock
    from minipeft.interview.widgets import WORDS

    monkeypatch.setenv("MINIPEFT_CARDS", str(tmp_path / "cards.json"))
    address, course = lab
    for language in ("en", "zh"):
        source = (
            f"import os\nos.environ['MINIPEFT_CARDS'] = {str(tmp_path / language)!r}\n"
            "from minipeft.interview.mock import mock\n"
            "from minipeft.interview.widgets import show\n"
            f"show(mock('senior', {language!r}, minutes=30, seed=4))"
        )
        kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
        cells = [nbformat.v4.new_code_cell(source)]
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, course / f"mock_{language}.ipynb")
        browser.get(f"{address}/lab/tree/mock_{language}.ipynb?token=letmein")
        wait_for(
            lambda: browser.find_elements(By.CSS_SELECTOR, ".jp-CodeCell"), 120, "the notebook"
        )
        time.sleep(5)
        click(browser, "Run", ".lm-MenuBar-itemLabel")
        click(browser, "Run All Cells", ".lm-Menu-itemLabel")
        words, parts = WORDS[language], mock("senior", language, minutes=30, seed=4).parts

        def find(selector):
            found = browser.find_elements(By.CSS_SELECTOR, f".jp-OutputArea-output {selector}")
            return [each for each in found if each.is_displayed()]

        def press(text, find=find):
            (button,) = [each for each in find("button") if each.text.strip() == text]
            browser.execute_script("arguments[0].click()", button)

        def says(text, find=find):
            wait_for(lambda: any(text in each.text for each in find(".widget-html")), 60, text)

        wait_for(lambda: find("button"), 120, "the interview")
        says(f"1 / {len(parts)}")
        for number, part in enumerate(parts, start=1):
            says(f"{number} / {len(parts)}")
            if part.rubric:
                press(words["reveal"])
                wait_for(lambda: find("input[type=checkbox]"), 60, "the rubric")
                press(words["grade"])
                says("0 %")
                for box in find("input[type=checkbox]"):
                    browser.execute_script("arguments[0].click()", box)
                time.sleep(1)
                press(words["grade"])
                says("100 %")
            elif part.kind == "drill":
                for value, said in ((-1, "wrong"), (part.item.answer, "right")):
                    type_into(browser, find("input[type=text]")[0], str(value))
                    time.sleep(1)
                    press(words["grade"])
                    says(words[said])
            else:
                press(words["check"])
                says("Not yet right")
                known = answers("right", part.item.exercise)
                right = next(source for check, source in known if check == part.item.name)
                type_into(browser, find("textarea")[0], right)
                time.sleep(1)
                press(words["check"])
                says(f"{part.item.name}: right.")
            browser.save_screenshot(str(tmp_path / f"{language}-{number}.png"))
            press(words["next"])
        press(words["report"])
        wait_for(lambda: find("table"), 60, "the report")
        browser.save_screenshot(str(tmp_path / f"{language}-report.png"))
