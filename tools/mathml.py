"""LaTeX to MathML, which browsers set themselves: no script, no font, no network.

latex2mathml does the work. Around it stand the commands that our notebooks use and it does not
know, attributes that browsers dropped when MathML Core came, and a refusal: what it cannot convert
it would print as text.
"""

import html
import re
import xml.etree.ElementTree as ElementTree

from latex2mathml.converter import convert_to_element
from latex2mathml.exceptions import NoAvailableTokensError

REWRITES = (
    (r"\\(begin|end)\{aligned\}", r"\\\1{split}"),
    (r"\\mathrm\{([A-Za-z]+)\}", r"\\text{\1}"),  # one word, not a product of letters
    (r"\\operatorname\*", r"\\operatorname"),
    (r"\\\\\[[\d.]+[a-z]{2}\]", r"\\\\"),  # extra space between lines
)
CAPITALS = set("ΓΔΘΛΞΠΣΥΦΨΩ")
FUNCTIONS = {"ln", "log", "exp", "sin", "cos", "tan", "tanh", "arg", "dim", "deg", "ker"}


def mathml(latex, display=False):
    """The formula as a `math` element; ValueError names what cannot be converted."""
    text = latex.strip()
    if not text:
        raise ValueError("an empty formula")
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text)
    if environment := re.search(r"\\begin\{(equation\*?|gather(ed)?\*?|multline\*?)\}", text):
        raise ValueError(f"\\begin{{{environment[1]}}} in ${latex}$: use $$...$$ or aligned")
    try:
        math = convert_to_element(text, display="block" if display else "inline")
    except Exception as error:  # its exceptions have no common class
        cause = "it ends too early" if isinstance(error, NoAvailableTokensError) else repr(error)
        raise ValueError(f"${latex}$ is not LaTeX that can be converted: {cause}") from error
    for element in math.iter():
        element.text = html.unescape(element.text or "")
        if "\\" in element.text:
            raise ValueError(f"{element.text.strip()} in ${latex}$ cannot be converted")
        if element.text == "&" and r"\&" not in latex:
            raise ValueError(f"& outside a table in ${latex}$")
        for_browsers(element)
    return ElementTree.tostring(math, encoding="unicode", short_empty_elements=False)


def for_browsers(element):
    """What MathML Core expects where latex2mathml writes older attributes."""
    if element.tag == "mi" and element.text in FUNCTIONS:
        element.tag = "mo"
        element.attrib.update(form="prefix", lspace="0", rspace="0.167em")
    if element.tag == "mi" and element.text in CAPITALS:
        element.set("mathvariant", "normal")
    if element.tag == "mi" and element.text == ":":
        element.tag = "mo"
    if element.tag == "mo" and element.text in {"|", "‖"}:
        element.attrib.setdefault("stretchy", "false")  # only after \left and \right
    alignment = element.attrib.pop("columnalign", None)
    if element.tag == "mtd" and alignment:
        element.set("class", alignment)
    if element.tag == "mtable" and element.attrib.pop("columnspacing", "").startswith("0em"):
        element.set("class", "aligned")
    for name in ("rowspacing", "columnspacing"):
        element.attrib.pop(name, None)
