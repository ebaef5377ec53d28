"""Kernels that start warm: each forks from a process that has imported the large libraries.

Importing them takes some six seconds, and the checks start more than a hundred kernels. A forked
kernel is a process of its own like any other: it finds modules already imported, and nothing that
another notebook did. `pytest -p tests.warm_kernels` switches it on, on Linux.
"""

import multiprocessing
import os
import subprocess
import sys
import time

from jupyter_client import launcher
from jupyter_client.provisioning import local_provisioner

# None of them starts a thread, which a fork would lose (pandas does). matplotlib asks the kernel
# for its backend when it is imported, so the kernel imports it.
LIBRARIES = ["torch", "transformers.modeling_utils", "transformers.models.llama.modeling_llama",
             "transformers.generation", "scipy.stats", "ipykernel.kernelapp"]  # fmt: skip
SHOW_PATH = [sys.executable, "-c", "import sys; print(*sys.path[1:], sep='\\n')"]


def become_kernel(arguments, environment, folder, path):
    """In the new process: what `python -m ipykernel_launcher` does with these arguments."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.environ.clear()
    os.environ.update(environment, JPY_PARENT_PID=str(os.getppid()))  # it ends if its parent does
    os.chdir(folder)
    sys.path[:], sys.argv[1:] = path, arguments
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance()


class Kernel:
    """A forked kernel; to its owner a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, arguments, environment, folder):
        shown = subprocess.run(SHOW_PATH, env=environment, check=True, capture_output=True)
        path = shown.stdout.decode().splitlines()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES)
        self.process = context.Process(
            target=become_kernel, args=(arguments, environment, folder, path)
        )
        self.process.start()
        self.pid = self.process.pid
        self.kill, self.terminate, self.wait = (
            self.process.kill, self.process.terminate, self.process.join,
        )  # fmt: skip
        while self.poll() is None and os.getpgid(self.pid) != self.pid:
            time.sleep(0.001)  # its owner signals its group, which must be no longer ours

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)


def launch_kernel(command, env=None, cwd=None, **others):
    """In place of Jupyter's function of this name."""
    if sys.platform == "linux" and command[:3] == [sys.executable, "-m", "ipykernel_launcher"]:
        return Kernel(command[3:], env or dict(os.environ), cwd or os.getcwd())
    return launcher.launch_kernel(command, env=env, cwd=cwd, **others)


def pytest_configure():
    local_provisioner.launch_kernel = launch_kernel
