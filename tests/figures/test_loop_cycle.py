"""The diagram of the training loop draws every part in its order and refuses unknown ones."""

import matplotlib.pyplot as plt
import pytest

from minipeft.figures.loop_cycle import CYCLE, PARTS, loop_cycle


@pytest.mark.parametrize("name", [None, *PARTS])
def test_it_is_drawn_and_its_text_says_the_order_and_what_each_part_prevents(name, shown_outputs):
    loop_cycle(name)
    ((data, metadata),) = shown_outputs
    assert data["image/png"].startswith(b"\x89PNG") and not plt.get_fignums()
    alt = metadata["image/png"]["alt"]
    assert "backward, clip, step, zero_grad" in alt and "accumulation" in alt.lower()
    assert all(part.prevents in alt for part in PARTS.values())
    assert name is None or f"Highlighted: {name}." in alt


def test_each_highlight_is_another_picture(shown_outputs):
    for name in [None, *PARTS]:
        loop_cycle(name)
    assert len({data["image/png"] for data, _ in shown_outputs}) == len(PARTS) + 1


def test_the_gradient_is_there_before_it_is_clipped_used_and_erased():
    order = [CYCLE.index(part) for part in ("backward", "clip", "step", "zero_grad")]
    assert order == sorted(order) and set(CYCLE) <= PARTS.keys()


def test_boxes_do_not_overlap_and_stay_inside():
    from minipeft.figures.loop_cycle import HEIGHT, TALL, WIDTH

    rows = {}
    for part in PARTS.values():
        assert 0 <= part.x and part.x + part.width <= WIDTH
        assert 0 <= part.y and part.y + TALL <= HEIGHT
        rows.setdefault(part.y, []).append((part.x, part.x + part.width))
    for spans in rows.values():
        spans.sort()
        assert all(end < start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))


def test_an_unknown_part_is_named_and_the_known_ones_are_listed():
    with pytest.raises(ValueError, match="'optimizer'; the names are batch, .*zero_grad"):
        loop_cycle("optimizer")
