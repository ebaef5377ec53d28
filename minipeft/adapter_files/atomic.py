"""Write a folder atomically: a reader sees either all of it or nothing of it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = "-minipeft-"  # in the hidden names of temporary files and folders, which we may remove


def flush(path: str | Path) -> None:
    """Write a file, or every file below a folder, from the system's buffers to the disk."""
    path = Path(path)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())


def behind_link(folder: str | Path) -> Path:
    """The absolute path of the folder or, for a symbolic link, of its target.

    Raises NotADirectoryError for a file, and for a link whose target's parent does not exist, for
    example because a disk is not mounted.
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
    """Where the old folder is while the new one is moved into its place."""
    return folder.with_name(f".{folder.name}{MARK}set-aside")


def _scratch(folder):
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}{MARK}", dir=folder.parent))


def discard(folder: Path, aside: Path) -> None:
    """Remove `aside`, an old `folder`. It is renamed first, so that a killed process cannot leave
    half of it under a name that is read."""
    hidden = _scratch(folder)
    os.rename(aside, hidden / folder.name)
    shutil.rmtree(hidden, ignore_errors=True)


def recover_folder(folder: str | Path) -> None:
    """Undo an interrupted replacement: if only the set-aside old folder is left, put it back.

    Call it before writing the folder, under the same lock. Readers need not call it.
    """
    folder = behind_link(folder)
    aside = _aside(folder)
    if aside.is_dir():
        if folder.exists():
            discard(folder, aside)  # the new folder is in place; only the clean-up was missing
        else:
            os.rename(aside, folder)


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty scratch folder that becomes `folder` if the block raises no exception.

    The scratch folder is beside `folder`, so moving it into place is one rename on one file system.
    If the block raises, it is removed and `folder` is unchanged. If the process is killed, a
    scratch folder (`.<name>-minipeft-...`) may be left, but `folder` is either the old or the new
    one. Between two renames the old folder is `.<name>-minipeft-set-aside`; if the process is
    killed then, the next writer puts it back. For a symbolic link, its target is replaced.
    Concurrent writers of one folder need a lock.
    Raises NotADirectoryError if `folder` is a file or a broken link.
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
    """The umask of this process, which Python can only read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
