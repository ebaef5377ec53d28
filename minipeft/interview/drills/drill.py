"""One numeric question, in English and Chinese."""

import math
import re
from typing import NamedTuple

from minipeft.refusals import require, shown

TOLERANCE = 0.1


class Drill(NamedTuple):
    """A question whose answer is one number.

    question, steps  {"en": ..., "zh": ...}; the steps end in the answer
    answer, unit     the number, and what it counts
    """

    question: dict[str, str]
    answer: float
    unit: str
    steps: dict[str, str]

    def right(self, answer: float | str) -> bool:
        """Whether an answer is within 10 % of the right one. Accepts numbers and "1,200".

        Raises ValueError for what is not a number, as "12,5".
        """
        text = str(answer).strip()
        if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", text):
            text = text.replace(",", "")
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        require(
            math.isfinite(number), f"{shown(answer)} is not a number; answer like 12.5 or 1,200."
        )
        return abs(number - self.answer) <= TOLERANCE * abs(self.answer)
