"""Slides of the lessons: enough of them, nothing told too early, whole without a network."""

import ast
import re
import sys
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from chromium import offline_chromium

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import make_slides  # noqa: E402

LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module", params=LESSONS, ids=lambda path: path.stem)
def deck(request, tmp_path_factory):
    """(notebook, file with its slides, soup) of one lesson."""
    out = tmp_path_factory.mktemp("slides")
    make_slides.write_deck(request.param, out)
    file = out / f"{request.param.stem}.html"
    soup = BeautifulSoup(file.read_text(encoding="utf-8"), "html.parser")
    return nbformat.read(request.param, as_version=4), file, soup


def places(soup, selector):
    """{number of the cell: [(slide, step) of its parts that are, or hold, such an element]}"""
    found = {}
    for number, slide in enumerate(soup.select(".slide")):
        for part in slide.select(".part"):
            if part.select_one(selector):
                place = number, int(part["data-step"])
                found.setdefault(int(part["data-cell"]), []).append(place)
    return found


def asks(cell):
    return cell.cell_type == "markdown" and "**Predict" in cell.source


def test_a_lesson_has_12_to_40_slides(deck):
    slides = deck[2].select(".slide")
    assert 12 <= len(slides) <= 40
    for slide in slides:
        steps = [int(part["data-step"]) for part in slide.select(".part")]
        assert slide.h2.get_text() and steps[0] == 0
        assert all(
            after - before in (0, 1) for before, after in zip(steps, steps[1:], strict=False)
        )


def test_no_set_up_is_shown_and_code_is_short(deck):
    for part in deck[2].select(".part:has(.code)"):
        code = part.get_text().strip("\n")
        assert not re.search(r"^ *(import|from|assert) |set_verbosity|NBVAL|# noqa", code, re.M)
        assert ast.parse(code).body, f"cell {part['data-cell']} is empty"
        length = sum(bool(line.strip()) for line in code.split("\n"))
        assert length <= 18, f"cell {part['data-cell']} has {length} lines: tag it slide-output"


def test_an_answer_comes_after_its_question(deck):
    notebook, _, soup = deck
    questions, code = places(soup, "strong"), places(soup, ".code")
    outputs, checked = places(soup, ".output"), 0
    for number, cell in enumerate(notebook.cells):
        if asks(cell):
            assert "slide" in cell.metadata.get("tags", []), f"cell {number} asks; tag it"
            after = enumerate(notebook.cells[number + 1 :], number + 1)
            answer = next(i for i, cell in after if cell.cell_type == "code")
            asked = questions[number][-1]
            assert all(asked < place for place in code.get(answer, [])), f"cell {answer}"
            assert all(asked < place for place in outputs.get(answer, [])), f"cell {answer}"
            if answer in code and answer in outputs:
                assert max(code[answer]) < min(outputs[answer]), f"cell {answer}"
            checked += answer in outputs
    assert checked


def test_a_deck_loads_nothing_and_its_figures_have_texts(deck):
    _, file, soup = deck
    assert not soup.select("link, iframe, object, embed, video, audio, source, base, a, [onclick]")
    assert [script.attrs for script in soup.select("script")] == [{}]
    assert not re.search(r"url\(|@import", "".join(style.get_text() for style in soup("style")))
    assert "default-src 'none'" in file.read_text(encoding="utf-8")
    for image in soup.select("img"):
        assert image["src"].startswith("data:image/") and len(image["alt"]) > 20


def test_the_tags_are_those_that_are_documented():
    used = set()
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            tags = cell.metadata.get("tags", [])
            assert len(tags) < 2 and (cell.cell_type == "code" or "slide-output" not in tags)
            used |= set(tags)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert used == make_slides.TAGS == set(re.findall(r"^\| `(slide[\w-]*)` \|", text, re.M))


def test_the_index_leads_to_every_deck(tmp_path):
    make_slides.write_all(LESSONS[:1], tmp_path)
    soup = BeautifulSoup((tmp_path / "index.html").read_text(encoding="utf-8"), "html.parser")
    assert [link["href"] for link in soup.select("a")] == ["00_start_here.html"]


def kinds(*cells):
    """[[(kind, step), ...] of every slide] of a notebook with these cells under one heading."""
    cells = [tagged(nbformat.v4.new_markdown_cell("## Here")), *cells]
    deck = make_slides.slides(nbformat.v4.new_notebook(cells=cells), LESSONS[0])
    return [[(kind, step) for kind, step, _, _ in parts] for _, parts in deck]


def tagged(cell, tag="slide"):
    cell.metadata["tags"] = [tag]
    return cell


def text(source):
    return tagged(nbformat.v4.new_markdown_cell(source))


def code(source, printed="", tag="slide"):
    outputs = [nbformat.v4.new_output("stream", text=printed)] if printed else []
    return tagged(nbformat.v4.new_code_cell(source, outputs=outputs), tag)


def test_a_question_waits_for_code_and_code_for_its_output():
    question = text("Known. **Predict.** How many?")
    assert kinds(question, code("print(7)", "7")) == [[("question", 0), ("code", 1), ("output", 2)]]
    assert kinds(question, code("print(7)", "7", "slide-output")) == [
        [("question", 0), ("output", 1)]
    ]
    answered = [("code", 0), ("output", 1)]
    assert kinds(code("print(7)", "7"), question) == [answered, [("question", 0)]]
    assert kinds(code("print(7)", "7"), text("So it is.")) == [[*answered, ("prose", 2)]]
    assert kinds(code("print(7)", "7"), text("Now again:")) == [answered, [("lead", 0)]]
    assert kinds(nbformat.v4.new_code_cell("secret = 7"), text("Then.")) == [[("prose", 0)]]


def test_what_does_not_fit_begins_a_new_slide():
    long = "\n".join(f"print({n})" for n in range(15))
    asked = text("**Predict.** How many?")
    assert kinds(asked, code(long, "7\n" * 9)) == [[("question", 0), ("code", 1)], [("output", 0)]]
    assert kinds(code(long, "7\n" * 2), text("So it is.")) == [[("code", 0), ("output", 1)]]


@pytest.mark.parametrize(
    "long, short",
    [
        ("One et al. 2022 say it. " + "And so on. " * 20, "One et al. 2022 say it."),
        ("**Bold.** Then this. " + "And so on. " * 20, "Bold. Then this."),
        ("**Bold** and more ($x$ too). " + "And so on. " * 20, "Bold and more (x too)."),
        ("[04. Memory](04.ipynb) has it. " + "And so on. " * 20, "04. Memory has it."),
        ("It reads 'Review: ... good'. " + "And so on. " * 20, "It reads 'Review: ... good'."),
        ("[It is said](04.ipynb). **False**: no. " + "And so on. " * 20, "It is said. False: no."),
        ("It works. But not here. " + "And so on. " * 20, "It works. But not here."),
        ("- It is said. It is false. " + "And so on. " * 20, "It is said. It is false."),
        ("Short. It stays.", "Short. It stays."),
        ("**Predict.** This? " + "And so on. " * 20, "Predict. This? " + "And so on. " * 20),
    ],
)
def test_a_long_text_keeps_what_it_says_first(long, short):
    notebook = nbformat.v4.new_notebook(cells=[text(f"## Here\n\n{long}")])
    ((_, ((*_, element),)),) = make_slides.slides(notebook, LESSONS[0])
    assert element.get_text().strip() == short.strip()


def test_code_is_shown_without_what_tells_the_answer():
    source = """# NBVAL_CHECK_OUTPUT
from math import (
    inf,
)

x = [1]  # noqa: E501


for each in x:
    print(each)
    assert each == 1, (
        "seven"
    )
torch.testing.assert_close(x, 1)"""
    assert make_slides.short_code(source) == "x = [1]\n\nfor each in x:\n    print(each)"


@pytest.fixture(scope="module")
def browser():
    with offline_chromium(1280, 720) as driver:
        yield driver


FAULTS = """
const size = (element) => parseFloat(getComputedStyle(element).fontSize);
const own = (element) => [...element.childNodes].some((n) => n.nodeType == 3 && n.data.trim());
return [...document.querySelectorAll(".slide")].flatMap((slide, i) => [
    slide.scrollHeight > 720 && `${i + 1} is ${slide.scrollHeight} px high`,
    ...[...slide.querySelectorAll(".part")].map((part) => part.scrollWidth > part.clientWidth
        && `${i + 1}: a part is ${part.scrollWidth} px wide`),
    ...[...slide.querySelectorAll(":not(math *)")].map((element) => own(element)
        && size(element) < 18 && `${i + 1}: ${size(element)} px: ${element.textContent}`),
]).filter(Boolean)"""


@pytest.mark.browser
def test_no_slide_overflows_and_none_has_small_type(deck, browser):
    browser.get(deck[1].as_uri())
    assert browser.execute_script(FAULTS) == []


@pytest.mark.browser
def test_a_slide_that_overflows_would_be_seen(browser, tmp_path):
    part = f'<div class="part" data-step="0"><pre>{"wide " * 99}</pre><p>{"long " * 999}</p></div>'
    make_slides.write_page(tmp_path / "x.html", "x", f'<section class="slide">{part}</section>')
    browser.get((tmp_path / "x.html").as_uri())
    assert len(browser.execute_script(FAULTS)) == 2


@pytest.mark.browser
def test_keys_and_clicks_show_one_step_after_the_other(browser, tmp_path):
    make_slides.write_deck(ROOT / "notebooks/05_freezing.ipynb", tmp_path)
    soup = BeautifulSoup((tmp_path / "05_freezing.html").read_text("utf-8"), "html.parser")
    slides = soup.select(".slide")
    needed = (".question", ".code", "pre.output")
    asked = next(n for n, slide in enumerate(slides, 1) if all(map(slide.select, needed)))

    def seen():
        return browser.execute_script(
            """return [...document.querySelectorAll(".slide")].flatMap((slide, i) =>
            [[".question", "asks"], [".code", "code"], ["pre.output", "output"]].flatMap((pair) =>
            [...slide.querySelectorAll(pair[0])].filter((e) => getComputedStyle(e).visibility ==
            "visible").map(() => `${i + 1} ${pair[1]}`)))"""
        )

    def press(key):
        browser.execute_script(f"dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}'}}))")

    browser.get((tmp_path / "05_freezing.html").as_uri() + f"#{asked}")
    steps = [f"{asked} asks", f"{asked} code", f"{asked} output"]
    assert seen() == steps[:1]
    press("ArrowRight")
    assert seen() == steps[:2]
    press(" ")
    assert seen() == steps
    press("PageUp")
    assert seen() == steps[:2]
    click = "document.body.dispatchEvent(new MouseEvent('click', {bubbles: true, clientX: %d}))"
    browser.execute_script(click % 900)
    assert seen() == steps
    browser.execute_script(click % 100)
    assert seen() == steps[:2]
    press("Home")
    for _ in range(200):
        press("PageDown")
    assert browser.execute_script("return location.hash") == f"#{len(slides)}"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert len(seen()) == sum(len(soup.select(what)) for what in needed), "all is printed"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
