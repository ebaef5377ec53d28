"""The three data sets of the course, each as a DatasetDict with splits that never change."""

import json
import random
from numbers import Real
from pathlib import Path

from minipeft.assets.fetch import AssetError
from minipeft.assets.sources import LANGUAGES, REVIEW_FILES, fetch_dialogues, fetch_reviews
from minipeft.refusals import require, shown

INSTRUCTIONS = {"english": "instructions_en.jsonl", "chinese": "instructions_zh.jsonl"}
PACKAGE = Path(__file__).resolve().parents[1]
INSTRUCTION_FOLDER = PACKAGE / "data"  # in an installed package; in the repository it is beside it
if not INSTRUCTION_FOLDER.is_dir():
    INSTRUCTION_FOLDER = PACKAGE.parent / "data"


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
    """The splits as a DatasetDict with these columns. Without datasets: as lists of dicts."""
    rows = {name: [{c: row[c] for c in columns} for row in part] for name, part in parts.items()}
    try:
        from datasets import Dataset, DatasetDict
    except ModuleNotFoundError:
        return rows
    return DatasetDict({name: Dataset.from_list(part) for name, part in rows.items()})


def load_reviews(source="movies", min_rating=1.0):
    """Rated short texts as a DatasetDict with splits train, validation, test (80/10/10 per cent).

    `source`: movies, amazon, editorials or tweets. Columns: text (str), rating (float, the mean
    of about 20 people, -4 to 4), label (0 negative, 1 positive), prompt and answer (str). Rows
    with |rating| < `min_rating` are left out, and always those rated exactly 0. Snippets of one
    document share a split. Source: Hutto and Gilbert 2014. Raises ValueError, AssetError.
    """
    names = list(REVIEW_FILES)
    require(source in names, f"There are no reviews {shown(source)}; choose one of {names}.")
    is_number = isinstance(min_rating, Real) and not isinstance(min_rating, bool)
    if not is_number or not 0 <= min_rating <= 3:
        raise ValueError(f"min_rating must be a number from 0 to 3, but is {shown(min_rating)}.")
    rows, seen = [], set()
    for row in _read_rows(fetch_reviews() / f"{source}.jsonl"):
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
    rows = _read_rows(fetch_dialogues() / f"{language}.jsonl")
    rows = list({(row["prompt"].casefold(), row["answer"]): row for row in rows}.values())
    parts = _split(rows, lambda row: row["prompt"].casefold())
    return _dataset(parts, ["prompt", "answer", "topic"])


def load_instructions(language="english"):
    """The course's own instructions as a DatasetDict: columns prompt, answer, category (all str).

    `language`: english or chinese. Splits train, validation, test (80/10/10 per cent), drawn within
    each category. The prompt is the instruction, the input if there is one, and the cue "Answer:"
    or "回答：", each on a line of its own; English answers begin with a space. Without the library
    datasets, as in a plain install, each split is a list of dicts. Source: data/ of the repository,
    so neither cache nor network is used. Raises ValueError, AssetError.
    """
    require(
        language in list(INSTRUCTIONS),
        f"There are no instructions in {shown(language)}; choose one of {LANGUAGES}.",
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
