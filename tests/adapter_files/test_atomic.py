"""whole_folder: the old folder or the new one, wherever the process is killed."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from minipeft.adapter_files.atomic import recover_folder, whole_folder

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
    from minipeft.adapter_files.atomic import whole_folder
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
    script.write_text(VICTIM.replace("from minipeft.adapter_files.atomic", LOAD_FILES))
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


# The victim reads atomic.py alone: importing all of minipeft would take seconds each time.
ATOMIC = Path(__file__).parents[2] / "minipeft" / "adapter_files" / "atomic.py"
LOAD_FILES = (
    "import importlib.util as u\n"
    f"s = u.spec_from_file_location('atomic', {str(ATOMIC)!r})\n"
    "atomic = u.module_from_spec(s); sys.modules['atomic'] = atomic\n"
    "s.loader.exec_module(atomic)\n"
    "from atomic"
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
    for path in ("result", "result/below", "result/far/below"):
        with pytest.raises(NotADirectoryError, match="result is a file"):
            _write(tmp_path / path, "new")
    assert (tmp_path / "result").read_text() == "mine"


# ---- what belongs to others ---------------------------------------------------------------------


def _everything(folder):
    return {
        str(path.relative_to(folder)): path.is_symlink() or path.is_file() and path.read_text()
        for path in sorted(folder.rglob("*"))
    }


def test_a_folder_with_a_name_like_ours_is_left_alone(tmp_path):
    for name in ("result.previous", ".result-old", "result-minipeft-set-aside", ".other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    before = _everything(tmp_path)
    _write(tmp_path / "result", "one")
    _write(tmp_path / "result", "two")
    recover_folder(tmp_path / "result")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "result"):
        raise KeyboardInterrupt
    after = _everything(tmp_path)
    assert {key: after[key] for key in before} == before
    assert set(after) - set(before) == {"result", "result/a.txt", "result/b.txt"}


def test_only_a_writer_puts_back_what_a_cut_off_swap_left(tmp_path, monkeypatch):
    folder = tmp_path / "result"
    _write(folder, "old")
    real, calls = os.rename, []

    def cut_off(source, target):
        calls.append(target)
        if len(calls) > 1:
            raise SystemExit  # and no clean-up, as after a kill
        real(source, target)

    monkeypatch.setattr(os, "rename", cut_off)
    with pytest.raises(SystemExit):
        _write(folder, "new")
    monkeypatch.undo()
    assert not folder.exists()
    (aside,) = (path for path in tmp_path.iterdir() if path.name.endswith("set-aside"))
    assert aside.name.startswith(".result-minipeft-") and _contents(aside)["a.txt"] == "old"
    with pytest.raises(KeyboardInterrupt), whole_folder(folder):  # its start is enough
        assert _contents(folder) == {"a.txt": "old", "b.txt": "old"}
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_link_stays_and_its_folder_is_replaced(tmp_path):
    disk = tmp_path / "disk"
    _write(disk / "real", "old")
    (tmp_path / "link").symlink_to(disk / "real")
    (tmp_path / "second").symlink_to("link")
    for name in ("link", "second"):
        _write(tmp_path / name, name)
        assert _contents(disk / "real")["a.txt"] == name
    (tmp_path / "ahead").symlink_to(disk / "not yet there")
    _write(tmp_path / "ahead", "first")
    assert _contents(disk / "not yet there")["a.txt"] == "first"
    assert all((tmp_path / name).is_symlink() for name in ("link", "second", "ahead"))
    assert sorted(p.name for p in disk.iterdir()) == ["not yet there", "real"]


def test_a_link_into_nowhere_is_refused(tmp_path):
    (tmp_path / "lost").symlink_to(tmp_path / "unmounted" / "folder")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("lost", "loop"):
        with pytest.raises(NotADirectoryError, match="is a link to .* which is not there"):
            _write(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loop", "lost"]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "to a file").symlink_to(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="is a file"):
        _write(tmp_path / "to a file", "new")
