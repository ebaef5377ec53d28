"""Live coding: tasks of the exercises, with their checks, as an interviewer would set them."""

import json
import re
from collections.abc import Callable
from typing import NamedTuple

from minipeft.exercises import FOLDER, load_checks
from minipeft.interview.bank import FOLDER as BANK
from minipeft.refusals import require

LEVEL_OF = {"1": "junior", "2": "senior", "3": "research"}
# (exercise, check) of each task. The exercise has the text in English, tasks_zh.jsonl in Chinese.
ASKED = [
    ("01_tokens_and_padding", "position_ids"),
    ("02_label_masking", "encode_pair"),
    ("03_training_loop", "decay_groups"),
    ("03_training_loop", "accumulated_backward"),
    ("04_memory_math", "round_trip"),
    ("06_prompt_tuning", "prompt_tuned"),
    ("08_prefix_tuning", "prefix_attention"),
    ("08_prefix_tuning", "lengthen"),
    ("10_adapters", "adapter"),
    ("11_lora", "lora_layer"),
    ("11_lora", "merge"),
    ("12_distillation", "distillation_loss"),
    ("14_beyond_one_machine", "rank_loss"),
    ("15_interview", "chat_row"),
    ("15_interview", "ring_all_reduce"),
    ("15_interview", "pack"),
]
# What only a reader of the whole exercise understands.
LEFT_OUT = re.compile(r"One mistake is left.*?\n\n| You have all the parts\.", re.S)


class Task(NamedTuple):
    """One coding task: its text in Markdown, the code to start from, and its check."""

    exercise: str
    name: str
    title: str
    level: str
    minutes: int
    text: dict[str, str]
    starter: str
    call: str
    check: Callable[..., None]

    def answer_in(self, space: dict) -> list:
        """What the check takes, from the variables that a candidate's code defined.

        Raises NameError for a function that is not there.
        """
        names = re.findall(r"\w+", self.call.partition("(")[2])
        missing = [name for name in names if name not in space]
        if missing:
            raise NameError(f"the code defines no {' and no '.join(missing)}")
        return [space[name] for name in names]


def coding_tasks() -> list[Task]:
    """All tasks for live coding, read from the exercises.

    Raises ValueError where minipeft was installed without its exercises.
    """
    require(FOLDER.is_dir(), f"There are no exercises in {FOLDER}; use the repository.")
    chinese = _chinese()
    return [_task(exercise, name, chinese) for exercise, name in ASKED]


def _chinese():
    """{(exercise, name of the function or class to write): its text in Chinese}."""
    with open(BANK / "coding" / "tasks_zh.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {
        (row["exercise"], row["name"]): f"**{row['title']}。** {row['text']}\n\n"
        f"<details><summary>思路</summary>\n\n{row['hint']}\n\n</details>"
        for row in rows
    }


def _task(exercise, name, chinese):
    path = FOLDER / f"{exercise}.ipynb"
    cells = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    call = next(cell for cell in cells if cell.startswith(f"checks.{name}(")).splitlines()[0]
    # A task that takes what another one wrote is set together with it.
    needed = re.findall(r"\w+", call.partition("(")[2])
    places = sorted(
        (i, each) for i, cell in enumerate(cells)
        for each in needed if re.search(rf"^(def|class) {each}\b", cell, re.M)
    )  # fmt: skip
    texts = [next(cell for cell in cells[i::-1] if cell.startswith("## Task")) for i, _ in places]
    heading = r"## Task \d+\. (.+) \(.*?(\d+) minutes, difficulty (\d).*\)\n"
    found = [re.match(heading, text) for text in texts]
    require(all(found), f"A heading in {exercise} says no minutes and difficulty.")
    english = [
        f"**{each[1]}{'' if each[1].endswith('?') else '.'}** "
        + LEFT_OUT.sub("", text[each.end() :].strip())
        for each, text in zip(found, texts, strict=True)
    ]
    return Task(
        exercise, name, found[-1][1], LEVEL_OF[max(each[3] for each in found)],
        sum(int(each[2]) for each in found),
        {"en": "\n\n".join(english),
         "zh": "\n\n".join(chinese[exercise, each] for _, each in places)},
        "\n\n\n".join(cells[i] for i, _ in places), call, getattr(load_checks(exercise), name),
    )  # fmt: skip
