import matplotlib.pyplot as plt
import pytest

from minipeft.figures import plots


@pytest.fixture(autouse=True)
def no_open_figures():
    """Each test starts without a figure and leaves none."""
    plt.close("all")
    yield
    plt.close("all")


@pytest.fixture
def shown_outputs(monkeypatch):
    """What `show` hands to the notebook: a list of (data, metadata)."""
    outputs = []
    monkeypatch.setattr(
        plots, "display", lambda data, raw, metadata: outputs.append((data, metadata))
    )
    return outputs
