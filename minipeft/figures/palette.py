"""Seven colors and a style for each method: the same in every notebook.

Every color has a contrast of at least 3 to 1 against white, and no two of them look alike to a
color-blind reader (tests/figures). Methods of one family share a color and differ in marker and
line, so a figure can be read in black and white too.
"""

BLUE, ORANGE, GREEN, PURPLE = "#0B7FC7", "#B94500", "#147349", "#8E3B9E"
GOLD, GREY, BLACK = "#B98803", "#737373", "#000000"

STYLES = {  # color, marker, line
    "zero-shot": (GREY, "x", ":"),
    "full fine-tuning": (BLACK, "s", "--"),
    "freezing": (BLACK, "v", "-."),
    "prompt tuning": (GREEN, "o", "-"),
    "P-tuning": (GREEN, "^", "--"),
    "prefix-tuning": (PURPLE, "o", "-"),
    "P-tuning v2": (PURPLE, "^", "--"),
    "adapters": (GOLD, "s", "-"),
    "LoRA": (BLUE, "o", "-"),
    "DoRA": (BLUE, "^", "--"),
    "distillation": (ORANGE, "D", "-"),
}


def style(method: str) -> dict[str, str]:
    """Keyword arguments for `axis.plot`: the color, marker and line of a method, and its label.

    Raises KeyError for a method that has no style.
    """
    color, marker, line = STYLES[method]
    return {"color": color, "marker": marker, "linestyle": line, "label": method}
