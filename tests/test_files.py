"""whole_folder: the old folder or the new one, wherever the process is killed."""

import os
import subprocess
import sys
import textwrap

import pytest

from minipeft.files import recover_folder, whole_folder

# Runs whole_folder and kills itself just before the n-th call that changes the disk.
VICTIM = textwrap.dedent(
    """
    import os, shutil, signal, sys
    from pathlib import Path
    left = int(sys.argv[2])
    def deadly(function):
        def call(*args, **kwargs):
            global left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    for name in ("mkdir", "rename", "fsync", "unlink", "rmdir", "chmod"):
        setattr(os, name, deadly(getattr(os, name)))
    from minipeft.files import whole_folder
    with whole_folder(sys.argv[1]) as scratch:
        (scratch / "a.txt").write_text("new")
        (scratch / "b.txt").write_text("new")
    """
)


def _contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def _write(folder, word):
    with whole_folder(folder) as scratch:
        (scratch / "a.txt").write_text(word)
        (scratch / "b.txt").write_text(word)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
@pytest.mark.parametrize("old", [True, False], ids=["over an old folder", "fresh"])
def test_killed_between_any_two_steps(tmp_path, old):
    script = tmp_path / "victim.py"
    script.write_text(VICTIM.replace("from minipeft.files", LOAD_FILES))
    wholes = [{"a.txt": word, "b.txt": word} for word in ("old", "new")]
    ended, seen = False, []
    for step in range(40):
        folder = tmp_path / str(step) / "result"
        folder.parent.mkdir()
        if old:
            _write(folder, "old")
        code = subprocess.run([sys.executable, script, folder, str(step)]).returncode
        if folder.exists():
            assert _contents(folder) in wholes, f"half a folder is visible after step {step}"
        recover_folder(folder)
        if old or folder.exists():
            assert _contents(folder) in wholes, f"the old folder was lost at step {step}"
            seen.append(_contents(folder)["a.txt"])
        _write(folder, "again")  # and the place is usable as before
        assert _contents(folder) == {"a.txt": "again", "b.txt": "again"}
        if code == 0:
            ended = True
            break
        assert code == -9
    assert ended and step > 5  # it was killed at every step there is
    assert "new" in seen and ("old" in seen) == old


# The victim reads files.py alone: importing all of minipeft would take seconds each time.
LOAD_FILES = (
    "import importlib.util as u\n"
    "s = u.spec_from_file_location('files', "
    f"{os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'minipeft')!r}"
    " + '/files.py')\n"
    "files = u.module_from_spec(s); sys.modules['files'] = files; s.loader.exec_module(files)\n"
    "from files"
)


def test_a_half_removed_old_folder_is_never_put_back(tmp_path, monkeypatch):
    """While the old folder is being removed, no half of it stands under a name that is read."""
    import shutil

    folder = tmp_path / "result"
    _write(folder, "old")
    names = []
    real = shutil.rmtree

    def watch(path, **options):
        names.append(os.path.basename(path))
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watch)
    _write(folder, "new")
    assert names and all(name.startswith(".") for name in names)


def test_an_error_in_the_block_leaves_the_old_folder_and_nothing_else(tmp_path):
    folder = tmp_path / "result"
    _write(folder, "old")
    with pytest.raises(KeyboardInterrupt), whole_folder(folder) as scratch:
        (scratch / "a.txt").write_text("half")
        raise KeyboardInterrupt
    assert _contents(folder) == {"a.txt": "old", "b.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_failed_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    folder = tmp_path / "result"
    _write(folder, "old")
    real, calls = os.rename, []

    def rename(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="no"):
        _write(folder, "new")
    assert _contents(folder) == {"a.txt": "old", "b.txt": "old"}


def test_nothing_stays_behind_and_relative_paths_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _write("deep/er", "one")
    _write("deep/er", "two")
    assert _contents(tmp_path / "deep" / "er")["a.txt"] == "two"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["er"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "result").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        _write(tmp_path / "result", "new")
    assert (tmp_path / "result").read_text() == "mine"
