"""One file for one question. TASKS names them all: {task: (settings, one training run)}."""

from functools import partial

from minipeft import load_grades, load_reviews
from tasks import (
    addition,
    chinese,
    distillation,
    encoder_or_table,
    grades,
    masking,
    reviews,
    subspaces,
)

TASKS = {
    **{task: (grades.settings_of(task), partial(grades.run, task)) for task in grades.LISTS},
    "addition": (addition.SETTINGS, addition.run),
    **{task: (reviews.settings_of(task), partial(reviews.run, task)) for task in reviews.METHODS},
    "encoder_or_table": (encoder_or_table.SETTINGS, encoder_or_table.run),
    "masking": (masking.SETTINGS, masking.run),
    "subspaces": (subspaces.SETTINGS, subspaces.run),
    **{
        task: (distillation.settings_of(task), partial(distillation.run, task))
        for task in distillation.LISTS
    },
    "chinese": (chinese.SETTINGS, chinese.run),
}
# {task: what loads its labeled rows}, where an answer is one of a few words: the test rows are the
# first of the split.
LABELED = {
    **dict.fromkeys(grades.LISTS, load_grades),
    **dict.fromkeys([*reviews.METHODS, "masking", "subspaces", "distillation"], load_reviews),
}
