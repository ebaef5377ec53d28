"""Live coding: tasks of the exercises, with their checks, as an interviewer would set them."""

import json
import re
from collections.abc import Callable
from typing import NamedTuple

from minipeft.exercises import FOLDER, load_checks
from minipeft.refusals import require

LEVEL_OF = {"1": "junior", "2": "senior", "3": "research"}
# (exercise, check): what is asked, in Chinese. The exercise has it in English.
ASKED = {
    ("01_tokens_and_padding", "position_ids"): "由注意力掩码算出位置编号，左填充和右填充都要对。",
    ("02_label_masking", "encode_pair"): "把提示和回答编码成输入与标签，只在回答上计算损失。",
    ("03_training_loop", "decay_groups"): "把参数分成参与和不参与权重衰减的两组。",
    ("03_training_loop", "accumulated_backward"): "按词元数（而不是按 batch）累积梯度。",
    ("04_memory_math", "round_trip"): "分块 4 位量化：求最大绝对值、查码本、还原。",
    ("06_prompt_tuning", "prompt_tuned"): "写出 prompt tuning 的前向过程。",
    ("08_prefix_tuning", "prefix_attention"): "写出能看到 prefix 的因果注意力。",
    ("08_prefix_tuning", "lengthen"): "有 prefix 时，掩码和位置编号应当怎样延长。",
    ("10_adapters", "adapter"): "写一个 adapter 模块，初始时不改变模型的输出。",
    ("11_lora", "lora_layer"): "写一个包住 nn.Linear 的 LoRA 层。",
    ("11_lora", "merge"): "把 LoRA 合并进权重。",
    ("12_distillation", "distillation_loss"): "写出带温度的蒸馏损失，并按目标词元平均。",
    ("14_beyond_one_machine", "rank_loss"): "多卡数据并行时，每张卡的损失应当怎样加权。",
    ("15_interview", "chat_row"): "多轮对话的标签：每一轮助手的回答都要训练。",
    ("15_interview", "ring_all_reduce"): "在纸上演算 ring all-reduce：结果和每张卡的发送量。",
    ("15_interview", "pack"): "把多条短样本打包成一行，互相不可见。",
}


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
    return [_task(exercise, name, chinese) for (exercise, name), chinese in ASKED.items()]


def _task(exercise, name, chinese):
    path = FOLDER / f"{exercise}.ipynb"
    cells = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    call = next(cell for cell in cells if cell.startswith(f"checks.{name}(")).splitlines()[0]
    # A task that takes what another one wrote is set together with it.
    needed = re.findall(r"\w+", call.partition("(")[2])
    places = sorted(
        i for i, cell in enumerate(cells)
        for each in needed if re.search(rf"^(def|class) {each}\b", cell, re.M)
    )  # fmt: skip
    texts = [next(cell for cell in cells[i::-1] if cell.startswith("## Task")) for i in places]
    heading = r"## Task \d+\. (.+) \(.*?(\d+) minutes, difficulty (\d).*\)\n"
    found = [re.match(heading, text) for text in texts]
    require(all(found), f"A heading in {exercise} says no minutes and difficulty.")
    titles = [
        f"**{each[1]}.** {text[each.end() :].strip()}"
        for each, text in zip(found, texts, strict=True)
    ]
    english = "\n\n".join(titles)
    return Task(
        exercise, name, found[-1][1], LEVEL_OF[max(each[3] for each in found)],
        sum(int(each[2]) for each in found),
        {"en": english, "zh": f"**{chinese}**\n\n{english}"},
        "\n\n\n".join(cells[i] for i in places), call, getattr(load_checks(exercise), name),
    )  # fmt: skip
