import matplotlib.pyplot as plt
import pytest


@pytest.fixture(autouse=True)
def no_open_figures():
    """Each test starts without a figure and leaves none."""
    plt.close("all")
    yield
    plt.close("all")
