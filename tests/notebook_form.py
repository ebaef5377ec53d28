"""The form of a notebook, as functions of (notebook, path) that return what is wrong.

Each returns a list of sentences that say which cell to change and how; an empty list is good.
`path` is where the notebook lies, or would lie: it decides what links mean and which method is
taught. test_notebooks.py holds the notebooks to them, and the functions to spoilt notebooks.
"""

import ast
import importlib
import pkgutil
import re
import statistics
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from bs4 import BeautifulSoup

import minipeft.figures

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import make_pages  # noqa: E402

WORDS, LINES, LONGEST, MEDIAN, METHOD_LINES = 2_200, 320, 30, 12, 25
TOGETHER = 7_000
# The chapter's number: the method's name in the diagram, and the module it is compared with.
METHODS = {
    "05": ("freezing", "minipeft.freezing"),
    "06": ("prompt tuning", "minipeft.prompt_tuning"),
    "07": ("P-tuning", "minipeft.p_tuning"),
    "08": ("prefix-tuning", "minipeft.prefix_tuning"),
    "09": ("P-tuning v2", "minipeft.p_tuning_v2"),
    "10": ("adapters", "minipeft.adapters"),
    "11": ("LoRA", "minipeft.lora"),
    "12": ("distillation", "minipeft.distillation"),
}


def core_form(notebook, path):
    """What a lesson in notebooks/ must have."""
    number = path.name[:2]
    said = (
        cell_sizes(notebook) + title_block(notebook) + headings(notebook) + way_on(notebook, path)
    )
    words = sum(len(cell.source.split()) for cell in markdown_cells(notebook))
    if words > WORDS:
        said.append(f"{words} words of markdown; keep to {WORDS}, move the rest to deeper/")
    if code_lines(notebook) > LINES:
        said.append(f"{code_lines(notebook)} lines of code; keep to {LINES}, or move some deeper")
    if number not in METHODS:
        return said + picture(notebook)
    method, module = METHODS[number]
    return said + stack_picture(notebook, method) + own_method(notebook, module)


def deeper_form(notebook, path):
    """What a notebook in notebooks/deeper/ must have."""
    return cell_sizes(notebook) + title_block(notebook) + headings(notebook)


def markdown_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "markdown"]


def code_cells(notebook):
    return [(i, c) for i, c in enumerate(notebook.cells) if c.cell_type == "code"]


def outputs(notebook):
    """(index of the cell, output) for every output."""
    return [(i, output) for i, cell in code_cells(notebook) for output in cell.outputs]


def length(source):
    return sum(bool(line.strip()) for line in source.splitlines())


def code_lines(notebook):
    return sum(length(cell.source) for _, cell in code_cells(notebook))


def cell_sizes(notebook):
    sizes = {i: length(cell.source) for i, cell in code_cells(notebook) if cell.source.strip()}
    if not sizes:
        return ["there is no code"]
    said = [f"cell {i} has {n} lines; split it" for i, n in sizes.items() if n > LONGEST]
    median = statistics.median(sizes.values())
    if median > MEDIAN:
        said.append(f"the median code cell has {median:g} lines; keep to {MEDIAN}")
    return said


def title_block(notebook):
    """The markdown above the first code cell."""
    first = next((i for i, _ in code_cells(notebook)), len(notebook.cells))
    text = "\n".join(c.source for c in notebook.cells[:first] if c.cell_type == "markdown")
    said = []
    if not re.match(r"# \S", text):
        said.append("the first cell does not begin with a title ('# ...')")
    for what, pattern in (
        ("'After this notebook you can'", r"After this notebook you can\b"),
        ("prerequisites ('Needs ...')", r"\b(Needs|Prerequisites?)\b"),
        ("the running time ('... to run')", r"\bto run\b|\b[Rr]unning time\b|\b[Rr]uns in\b"),
    ):
        if not re.search(pattern, text):
            said.append(f"the title block, above the first code, lacks {what}")
    return said


def headings(notebook):
    text = "\n".join(cell.source for cell in markdown_cells(notebook))
    return [
        f"there is no heading '## {name}'"
        for name in ("Summary", "References")
        if not re.search(rf"^#+ (\d+\. )?{name}\b", text, re.M)
    ]


def way_on(notebook, path):
    """Links to this lesson's exercise and to the next lesson, where there are such."""
    links = {to for _, tag, to in targets(notebook, path) if tag == "a"}
    lessons = sorted((ROOT / "notebooks").glob("*.ipynb"))
    after = [lesson for lesson in lessons if lesson.name[:2] > path.name[:2]][:1]
    exercises = list((ROOT / "exercises").glob(f"{path.name[:2]}_*.ipynb"))
    return [
        f"there is no link to {to.relative_to(ROOT)}" for to in after + exercises if to not in links
    ]


def calls(code):
    """Every call of a plain or dotted name: (last part of the name, the node)."""
    for node in ast.walk(code):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            yield name, node


def tree(notebook):
    """All code cells as one module; lines of IPython's own, % and !, left out."""
    lines = [line for _, cell in code_cells(notebook) for line in cell.source.splitlines()]
    return ast.parse("\n".join(line for line in lines if line[:1] not in {"%", "!"}))


def diagrams():
    """The functions of minipeft.figures that draw a diagram, not a plot."""
    names = set()
    for part in pkgutil.iter_modules(minipeft.figures.__path__, "minipeft.figures."):
        if part.name.rpartition(".")[2] not in {"boxes", "palette", "plots"}:
            module = importlib.import_module(part.name)
            names |= {
                name
                for name, thing in vars(module).items()
                if getattr(thing, "__module__", None) == part.name and name[0] != "_"
            }
    return names


def picture(notebook):
    drawn = diagrams() | {"blank"}  # blank: a diagram drawn in the notebook, from boxes
    images = any("<img " in make_pages.markdown(c.source) for c in markdown_cells(notebook))
    if images or any(name in drawn for name, _ in calls(tree(notebook))):
        return []
    return ["there is no diagram: call stack_diagram() or another of minipeft.figures"]


def stack_picture(notebook, method):
    for name, call in calls(tree(notebook)):
        given = [*call.args[:1], *(k.value for k in call.keywords if k.arg == "highlight")]
        if name == "stack_diagram" and [getattr(g, "value", None) for g in given] == [method]:
            return []
    # A method without a place in the stack has a diagram of its own.
    from minipeft.figures.stack import PLACES

    if method not in PLACES:
        return picture(notebook)
    return [f'there is no stack_diagram(highlight="{method}")']


def own_method(notebook, module):
    """A short class or function of the notebook, compared with what the package's module does."""
    code = tree(notebook)
    package = vars(importlib.import_module(module))
    theirs = {
        alias.asname or alias.name
        for node in ast.walk(code)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minipeft"
        for alias in node.names
        if getattr(package.get(alias.name), "__module__", None) == module
        or f"minipeft.{alias.name}" == module
    }
    from_package = comparisons(code, theirs)
    for own in code.body:
        short = isinstance(own, (ast.FunctionDef, ast.ClassDef))
        if short and own.end_lineno - own.lineno < METHOD_LINES:
            for call, mine in comparisons(code, {own.name}).items():
                sides = [names(argument) for argument in call.args[:2]]
                # A helper that both sides use is not a method, and neither side is the other.
                for one, other in (sides, sides[::-1]):
                    if one & mine and not one & from_package[call]:
                        if other & from_package[call] and not other & mine:
                            return []
    return [
        f"no class or function of at most {METHOD_LINES} lines is written in the notebook and "
        f"compared by torch.equal or assert_close with what {module} does"
    ]


def names(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def comparisons(code, origins):
    """{call of torch.equal and the like: the names that then depend on `origins`}."""
    found, carry = {}, set(origins)

    def keep(target, value):
        pairs = [(target, value)]
        if both_tuples(target, value):  # a, b = mine(x), theirs(x)
            pairs = list(zip(target.elts, value.elts, strict=True))
        changes = [(each, bool(names(v) & carry)) for each, v in pairs]
        for each, depends in changes:
            if depends:
                carry.update(names(each))
            elif not isinstance(each, (ast.Attribute, ast.Subscript)):
                carry.difference_update(names(each))  # a new value under an old name

    def walk(statements):
        for line in statements:
            inner = [getattr(line, part, []) for part in ("body", "orelse", "finalbody")]
            if isinstance(line, (ast.FunctionDef, ast.ClassDef)):
                note(line)
                if line.name not in origins:
                    (carry.add if names(line) & carry else carry.discard)(line.name)
                continue
            if not any(inner):
                note(line)
            if isinstance(line, ast.Assign):
                for target in line.targets:
                    keep(target, line.value)
            elif isinstance(line, ast.For):
                keep(line.target, line.iter)
            elif isinstance(line, ast.With):
                for item in line.items:
                    if item.optional_vars:
                        keep(item.optional_vars, item.context_expr)
            elif isinstance(line, ast.Expr) and isinstance(line.value, ast.Call):
                call = line.value  # wrap(model) changes the model
                if names(call.func) & carry and call.args and isinstance(call.args[0], ast.Name):
                    carry.add(call.args[0].id)
            for part in inner:
                walk(part)

    def note(line):
        for name, call in calls(line):
            if name in {"equal", "allclose", "assert_close"} and len(call.args) > 1:
                found[call] = set(carry)

    walk(code.body)
    return found


def both_tuples(target, value):
    return (
        isinstance(target, ast.Tuple)
        and isinstance(value, ast.Tuple)
        and len(target.elts) == len(value.elts)
    )


def everywhere(notebook, path):
    """What holds for every notebook, in whatever folder."""
    return (
        numbered_claims(notebook)
        + plots_shown(notebook)
        + alternative_texts(notebook)
        + dollars(notebook)
        + links(notebook, path)
    )


def numbered_claims(notebook):
    """A reader knows no numbers of claims: name them in words."""
    said = []
    for i, cell in enumerate(notebook.cells):
        texts = {f"cell {i}": cell.source}
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            shown = [output.get("text", ""), *(data[k] for k in data if k.startswith("text/"))]
            texts[f"the output of cell {i}"] = re.sub(r"<[^>]*>", "", "\n".join(shown))
        for place, text in texts.items():
            if found := re.search(r"\b[Cc]laims?[ \n]*\(?(number |no\. ?|#)?\d+", text):
                said.append(f"{place} says '{found[0]}'; name the claim in words")
    return said


def plots_shown(notebook):
    return [
        f"cell {i} calls plt.show(); use show(figure, alt=...) of minipeft.figures"
        for i, cell in code_cells(notebook)
        if re.search(r"\bplt\.show\(", cell.source)
    ]


def alternative_texts(notebook):
    said = []
    for i, output in outputs(notebook):
        if "image/png" in output.get("data", {}):
            alt = output.metadata.get("image/png", {}).get("alt", "")
            said += [f"the figure of cell {i} {fault}" for fault in faults_of_alt(alt, 20)]
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            for image in BeautifulSoup(rendered(cell.source), "html.parser").select("img"):
                faults = faults_of_alt(image.get("alt", ""), 1)
                said += [f"the image {image.get('src')} in cell {i} {fault}" for fault in faults]
    return said


def faults_of_alt(alt, least):
    if len(alt.strip()) < least:
        yield f"has no alternative text of {least} letters or more; use show(figure, alt=...)"
    elif re.match(r"\W*((an?|the) )?(image|figure|picture) (of|showing)\b", alt, re.I):
        yield f"has an alternative text that begins '{alt[:12]}'; begin with what is shown"


def dollars(notebook):
    """JupyterLab takes what stands between two dollars for a formula, prices too."""
    said = []
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            try:
                soup = BeautifulSoup(make_pages.markdown(cell.source), "html.parser")
            except ValueError as error:
                said.append(f"cell {i}: {error}")
                continue
            for code in soup.select("code, pre, math"):
                code.decompose()
            plain = soup.get_text().count("$") - len(re.findall(r"\\\$", cell.source))
            if plain > 1:
                said.append(f"cell {i} has {plain} dollar signs outside formulas; write \\$")
    return said


def rendered(source):
    try:
        return make_pages.markdown(source)
    except ValueError:  # a formula; `dollars` tells
        return make_pages.markdown(source.replace("$", ""))


def targets(notebook, path):
    """(index of the cell, tag, absolute path) of every relative link and image."""
    for i, tag, url in urls(notebook):
        parts = urlsplit(url)
        if not parts.scheme and not parts.netloc and parts.path:
            yield i, tag, (path.parent / unquote(parts.path)).resolve()


def urls(notebook):
    for i, text in pieces(notebook):
        for element in BeautifulSoup(text, "html.parser").select("a[href], img[src]"):
            yield i, element.name, element.get("href") or element.get("src")


def pieces(notebook):
    """(index of the cell, HTML) of every markdown cell and every output that is HTML."""
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            yield i, rendered(cell.source)
    for i, output in outputs(notebook):
        yield i, output.get("data", {}).get("text/html", "")


def links(notebook, path):
    said = []
    known = {}
    for i, _, url in urls(notebook):
        parts = urlsplit(url)
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if parts.path and not target.exists():
            said.append(f"cell {i} links to {url}, which is not there")
        elif parts.fragment and target.suffix in {".ipynb", ".md"}:
            if target not in known:
                known[target] = sections(notebook if target == path else load(target))
            if unquote(parts.fragment) not in known[target]:
                near = [s for s in known[target] if s.lower() == parts.fragment.lower()]
                hint = f"; it has #{near[0]}" if near else ""
                said.append(f"cell {i} links to {url}: no such section{hint}")
    return said


def sections(there):
    """The names in a notebook as JupyterLab makes them, in a markdown file as GitHub does."""
    if not isinstance(there, str):
        soups = [BeautifulSoup(text, "html.parser") for _, text in pieces(there)]
        return {element["id"] for soup in soups for element in soup.select("[id]")}
    titles = re.findall(r"^#+ (.+)", there, re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}


def load(path):
    if path.suffix == ".ipynb":
        return nbformat.read(path, as_version=4)
    return path.read_text(encoding="utf-8")
