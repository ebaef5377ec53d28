"""The three data sets of the course, each as a DatasetDict with fixed splits."""

import bisect
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipeft.assets.fetch import AssetError
from minipeft.assets.sources import LANGUAGES, REVIEW_FILES, fetch_dialogues, fetch_reviews
from minipeft.refusals import is_number, require, shown

if TYPE_CHECKING:
    from datasets import DatasetDict

INSTRUCTIONS = {"english": "instructions_en.jsonl", "chinese": "instructions_zh.jsonl"}
GRADES = (" terrible", " bad", " okay", " good", " great")
PACKAGE = Path(__file__).resolve().parents[1]
INSTRUCTION_FOLDER = PACKAGE / "data"  # in an installed package; else next to the package
if not INSTRUCTION_FOLDER.is_dir():
    INSTRUCTION_FOLDER = PACKAGE.parent / "data"


def _read_rows(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _split(rows, group_of):
    """Seeded 80/10/10 split that does not separate the rows of a group.

    Rows are filtered after it, so a filter never moves a row to another split.
    """
    groups = sorted({group_of(row) for row in rows})
    random.Random(0).shuffle(groups)
    bounds = {"train": 0.8, "validation": 0.9, "test": 1.0}
    split_of = {}
    for i, group in enumerate(groups):
        quantile = (i + 0.5) / len(groups)
        split_of[group] = next(name for name, bound in bounds.items() if quantile < bound)
    splits = {name: [row for row in rows if split_of[group_of(row)] == name] for name in bounds}
    for split in splits.values():
        random.Random(0).shuffle(split)
    return splits


def _dataset(splits, columns):
    """The splits as a DatasetDict with these columns. Without datasets: as lists of dicts."""
    rows = {name: [{c: row[c] for c in columns} for row in split] for name, split in splits.items()}
    try:
        from datasets import Dataset, DatasetDict
    except ModuleNotFoundError:
        return rows
    return DatasetDict({name: Dataset.from_list(split) for name, split in rows.items()})


def load_reviews(source: str = "movies", min_rating: float = 1.0) -> "DatasetDict":
    """Rated short texts as a DatasetDict with splits train, validation, test (80/10/10 percent).

    `source`: movies, amazon, editorials or tweets. Columns: text (str), rating (float, the mean
    of about 20 raters, -4 to 4), label (0 negative, 1 positive), prompt and answer (str). Rows with
    rating 0 or |rating| < `min_rating` are left out. Snippets of one document are in one split.
    Source: Hutto and Gilbert 2014. Raises ValueError, AssetError.
    """
    names = list(REVIEW_FILES)
    require(source in names, f"There are no reviews {shown(source)}; choose one of {names}.")
    require(
        is_number(min_rating) and 0 <= min_rating <= 3,
        f"min_rating must be a number from 0 to 3, but is {shown(min_rating)}.",
    )
    splits = _reviews_of(source)
    for split in splits.values():
        split[:] = [r for r in split if r["rating"] != 0 and abs(r["rating"]) >= min_rating]
        for row in split:
            row["label"] = int(row["rating"] > 0)
            row["prompt"] = f"Review: {row['text']}\nSentiment:"
            row["answer"] = (" negative", " positive")[row["label"]]
    return _dataset(splits, ["text", "rating", "label", "prompt", "answer"])


def load_grades() -> "DatasetDict":
    """The rated film snippets in five classes of equal size, as a DatasetDict.

    Columns: text (str), rating (float, -4 to 4), label (0 to 4, from the lowest fifth of the
    ratings to the highest), prompt, and answer: one of " terrible", " bad", " okay", " good",
    " great". Splits train, validation, test: 9,103, 500 and 1,000 rows; validation and test are
    parts of those of `load_reviews`. Source: Hutto and Gilbert 2014. Raises AssetError.
    """
    splits = _reviews_of("movies")
    ratings = sorted(row["rating"] for split in splits.values() for row in split)
    limits = [ratings[len(ratings) * fifth // 5] for fifth in range(1, 5)]
    for split in splits.values():
        for row in split:
            row["label"] = bisect.bisect_right(limits, row["rating"])
            row["prompt"] = f"Review: {row['text']}\nIn one word, the film is"
            row["answer"] = GRADES[row["label"]]
    rest = splits["validation"][500:] + splits["test"][1000:]
    splits = {
        "train": splits["train"] + rest,
        "validation": splits["validation"][:500],
        "test": splits["test"][:1000],
    }
    random.Random(0).shuffle(splits["train"])
    return _dataset(splits, ["text", "rating", "label", "prompt", "answer"])


def _reviews_of(source):
    """{split: rows of the cached file, without duplicate texts}."""
    rows, seen = [], set()
    for row in _read_rows(fetch_reviews() / f"{source}.jsonl"):
        if row["text"] and (key := row["text"].casefold()) not in seen:
            seen.add(key)
            rows.append(row)
    # The id of a whole text is like "12", that of the third snippet of document 12 is "12_3".
    return _split(rows, lambda row: row["id"].split("_")[0])


def load_dialogues(language: str = "english") -> "DatasetDict":
    """Question and answer pairs as a DatasetDict: columns prompt, answer, topic (all str).

    `language`: english or chinese. Splits train, validation, test (80/10/10 percent). Pairs with
    the same prompt are in one split. Source: chatterbot-corpus 1.3.3.
    Raises ValueError, AssetError.
    """
    require(
        language in LANGUAGES,
        f"There are no dialogues in {shown(language)}; choose one of {LANGUAGES}.",
    )
    rows = _read_rows(fetch_dialogues() / f"{language}.jsonl")
    rows = list({(row["prompt"].casefold(), row["answer"]): row for row in rows}.values())
    splits = _split(rows, lambda row: row["prompt"].casefold())
    return _dataset(splits, ["prompt", "answer", "topic"])


def load_instructions(language: str = "english") -> "DatasetDict":
    """The course's own instructions as a DatasetDict: columns prompt, answer, category (all str).

    `language`: english or chinese. Splits train, validation, test (80/10/10 percent), stratified
    by category. A prompt is the instruction, the input if there is one, and the cue "Answer:" or
    "回答：", each on its own line; English answers begin with a space. If the library datasets is
    not installed, each split is a list of dicts. Source: data/ of the repository, so neither cache
    nor network is used. Raises ValueError, AssetError.
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
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for category in sorted({row["category"] for row in rows}):
        of_category = [row for row in rows if row["category"] == category]
        for name, split in _split(of_category, lambda row: row["prompt"].casefold()).items():
            splits[name] += split
    for split in splits.values():
        random.Random(0).shuffle(split)
    return _dataset(splits, ["prompt", "answer", "category"])
