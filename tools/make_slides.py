"""Slides of the lessons for a browser without a network: python tools/make_slides.py [FILE ...].

Writes build/slides/NN_name.html, one file for each notebook of notebooks/ (or each one named),
and an index.html. Two cell tags say what is shown; a cell without one is not:

slide         the cell. A heading begins a new slide. A long paragraph is cut to one sentence and a
              long item to two, unless they ask to predict. Code comes without imports and
              assertions, its output a key press later.
slide-output  only the output of the cell.
"""

import ast
import html
import math
import re
import sys
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup, NavigableString

from make_pages import ROOT, PageExporter, settle, title, without_widgets

TAGS = {"slide", "slide-output"}
OUT = ROOT / "build/slides"
ROOM = 580  # pixels of a slide below its heading
SILENT = re.compile(r"(import|from|assert) |torch\.testing\.assert_close\(")
SENTENCE = re.compile(r"(?<!\bal)(?<!\.)[.?!][\")]?(?!\s+(But|So|Yet)\b)(\s|$)")
NOT_SHOWN = ("Prerequisites", "Running time", "References", "Exercise and next lesson")


def short_code(source):
    """The code without imports, assertions (they tell the answer) and comments for tools."""
    drop = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and SILENT.match(ast.unparse(node)):
            drop |= set(range(node.lineno, node.end_lineno + 1))
    kept = [line for n, line in enumerate(source.splitlines(), 1) if n not in drop]
    kept = [re.sub(r"\s*# (NBVAL_\w+|noqa\b.*|fmt: \w+)$", "", line) for line in kept]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")


def shorten(block, sentences):
    """Leave a long text this many sentences; one that is bold or a link as a whole is extra."""
    nodes = [node for node in block.contents if str(node).strip()]
    for place, node in enumerate(nodes if len(block.get_text()) > 160 else []):
        for end in SENTENCE.finditer(node) if isinstance(node, NavigableString) else ():
            sentences -= place != 1 or bool(node[: end.start()].strip())
            if not sentences:
                node.replace_with(node[: end.end()].rstrip())
                return [rest.extract() for rest in nodes[place + 1 :]]


def height(element):
    """About how many pixels it takes."""
    if element.find("img"):
        return 470  # it takes what is free
    if rows := element.select("tr"):
        return 18 + 48 * len(rows)
    if element.select("math[display=block]"):
        return 100 + 50 * len(element.select("mtr"))
    if element.name == "pre" or element.pre:
        lines = element.get_text().strip("\n").split("\n")
        return 40 + 28.4 * sum(math.ceil((len(line) or 1) / 96) for line in lines)
    blocks = element.select("li") or [element]
    return 20 + sum(8 + 36.5 * math.ceil(len(block.get_text()) / 84) for block in blocks)


def shown(notebook, path):
    """(element, number of its cell) of all that the tags show, in order."""
    cells = []
    for number, cell in enumerate(notebook.cells):
        if tags := TAGS & set(cell.metadata.get("tags", [])):
            if cell.cell_type == "code":
                cell.source = short_code(cell.source) if "slide" in tags else ""
            cells += [nbformat.v4.new_markdown_cell(f'<hr data-cell="{number}">'), cell]
    notebook = nbformat.v4.new_notebook(cells=cells)
    text, _ = PageExporter().from_notebook_node(notebook, {"metadata": {}, "page_title": ""})
    main = BeautifulSoup(text, "html.parser").main
    for link in main.select("a"):
        link.name, link.attrs = "span", {}
    settle(main, path, OUT, set())
    for box in main.select("[tabindex]"):  # nothing scrolls
        del box["tabindex"]
    skip = False
    for element in main.select("main > section > :not(details), main > :not(section)"):
        words = element.get_text().strip()
        if element.name == "hr":
            number = element.get("data-cell")
        elif re.fullmatch(r"h\d", element.name):
            skip = words in NOT_SHOWN
        if not skip and not words.startswith(NOT_SHOWN) and (words or element.find("img")):
            yield element, number


def kind_of(element):
    for kind in {"code", "output"} & set(element.get("class", [])):
        if kind == "output" and max(map(len, element.get_text().split("\n"))) > 104:
            element["class"].append("wide")
        return kind
    if element.find("strong", string=re.compile("^Predict")):
        return "question"
    lead = element.get_text().strip().endswith(":")
    for block in [element] if element.name == "p" else element.select("li"):
        shorten(block.p or block, 1 if element.name == "p" else 2)
    return "lead" if lead else "prose" if element.name == "p" and not element.img else "text"


def slides(notebook, path):
    """[(heading, [(kind, step, number of the cell, element), ...]), ...]"""
    without_widgets(notebook)
    deck, heading, parts, full, step = [], None, [], math.inf, 0
    for element, number in shown(notebook, path):
        if re.fullmatch(r"h\d", element.name):
            heading, parts, full = element, [], math.inf
            continue
        first = heading.name == "h1"
        kind = "text" if first and element.name in ("p", "ul") else kind_of(element)
        size, kinds = height(element), [part[0] for part in parts]
        ran = "code" in kinds or "output" in kinds
        if kind == "prose" and ran and full + size > ROOM:
            continue  # the teacher says it
        new = full + size > ROOM or (first and kind == "output") or (kind == "code" and ran)
        if new or (ran and kind in ("question", "lead")):
            parts, full, step = [], 0, 0
            deck.append((heading, parts))
        elif kind == "output" or ran or (kind == "code" and "question" in kinds):
            step += (kind, number) != (parts[-1][0], parts[-1][2])
        parts.append((kind, step, number, element))
        full += size
    return deck


def write_page(file, name, body):
    files = ("pages/style.css", "deck/style.css", "deck/deck.js")
    pages, deck, script = ((ROOT / "tools" / one).read_text("utf-8") for one in files)
    inline = "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    policy = f"default-src 'none'; img-src data:; {inline}"
    file.write_text(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{html.escape(name)}</title><style>{pages}{deck}</style></head>\n"
        f"<body><main>{body}</main><script>{script}</script></body></html>\n",
        encoding="utf-8",
    )


def write_deck(path, out):
    """Write the slides of one notebook; returns its line of the index."""
    notebook = nbformat.read(path, as_version=4)
    name, deck, body = title(notebook), slides(notebook, path), []
    for place, (heading, parts) in enumerate(deck, 1):
        looks = "slide title" if place == 1 else "slide"
        label = f'aria-roledescription="slide" aria-label="{place} of {len(deck)}"'
        body.append(f'<section class="{looks}" tabindex="-1" {label}>')
        body.append(f"<h2>{heading.decode_contents()}</h2>")
        for kind, step, number, element in parts:
            looks = "picture" if element.find("img") else "question" if kind == "question" else ""
            body.append(f'<div class="part {looks}" data-step="{step}" data-cell="{number}">')
            body.append(f"{element}</div>")
        body.append(f'<p class="place">{place} / {len(deck)}</p></section>')
    write_page(out / f"{path.stem}.html", name, "\n".join(body))
    print(f"{path.stem}: {len(deck)} slides")
    return f'<li><a href="{path.stem}.html">{html.escape(name)}</a>, {len(deck)} slides</li>'


def write_all(paths, out):
    """Write a deck for each notebook, and the page that lists them."""
    out.mkdir(parents=True, exist_ok=True)
    rows = "".join(write_deck(path, out) for path in paths)
    keys = "Keys: arrows, space, page up and down; or click, in the left quarter to go back."
    body = f'<div class="part" data-step="0"><p>{keys}</p><ul>{rows}</ul></div>'
    body = f'<section class="slide" tabindex="-1"><h2>Slides</h2>{body}</section>'
    write_page(out / "index.html", "Slides", body)


if __name__ == "__main__":
    every = sorted((ROOT / "notebooks").glob("*.ipynb"))
    write_all([Path(name).resolve() for name in sys.argv[1:]] or every, OUT)
