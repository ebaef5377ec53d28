"""Write a folder so that a reader sees either all of it or nothing of it."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path


def _flush(folder):
    """Ask the operating system to put every file below `folder` on the disk."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def _aside(folder):
    return folder.with_name(folder.name + ".previous")


def _discard(folder):
    """Remove a folder; a kill in the middle must not leave half of it under its own name."""
    hidden = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    os.rename(folder, hidden / folder.name)
    shutil.rmtree(hidden, ignore_errors=True)


def recover_folder(folder):
    """Undo a swap that was cut off: if only the set-aside old folder is left, put it back.

    Call it before reading a folder that `whole_folder` writes, and not while another process is
    writing it.
    """
    folder = Path(folder).absolute()
    aside = _aside(folder)
    if aside.is_dir():
        if folder.exists():
            _discard(aside)  # the swap had finished; only the clean-up was missing
        else:
            os.rename(aside, folder)


@contextmanager
def whole_folder(folder):
    """Yield an empty scratch folder; when the block ends well, it becomes `folder`.

    The scratch folder stands beside `folder`, so that moving it into place is one rename on one
    file system. When the block raises, the scratch folder is removed and `folder` is as it was.
    When the process is killed, a scratch folder (its name starts with a dot) may stay behind, but
    `folder` is either the old one or the new one. A folder that was there before is set aside as
    `<folder>.previous` for the moment between two renames; `recover_folder` puts it back if the
    process dies just then. Two writers of one folder need a lock of their own.
    Raises NotADirectoryError if a file has that name.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, so no folder can be written there.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(folder)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    scratch.chmod(0o777 & ~_umask())
    try:
        yield scratch
        _flush(scratch)
        if folder.exists():
            os.rename(folder, _aside(folder))
        os.rename(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        recover_folder(folder)
        raise
    recover_folder(folder)  # removes the old folder that was set aside


def _umask():
    """The permissions that this process takes away from new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
