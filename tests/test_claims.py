"""The claims of the notes: complete, the same in both languages, and each measured somewhere."""

import json
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from exercise_cells import sections

from minipeft.claims import VERDICTS, ClaimsTable, anchor, claims_table, load_claims

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
ROWS = load_claims()
TEXTS = ("claim", "truth", "measured")
KEYS = {"number", "verdict", "notebook", "section"} | {
    f"{t}_{x}" for t in TEXTS for x in ("en", "zh")
}
EACH = pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["number"]))


def test_all_35_claims_are_there_once_and_in_order():
    assert [row["number"] for row in ROWS] == list(range(1, 36))
    assert len({row["claim_en"] for row in ROWS}) == len({row["claim_zh"] for row in ROWS}) == 35


@EACH
def test_a_row_is_complete(row):
    assert row.keys() == KEYS and row["verdict"] in VERDICTS
    for text in TEXTS:
        assert row[f"{text}_en"].strip() and re.search("[\u4e00-\u9fff]", row[f"{text}_zh"])
        assert not re.search("[\u4e00-\u9fff]", row[f"{text}_en"])
    assert re.search(r"\d", row["measured_en"]), "no number shows it"
    assert not re.search(
        r"claims? \d", " ".join(row[k] for k in KEYS - {"number", "section"}), re.I
    )


@EACH
def test_both_languages_have_the_same_numbers(row):
    numbers = lambda text: sorted(re.findall(r"\d+(?:[.,]\d+)*", text))  # noqa: E731
    for text in TEXTS:
        assert numbers(row[f"{text}_en"]) == numbers(row[f"{text}_zh"]), text


@EACH
def test_chinese_and_latin_text_are_separated(row):
    for text in TEXTS:
        touching = re.findall(
            "[\u4e00-\u9fff][A-Za-z0-9]|[A-Za-z0-9%][\u4e00-\u9fff]", row[f"{text}_zh"]
        )
        assert not touching


@EACH
def test_a_claim_points_to_a_section_that_exists(row):
    assert (NOTEBOOKS / row["notebook"]).is_file(), f"no notebook {row['notebook']}"
    found = sections(NOTEBOOKS / row["notebook"])
    assert row["section"] in found, f"{row['notebook']} has no {row['section']!r}, but {found}"
    assert found.count(row["section"]) == 1, "the link would lead to the first of several"


def test_the_search_knows_both_languages_and_no_case():
    assert len(claims_table().rows) == len(claims_table(search="  ").rows) == 35
    lower, upper = claims_table(search="lora"), claims_table("zh", search="LORA")
    assert [r["number"] for r in lower.rows] == [r["number"] for r in upper.rows] != []
    chinese, english = claims_table(search="填充"), claims_table(search="PADDING")
    assert {1, 2} <= {row["number"] for row in chinese.rows} & {
        row["number"] for row in english.rows
    }
    both = claims_table(search="lora bfloat16")
    assert 0 < len(both.rows) < len(lower.rows) and 26 in {row["number"] for row in both.rows}
    assert claims_table(search="no such words").rows == []


def test_another_language_is_refused():
    with pytest.raises(ValueError, match="'fr' is neither"):
        claims_table("fr")


class Table(HTMLParser):
    """The ids, links and text of an HTML table; fails at a tag that does not belong there."""

    def __init__(self, html):
        super().__init__()
        self.ids, self.links, self.text, self.open = [], [], "", []
        self.feed(html)
        assert not self.open, "a tag stays open"

    def handle_starttag(self, tag, attrs):
        assert tag in {"table", "thead", "tbody", "tr", "th", "td", "a", "b", "i", "br"}, tag
        if tag != "br":
            self.open.append(tag)
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if "href" in found else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_table_shows_every_claim_and_links_to_its_section(language):
    table = Table(claims_table(language)._repr_html_())
    assert table.ids == ["claims", *(f"claim-{number}" for number in range(1, 36))]
    assert table.links == [f"{row['notebook']}#{anchor(row['section'])}" for row in ROWS]
    for row in ROWS:
        assert all(row[f"{text}_{language}"] in table.text for text in TEXTS)
        assert VERDICTS[row["verdict"]][language == "zh"] in table.text


def test_what_looks_like_html_is_shown_as_text():
    bad = "<script>alert('1')</script> & \"2\""
    row = {**ROWS[0], "claim_en": bad, "truth_en": bad, "measured_en": bad, "section": bad}
    table = Table(ClaimsTable([row])._repr_html_())
    assert table.text.count(bad) == 4


def test_text_alone_shows_every_claim_too():
    lines = repr(claims_table("zh")).splitlines()
    assert len(lines) == 35 and all(r["claim_zh"] in x for r, x in zip(ROWS, lines, strict=True))


def test_notebook_00_shows_the_file_as_it_is():
    notebook = json.loads((NOTEBOOKS / "00_start_here.ipynb").read_text(encoding="utf-8"))
    assert sections(NOTEBOOKS / "00_start_here.ipynb").count("Claims") == 1, (
        "other notebooks link to #Claims"
    )
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    shown = ["".join(output.get("data", {}).get("text/html", "")) for output in outputs]
    assert claims_table()._repr_html_() in shown, "run notebook 00 again"


def test_the_search_box_of_notebook_00_filters_the_table_as_you_type():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    path = NOTEBOOKS / "00_start_here.ipynb"
    (cell,) = (c.source for c in nbformat.read(path, 4).cells if "search.observe" in c.source)
    imports = (
        "import ipywidgets as widgets\nfrom IPython.display import display\n"
        "from minipeft.claims import claims_table"
    )
    typed = 'search.value = "PADDING"\nlanguage.value = "zh"'
    cells = [nbformat.v4.new_code_cell(source) for source in (imports, cell, typed)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=120).execute()
    shown = [output.data["text/html"] for output in cells[1].outputs if "text/html" in output.data]
    assert shown == [claims_table("zh", "padding")._repr_html_()]


def test_anchors_are_those_of_jupyter():
    nbconvert = pytest.importorskip("nbconvert.filters.markdown_mistune")
    for heading in sorted({row["section"] for row in ROWS} | {'What is "A" / B & 50 %?'}):
        html = nbconvert.markdown2html_mistune(f"## {heading}")
        assert f'id="{escape(anchor(heading), quote=False)}"' in html, html


def test_the_file_travels_with_the_package():
    import tomllib

    project = tomllib.loads((NOTEBOOKS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert "claims.jsonl" in project["tool"]["setuptools"]["package-data"]["minipeft.data"]
