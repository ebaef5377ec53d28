"""The palette: seen against white, told apart by color-blind readers, one style for each method."""

from itertools import combinations

import numpy as np
import pytest

from minipeft.figures import STYLES, palette, style

COLORS = {name: value for name, value in vars(palette).items() if str(value).startswith("#")}
# Machado, Oliveira and Fernandes 2009, severity 1.0, for linear RGB.
SIGHTS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
XYZ = np.array(  # linear sRGB to XYZ, D65
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
APART = 12  # CIE 1976 difference; about 2.3 can just be told apart when side by side


def linear(color):
    value = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast_with_white(color):
    """WCAG 2, from 1 to 21."""
    return 1.05 / (linear(color) @ XYZ[1] + 0.05)


def lab(light):
    x = XYZ @ np.clip(light, 0, 1) / XYZ.sum(axis=1)
    f = np.where(x > (6 / 29) ** 3, np.cbrt(x), x / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def difference(one, other, sight):
    matrix = SIGHTS[sight]
    return np.linalg.norm(lab(matrix @ linear(one)) - lab(matrix @ linear(other)))


def test_the_arithmetic_gives_known_values():
    assert contrast_with_white("#000000") == pytest.approx(21, abs=0.01)
    assert contrast_with_white("#FFFFFF") == pytest.approx(1)
    assert contrast_with_white("#777777") == pytest.approx(4.48, abs=0.01)
    assert lab(linear("#FF0000")) == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    for matrix in SIGHTS.values():  # grey looks grey to all
        assert matrix.sum(axis=1) == pytest.approx([1, 1, 1], abs=1e-5)


def test_pairs_that_are_known_to_be_bad_would_fail():
    red, green, yellow = "#D62728", "#2CA02C", "#F0E442"
    assert difference(red, green, "deuteranopia") < APART < difference(red, green, "normal")
    assert difference("#009E73", "#7F7F7F", "deuteranopia") < APART
    assert difference("#00C0C0", "#00B8D8", "tritanopia") < APART
    assert contrast_with_white(yellow) < 3


@pytest.mark.parametrize("name", COLORS)
def test_a_color_is_seen_against_white(name):
    assert contrast_with_white(COLORS[name]) >= 3


@pytest.mark.parametrize("sight", SIGHTS)
def test_no_two_colors_look_alike(sight):
    assert len(COLORS) >= 6
    alike = [
        f"{a} and {b}: {difference(COLORS[a], COLORS[b], sight):.1f}"
        for a, b in combinations(COLORS, 2)
        if difference(COLORS[a], COLORS[b], sight) < APART
    ]
    assert not alike, f"with {sight} these look alike: {alike}"


def test_every_method_has_its_own_color_and_marker():
    looks = [(style(method)["color"], style(method)["marker"]) for method in STYLES]
    assert len(set(looks)) == len(looks)
    assert {color for color, _ in looks} <= set(COLORS.values())
