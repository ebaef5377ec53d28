"""How many interview questions each chapter has."""

from collections import Counter

import matplotlib.pyplot as plt

from minipeft.figures.palette import BLUE
from minipeft.figures.plots import show


def bank_bars(rows: list[dict]) -> None:
    """Draw a bar for each chapter, with the number of its questions.

    rows: questions of `minipeft.interview.bank`, each with its "chapter".
    """
    counts = sorted(Counter(row["chapter"] for row in rows).items())
    figure, axis = plt.subplots(figsize=(7.5, 2.6), layout="constrained")
    bars = axis.bar([chapter for chapter, _ in counts], [n for _, n in counts], color=BLUE)
    axis.bar_label(bars, fontsize=8)
    axis.margins(y=0.12)  # room for the number on the highest bar
    axis.set(xlabel="chapter", ylabel="questions")
    told = ", ".join(f"{chapter}: {n}" for chapter, n in counts)
    show(figure, alt=f"Number of interview questions in each chapter. {told}.")
