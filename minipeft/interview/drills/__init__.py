"""Numeric drills: questions with numbers drawn at random, graded within 10 %, solved step by step.

`draw(seed)` gives one of any kind, `draw(seed, kind="kv_cache")` one of a kind; KINDS names all.
"""

import random
from collections.abc import Callable

from minipeft.interview.drills import counts, memory, training
from minipeft.interview.drills.drill import Drill
from minipeft.refusals import require, shown

__all__ = ["Drill", "KINDS", "draw"]

KINDS: dict[str, Callable[[random.Random], Drill]] = {
    function.__name__: function
    for function in (*memory.DRILLS, *counts.DRILLS, *training.DRILLS)
}  # fmt: skip


def draw(seed: int, kind: str = "") -> Drill:
    """A drill of this kind, or of a kind that the seed chooses; the same seed, the same drill.

    Raises ValueError for an unknown kind.
    """
    rng = random.Random(seed)
    require(not kind or kind in KINDS, f"There is no drill {shown(kind)}, but {', '.join(KINDS)}.")
    kind = kind or rng.choice(list(KINDS))
    return KINDS[kind](rng)
