"""The notebooks as HTML pages: whole without a network, with formulas, readable on a phone."""

import re
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from bs4 import BeautifulSoup
from chromium import offline_chromium

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import make_pages  # noqa: E402
from mathml import mathml  # noqa: E402

LOADED = "script, link, img, iframe, object, embed, video, audio, source, base"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """{path below the folder: (text, soup)} of all pages, and the folder."""
    out = tmp_path_factory.mktemp("pages")
    make_pages.write_all(out)
    texts = {page: page.read_text(encoding="utf-8") for page in sorted(out.rglob("*.html"))}
    return out, {
        page.relative_to(out).as_posix(): (text, BeautifulSoup(text, "html.parser"))
        for page, text in texts.items()
    }


def test_every_notebook_has_its_page_and_stands_in_the_index(pages):
    _, every = pages
    index = [link["href"] for link in every["index.html"][1].select("a")]
    assert index == [str(make_pages.page_of(path)) for path in make_pages.notebooks()]
    assert sorted([*index, "index.html"]) == sorted(every)
    assert "LoRA" in every["index.html"][1].get_text()


def test_a_page_loads_nothing(pages):
    for name, (text, soup) in pages[1].items():
        for element in soup.select(LOADED):
            assert element.name == "img", f"{name}: {element.name}"
            assert element["src"].startswith("data:image/"), f"{name}: {element['src'][:80]}"
        for style in [*soup.select("style"), *soup.select("[style]")]:
            assert not re.search(r"url\(|@import", style.get("style") or style.get_text()), name
        assert not soup.select("[onload], [onclick], [onerror]")
        assert "default-src 'none'" in text or name == "index.html"


def test_every_figure_of_a_page_has_the_text_of_its_notebook(pages):
    texts = 0
    for path in make_pages.notebooks():
        notebook = nbformat.read(path, as_version=4)
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        pngs = [output for output in outputs if "image/png" in output.get("data", {})]
        expected = [output.metadata.get("image/png", {}).get("alt") for output in pngs]
        images = pages[1][str(make_pages.page_of(path))][1].select(".figure img")
        assert len(images) == len(expected)
        for image, text in zip(images, expected, strict=True):
            texts += bool(text)
            assert image["alt"] == text if text else image["alt"], path.name
        for image in pages[1][str(make_pages.page_of(path))][1].select("section img"):
            assert image["alt"].strip(), path.name
    assert texts > 0


def test_no_formula_is_left_as_latex(pages):
    formulas = 0
    for name, (_, soup) in pages[1].items():
        formulas += len(soup.select("math"))
        for code in soup.select("code, pre, .code, math"):
            code.decompose()
        assert not re.search(r"\$[^$\n]*\$|\\(frac|text|begin)\b", soup.get_text()), name
    assert formulas > 100


def test_links_between_pages_lead_to_pages_and_sections(pages):
    out, every = pages
    for name, (_, soup) in every.items():
        for link in soup.select("a[href]"):
            if "://" not in link["href"] and not link["href"].startswith("mailto:"):
                place, _, section = link["href"].partition("#")
                target = (out / name).parent / place if place else out / name
                assert target.resolve().is_file(), f"{name} links to {link['href']}"
                assert target.suffix != ".ipynb", f"{name} links to {link['href']}"
                if section and target.suffix == ".html":
                    key = target.resolve().relative_to(out.resolve()).as_posix()
                    ids = {element["id"] for element in every[key][1].select("[id]")}
                    assert unquote(section) in ids, f"{name} links to {link['href']}"


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A small course in tmp_path; write(*cells) writes a lesson and returns its page's soup."""
    for folder in ("notebooks/deeper", "exercises", "minipeft"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(make_pages, "ROOT", tmp_path)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    (tmp_path / "minipeft/lora.py").write_text("B = A = None\n")
    other = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Other *one*")])
    for name in ("notebooks/02_other", "exercises/01_lesson", "notebooks/deeper/01_more"):
        nbformat.write(other, tmp_path / f"{name}.ipynb")

    def write(*cells):
        cells = [nbformat.v4.new_markdown_cell("# 01. A `lesson`"), *cells]
        path = tmp_path / "notebooks/01_lesson.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        make_pages.write_all(tmp_path / "out")
        page = (tmp_path / "out/notebooks/01_lesson.html").read_text(encoding="utf-8")
        return BeautifulSoup(page, "html.parser")

    return write


def text_cell(source):
    return nbformat.v4.new_markdown_cell(source)


def code_cell(data, metadata=None):
    output = nbformat.v4.new_output("display_data", data, metadata=metadata or {})
    return nbformat.v4.new_code_cell("x = '$5 to $6'", outputs=[output])


def test_links_become_links_to_pages(course, tmp_path):
    soup = course(
        text_cell(
            "[a](02_other.ipynb#Other-one) [b](deeper/01_more.ipynb)"
            " [c](../exercises/01_lesson.ipynb) [d](../minipeft/lora.py) [e](../minipeft)"
            " [f](https://example.org/x.ipynb) [g](#x)"
        )
    )
    links = {link.get_text(): link["href"] for link in soup.select("section a")}
    assert links == {
        "a": "02_other.html#Other-one",
        "b": "deeper/01_more.html",
        "c": "../exercises/01_lesson.html",
        "d": "../minipeft/lora.py",
        "f": "https://example.org/x.ipynb",
        "g": "#x",
    }
    assert (tmp_path / "out/minipeft/lora.py").read_text() == "B = A = None\n"
    nav = {link.get_text(): link["href"] for link in soup.select("nav a")}
    assert nav == {"Contents": "../index.html", "Next": "02_other.html"}
    assert soup.title.get_text() == "01. A lesson"
    other = BeautifulSoup((tmp_path / "out/notebooks/02_other.html").read_text(), "html.parser")
    assert other.h1["id"] == "Other-one"


def test_a_link_to_nowhere_is_refused(course):
    with pytest.raises(ValueError, match="written\nnotebooks/01_lesson.ipynb links to 03_no"):
        course(text_cell("[a](03_no.ipynb)"))


def test_the_text_of_a_figure_comes_from_its_metadata(course, tmp_path):
    (tmp_path / "notebooks/p.png").write_bytes(b"\x89PNG")
    alt = 'Loss of "full" < 2 & falling'
    soup = course(
        code_cell({"image/png": "iVBORw0KGgo=\n"}, {"image/png": {"alt": alt, "width": 7}}),
        text_cell("![A picture](p.png)"),
    )
    figure, picture = soup.select("img")
    assert (figure["alt"], figure["width"]) == (alt, "7")
    assert figure["src"] == "data:image/png;base64,iVBORw0KGgo="
    assert picture["alt"] == "A picture"
    assert picture["src"] == "data:image/png;base64,iVBORw=="


def test_dollars_in_code_and_prices_stay(course):
    soup = course(text_cell("From $5 to $10, `$x$ and $$y$$`, \\$3; $a<b$ and\n\n$$\nz\n$$"))
    section = soup.select("section")[1]
    assert [math["display"] for math in section.select("math")] == ["inline", "block"]
    assert "From $5 to $10, $x$ and $$y$$, $3; a<b and" in section.get_text()


def test_a_page_has_no_dead_controls(course):
    widget = {make_pages.WIDGET: {"model_id": "1"}}
    soup = course(
        code_cell({**widget, "text/plain": "Filter:   0%|      | 0/2"}),
        code_cell({**widget, "text/plain": "interactive(children=())"}),
    )
    assert [output.get_text() for output in soup.select(".output")] == [
        "(Run the notebook to use this control.)"
    ]


def test_a_formula_that_cannot_be_set_names_its_notebook(course):
    with pytest.raises(ValueError, match=r"\nnotebooks/01_lesson.ipynb: \\nosuch in "):
        course(text_cell(r"$\nosuch{x}$"))


@pytest.mark.parametrize(
    "latex",
    [r"\nosuch{x}", r"\frac{", "a & b", " ", r"\begin{gather} a \end{gather}", r"\text{\alpha}"],
)
def test_what_would_be_printed_raw_is_refused(latex):
    with pytest.raises(ValueError):
        mathml(latex)


def test_formulas_as_browsers_set_them():
    aligned = BeautifulSoup(
        mathml(r"\begin{aligned} a &= b \\[2pt] \Delta W &= BA \end{aligned}", display=True),
        "html.parser",
    )
    assert [[cell["class"] for cell in row.select("mtd")] for row in aligned.select("mtr")] == [
        [["right"], ["left"]]
    ] * 2
    assert aligned.find("mi", string="Δ")["mathvariant"] == "normal"
    assert "<mtext>softmax</mtext>" in mathml(r"\mathrm{softmax}(x)")
    assert ">ln</mo>" in mathml(r"\ln 2") and "&lt;" in mathml("a < b")
    norm = BeautifulSoup(mathml(r"\lVert x \rVert"), "html.parser")
    assert [bar["stretchy"] for bar in norm.select("mo")] == ["false", "false"]
    assert "<munderover>" in mathml(r"\sum_{i=1}^{n} x_i", display=True)


@pytest.fixture(scope="module")
def browser():
    with offline_chromium(390, 844, mobile=True) as driver:
        yield driver


@pytest.mark.browser
def test_no_page_scrolls_sideways_on_a_phone(pages, browser):
    out, every = pages
    for name in every:
        browser.get((out / name).as_uri())
        width = browser.execute_script("return document.documentElement.scrollWidth")
        assert width <= 390, f"{name} is {width} px wide"


@pytest.mark.browser
def test_a_page_that_is_too_wide_would_be_seen(browser, tmp_path):
    page = tmp_path / "wide.html"
    page.write_text('<meta name="viewport" content="width=device-width"><pre>' + "wide " * 99)
    browser.get(page.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") > 390


@pytest.mark.browser
def test_a_formula_is_set_by_the_browser(browser, course, tmp_path):
    course(text_cell(r"$$\frac{a}{b}$$ and $$\begin{aligned} a &= 1 \\ bbb &= 2 \end{aligned}$$"))
    browser.get((tmp_path / "out/notebooks/01_lesson.html").as_uri())
    edges = """const edge = (what, side) => [...document.querySelectorAll(what)].map(
        element => element.getBoundingClientRect()[side]);
    return [edge("mfrac > *", "top"), edge("mtd.right", "right"),
            edge("mtd.right > :last-child", "right")]"""
    fraction, columns, ends = browser.execute_script(edges)
    assert fraction[0] < fraction[1], "a above b"
    assert ends == pytest.approx(columns, abs=1), "both left sides end at the equals sign"
