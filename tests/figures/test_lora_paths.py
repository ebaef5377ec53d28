"""LoRA's two paths: the picture names the shapes it draws."""

import pytest

from minipeft.figures import lora_paths


def test_the_text_names_both_shapes(monkeypatch):
    texts = []
    monkeypatch.setattr(lora_paths, "show", lambda figure, alt: texts.append((figure, alt)))
    lora_paths.lora_paths(d_in=576, d_out=192, r=8)
    ((figure, alt),) = texts
    assert "192 by 576" in alt and "8 by 576" in alt and "192 by 8" in alt
    drawn = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert "W0 (192, 576)" in drawn and "A (8, 576)" in drawn and "B (192, 8)" in drawn


@pytest.mark.parametrize("sizes", [(0, 4, 2), (4, 2.5, 2), (4, 4, -1)])
def test_a_size_that_is_none_is_refused(sizes):
    with pytest.raises(ValueError, match="size of a matrix"):
        lora_paths.lora_paths(*sizes)
