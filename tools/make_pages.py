"""The notebooks as HTML pages that need no network: python tools/make_pages.py [FOLDER].

Writes build/pages/index.html and, laid out as in the repository, a page for each notebook in
notebooks/, notebooks/deeper/ and exercises/. A page is one file: formulas are MathML, pictures and
style stand inside, and there are no scripts. Links to notebooks become links to their pages; any
other file that a notebook links to is copied, so that no link leaves the folder.
"""

import base64
import html
import mimetypes
import os
import re
import shutil
import sys
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import nbformat
from bs4 import BeautifulSoup
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import (
    IPythonRenderer,
    MarkdownWithMath,
    MathBlockParser,
    MathInlineParser,
)

from mathml import mathml

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"notebooks": "Lessons", "notebooks/deeper": "Deeper", "exercises": "Exercises"}
WIDGET = "application/vnd.jupyter.widget-view+json"
# As in pandoc: a formula neither begins nor ends with a space, and no digit follows it. So
# "from $5 to $10" has none, and code keeps its dollars.
INLINE = r"(?<![$\\])\$(?=[^\s$`])(?P<math_inline_tex>[^$`]*[^\s$`\\])\$(?![\d$])"


class Blocks(MathBlockParser):
    """A formula that is a block begins a line; $$ within code stays code."""

    SPECIFICATION = {
        **MathBlockParser.SPECIFICATION,
        "multiline_math": r"^ {0,3}(?:" + MathBlockParser.MULTILINE_MATH + ")",
    }


class Inlines(MathInlineParser):
    SPECIFICATION = {**MathInlineParser.SPECIFICATION, "inline_math_tex": INLINE}


class Renderer(IPythonRenderer):
    def inline_math(self, body):
        # On a phone a long one gets a line of its own, which scrolls.
        math = mathml(body)
        signs = len(re.sub(r"<[^>]*>|&\w+;", "", math))
        return f'<span class="long">{math}</span>' if signs > 28 else math

    def block_math(self, body):
        return f'<span class="formula" style="display: block">{mathml(body, display=True)}</span>'

    def latex_environment(self, name, body):
        return self.block_math(f"\\begin{{{name}}}{body}\\end{{{name}}}")

    def heading(self, text, level, **attributes):
        # The name that JupyterLab gives a heading, so that links to sections work in both.
        name = BeautifulSoup(text, "html.parser").get_text().replace(" ", "-")
        return f'<h{level} id="{html.escape(name)}">{text}</h{level}>\n'


def markdown(source, attachments=None):
    renderer = Renderer(escape=False, attachments=attachments or {})
    return MarkdownWithMath(renderer, Blocks(), Inlines()).render(source)


class PageExporter(HTMLExporter):
    """nbconvert's exporter with the template in tools/pages and formulas as MathML."""

    def __init__(self, **options):
        super().__init__(
            template_name="pages", extra_template_basedirs=[str(ROOT / "tools")], **options
        )

    def default_filters(self):
        yield from super().default_filters()
        yield "markdown2html", lambda source: markdown(source)


def title(notebook):
    """The first heading, without markup."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (found := re.search(r"^# .+", cell.source, re.M)):
            return BeautifulSoup(markdown(found[0]), "html.parser").get_text().strip()
    raise ValueError("the notebook has no title")


def without_widgets(notebook):
    """A page has no kernel: drop progress bars, and say where a control would be."""
    for cell in notebook.cells:
        for output in list(cell.get("outputs", [])):
            if WIDGET in output.get("data", {}):
                if re.search(r"\d+%\|", output.data.get("text/plain", "")):
                    cell.outputs.remove(output)
                else:
                    del output.data[WIDGET]
                    output.data["text/plain"] = "(Run the notebook to use this control.)"


def notebooks():
    """All notebooks that become pages, in reading order."""
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.ipynb"))]


def page_of(path):
    return PurePosixPath(path.relative_to(ROOT).as_posix()).with_suffix(".html")


def relative(page, to):
    return os.path.relpath(to, PurePosixPath(page).parent).replace(os.sep, "/")


def inside(url, path):
    """The file or folder of the repository that a relative link in `path` names, else None."""
    parts = urlsplit(url)
    if parts.scheme or parts.netloc or not parts.path:
        return None
    target = (path.parent / unquote(parts.path)).resolve()
    if not target.exists() or not target.is_relative_to(ROOT):
        raise ValueError(f"{path.relative_to(ROOT)} links to {url}, which is not there")
    return target


def settle(soup, path, out, pages):
    """Make links lead to pages or copies, pictures part of the page, and wide tables scroll."""
    page = page_of(path)
    for image in soup.select("img[src]"):
        if source := inside(image["src"], path) if "data:" not in image["src"][:5] else None:
            kind = mimetypes.guess_type(source.name)[0]
            image["src"] = (
                f"data:{kind};base64,{base64.b64encode(source.read_bytes()).decode('ascii')}"
            )
    for link in soup.select("a[href]"):
        target = inside(link["href"], path)
        if target in pages:
            fragment = urlsplit(link["href"]).fragment
            link["href"] = relative(page, page_of(target)) + (f"#{fragment}" if fragment else "")
        elif target and target.is_file():
            copy = out / target.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, copy)
        elif target:
            link.unwrap()  # a folder: nothing that a browser could show everywhere
    for table in soup.select("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))


def write_page(path, out, order=None):
    """Export one notebook below the folder `out`; returns its title."""
    order = order or notebooks()
    notebook = nbformat.read(path, as_version=4)
    without_widgets(notebook)
    page = page_of(path)
    same = [other for other in order if other.parent == path.parent]
    place = same.index(path)
    near = {
        "page_title": title(notebook),
        "page_contents": relative(page, "index.html"),
        "page_before": place and relative(page, page_of(same[place - 1])),
        "page_after": place + 1 < len(same) and relative(page, page_of(same[place + 1])),
    }
    try:
        text, _ = PageExporter().from_notebook_node(notebook, {"metadata": {}, **near})
    except ValueError as error:
        raise ValueError(f"{path.relative_to(ROOT)}: {error}") from error
    soup = BeautifulSoup(text, "html.parser")
    nav = soup.nav.extract()
    settle(soup, path, out, set(order))
    soup.body.insert(0, nav)
    (out / page).parent.mkdir(parents=True, exist_ok=True)
    (out / page).write_text(str(soup), encoding="utf-8")
    return near["page_title"]


def write_index(titles, out):
    parts = []
    for folder, name in FOLDERS.items():
        rows = [
            f'<li><a href="{page_of(path)}">{html.escape(text)}</a></li>'
            for path, text in titles.items()
            if path.parent == ROOT / folder
        ]
        if rows:
            parts += [f"<h2>{name}</h2>", '<ul class="contents">', *rows, "</ul>"]
    style = (ROOT / "tools/pages/style.css").read_text(encoding="utf-8")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>minipeft</title><style>{style}</style>"
    )
    body = f"<main><h1>minipeft: efficient fine-tuning</h1>{''.join(parts)}</main>"
    (out / "index.html").write_text(
        f'<!DOCTYPE html><html lang="en"><head>{head}</head><body>{body}</body></html>\n',
        encoding="utf-8",
    )


def write_all(out):
    """Write every page; ValueError lists all that is wrong in the notebooks, after the last one."""
    order = notebooks()
    out.mkdir(parents=True, exist_ok=True)
    titles, faults = {}, []
    for path in order:
        try:
            titles[path] = write_page(path, out, order)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(["not all pages could be written", *faults]))
    write_index(titles, out)
    print(f"{len(order)} pages: {out / 'index.html'}")


if __name__ == "__main__":
    try:
        write_all(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build/pages").resolve())
    except ValueError as error:
        sys.exit(str(error))
