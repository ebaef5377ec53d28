"""Every notebook has the form that CONTRIBUTING asks for, and was committed after a clean run."""

import copy
import re

import nbformat
import notebook_form as form
import pytest
from notebook_form import ROOT
from run_notebooks import FOLDERS

CORE = sorted((ROOT / "notebooks").glob("*.ipynb"))
DEEPER = sorted((ROOT / "notebooks/deeper").glob("*.ipynb"))


def named(path):
    return path.relative_to(ROOT / "notebooks").with_suffix("").as_posix()


def faults(path):
    notebook = form.load(path)
    own = form.core_form if path in CORE else form.deeper_form
    return own(notebook, path) + form.everywhere(notebook, path)


def test_the_course_has_its_lessons():
    assert len(CORE) >= 15
    assert [str(ROOT / folder) for folder in FOLDERS] == [
        str(ROOT / "notebooks"),
        str(ROOT / "notebooks/deeper"),
    ]


@pytest.mark.parametrize("path", CORE + DEEPER, ids=named)
def test_a_notebook_has_its_form(path):
    said = faults(path)
    assert not said, "\n".join([f"{path.name}:", *said])


def test_all_notebooks_together_are_short():
    lines = {named(path): form.code_lines(form.load(path)) for path in CORE + DEEPER}
    assert sum(lines.values()) < form.TOGETHER, lines


@pytest.mark.parametrize("path", CORE + DEEPER, ids=named)
def test_a_notebook_is_committed_as_a_clean_run(path):
    notebook = form.load(path)
    code = [cell for _, cell in form.code_cells(notebook) if cell.source.strip()]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for _, output in form.outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text[:200]
        assert "Warning" not in output.get("text", "")


# The list under the decision tree of 13 has its numbers typed in. Each must be what a saved cell
# says: (phrase of the list, notebook, what its cell printed, the one's unit in that of the other).
N = r"([+-]?\d(?:[\d.,]*\d)?)"
LEAVES = [
    (f"with {N} % of the parameters", "12_distillation", rf"15 blocks: .* {N} %", 1),
    (f"it gets {N} % right", "12_distillation", rf"\nfirst 15: 15 trained, \S+: {N} %", 1),
    (rf"right \({N} to", "12_distillation", rf"\nfirst 15: 15 trained, \S+: \S+ % \({N} to", 1),
    (f"its teacher {N} with", "12_distillation", f"teacher {N} %; right of 600", 1),
    (rf"a task is {N} MB \(LoRA", "deeper/13_cost", rf"LoRA +\S+ +\S+ +{N}\n", 1e6),
    (rf"or {N} MB \(prefix", "deeper/13_cost", rf"prefix-tuning +\S+ +\S+ +{N}\n", 1e6),
    (rf"\(prefix\), not {N}", "deeper/13_cost", rf"all blocks +106,202,880 +\S+ +{N}", 1e6),
    (f"against LoRA's {N}", "13_choosing_a_method", f"LoRA +460,800 trainable: peak {N} GiB", 1),
    (f"for {N} points", "13_choosing_a_method", rf"LoRA at its best rate: {N} points", 1),
    (rf"\(-1.8 to {N}\)", "13_choosing_a_method", rf"its best rate: \S+ points \(-1.8 to {N}\)", 1),
    (rf"and values \({N} points", "11_lora", rf"all seven +{N} \(", 1),
    (rf"-2.0 to {N}, \[notebook 11", "11_lora", rf"all seven +\S+ \(-2.0 to {N}\)", 1),
]


@pytest.mark.parametrize("said, name, printed, unit", LEAVES)
def test_the_numbers_behind_the_leaves_are_those_of_saved_cells(said, name, printed, unit):
    cells = form.load(ROOT / "notebooks/13_choosing_a_method.ipynb").cells
    (text,) = [cell.source for cell in cells if "The numbers behind the leaves" in cell.source]
    (said,) = re.findall(said, text)
    saved = form.outputs(form.load(ROOT / f"notebooks/{name}.ipynb"))
    output = "\n".join(output.get("text", "") for _, output in saved)
    (value,) = set(re.findall(printed, output))
    value, places = float(value.replace(",", "")) / unit, len(said.partition(".")[2])
    assert f"{value:.{places}f}" == said.lstrip("+")


# The checks themselves: one good notebook, and every way to spoil it.

METHOD = """class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)"""
LINK = "[next](12_distillation.ipynb) [exercise](../exercises/11_lora.ipynb)"
PATH = ROOT / "notebooks/11_lora.ipynb"


def good():
    """A lesson on LoRA that has everything."""
    markdown, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    figure = nbformat.v4.new_output(
        "display_data",
        {"image/png": "iVBORw0KGgo="},
        metadata={"image/png": {"alt": "The loss falls from 2 to 1 in ten steps."}},
    )
    cells = [
        markdown(
            "# 11. LoRA\n\n**After this notebook you can** write it.\n\nNeeds 02 · 5 s to run"
        ),
        code('from minipeft import add_lora, load_base\nstack_diagram(highlight="LoRA")'),
        code(METHOD, outputs=[figure]),
        code("mine = LoRA(load_base())\ntheirs = load_base()\nadd_lora(theirs)"),
        code("assert torch.equal(mine(ids).logits, theirs(ids).logits)"),
        markdown(f"## Summary\n\nIt costs \\$5, `$x`, $W_0$; [above](#11.-LoRA). {LINK}"),
        markdown("## References\n\n[Hu](https://arxiv.org/abs/2106.09685)"),
    ]
    return nbformat.v4.new_notebook(cells=cells)


def said_of(notebook, path=PATH):
    return form.core_form(notebook, path) + form.everywhere(notebook, path)


def replaced(cell, old, new):
    def spoil(notebook):
        assert old in notebook.cells[cell].source
        notebook.cells[cell].source = notebook.cells[cell].source.replace(old, new)

    return spoil


def added(text, cell=5):
    def spoil(notebook):
        notebook.cells[cell].source += text

    return spoil


def alt(text):
    def spoil(notebook):
        notebook.cells[2].outputs[0].metadata["image/png"] = {"alt": text} if text else {}

    return spoil


def printed(text):
    def spoil(notebook):
        notebook.cells[4].outputs.append(nbformat.v4.new_output("stream", text=text))

    return spoil


def table(text):
    def spoil(notebook):
        output = nbformat.v4.new_output("display_data", {"text/html": text})
        notebook.cells[4].outputs.append(output)

    return spoil


def lines(count, cells=1):
    def spoil(notebook):
        for _ in range(cells):
            notebook.cells.append(nbformat.v4.new_code_cell("x = 1\n" * count))

    return spoil


long_method = METHOD + "\n        pass" * 25
BAD = {
    "long cell": (lines(31), "cell 7 has 31 lines; split it"),
    "long cells": (lines(13, 9), "the median code cell has 13 lines"),
    "much code": (lines(1, 321), "lines of code; keep to 320"),
    "many words": (added(" word" * 2200), "words of markdown; keep to 2200"),
    "no title": (replaced(0, "# 11", "11"), "does not begin with a title"),
    "no aim": (replaced(0, "After this notebook", "Then"), "'After this notebook you can'"),
    "no needs": (replaced(0, "Needs", "Read"), "lacks prerequisites"),
    "no time": (replaced(0, "to run", "long"), "lacks the running time"),
    "no summary": (replaced(5, "## Summary", "## End"), "no heading '## Summary'"),
    "no references": (replaced(6, "## References", "References"), "no heading '## References'"),
    "other method": (replaced(1, '"LoRA"', '"adapters"'), 'no stack_diagram(highlight="LoRA")'),
    "no method": (replaced(1, 'highlight="LoRA"', ""), 'no stack_diagram(highlight="LoRA")'),
    "no diagram": (replaced(1, "stack_diagram(", "print("), 'no stack_diagram(highlight="LoRA")'),
    "long method": (replaced(2, METHOD, long_method), "no class or function of at most 25"),
    "not compared": (replaced(4, "torch.equal(", "bool("), "no class or function of at most 25"),
    "compared with itself": (replaced(4, "theirs(", "mine("), "no class or function of at most"),
    "compared with the base": (replaced(3, "add_lora(", "print("), "compared by torch.equal"),
    "helper on both sides": (
        replaced(4, "theirs(ids)", "LoRA(theirs)(ids)"),
        "compared by torch.equal",
    ),
    "value replaced": (
        replaced(4, "assert", "mine = load_base()\nassert"),
        "compared by torch.equal",
    ),
    "method of the package": (replaced(3, "LoRA(", "add_lora("), "compared by torch.equal"),
    "no next": (replaced(5, "12_distillation", "10_adapters"), "no link to notebooks/12_dist"),
    "no exercise": (replaced(5, "../exercises", "../solutions"), "no link to exercises/11_lora"),
    "claim": (added(" Claim 26 is true."), "cell 5 says 'Claim 26'"),
    "claims": (added("\n# see claims (7", 4), "cell 4 says 'claims (7'"),
    "claim printed": (printed("of claim 3: 0.5"), "the output of cell 4 says 'claim 3'"),
    "claim in a table": (table("<b>claim</b> <i>3</i>"), "the output of cell 4 says 'claim 3'"),
    "dead link in a table": (table('<a href="#No">x</a>'), "cell 4 links to #No: no such section"),
    "plt.show": (added("\nplt.show()", 4), "cell 4 calls plt.show()"),
    "no alt": (alt(""), "figure of cell 2 has no alternative text"),
    "short alt": (alt("Loss by step"), "figure of cell 2 has no alternative text"),
    "empty alt": (alt("A figure of the loss by step"), "begins 'A figure of '"),
    "image": (added(" ![](figures/lora_reviews.png)"), "lora_reviews.png in cell 5 has no alt"),
    "dead link": (added(" [x](12_nothing.ipynb)"), "12_nothing.ipynb, which is not there"),
    "dead image": (added(" ![a loss](figures/no.png)"), "figures/no.png, which is not there"),
    "dead section": (added(" [x](#Nowhere)"), "#Nowhere: no such section"),
    "case": (added(" [x](#summary)"), "#summary: no such section; it has #Summary"),
    "dead section there": (added(" [x](12_distillation.ipynb#No)"), "ipynb#No: no such section"),
    "dead section of a text": (added(" [x](../README.md#no)"), "README.md#no: no such section"),
    "prices": (added(" From $5 to $10."), "cell 5 has 2 dollar signs outside formulas"),
    "formula": (added(r" $\nosuch{x}$"), r"cell 5: \nosuch in $\nosuch{x}$ cannot be converted"),
}


def test_a_good_notebook_passes():
    assert said_of(good()) == []
    assert form.deeper_form(good(), ROOT / "notebooks/deeper/11_x.ipynb") == []


@pytest.mark.parametrize("spoil,sentence", BAD.values(), ids=BAD)
def test_a_spoilt_notebook_is_named(spoil, sentence):
    notebook = copy.deepcopy(good())
    spoil(notebook)
    assert sentence in "\n".join(said_of(notebook))


def test_a_comparison_may_use_names_and_tolerances():
    notebook = good()
    notebook.cells[4].source = (
        "with torch.no_grad():\n    a, b = mine(ids).logits, theirs(ids).logits\n"
        "assert torch.allclose(a, b)\na = 0"
    )
    assert said_of(notebook) == []


def test_a_lesson_without_a_method_needs_some_diagram():
    path = ROOT / "notebooks/13_choosing_a_method.ipynb"
    missing = "there is no diagram"
    notebook = good()
    assert missing not in "\n".join(said_of(notebook, path))
    notebook.cells[1].source = "print()"
    assert missing in "\n".join(said_of(notebook, path))
    notebook.cells[5].source += "\n![A stack of blocks](figures/lora_reviews.png)"
    assert missing not in "\n".join(said_of(notebook, path))


def test_a_table_that_is_printed_can_have_sections():
    notebook = good()
    notebook.cells[5].source += " [row](#row-7)"
    assert "#row-7: no such section" in "\n".join(said_of(notebook))
    table('<table><tr id="row-7"></tr></table>')(notebook)
    assert said_of(notebook) == []


def test_a_link_inside_code_is_no_link():
    notebook = good()
    notebook.cells[5].source += "\n\n`[x](nowhere.ipynb)`\n\n```\n[y](nowhere.ipynb)\n```\n"
    assert said_of(notebook) == []
