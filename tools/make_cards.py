"""Flashcards of the interview bank: python tools/make_cards.py anki | print

anki    build/interview/minipeft-en.apkg and minipeft-zh.apkg, a deck for each language
print   build/interview/cards-en.html and cards-zh.html, for paper or PDF: questions on one page,
        their answers on the next, in the order that two-sided printing needs

The ids of notes come from the ids of questions, so an update of a deck keeps a learner's progress.
"""

import contextlib
import html
import io
import re
import sys
import tempfile
from pathlib import Path

import genanki
import matplotlib.pyplot as plt
import mistune

from mathml import mathml
from minipeft.figures import stack_diagram
from minipeft.interview.bank import LANGUAGES, load_bank

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "interview"
DECKS = {"en": (1_706_001_135, "minipeft: interview"), "zh": (1_706_001_136, "minipeft：面试")}
MODEL = 1_706_001_137
WORDS = {
    "en": ("More", "What to listen for", "Often said, and wrong", "Limits"),
    "zh": ("展开", "评分要点", "常见的错误回答", "适用范围"),
}
DIAGRAMS = {"05": "freezing", "06": "prompt tuning", "07": "P-tuning", "08": "prefix-tuning",
            "09": "P-tuning v2", "10": "adapters", "11": "LoRA"}  # fmt: skip
FORMULA = re.compile(r"\$([^$]+)\$")


def as_html(text, formula):
    """Markdown as HTML; `formula` turns the LaTeX between two dollars into HTML."""
    kept = []

    def keep(found):
        kept.append(formula(found[1]))
        return f"\N{OBJECT REPLACEMENT CHARACTER}{len(kept) - 1}\N{OBJECT REPLACEMENT CHARACTER}"

    code = r"(`[^`]*`)"
    parts = [part if part.startswith("`") else FORMULA.sub(keep, part)
             for part in re.split(code, text)]  # fmt: skip
    page = mistune.html("".join(parts)).strip()
    return re.sub("\ufffc(\\d+)\ufffc", lambda place: kept[int(place[1])], page)


def sides(row, language, formula):
    """(front, back) of one question as HTML, without a diagram."""
    more, listen, wrong, limits = WORDS[language]
    convert = lambda text: as_html(text, formula)  # noqa: E731
    points = "".join(f"<li>{convert(point)}</li>" for point in row["rubric"])
    label = html.escape(f"{row['chapter']} · {row['level']} · {row['minutes']} min")
    back = (
        f"{convert(row['short'])}<details><summary>{more}</summary>{convert(row['answer'])}"
        f"<h4>{listen}</h4><ul>{points}</ul><h4>{wrong}</h4>{convert(row['wrong'])}"
        f"{convert(row['why_wrong'])}<h4>{limits}</h4>{convert(row['limits'])}</details>"
    )
    return f"{convert(row['question'])}<small>{label}</small>", back


def diagram(chapter, folder):
    """The file of a chapter's diagram of the transformer stack, or None."""
    if chapter not in DIAGRAMS:
        return None
    path = Path(folder) / f"minipeft-stack-{chapter}.png"
    if not path.exists():
        plt.switch_backend("agg")
        with contextlib.redirect_stdout(io.StringIO()):
            stack_diagram(DIAGRAMS[chapter])
        plt.gcf().savefig(path, dpi=110)
        plt.close("all")
    return path


def make_anki(folder):
    """One .apkg for each language."""
    model = genanki.Model(
        MODEL, "minipeft question",
        fields=[{"name": "Question"}, {"name": "Answer"}, {"name": "Diagram"}],
        templates=[{"name": "Question", "qfmt": "{{Question}}",
                    "afmt": "{{FrontSide}}<hr id=answer>{{Answer}}{{Diagram}}"}],
        css=".card { font: 20px sans-serif; text-align: left; max-width: 40em; margin: auto; }\n"
            "small { color: #555; } img { max-width: 100%; }",
    )  # fmt: skip
    in_anki = lambda latex: rf"\({html.escape(latex)}\)"  # noqa: E731
    with tempfile.TemporaryDirectory() as pictures:
        for language in LANGUAGES:
            number, name = DECKS[language]
            deck, media = genanki.Deck(number, name), set()
            for row in load_bank(language):
                picture = diagram(row["chapter"], pictures)
                tag = f'<img src="{picture.name}">' if picture else ""
                media |= {str(picture)} if picture else set()
                deck.add_note(genanki.Note(
                    model, [*sides(row, language, in_anki), tag],
                    guid=genanki.guid_for("minipeft", row["id"], language),
                    tags=[f"chapter{row['chapter']}", row["level"], row["kind"]],
                ))  # fmt: skip
            package = genanki.Package(deck)
            package.media_files = sorted(media)
            package.write_to_file(folder / f"minipeft-{language}.apkg")


PAGE = """<!doctype html><html lang="{language}"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 11pt/1.35 sans-serif; margin: 0; }}
.sheet {{ display: grid; grid-template: repeat(4, 66mm) / 1fr 1fr; width: 190mm; margin: 5mm auto;
          break-after: page; }}
.card {{ border: 1px dashed #888; padding: 4mm; overflow: hidden; }}
.card small {{ display: block; color: #555; }} p {{ margin: 0 0 1mm; }}
@page {{ size: A4; margin: 10mm; }}</style>{sheets}</html>
"""


def make_print(folder):
    """One HTML page for each language, without a network."""
    for language in LANGUAGES:
        rows, sheets = load_bank(language), []
        for start in range(0, len(rows), 8):
            eight = rows[start : start + 8]
            fronts = [sides(row, language, mathml)[0] for row in eight]
            fronts += [""] * (8 - len(fronts))
            backs = [as_html(row["short"], mathml) for row in eight] + [""] * (8 - len(eight))
            turned = [backs[i ^ 1] for i in range(8)]  # left and right change when paper is turned
            for cards in (fronts, turned):
                inside = "".join(f'<div class="card">{card}</div>' for card in cards)
                sheets.append(f'<div class="sheet">{inside}</div>')
        page = PAGE.format(language=language, title=DECKS[language][1], sheets="\n".join(sheets))
        (folder / f"cards-{language}.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    kinds = {"anki": make_anki, "print": make_print}
    if sys.argv[1:] not in (["anki"], ["print"]):
        raise SystemExit("usage: python tools/make_cards.py anki | print")
    BUILD.mkdir(parents=True, exist_ok=True)
    kinds[sys.argv[1]](BUILD)
    print(f"{BUILD.relative_to(ROOT)}: {', '.join(sorted(p.name for p in BUILD.iterdir()))}")
