"""The chart of the interview bank shows every chapter with its number."""

from minipeft.figures.bank_bars import bank_bars
from minipeft.interview.bank import raw_bank


def test_the_text_says_what_the_bars_show(shown_outputs):
    bank_bars([{"chapter": "11"}, {"chapter": "02"}, {"chapter": "11"}])
    bank_bars(raw_bank())
    first, whole = (metadata["image/png"]["alt"] for _, metadata in shown_outputs)
    assert first.endswith("02: 1, 11: 2.")
    assert sum(
        int(each.split(": ")[1].strip(".")) for each in whole.split(". ")[1].split(", ")
    ) == (len(raw_bank()))
