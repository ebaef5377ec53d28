"""How often does an interval that promises 95 % hold the truth? A simulation.

    python benchmarks/interval_coverage.py [--trials 3000]

Two methods answer the same test rows with several seeds each. The chance of a right answer is
sigmoid(1 + difficulty of the row + luck of the seed + what only this method finds easy). Both are
equally good on average, so the true difference is 0. Three intervals for the difference:

  rows   1.96 standard errors over the rows, of answers averaged over the seeds
  seeds  Student's t over the differences of the seeds
  both   `minipeft.evidence.compare`

One row for each case goes to results/coverage.csv: the share of trials in which the interval holds
0, and its mean width in points. With 3,000 trials a share of 0.95 is known to 0.008.
"""

import argparse
import csv
import math
from pathlib import Path

import torch
from scipy import stats
from tqdm import tqdm

from minipeft.evidence import compare

RESULTS = Path(__file__).resolve().parent / "results" / "coverage.csv"
CASES = [  # seeds, rows, deviation of the luck of a seed (in logits)
    (seeds, rows, luck) for seeds in (2, 3, 5) for rows in (200, 1000) for luck in (0.0, 0.1, 0.3)
]
DIFFICULTY, OWN = 1.5, 0.5  # deviations over the rows, in logits


def difference(seeds, rows, luck, generator):
    """Answers of one method minus those of the other: (seeds, rows)."""
    hard = DIFFICULTY * torch.randn(rows, generator=generator)
    answers = []
    for _ in range(2):
        chance = torch.sigmoid(
            1.0
            + hard
            + OWN * torch.randn(rows, generator=generator)
            + luck * torch.randn(seeds, 1, generator=generator)
        )
        answers.append((torch.rand(seeds, rows, generator=generator) < chance).double())
    return answers[0] - answers[1]


def halves(x):
    """{interval: (middle, half of its width)} for differences x (seeds, rows)."""
    mean, by_row, by_seed = x.mean().item(), x.mean(0), x.mean(1)
    both = compare(x)
    over_seeds = stats.t.ppf(0.975, len(by_seed) - 1) * by_seed.std() / math.sqrt(len(by_seed))
    return {
        "rows": (mean, 1.96 * by_row.std().item() / math.sqrt(len(by_row))),
        "seeds": (mean, over_seeds.item()),
        "both": (mean, both.high - mean),
    }


def main():
    parser = argparse.ArgumentParser(description="Simulate how often intervals hold the truth.")
    parser.add_argument("--trials", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    generator, table = torch.Generator().manual_seed(0), []
    for seeds, rows, luck in tqdm(CASES):
        found = [halves(difference(seeds, rows, luck, generator)) for _ in range(options.trials)]
        line = {"seeds": seeds, "rows": rows, "luck": luck, "trials": options.trials}
        for name in ("rows", "seeds", "both"):
            held = sum(abs(one[name][0]) <= one[name][1] for one in found)
            width = sum(2 * one[name][1] for one in found) / len(found)
            line |= {f"{name}_covers": f"{held / len(found):.3f}",
                     f"{name}_width": f"{100 * width:.2f}"}  # fmt: skip
        table.append(line)
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    for line in table:
        print(*(f"{name} {value}" for name, value in line.items()), sep="  ")


if __name__ == "__main__":
    main()
