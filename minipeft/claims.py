"""The claims of common study notes: what each says, whether it holds, and where it is measured.

In a notebook `claims_table(search="padding")` shows the rows that mention padding, and
`claims_table(language="zh")` the whole table in Chinese.
"""

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from minipeft.refusals import require, shown

VERDICTS = {  # as in the file: as shown in (English, Chinese)
    "true": ("✓ true", "✓ 正确"),
    "true with a condition": ("◐ true with a condition", "◐ 有条件成立"),
    "false": ("✗ false", "✗ 错误"),
    "open": ("? open", "? 尚无定论"),
}
WORDS = {"en": ("Claim", "Verdict", "Measured", "Where"), "zh": ("论断", "结论", "实测", "出处")}
LEFT = 'style="text-align:left;vertical-align:top"'


def load_claims() -> list[dict]:
    """All claims in order, each a dict with the keys of data/claims.jsonl.

    Keys: number, verdict, notebook (relative to notebooks/), section (its heading), and in English
    and Chinese, ending in _en and _zh: claim, truth, measured.
    """
    package = Path(__file__).resolve().parent  # installed: data lies inside, else next to it
    folder = next(d for d in (package / "data", package.parent / "data") if d.is_dir())
    with open(folder / "claims.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def anchor(heading: str) -> str:
    """The part of a link after "#" that Jupyter gives to this heading."""
    return quote(heading.replace(" ", "-"), safe="?/:@!$&'()*+,;=")


@dataclass
class ClaimsTable:
    """Some claims, shown as an HTML table in a notebook and as lines of text elsewhere."""

    rows: list[dict]
    language: str = "en"

    def __repr__(self) -> str:
        key = f"claim_{self.language}"
        return "\n".join(f"{r['number']:2} {r['verdict']}: {r[key]}" for r in self.rows)

    def _repr_html_(self) -> str:
        claim, verdict, measured, where = WORDS[self.language]
        head = "".join(f"<th {LEFT}>{w}</th>" for w in ("#", claim, verdict))
        body = ""
        for row in self.rows:
            text = {k: escape(row[f"{k}_{self.language}"]) for k in ("claim", "truth", "measured")}
            href = escape(f"{row['notebook']}#{anchor(row['section'])}")
            link = f'<a href="{href}">{escape(row["notebook"][:-6])}: {escape(row["section"])}</a>'
            cell = f"<b>{text['claim']}</b><br>{text['truth']}<br><i>{measured}:</i> "
            cell += f"{text['measured']}<br><i>{where}:</i> {link}"
            holds = VERDICTS[row["verdict"]][self.language == "zh"]
            cells = "".join(f"<td {LEFT}>{one}</td>" for one in (row["number"], cell, holds))
            body += f'<tr id="claim-{row["number"]}">{cells}</tr>\n'
        return f'<table id="claims"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>'


def claims_table(language: str = "en", search: str = "") -> ClaimsTable:
    """The claims that contain every word of `search`, in either language; upper case or lower.

    Raises ValueError if `language` is neither "en" nor "zh".
    """
    require(language in WORDS, f'language={shown(language)} is neither "en" nor "zh".')
    words = search.casefold().split()
    text_of = lambda row: " ".join(map(str, row.values())).casefold()  # noqa: E731
    found = [row for row in load_claims() if all(word in text_of(row) for word in words)]
    return ClaimsTable(found, language)
