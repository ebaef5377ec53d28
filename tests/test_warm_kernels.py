"""A kernel that starts warm gives a notebook what Jupyter gives a learner."""

import json
import os
import sys

import pytest
import warm_kernels
from jupyter_client import launcher
from jupyter_client.manager import KernelManager
from jupyter_client.provisioning import local_provisioner

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels fork on Linux only")

ASK = """
import json, os, sys
print(json.dumps({
    "path": sys.path, "folder": os.getcwd(), "name": __name__, "variables": sorted(globals()),
    "environment": dict(os.environ), "leads its group": os.getpgid(0) == os.getpid(),
    "ours": [name for name in sys.modules if name.split(".")[0] in ("minipeft", "checks")],
    "torch": "torch" in sys.modules,
}))
"""
LEAVE = "import json, os, torch; os.environ['LEFT'] = '1'; torch.LEFT = json.LEFT = 1\n"
LEFT = "import json, torch; print(hasattr(json, 'LEFT'), hasattr(torch, 'LEFT'))"


def answered(launch_kernel, codes, folder, monkeypatch):
    """What a new kernel prints for each piece of code."""
    monkeypatch.setattr(local_provisioner, "launch_kernel", launch_kernel)
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(folder))
    client, answers = manager.blocking_client(), []
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        for code in codes:
            said = []
            client.execute_interactive(
                code, timeout=60, store_history=False,
                output_hook=lambda message, said=said: said.append(message["content"].get("text")),
            )  # fmt: skip
            answers.append("".join(text for text in said if text))
        if launch_kernel is warm_kernels.launch_kernel:
            assert os.getpgid(manager.provisioner.pid) == manager.provisioner.pid != os.getpgid(0)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert not manager.is_alive()
    return answers


def test_it_finds_what_any_kernel_finds_and_nothing_of_another(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    warm, cold = warm_kernels.launch_kernel, launcher.launch_kernel
    found, left = answered(warm, [ASK, LEAVE + ASK], tmp_path, monkeypatch)
    again, attributes = answered(warm, [ASK, LEFT], tmp_path, monkeypatch)
    (expected,) = answered(cold, [ASK], tmp_path, monkeypatch)
    found, left, again, expected = map(json.loads, (found, left, again, expected))
    assert str(tmp_path) in expected["path"] and expected["ours"] == []
    assert found.pop("torch") and again.pop("torch") and not expected.pop("torch")
    assert found["environment"].pop("JPY_PARENT_PID") == again["environment"].pop("JPY_PARENT_PID")
    assert expected["environment"].pop("JPY_PARENT_PID") == str(os.getpid())
    assert found == again == expected
    assert left["environment"]["LEFT"] == "1" and attributes == "False False\n"
