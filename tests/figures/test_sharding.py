"""The diagram of what every rank holds agrees with ZeRO's table, and refuses unknown names."""

import matplotlib.pyplot as plt
import pytest

from minipeft.figures import sharding
from minipeft.figures.sharding import PARTS, STAGES, sharding_diagram


@pytest.mark.parametrize("name", [None, *STAGES])
def test_it_is_drawn_and_its_text_says_what_every_stage_shards(name, shown_outputs):
    sharding_diagram(name)
    ((data, metadata),) = shown_outputs
    assert data["image/png"].startswith(b"\x89PNG") and not plt.get_fignums()
    alt = metadata["image/png"]["alt"]
    for said in (
        "DDP: parameters whole, gradients whole, optimizer state whole; all-reduce: gradients",
        "ZeRO-1: optimizer state sharded, parameters whole, gradients whole",
        "ZeRO-2: gradients sharded, optimizer state sharded, parameters whole",
        "ZeRO-3, FSDP: parameters sharded, gradients sharded, optimizer state sharded",
    ):
        assert said in alt


def test_each_stage_shards_one_part_more_in_the_papers_order():
    order = ["optimizer state", "gradients", "parameters"]
    for i, stage in enumerate(STAGES.values()):
        assert set(stage.sharded) == set(order[:i]) <= set(PARTS)


def test_a_shard_is_half_a_bar(monkeypatch, shown_outputs):
    heights = []
    bar = plt.Axes.bar
    monkeypatch.setattr(
        plt.Axes,
        "bar",
        lambda self, x, height, *rest, **kw: (
            heights.append(height) if kw.get("fill", True) else None,
            bar(self, x, height, *rest, **kw),
        ),
    )
    sharding_diagram()
    assert len(heights) == 2 * len(STAGES) * len(PARTS)
    assert sum(height == 0.65 for height in heights) == 2 * (0 + 1 + 2 + 3)
    assert set(heights) == {0.65, 1.3}


def test_a_highlight_changes_the_picture(shown_outputs):
    for name in (None, *STAGES):
        sharding_diagram(name)
    assert len({data["image/png"] for data, _ in shown_outputs}) == 1 + len(STAGES)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'zero'; the names are DDP, ZeRO-1"):
        sharding.sharding_diagram("zero")
