"""Wrong answers to exercise 12: (check, source of the answer, part of the message expected)."""

from edits import edited

_DIVERGENCE = """
import torch
from torch.nn.functional import kl_div

def divergence(student_logits, teacher_logits, direction="forward"):
    if direction not in ("forward", "reverse"):
        raise ValueError("neither")
    log_s, log_t = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    log_p, log_q = (log_t, log_s) if direction == "forward" else (log_s, log_t)
    return kl_div(log_q, log_p.exp(), reduction="none").sum(-1).mean()
"""

# Everything by torch's functions on all positions, where the solution picks the targets first.
_LOSS = """
import torch
from torch.nn.functional import cross_entropy, kl_div

def distillation_loss(student_logits, teacher_logits, labels, alpha=0.5, temperature=2.0):
    T = temperature
    labels = labels[:, 1:]
    student, teacher = student_logits[:, :-1].float(), teacher_logits[:, :-1].float().detach()
    hard = cross_entropy(student.transpose(1, 2), labels)
    inputs, targets = (student / T).log_softmax(-1), (teacher / T).softmax(-1)
    rows = kl_div(inputs, targets, reduction="none").sum(-1)
    chosen = labels != -100
    soft = rows[chosen].mean() * T**2
    return alpha * hard + (1 - alpha) * soft
"""

# Row by row: the mean of no target is NaN, and NaN times zero is NaN.
_BY_ROW = """
from torch.nn.functional import cross_entropy, kl_div

def distillation_loss(student_logits, teacher_logits, labels, alpha=0.5, temperature=2.0):
    total, count, T = 0.0, 0, temperature
    for s, t, y in zip(student_logits.float(), teacher_logits.detach().float(), labels):
        s, t, y = s[:-1], t[:-1], y[1:]
        keep = y != -100
        n = int(keep.sum())
        hard = cross_entropy(s[keep], y[keep])
        inputs, targets = (s[keep] / T).log_softmax(-1), (t[keep] / T).softmax(-1)
        soft = kl_div(inputs, targets, reduction="none").sum(-1).mean() * T**2
        total = total + n * (alpha * hard + (1 - alpha) * soft)
        count += n
    return total / count
"""

# A model built from a new config and filled, where the solution cuts a copy.
_STUDENT = """
import copy
import torch
from torch import nn

def student_from_layers(teacher, keep):
    if len(keep) == 0 or min(keep) < 0 or max(keep) >= len(teacher.model.layers):
        raise ValueError("no such blocks")
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(keep)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in keep]
    student = type(teacher)(config).eval()
    for name in ("embed_tokens", "norm"):
        getattr(student.model, name).load_state_dict(getattr(teacher.model, name).state_dict())
    student.lm_head.load_state_dict(teacher.lm_head.state_dict())
    for layer, i in zip(student.model.layers, keep):
        layer.load_state_dict(teacher.model.layers[i].state_dict())
    return student
"""

_COPY = """
import copy
import torch
from torch import nn

def student_from_layers(teacher, keep):
    if len(keep) == 0 or min(keep) < 0 or max(keep) >= len(teacher.model.layers):
        raise ValueError("no such blocks")
    student = copy.deepcopy(teacher)
    student.model.layers = nn.ModuleList(copy.deepcopy(student.model.layers[i]) for i in keep)
    student.config.num_hidden_layers = len(keep)
    for number, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = number
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = [student.config.layer_types[i] for i in keep]
    return student.requires_grad_(True)
"""

_POLICY = """
import torch

def on_policy_loss(student, teacher, input_ids, attention_mask, max_new_tokens):
    ids = student.generate(input_ids, attention_mask=attention_mask, do_sample=True, top_k=0,
                           max_new_tokens=max_new_tokens)
    width = input_ids.shape[1]
    new = ids[:, width:]
    ends = (new == student.config.eos_token_id).long()
    written = ends.cumsum(1) - ends == 0
    mask = torch.cat([attention_mask, torch.ones_like(new)], 1)
    s = student(ids, attention_mask=mask).logits[:, width - 1 : -1]
    with torch.no_grad():
        t = teacher(ids, attention_mask=mask).logits[:, width - 1 : -1]
    return divergence(s[written], t[written], "reverse")
"""

_TARGETS = """
import torch

def teacher_targets(teacher, batch):
    teacher.eval()
    with torch.no_grad():
        output = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return output.logits
"""

_STUDENT_LOSS = """
def student_loss(student, targets, batch, alpha, temperature):
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    student.train()
    logits = student(input_ids=ids, attention_mask=mask).logits
    return distillation_loss(logits, targets, labels, alpha, temperature)
"""

_STEP = """
import torch

def distil_step(student, teacher, optimizer, batch, alpha, temperature):
    targets = teacher_targets(teacher, batch)
    loss = student_loss(student, targets, batch, alpha, temperature)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
"""

_FOUND = """
def distil_step(student, teacher, optimizer, batch, alpha, temperature):
    return found_step(student, teacher, optimizer, batch, alpha, temperature)
"""


def _edit(source, *texts):
    return edited(source, *zip(texts[::2], texts[1::2], strict=True))


KL = 'kl_div(log_q, log_p.exp(), reduction="none").sum(-1).mean()'
PAIR = '(log_t, log_s) if direction == "forward" else (log_s, log_t)'
SOFT = "rows[chosen].mean() * T**2"
SHIFT = "student_logits[:, :-1].float(), teacher_logits[:, :-1].float().detach()"
BOTH = "alpha * hard + (1 - alpha) * soft"
HARD = "cross_entropy(student.transpose(1, 2), labels)"
COPIED = "copy.deepcopy(student.model.layers[i]) for i in keep"
NUMBERED = """    for number, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = number
"""
REFUSED = """    if len(keep) == 0 or min(keep) < 0 or max(keep) >= len(teacher.model.layers):
        raise ValueError("no such blocks")
"""
KINDS = "[student.config.layer_types[i] for i in keep]"
WHERE = "logits[:, width - 1 : -1]"
ENDS = "ends.cumsum(1) - ends == 0"
ONES = "torch.cat([attention_mask, torch.ones_like(new)], 1)"
S_MASK = "s = student(ids, attention_mask=mask)"
T_MASK = "t = teacher(ids, attention_mask=mask)"
LOSS = "distillation_loss(logits, targets, labels, alpha, temperature)"
ASKED = 'teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])'
PLAIN = "    with torch.no_grad():\n        output = "
RETURNED = "return output.logits"
DIVERGED = 'divergence(s[written], t[written], "reverse")'


def _soft(new):
    return _edit(_LOSS, SOFT, new)


def _step_loss(new):
    """The loss of a step with a soft part of its own, `new`."""
    return _edit(
        _STUDENT_LOSS,
        f"    return {LOSS}",
        "    from torch.nn.functional import cross_entropy, kl_div\n"
        "    T = temperature\n"
        "    s, t, wanted = logits[:, :-1], targets[:, :-1], labels[:, 1:]\n"
        "    chosen = wanted != -100\n"
        "    hard = cross_entropy(s[chosen], wanted[chosen])\n"
        "    def kl(p, q):\n"
        "        return kl_div(q.log_softmax(-1), p.softmax(-1), reduction='none').sum(-1)\n"
        f"    return alpha * hard + (1 - alpha) * {new}",
    )


WRONG = [
    ("divergence", _edit(_DIVERGENCE, "kl_div(log_q, log_p.exp()", "kl_div(log_p, log_q.exp()"),
     "taken for each other"),
    ("divergence", _edit(_DIVERGENCE, PAIR, "(log_t, log_s)"), "is not symmetric"),
    ("divergence", _edit(_DIVERGENCE, KL, f"-{KL}"), "its sign is wrong"),
    ("divergence", _edit(_DIVERGENCE, '"none").sum(-1)', '"none")'),
     "by the size of the vocabulary as well. A row"),
    ("divergence", _edit(_DIVERGENCE, '"none").sum(-1).mean()', '"sum")'),
     "is a sum over the rows"),
    ("divergence", _edit(_DIVERGENCE, '"none").sum(-1).mean()', '"batchmean")'),
     "by the first dimension alone"),
    ("divergence", _edit(_DIVERGENCE, KL,
                         "kl_div((student_logits if direction == 'forward' else teacher_logits)"
                         ".softmax(-1), log_p.exp(), reduction='none').sum(-1).mean()"),
     "there is a probability"),
    ("divergence", _edit(_DIVERGENCE, KL, "-(log_p.exp() * log_q).sum(-1).mean()"),
     "that is a cross-entropy"),
    ("divergence", _edit(_DIVERGENCE, KL, KL + " / torch.tensor(2.0).log()"), "it is in bits"),
    ("divergence", _edit(_DIVERGENCE, KL, "kl_div(log_q, log_p, reduction='none', log_target=True)"
                                          ".sum(-1).mean()"), "zero times infinity"),
    ("divergence", _edit(_DIVERGENCE, KL, "(log_p.exp() * (log_p - log_q)).sum(-1).nan_to_num()"
                                          ".mean()"), "the value is not the divergence"),
    ("divergence", _edit(_DIVERGENCE, KL, "(log_p.exp().detach() * (log_p - log_q)).sum(-1)"
                                          ".mean()"), "was detached"),
    ("divergence", _edit(_DIVERGENCE, "student_logits.log", "student_logits.detach().log"),
     "no gradient reaches the student"),
    ("divergence", _edit(_DIVERGENCE, 'raise ValueError("neither")', "pass"), "is accepted"),
    ("distillation_loss", _edit(_LOSS, BOTH, "(1 - alpha) * hard + alpha * soft"), "wrong part"),
    ("distillation_loss", _edit(_LOSS, BOTH, "hard + (1 - alpha) * soft"), "counts in full"),
    ("distillation_loss", _soft("rows[chosen].mean()"), "T squared is missing"),
    ("distillation_loss", _soft("rows[chosen].mean() * T"), "by T, not by its square"),
    ("distillation_loss", _soft("rows[chosen].mean() * T**4"), "twice"),
    ("distillation_loss", _edit(_LOSS, "(teacher / T)", "teacher"), "only the student's logits"),
    ("distillation_loss", _edit(_LOSS, "(student / T)", "student"), "only the teacher's logits"),
    ("distillation_loss", _edit(_LOSS, "(student / T)", "student", "(teacher / T)", "teacher"),
     "neither model's logits"),
    ("distillation_loss", _edit(_LOSS, "(student / T)", "(student * T)",
                                "(teacher / T)", "(teacher * T)"), "multiplied by the temperature"),
    ("distillation_loss", _edit(_LOSS, "= (student / T).log_softmax(-1), (teacher / T).softmax",
                                "= (teacher / T).log_softmax(-1), (student / T).softmax"),
     "the other way round"),
    (
        "distillation_loss",
        _edit(_LOSS, "(student / T).log_softmax(-1), (teacher / T).softmax(-1)",
              "(student_logits / T).log_softmax(-1), (teacher_logits / T).softmax(-1)",
              SOFT, "rows[:, 1:][chosen].mean() * T**2"),
        "where the target stands, not where it is predicted",
    ),
    # The labels are shifted, and then once more, by somebody who shifts the logits as well.
    (
        "distillation_loss",
        _edit(_LOSS, "(student / T).log_softmax(-1), (teacher / T).softmax(-1)",
              "(student_logits[:, 1:] / T).log_softmax(-1), "
              "(teacher_logits[:, 1:] / T).softmax(-1)",
              SOFT, "rows[:, 1:][chosen[:, :-1]].mean() * T**2"),
        "one position too late",
    ),
    ("distillation_loss", _soft("rows.mean() * T**2"), "but the last are counted, -100 or not"),
    (
        "distillation_loss",
        _edit(_LOSS, "(student / T).log_softmax(-1), (teacher / T).softmax(-1)",
              "(student_logits / T).log_softmax(-1), (teacher_logits / T).softmax(-1)",
              SOFT, "rows.mean() * T**2"),
        "padding among them",
    ),
    ("distillation_loss", _soft("rows[chosen].sum() / len(rows) * T**2"),
     "of rows, not of targets"),
    ("distillation_loss", _soft("kl_div(inputs, targets, reduction='batchmean') * T**2"),
     "all positions but the last are divided"),
    ("distillation_loss", _soft("(rows * chosen).mean() * T**2"), "over the targets is divided"),
    ("distillation_loss", _soft("rows[chosen].sum() * T**2"), "it is a sum, not a mean."),
    ("distillation_loss", _soft("kl_div(inputs, targets, reduction='none')[chosen].mean() * T**2"),
     "by the size of the vocabulary as well"),
    (
        "distillation_loss",
        _soft("((rows * chosen).sum(1) / chosen.sum(1)).mean() * T**2"),
        "targets of short answers count more",
    ),
    ("distillation_loss", _edit(_LOSS, "(student / T).log_softmax", "(student / T).softmax"),
     "there is a probability"),
    (
        "distillation_loss",
        _edit(_LOSS, 'kl_div(inputs, targets, reduction="none").sum(-1)',
              "-(targets * inputs).sum(-1)"),
        "that is a cross-entropy",
    ),
    ("distillation_loss", _edit(_LOSS, HARD, "cross_entropy(student.transpose(1, 2) / T, labels)"),
     "the labels know of none"),
    ("distillation_loss", _edit(_LOSS, BOTH, "alpha * T**2 * hard + (1 - alpha) * soft"),
     "that is for the soft part"),
    (
        "distillation_loss",
        _edit(_LOSS, HARD, "cross_entropy(student_logits[:, 1:].transpose(1, 2), labels)"),
        "asked for its own token",
    ),
    ("distillation_loss", _edit(_LOSS, "2), labels)", "2), labels, reduction='sum')"),
     "a sum, not a mean over the targets"),
    ("distillation_loss", _edit(_LOSS, "2), labels)", "2), labels, reduction='none').mean()"),
     "at alpha=1: its sum is divided by all"),
    ("distillation_loss", _edit(_LOSS, BOTH, "alpha * hard + (1 - alpha) ** 2 * soft"),
     "are not mixed as they are"),
    ("distillation_loss", _edit(_LOSS, ".float().detach()", ".float()"), "reaches the teacher"),
    ("distillation_loss", _edit(_LOSS, "student_logits[:, :-1]", "student_logits.detach()[:, :-1]"),
     "No gradient reaches the student"),
    ("distillation_loss", _edit(_LOSS, "(student / T)", "(student.detach() / T)"),
     "its gradient with respect to the student"),
    ("distillation_loss", _edit(_LOSS, ".float()", ""), "which has three digits"),
    ("distillation_loss", _edit(_LOSS, "    labels = labels[:, 1:]",
                                "    labels[labels == -100] = 0\n    labels = labels[:, 1:]"),
     "The labels that came in"),
    ("distillation_loss", _soft("rows[chosen].median() * T**2"), "no mistake that is known"),
    ("student_from_layers", _edit(_COPY, "copy.deepcopy(teacher)", "teacher"),
     "itself has been cut"),
    (
        "student_from_layers",
        _edit(_COPY, "    student.config.num", "    teacher.config.num"),
        "The config of the teacher says",
    ),
    ("student_from_layers", _edit(_COPY, "    student.config.num_hidden_layers = len(keep)\n", ""),
     "it would be another model"),
    (
        "student_from_layers",
        _edit(_COPY, "    student.config.num",
              "    student.config = copy.deepcopy(student.config)\n    student.config.num"),
        "student.model.config is another one",
    ),
    ("student_from_layers", _edit(_COPY, "copy.deepcopy(student.model.layers[i])",
                                  "teacher.model.layers[i]"),
     "q_proj.weight of the student"),
    (
        "student_from_layers",
        _edit(_STUDENT, "layer.load_state_dict(teacher.model.layers[i].state_dict())", "pass"),
        "of none of the teacher's",
    ),
    ("student_from_layers", _edit(_COPY, f"nn.ModuleList({COPIED})",
                                  "student.model.layers[: len(keep)]"), "blocks [0, 1]"),
    ("student_from_layers", _edit(_COPY, COPIED,
                                  "m for i, m in enumerate(student.model.layers) if i not in keep"),
     "blocks [0, 2]"),
    ("student_from_layers", _edit(_STUDENT, '"embed_tokens", "norm"', '"norm",',
                                  "    student.lm_head.load", "    if 0: student.lm_head.load"),
     "embed_tokens.weight is not a copy"),
    (
        "student_from_layers",
        _edit(_COPY, "    return student.req",
              "    student.lm_head.weight = nn.Parameter(student.lm_head.weight.clone())\n"
              "    return student.req"),
        "is tied to its embedding",
    ),
    ("student_from_layers", _edit(_COPY, NUMBERED, ""), "file their keys and values there"),
    (
        "student_from_layers",
        _edit(_COPY, NUMBERED, f"{NUMBERED}    for number, i in enumerate(keep):\n"
                               "        teacher.model.layers[i].self_attn.layer_idx = number\n"),
        "have been given other numbers",
    ),
    ("student_from_layers", _edit(_COPY, ".requires_grad_(True)", ""), "as frozen as the teacher"),
    ("student_from_layers", _edit(_COPY, KINDS, "student.config.layer_types"), "has 4 entries"),
    ("student_from_layers", _edit(_COPY, KINDS, "student.config.layer_types[: len(keep)]"),
     "With keep=(1, 3) config.layer_types"),
    ("student_from_layers", _edit(_COPY, KINDS, KINDS + "\n        teacher.config.layer_types = "
                                                "student.config.layer_types"),
     "of the teacher has been cut"),
    ("student_from_layers", _edit(_COPY, REFUSED, ""), "keep=() is accepted"),
    ("student_from_layers", _edit(_COPY, REFUSED, "    if len(keep) == 0:\n"
                                                  "        raise ValueError('none')\n"),
     "ends in an IndexError"),
    ("student_from_layers", _edit(_COPY, REFUSED, "    if len(keep) == 0:\n"
                                                  "        raise ValueError('none')\n"
                                                  "    last = len(teacher.model.layers) - 1\n"
                                                  "    keep = [min(i, last) for i in keep]\n"),
     "keep=(0, 4) is accepted"),
    ("on_policy_loss", _edit(_POLICY, "ids = student.gen", "ids = teacher.gen"), "teacher writes"),
    ("on_policy_loss", _edit(_POLICY, "do_sample=True", "do_sample=False"), "its likeliest text"),
    ("on_policy_loss", _edit(_POLICY, ", top_k=0", ""), "are not drawn from all"),
    ("on_policy_loss", _edit(_POLICY, "attention_mask=attention_mask, do", "do"),
     "While it writes"),
    ("on_policy_loss", _edit(_POLICY, "max_new_tokens=max_new_tokens", "max_length=max_new_tokens"),
     "The number of new tokens"),
    ("on_policy_loss", _edit(_POLICY, '"reverse"', '"forward"'), "in the forward direction"),
    ("on_policy_loss", _edit(_POLICY, WHERE, "logits[:, width:]"), "where the new tokens stand"),
    (
        "on_policy_loss",
        _edit(_POLICY, "written = ends", "written = torch.cat([attention_mask[:, 1:] > 0, ends",
              "- ends == 0", "- ends == 0], 1)", WHERE, "logits[:, :-1]"),
        "tokens of the prompt are counted",
    ),
    (
        "on_policy_loss",
        _edit(_POLICY, WHERE, "logits", "s[written], t[written]", "s, t"),
        "every position is counted",
    ),
    ("on_policy_loss", _edit(_POLICY, "s[written], t[written]", "s, t"),
     "lets the student write: what comes after the end"),
    ("on_policy_loss", _edit(_POLICY, ENDS, "new != student.config.pad_token_id"),
     "the end token, which"),
    (
        "on_policy_loss",
        _edit(_POLICY, "s[written], t[written]", "s * written[..., None], t * written[..., None]"),
        "those after an end being zero",
    ),
    ("on_policy_loss", _edit(_POLICY, 'divergence(s[written], t[written], "reverse")',
                             'divergence(s[written], t[written], "reverse") * written.sum()'),
     "a sum over the new tokens"),
    ("on_policy_loss", _edit(_POLICY, 'divergence(s[written], t[written], "reverse")',
                             'divergence(s[written], t[written], "reverse") * written.sum() / '
                             'len(new)'), "a sum for each row"),
    ("on_policy_loss", _edit(_POLICY, ONES, "torch.ones_like(ids)"), "neither model is told"),
    ("on_policy_loss", _edit(_POLICY, T_MASK, "t = teacher(ids)"), "the teacher is not told"),
    ("on_policy_loss", _edit(_POLICY, S_MASK, "s = student(ids)"), "the student is not told"),
    ("on_policy_loss", _edit(_POLICY, "import torch\n", "import torch\n\n@torch.no_grad()"),
     "The loss has no gradient"),
    ("on_policy_loss", _edit(_POLICY, "with torch.no_grad()", "with torch.enable_grad()"),
     "A gradient reaches the teacher"),
    ("on_policy_loss", _edit(_POLICY, T_MASK, S_MASK.replace("s =", "t =")),
     "The teacher does not score"),
    ("on_policy_loss", _edit(_POLICY, "student.generate(input_ids,",
                             "student.generate(input_ids[:, -2:],"), "continue the prompts"),
    # Two directions
    ("divergence", _edit(_DIVERGENCE, 'raise ValueError("neither")', 'raise KeyError("neither")'),
     "raises KeyError instead"),
    ("divergence", _edit(_DIVERGENCE, "log_s, log_t = student_logits.log_softmax(-1), "
                                      "teacher_logits.log_softmax(-1)",
                         "log_s, log_t = student_logits.softmax(-1).log(), "
                         "teacher_logits.softmax(-1).log()"), "is rounded to 0 before"),
    ("divergence", _edit(_DIVERGENCE, "log_s, log_t = student_logits.log_softmax(-1), "
                                      "teacher_logits.log_softmax(-1)",
                         "log_s, log_t = (student_logits.softmax(-1) + 1e-9).log(), "
                         "(teacher_logits.softmax(-1) + 1e-9).log()"), "Is a small number added"),
    ("divergence", _edit(_DIVERGENCE, "student_logits.log_softmax(-1), "
                                      "teacher_logits.log_softmax(-1)",
                         "student_logits.log_softmax(1), teacher_logits.log_softmax(1)"),
     "over another axis than the vocabulary"),
    ("divergence", _edit(_DIVERGENCE, KL, "kl_div(student_logits if direction == 'forward' else "
                                          "teacher_logits, log_p.exp(), reduction='none')"
                                          ".sum(-1).mean()"), "logits are taken for logarithms"),
    ("divergence", _edit(_DIVERGENCE, KL, "kl_div(log_q, log_p.exp(), reduction='none', "
                                          "log_target=True).sum(-1).mean()"),
     "promises a logarithm"),
    ("divergence", _edit(_DIVERGENCE, KL, "(log_p.exp() * (log_p - log_q)).abs().sum(-1).mean()"),
     "were made positive"),
    ("divergence", _edit(_DIVERGENCE, KL, "kl_div(log_q, log_p.exp(), reduction='none').relu()"
                                          ".sum(-1).mean()"), "were cut off at zero"),
    ("divergence", _edit(_DIVERGENCE, '"none").sum(-1).mean()', '"sum") / 6'),
     "a size or an axis is fixed"),
    ("divergence", _edit(_DIVERGENCE, "    log_s, log_t",
                         "    student_logits -= student_logits.max(-1, keepdim=True).values\n"
                         "    log_s, log_t"), "The logits that came in"),
    ("divergence", _edit(_DIVERGENCE, "mean()", "mean().item()"), "not float"),
    # The loss
    ("distillation_loss", _soft("(student - teacher)[chosen].square().mean()"),
     "squared error of the logits, not"),
    ("distillation_loss", _soft("(student - teacher)[chosen].square().sum(-1).mean()"),
     "of the logits, summed"),
    ("distillation_loss", _soft("(inputs.exp() - targets)[chosen].square().mean() * T**2"),
     "squared error of the probabilities"),
    ("distillation_loss", _edit(_LOSS, "chosen = labels != -100", "chosen = labels > 0"),
     "targets whose id is 0 are dropped"),
    ("distillation_loss", _edit(_LOSS, HARD, "cross_entropy(student[labels > 0], "
                                             "labels[labels > 0])"), "tokens with id 0 have"),
    ("distillation_loss", _edit(_LOSS, HARD, "cross_entropy(student[labels != -100], "
                                             "teacher[labels != -100].argmax(-1))"),
     "stands where the label belongs"),
    ("distillation_loss", _soft("cross_entropy(student[chosen], teacher[chosen].argmax(-1))"),
     "is taken as a label. The rest"),
    ("distillation_loss", _soft("cross_entropy(student[chosen], teacher[chosen].argmax(-1)) * T**2"
                                ), "as a label, and T * T"),
    ("distillation_loss", _edit(_LOSS, HARD, "cross_entropy(teacher.transpose(1, 2), labels)"),
     "compared with the teacher's logits"),
    ("distillation_loss", _edit(_LOSS, HARD, "cross_entropy(student.transpose(1, 2), "
                                             "labels.clamp(min=0))"), "token 0 is asked for"),
    ("distillation_loss", _edit(_LOSS, "T = temperature", "T = 2.0"), "the temperature is 2"),
    ("distillation_loss", _edit(_LOSS, "(teacher / T).softmax(-1)",
                                "(teacher.softmax(-1) / T).softmax(-1)"),
     "probabilities are taken for its logits"),
    ("distillation_loss", _edit(_LOSS, "    T = temperature\n",
                                "    T = temperature\n    student_logits /= 1\n"
                                "    teacher_logits -= teacher_logits.mean(-1, keepdim=True)\n"),
     "The logits that came in"),
    # The labels are rolled, so the first one comes to stand at the end.
    ("distillation_loss", _edit(_LOSS, "labels[:, 1:]", "labels.roll(-1, 1)",
                                "student_logits[:, :-1]", "student_logits",
                                "teacher_logits[:, :-1]", "teacher_logits"),
     "is asked for its first token"),
    ("distillation_loss", _edit(_LOSS, "    labels = labels[:, 1:]",
                                "    n = (labels != -100).sum()\n    labels = labels[:, 1:]",
                                "2), labels)", "2), labels, reduction='sum') / n",
                                "rows[chosen].mean()", "rows[chosen].sum() / n"),
     "the divisor counts the first tokens"),
    ("distillation_loss", _edit(_LOSS, "    labels = labels[:, 1:]",
                                "    labels = torch.cat([labels[:, 1:], "
                                "torch.full((len(labels), 1),"
                                " -100)], 1)", "student_logits[:, :-1]", "student_logits",
                                "teacher_logits[:, :-1]", "teacher_logits"),
     "whatever the device of the labels"),
    ("distillation_loss", _edit(_LOSS, BOTH, "0.5 * hard + 0.5 * soft"), "same for every alpha"),
    # A student made of the teacher's blocks
    ("student_from_layers", _edit(_COPY, "for i in keep)\n    student.config.num",
                                  "for i in sorted(keep))\n    student.config.num"),
     "stand in the teacher's order"),
    ("student_from_layers", _edit(_COPY, REFUSED,
                                  "    if not keep or max(keep) >= len(teacher.model.layers):\n"
                                  "        raise ValueError('no such blocks')\n"),
     "keep=(0, -1) is accepted"),
    ("student_from_layers", _edit(_COPY, "copy.deepcopy(student.model.layers[i])",
                                  "student.model.layers[i]"), "stands in two places"),
    ("student_from_layers", _STUDENT, "the student in torch.float32"),
    ("student_from_layers", _edit(_STUDENT, "    return student\n",
                                  "    student.lm_head.weight = student.model.embed_tokens.weight\n"
                                  "    return student.to(teacher.dtype)\n"),
     "weights of its own, the student's is"),
    ("student_from_layers", _edit(_COPY, "    student = copy", "    teacher.requires_grad_(True)\n"
                                                               "    student = copy"),
     "was frozen or unfrozen on the way"),
    ("student_from_layers", _edit(_COPY, "    student = copy", "    teacher.eval()\n"
                                                               "    student = copy"),
     "into another mode on the way"),
    ("student_from_layers", _edit(_COPY, "        student.config.layer_types = " + KINDS,
                                  "        student.config.layer_types = sorted(" + KINDS + ")"),
     "With keep=(3, 0) config.layer_types"),
    ("student_from_layers", _edit(_COPY, "= len(keep)\n    for",
                                  "= len(keep)\n    student.model.rotary_emb = "
                                  "teacher.model.rotary_emb\n    for"),
     "rotary_emb.inv_freq of the student"),
    # The student's own texts
    ("on_policy_loss", _edit(_POLICY, "top_k=0,", "top_k=0, top_p=0.9,"), "top_p=0.9 changes"),
    ("on_policy_loss", _edit(_POLICY, "top_k=0,", "top_k=0, temperature=0.7,"),
     "temperature=0.7 changes"),
    ("on_policy_loss", _edit(_POLICY, DIVERGED,
                             "(s[written].softmax(-1).detach() * (s[written].log_softmax(-1) "
                             "- t[written].log_softmax(-1))).sum(-1).mean()"),
     "probabilities are detached, and the rest"),
    ("on_policy_loss", _edit(_POLICY, DIVERGED,
                             f"2 * {DIVERGED} - {DIVERGED}.detach()"),
     "weights get another gradient"),
    ("on_policy_loss", _edit(_POLICY, DIVERGED,
                             "(s.log_softmax(-1) - t.log_softmax(-1))"
                             ".gather(2, new[..., None])[..., 0][written].mean()"),
     "only the probabilities of the tokens drawn"),
    ("on_policy_loss", _edit(_POLICY, "    return " + DIVERGED,
                             "    rows = [divergence(a[w], b[w], 'reverse') for a, b, w in "
                             "zip(s, t, written)]\n    return sum(rows) / len(rows)"),
     "tokens of short texts count more"),
    ("on_policy_loss", _edit(_POLICY, "ends = (new ==", "ends = (ids ==", ENDS,
                             "(ends.cumsum(1) - ends == 0)[:, width:]"),
     "an end token in the prompt"),
    ("on_policy_loss", _edit(_POLICY, "new = ids[:, width:]", "new = ids[:, -max_new_tokens:]",
                             WHERE, "logits[:, -max_new_tokens - 1 : -1]",
                             ONES, "torch.cat([attention_mask, torch.ones_like(ids[:, width:])], 1)"
                             ), "may write fewer"),
    ("on_policy_loss", _edit(_POLICY, "student.config.eos_token_id", "2"),
     "in which token 7 ends a row, and all rows end after 3 of 4 tokens: what comes after"),
    ("on_policy_loss", _edit(_POLICY, "    ids = student.gen",
                             "    attention_mask[:] = 1\n    ids = student.gen"),
     "prompts or their mask that came in"),
    ("on_policy_loss", _edit(_POLICY, "top_k=0,", "top_k=0, eos_token_id=1,"),
     "told to stop at another token"),
    ("on_policy_loss", _edit(_POLICY, ONES,
                             "torch.cat([attention_mask, torch.ones(new.shape)], 1)"),
     "whatever the device of the prompts"),
    ("on_policy_loss", _edit(_POLICY, "    ids = student", "    with torch.inference_mode():\n"
                                                           "     ids = student"),
     "Inference tensors cannot"),
    ("on_policy_loss", _edit(_POLICY, "top_k=0,", "top_k=0, num_beams=4,"), "num_beams=4 changes"),
    ("on_policy_loss", _edit(_POLICY, ONES, "(ids != student.config.pad_token_id).long()"),
     "hides a word that has the id of the padding"),
    ("on_policy_loss", _edit(_POLICY, "    return " + DIVERGED,
                             "    x, y = (each.log_softmax(-1).gather(2, new[..., None])[..., 0]"
                             "[written] for each in (s, t))\n"
                             "    return (x * (x - y).detach()).mean()"),
     "policy gradient's stand-in"),
    ("on_policy_loss", _edit(_POLICY, "    with torch.no_grad():\n",
                             "    teacher.requires_grad_(False)\n    if True:\n"),
     "The teacher has been frozen"),
    # What the teacher is asked
    ("teacher_targets", _edit(_TARGETS, "    teacher.eval()\n", ""),
     "The teacher is in training mode"),
    ("teacher_targets", _edit(_TARGETS, ASKED, 'teacher(batch["input_ids"])'),
     "The teacher takes the padding"),
    ("teacher_targets", _edit(_TARGETS, PLAIN, "    if True:\n        output = "),
     "builds a graph"),
    ("teacher_targets", _edit(_TARGETS, "    with torch.no_grad():\n",
                              "    teacher.requires_grad_(False)\n    if True:\n"),
     "The teacher has been frozen"),
    ("teacher_targets", _edit(_TARGETS, "    with torch.no_grad():\n",
                              "    torch.set_grad_enabled(False)\n    if True:\n"),
     "Gradients stay switched off"),
    ("teacher_targets", _edit(_TARGETS, "    with torch", '    batch.pop("labels")\n    with torch'
                              ), "The batch has been changed"),
    ("teacher_targets", _edit(_TARGETS, RETURNED, "return output"),
     "as a tensor; this is a Causal"),
    ("teacher_targets", _edit(_TARGETS, RETURNED, "return output.logits.softmax(-1)"),
     "These are probabilities"),
    ("teacher_targets", _edit(_TARGETS, RETURNED, "return output.logits.log_softmax(-1)"),
     "These are logarithms"),
    ("teacher_targets", _edit(_TARGETS, RETURNED, "return output.logits.argmax(-1)"),
     "and the result (2, 6)."),
    ("teacher_targets", _edit(_TARGETS, RETURNED, "return output.logits[:, :-1]"),
     "and the result (2, 5, "),
    ("teacher_targets", _edit(_TARGETS, RETURNED, "return output.logits / 2.0"),
     "not what the teacher says"),
    ("teacher_targets", "def teacher_targets(teacher, batch):\n    return batch['labels']\n",
     "The teacher is not asked"),
    ("teacher_targets", _edit(_TARGETS, "    teacher.eval()\n",
                              "    training = teacher.training\n    teacher.eval()\n",
                              RETURNED, "teacher.train(training)\n    " + RETURNED),
     "is put back into training mode"),
    # What the student learns from
    ("student_loss", _edit(_STUDENT_LOSS, "    student.train()\n", ""),
     "The student is not in training"),
    ("student_loss", _edit(_STUDENT_LOSS, "student(input_ids=ids, attention_mask=mask)",
                           "student(ids)"), "The student takes the padding"),
    ("student_loss", _edit(_STUDENT_LOSS, LOSS, "distillation_loss(logits, targets, labels, "
                                                "1 - alpha, temperature)"),
     "alpha goes to the wrong part"),
    ("student_loss", _edit(_STUDENT_LOSS, "    student.train()\n",
                           "    student.train()\n    labels[:, -1] = -100\n"),
     "The batch has been changed"),
    ("student_loss", _step_loss("kl(t / T, s / T)[chosen].mean()"), "T squared is missing"),
    ("student_loss", _step_loss("kl(s / T, t / T)[chosen].mean() * T**2"), "the other way round"),
    ("student_loss", _step_loss("kl(t / T, s / T)[chosen].sum() / len(s) * T**2"),
     "of rows, not of targets"),
    ("student_loss", _step_loss("kl(targets / T, logits / T).mean() * T**2"),
     "padding among them"),
    ("student_loss", _step_loss("kl(targets / T, logits / T)[labels != -100].mean() * T**2"),
     "where the target stands"),
    ("student_loss", _edit(_STUDENT_LOSS, "(logits, targets, labels",
                           "(targets, logits, labels"), "student and teacher have changed places"),
    ("student_loss", _edit(_STUDENT_LOSS, "targets, labels,",
                           "targets, torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], "
                           "-100)], 1),"), "the labels are shifted twice"),
    ("student_loss", _edit(_STUDENT_LOSS, "(logits, targets, labels",
                           "(logits / temperature, targets / temperature, labels"),
     "already divided by the temperature"),
    ("student_loss", _edit(_STUDENT_LOSS, "(logits, targets, labels",
                           "(logits.softmax(-1), targets.softmax(-1), labels"),
     "of a step: probabilities are taken for logits"),
    ("student_loss", _edit(_STUDENT_LOSS, "(logits, targets, labels",
                           "(logits, targets.softmax(-1), labels"),
     "probabilities are taken for its logits"),
    ("student_loss", _edit(_STUDENT_LOSS, f"return {LOSS}",
                           "return student(**batch).loss"), "the labels' part alone"),
    ("student_loss", _edit(_STUDENT_LOSS, "labels, alpha,", "labels, 0.0,"),
     "the teacher's part alone"),
    ("student_loss", _edit(_STUDENT_LOSS, "def student_loss", "@torch.no_grad()\ndef student_loss"),
     "without a graph the student cannot"),
    ("student_loss", _edit(_STUDENT_LOSS, f"return {LOSS}",
                           f"loss = {LOSS}\n    loss.backward(retain_graph=True)\n    return loss"),
     "The backward pass is made here already"),
    ("student_loss", _edit(_STUDENT_LOSS, "    student.train()\n",
                           "    student.train()\n    targets /= temperature\n    targets *= 2\n"),
     "The teacher's logits that came in"),
    ("student_loss", _edit(_STUDENT_LOSS, f"return {LOSS}", f"return {LOSS}.item()"),
     "one number, not float"),
    ("student_loss", _edit(_STUDENT_LOSS, f"return {LOSS}",
                           f"loss = {LOSS}\n    return loss.detach() + 2 * (loss - loss.detach())"),
     "not its gradient in the student's weights"),
    ("student_loss", _edit(_STUDENT_LOSS, f"return {LOSS}",
                           f"student.eval()\n    return {LOSS}"), "is put back into eval mode"),
    ("student_loss", _edit(_STUDENT_LOSS, "labels, alpha, temperature)",
                           "labels, temperature, alpha)"), "alpha and the temperature have"),
    ("student_loss", _edit(_STUDENT_LOSS, "targets, labels,", "targets, ids,"),
     "whatever the labels say"),
    # The whole step
    ("distil_step", _FOUND, "The teacher takes the padding"),
    ("distil_step", _edit(_STEP, "optimizer.zero_grad()", "student.zero_grad()"),
     "the weights of the teacher"),
    ("distil_step", _edit(_STEP, "zero_grad()", "zero_grad(set_to_none=False)"),
     "weight decay still moves it"),
    ("distil_step", _edit(_STEP, "loss.item()", "loss"), "lives on after the step"),
    ("distil_step", _edit(_STEP, "return loss.item()", "return loss.detach()"),
     "Return the loss as a float"),
    ("distil_step", _edit(_STEP, "    optimizer.step()\n", ""), "makes no step"),
    ("distil_step", _edit(_STEP, "    optimizer.zero_grad()\n", ""), "is still in it"),
    ("distil_step", _edit(_STEP, "    optimizer.zero_grad()\n    loss.backward()\n", ""),
     "of the step before alone"),
    ("distil_step", _edit(_STEP, "    loss.backward()\n    opt",
                          "    loss.backward()\n"
                          "    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)\n"
                          "    opt"),
     "does not move by its gradient"),
    ("distil_step", _edit(_STEP, "    optimizer.zero_grad()\n    loss.backward()\n",
                          "    loss.backward()\n    optimizer.zero_grad()\n"),
     "there is no gradient any more"),
    ("distil_step", _edit(_STEP, "    loss.backward()\n",
                          "    loss.backward(retain_graph=True)\n    loss.backward()\n"),
     "by twice the gradient"),
    ("distil_step", _edit(_STEP, "    optimizer.step()\n",
                          "    optimizer.step()\n    optimizer.step()\n"), "makes 2 steps"),
    ("distil_step", _edit(_STEP, "    return loss.item()",
                          "    return student_loss(student, targets, batch, alpha, temperature)"
                          ".item()"), "that is the loss after the step"),
    ("distil_step", _edit(_STEP, "    optimizer.zero_grad()\n",
                          "    student.eval()\n    student(batch['input_ids'], "
                          "batch['attention_mask'])\n    optimizer.zero_grad()\n"),
     "The student is in the wrong mode"),
    ("distil_step", _edit(_STEP, "    return loss.item()",
                          "    batch['labels'][:] = -100\n    return loss.item()"),
     "The batch has been changed"),
    ("distil_step", _edit(_STEP, "targets, batch, alpha, temp", "targets, batch, 1 - alpha, temp"),
     "The loss returned: alpha goes"),
    ("distil_step", _edit(_STEP, "loss.item()", "round(loss.item(), 2)"), "it is rounded"),
    ("distillation_loss", _BY_ROW, "With a row without a target"),
]  # fmt: skip
