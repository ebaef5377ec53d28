"""Numeric drills: questions with numbers drawn at random, graded within 10 %, solved step by step.

`draw(seed)` gives one for a whiteboard, `draw(seed, kind="lora_step")` one of a kind; KINDS has all.
"""

import random
from collections.abc import Callable

from minipeft.interview.drills import counts, memory, training
from minipeft.interview.drills.drill import Drill
from minipeft.refusals import require, shown

__all__ = ["Drill", "KINDS", "WHITEBOARD", "draw"]

KINDS: dict[str, Callable[[random.Random], Drill]] = {
    function.__name__: function
    for function in (*memory.DRILLS, *counts.DRILLS, *training.DRILLS)
}  # fmt: skip


# The peak of a whole step is computed by `estimate`, and is no work for a whiteboard.
WHITEBOARD = [name for name in KINDS if not name.endswith("_step")]


def draw(seed: int, kind: str = "") -> Drill:
    """A drill of this kind, or of a kind from WHITEBOARD that the seed chooses; the same seed, the
    same drill.

    Raises ValueError for an unknown kind.
    """
    rng = random.Random(seed)
    require(not kind or kind in KINDS, f"There is no drill {shown(kind)}, but {', '.join(KINDS)}.")
    kind = kind or rng.choice(WHITEBOARD)
    return KINDS[kind](rng)
