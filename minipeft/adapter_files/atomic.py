"""Write a folder so that a reader sees either all of it or nothing of it."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

MARK = "-minipeft-"  # within the hidden names of what is there for a moment only: ours to remove


def flush(path):
    """Ask the operating system to put a file, or every file below a folder, on the disk."""
    path = Path(path)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())


def behind_link(folder):
    """The absolute path of the folder, or of the one that it links to, so that the link stays.

    Raises NotADirectoryError for a link into a place that is not there, as on a disk that is not
    mounted, and for a file.
    """
    folder = Path(folder).absolute()
    target = Path(os.path.realpath(folder)) if folder.is_symlink() else folder
    if target.is_symlink() or (folder.is_symlink() and not target.parent.is_dir()):
        raise NotADirectoryError(
            f"{folder} is a link to {target}, which is not there; mount its disk, or remove the "
            "link."
        )
    there = next(path for path in (target, *target.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file, so no folder can be written there.")
    return target


def _aside(folder):
    """Where the old folder waits while the new one moves in. Nobody else gives such a name."""
    return folder.with_name(f".{folder.name}{MARK}set-aside")


def _scratch(folder):
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}{MARK}", dir=folder.parent))


def discard(folder, aside):
    """Remove the old folder; a kill in the middle must not leave half of it where it is found."""
    hidden = _scratch(folder)
    os.rename(aside, hidden / folder.name)
    shutil.rmtree(hidden, ignore_errors=True)


def recover_folder(folder):
    """Undo a swap that was cut off: if only the set-aside old folder is left, put it back.

    For who is about to write the folder, under the same lock. Who only reads calls nothing.
    """
    folder = behind_link(folder)
    aside = _aside(folder)
    if aside.is_dir():
        if folder.exists():
            discard(folder, aside)  # the swap had finished; only the clean-up was missing
        else:
            os.rename(aside, folder)


@contextmanager
def whole_folder(folder):
    """Yield an empty scratch folder; when the block ends well, it becomes `folder`.

    The scratch folder stands beside `folder`, so that moving it into place is one rename on one
    file system. When the block raises, the scratch folder is removed and `folder` is as it was.
    When the process is killed, a scratch folder (`.<name>-minipeft-...`) may stay behind, but
    `folder` is either the old one or the new one. A folder that was there before is set aside as
    `.<name>-minipeft-set-aside` for the moment between two renames; if the process dies just then,
    the next writer puts it back. A link to a folder stays, and what it points to is replaced. Two
    writers of one folder need a lock of their own.
    Raises NotADirectoryError if a file has that name, or a link leads nowhere.
    """
    folder = behind_link(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(folder)
    scratch = _scratch(folder)
    scratch.chmod(0o777 & ~_umask())
    try:
        yield scratch
        flush(scratch)
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
