"""Checks of exercise 12: they name the mistake and stay silent about the solution."""

import copy

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from checks import Mistake
from minipeft import load_base


def _kl(p_logits, q_logits):
    """KL(p || q) of each row."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _number(got, what="The result"):
    if not isinstance(got, torch.Tensor) or got.numel() != 1:
        shape = tuple(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
        raise Mistake(f"{what} should be a tensor with one number, not {shape}.")
    if not got.isfinite():
        raise Mistake(f"{what} is {got.item()}.")
    return got.item()


def _near(a, b, tolerance=1e-4):
    return abs(a - b) <= tolerance * max(1.0, abs(b))


def _compare(got, right, known, where):
    """Pass if got is right; else say which known mistake it is."""
    if _near(got, right):
        return
    for what, value in known.items():
        if _near(got, float(value)):
            raise Mistake(f"{where}: {what}")
    raise Mistake(f"{where}: {got:.4f} is not the value, and no mistake that is known here.")


def divergence(answer):
    """Check a function (student_logits, teacher_logits, direction) -> mean KL of the rows."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5) * 2, torch.randn(2, 3, 5) * 2
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    s, t = log_s.exp(), log_t.exp()
    rows = {"forward": _kl(teacher, student), "reverse": _kl(student, teacher)}
    got = {way: _number(answer(student, teacher, way)) for way in rows}
    right = {way: value.mean().item() for way, value in rows.items()}
    if _near(got["forward"], right["reverse"]) and _near(got["reverse"], right["forward"]):
        raise Mistake("The two directions are taken for each other.")
    if _near(got["forward"], got["reverse"]):
        raise Mistake("Both directions give the same, but the divergence is not symmetric.")
    entropy = {"forward": -(t * log_t).sum(-1).mean(), "reverse": -(s * log_s).sum(-1).mean()}
    probability = {"forward": (t * (log_t - s)).sum(-1), "reverse": (s * (log_s - t)).sum(-1)}
    for way, value in right.items():
        known = {
            "its sign is wrong; a divergence is never below zero.": -value,
            "it is divided by the size of the vocabulary as well. A row is one unit.": value / 5,
            "it is a sum over the rows, not their mean.": value * 6,
            "it is divided by the first dimension alone; every row counts as one.": value * 3,
            "where a logarithm belongs, there is a probability.": probability[way].mean(),
            "that is a cross-entropy. It is not zero when the two agree.": value + entropy[way],
            "it is in bits, not in nats.": value / torch.tensor(2.0).log().item(),
        }
        _compare(got[way], value, known, f"In the {way} direction")
    for way in rows:
        x, y = student.clone().requires_grad_(), student.clone().requires_grad_()
        result = answer(x, teacher, way)
        if not result.requires_grad:
            raise Mistake(f"In the {way} direction no gradient reaches the student.")
        result.backward()
        pair = (teacher, y) if way == "forward" else (y, teacher)
        _kl(*pair).mean().backward()
        if x.grad is None or not torch.allclose(x.grad, y.grad, atol=1e-5):
            raise Mistake(
                f"In the {way} direction the value is right and the gradient is not: a part of "
                "what depends on the student was detached."
            )
    ruled_out = teacher.clone()
    ruled_out[..., 1] = -torch.inf
    x = student.clone().requires_grad_()
    result = answer(x, ruled_out, "forward")
    result.backward()
    if not result.isfinite() or not x.grad.isfinite().all():
        raise Mistake(
            "Where the teacher rules a token out, with a logit of -inf, the forward direction "
            "becomes NaN: zero times infinity."
        )
    keep = [0, 2, 3, 4]
    expected = (t := ruled_out[..., keep].softmax(-1)) * (t.log() - log_s[..., keep])
    if not _near(result.item(), expected.sum(-1).mean().item()):
        raise Mistake("Where the teacher rules a token out, the value is not the divergence.")
    try:
        answer(student, teacher, "sideways")
    except ValueError:
        return
    raise Mistake("An unknown direction is accepted.")


# Two rows of six tokens: the first has two targets and padding behind them, the second three.
_LABELS = torch.tensor([[-100, -100, 3, 1, -100, -100], [-100, -100, -100, 2, 4, 0]])


def _soft_mistakes(s, t, targets, T):
    """Values of the soft part, without T * T, that come from known mistakes."""
    kl = _kl(t / T, s / T)  # (batch, seq)
    last = torch.zeros(len(s), 1, dtype=torch.bool)
    shifted = torch.cat([targets[:, 1:], last], 1)  # where a target is predicted
    late = torch.cat([last, targets[:, :-1]], 1)
    right = kl[shifted].mean()
    n = targets.sum()
    x, y = s[shifted], t[shifted]
    log_s, log_t = (x / T).log_softmax(-1), (y / T).log_softmax(-1)
    return right, {
        "T squared is missing.": right / T**2,
        "it is multiplied by T, not by its square.": right / T,
        "it is multiplied by T * T twice.": right * T**2,
        "only the student's logits are divided by the temperature.": _kl(y, x / T).mean(),
        "only the teacher's logits are divided by the temperature.": _kl(y / T, x).mean(),
        "neither model's logits are divided by the temperature.": _kl(y, x).mean(),
        "the logits are multiplied by the temperature.": _kl(y * T, x * T).mean(),
        "the divergence is taken the other way round.": _kl(x / T, y / T).mean(),
        "it is taken where the target stands, not where it is predicted.": kl[targets].mean(),
        "it is shifted the wrong way, one position too late.": kl[late].mean(),
        "positions without a target are counted too, padding among them.": kl.mean(),
        "all positions but the last are counted, -100 or not.": kl[:, :-1].mean(),
        "its sum is divided by the number of rows, not of targets.": kl[shifted].sum() / len(s),
        "all positions are divided by the number of rows.": kl.sum() / len(s),
        "all positions but the last are divided by the number of rows.": kl[:, :-1].sum() / len(s),
        "its sum over the targets is divided by all positions.": kl[shifted].sum() / kl.numel(),
        "its sum over the targets is divided by all positions but the last of each row.": (
            kl[shifted].sum() / kl[:, :-1].numel()
        ),
        "it is a sum, not a mean.": right * n,
        "it is divided by the size of the vocabulary as well.": right / s.shape[-1],
        "it is a mean of the rows' means, so targets of short answers count more.": (
            (kl * shifted).sum(1) / shifted.sum(1)
        ).mean(),
        "where a logarithm belongs, there is a probability.": (
            (log_t.exp() * (log_t - log_s.exp())).sum(-1).mean()
        ),
        "that is a cross-entropy, which is not zero when the two agree.": (
            -(log_t.exp() * log_s).sum(-1).mean()
        ),
    }


def distillation_loss(answer):
    """Check a function (student_logits, teacher_logits, labels, alpha, temperature) -> loss."""
    torch.manual_seed(0)
    s, t, T = torch.randn(2, 6, 7) * 2, torch.randn(2, 6, 7) * 2, 3.0
    labels, targets = _LABELS.clone(), _LABELS != -100
    where = [(0, 1), (0, 2), (1, 2), (1, 3), (1, 4)]  # the positions that predict a target
    rows, wanted = torch.stack([s[i] for i in where]), torch.tensor([3, 1, 2, 4, 0])
    log = s.log_softmax(-1)
    hard = nn.functional.cross_entropy(rows, wanted).item()
    soft, known = _soft_mistakes(s, t, targets, T)
    soft = soft.item() * T**2
    got = {a: _number(answer(s, t, labels, a, T)) for a in (0.0, 0.25, 1.0)}
    if not torch.equal(labels, _LABELS):
        raise Mistake("The labels that came in were changed. The caller still needs them.")
    if _near(got[0.0], hard) and _near(got[1.0], soft):
        raise Mistake("alpha goes to the wrong part: at alpha=1 only the labels should count.")
    if _near(got[0.0], hard + soft) or _near(got[1.0], hard + soft):
        raise Mistake("One of the two parts counts in full, whatever alpha is.")
    mistakes = {what: value * T**2 for what, value in known.items()}
    _compare(got[0.0], soft, mistakes, "The soft part, at alpha=0")
    here = -log[targets].gather(1, labels[targets][:, None]).mean()
    mistakes = {
        "it is taken at the temperature; the labels know of none.": nn.functional.cross_entropy(
            rows / T, wanted
        ),
        "it is multiplied by T * T; that is for the soft part.": hard * T**2,
        "a position is asked for its own token, not for the next.": here,
        "it is a sum, not a mean over the targets.": hard * len(where),
        "its sum is divided by all positions.": hard * len(where) / labels.numel(),
        "its sum is divided by all positions but the last of each row.": hard * len(where) / 10,
        "its sum is divided by the number of rows.": hard * len(where) / 2,
        "its sign is wrong.": -hard,
    }
    _compare(got[1.0], hard, mistakes, "The hard part, at alpha=1")
    if not _near(got[0.25], 0.25 * hard + 0.75 * soft):
        raise Mistake("Each part alone is right, but at alpha=0.25 they are not mixed as they are.")
    x, y = s.clone().requires_grad_(), t.clone().requires_grad_()
    loss = answer(x, y, labels, 0.25, T)
    if not loss.requires_grad:
        raise Mistake("No gradient reaches the student.")
    loss.backward()
    if y.grad is not None and y.grad.any():
        raise Mistake("A gradient reaches the teacher's logits: the teacher would be trained too.")
    reference = s.clone().requires_grad_()
    shifted = torch.stack([reference[i] for i in where])
    told = torch.stack([t[i] for i in where])
    total = 0.25 * nn.functional.cross_entropy(shifted, wanted)
    (total + 0.75 * T**2 * _kl(told / T, shifted / T).mean()).backward()
    if x.grad is None or not torch.allclose(x.grad, reference.grad, atol=1e-5):
        raise Mistake("The loss is right, but its gradient with respect to the student is not.")
    a, b = s.bfloat16(), t.bfloat16()
    got = answer(a, b, labels, 0.25, T)
    exact = answer(a.float(), b.float(), labels, 0.25, T).item()
    if got.dtype != torch.float32 or abs(got.item() - exact) > 1e-5 * abs(exact):
        raise Mistake(
            "On bfloat16 logits the loss is computed in bfloat16, which has three digits. Sums "
            "over a vocabulary need more."
        )


def _deep(kind="llama"):
    """A model of four blocks, as the tiny ones of load_base are of two."""
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:  # blocks 2 and 3 attend to the last three tokens alone
        model = Qwen2ForCausalLM(
            Qwen2Config(**sizes, use_sliding_window=True, sliding_window=3, max_window_layers=2)
        )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def _same_block(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _cut(answer, teacher, keep):
    """The student, after whatever is visible in its weights and its config was looked at."""
    untouched = copy.deepcopy(teacher)
    student = answer(teacher, keep)
    if student is teacher or len(teacher.model.layers) != 4:
        raise Mistake("The teacher itself has been cut; it should stay as it was.")
    if teacher.config.num_hidden_layers != 4:
        raise Mistake("The config of the teacher says another number of blocks now.")
    if type(student) is not type(teacher):
        raise Mistake(f"The student is a {type(student).__name__}, the teacher is not.")
    layers = student.model.layers
    if len(layers) != len(keep):
        raise Mistake(f"With keep={keep} the student has {len(layers)} blocks.")
    if student.config.num_hidden_layers != len(keep):
        raise Mistake(
            f"The student has {len(keep)} blocks, and its config says "
            f"{student.config.num_hidden_layers}. Saved, it could not be loaded again."
        )
    if student.model.config.num_hidden_layers != len(keep):
        raise Mistake("student.config is right, but student.model.config is another one.")
    owned = {p.data_ptr(): name for name, p in teacher.named_parameters()}
    shared = [name for name, p in student.named_parameters() if p.data_ptr() in owned]
    if shared:
        raise Mistake(
            f"{shared[0]} of the student is in the same memory as the teacher's: training the one "
            "changes the other."
        )
    source = untouched.model.layers
    found = [next((j for j in range(4) if _same_block(layer, source[j])), None) for layer in layers]
    if None in found:
        raise Mistake(
            f"Block {found.index(None)} of the student has the weights of none of the teacher's."
        )
    if found != list(keep):
        raise Mistake(f"With keep={keep} the student has the teacher's blocks {found}.")
    if student.lm_head.weight is not student.model.embed_tokens.weight:
        raise Mistake("The teacher's head is tied to its embedding, the student's is not.")
    outside = {n: p for n, p in untouched.named_parameters() if ".layers." not in n}
    for name, p in student.named_parameters():
        if ".layers." not in name and not torch.equal(p, outside[name]):
            raise Mistake(f"The blocks are right, but {name} is not a copy of the teacher's.")
    numbers = [layer.self_attn.layer_idx for layer in layers]
    if numbers != list(range(len(keep))):
        raise Mistake(
            f"The blocks of the student believe that they are blocks {numbers} of the model, and "
            "file their keys and values there."
        )
    state, old = teacher.state_dict(), untouched.state_dict()
    if not all(torch.equal(state[key], old[key]) for key in old):
        raise Mistake("The weights of the teacher have changed.")
    if [layer.self_attn.layer_idx for layer in teacher.model.layers] != [0, 1, 2, 3]:
        raise Mistake("The blocks of the teacher have been given other numbers.")
    return student


def student_from_layers(answer):
    """Check a function (teacher, keep) -> a new model made of these blocks of the teacher."""
    teacher = _deep().requires_grad_(False)
    student = _cut(answer, teacher, (1, 3))
    if not all(p.requires_grad for p in student.parameters()):
        raise Mistake("The student is as frozen as the teacher.")
    teacher = _deep("qwen2")
    student = _cut(answer, teacher, (1, 3))
    kinds = _deep("qwen2").config.layer_types
    if teacher.config.layer_types != kinds:
        raise Mistake("The list layer_types of the teacher has been cut.")
    if len(student.config.layer_types) != 2:
        raise Mistake(
            f"For two blocks of Qwen2, config.layer_types has {len(student.config.layer_types)} "
            "entries."
        )
    if list(student.config.layer_types) != [kinds[1], kinds[3]]:
        raise Mistake(
            f"config.layer_types of the student is {list(student.config.layer_types)}. That is not "
            "what its blocks were in the teacher."
        )
    torch.manual_seed(0)
    ids = torch.randint(3, 64, (2, 7))
    with torch.no_grad():
        tokens = [
            student.generate(ids, max_new_tokens=4, do_sample=False, use_cache=cache)
            for cache in (True, False)
        ]
    if not torch.equal(*tokens):
        raise Mistake("The student generates with a cache something else than without.")
    for keep in ((), (0, 4)):
        try:
            answer(_deep(), keep)
        except ValueError:
            continue
        except IndexError as error:
            raise Mistake(
                f"keep={keep} for a teacher of 4 blocks ends in an IndexError, not a ValueError."
            ) from error
        raise Mistake(f"keep={keep} is accepted for a teacher of 4 blocks.")


class _Recorder:
    """Stands in for a model's generate: notes how it was called, returns a fixed text."""

    def __init__(self, ids):
        self.ids, self.calls = ids, []

    def __call__(self, inputs=None, **kwargs):
        inputs = kwargs.pop("input_ids", inputs)
        self.calls.append({"input_ids": inputs, **kwargs})
        return self.ids


def _refuse(*args, **kwargs):
    raise Mistake("The teacher writes the texts. They should be the student's own.")


def _logged(model):
    """A list that grows with (mask, training, output) of each forward pass; and the handle."""
    log = []

    def hook(module, args, kwargs, output):
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        log.append((mask, module.training, output.logits))

    return log, model.register_forward_hook(hook, with_kwargs=True)


def on_policy_loss(answer):
    """Check a function (student, teacher, input_ids, attention_mask, max_new_tokens) -> loss."""
    (teacher, _), (student, _) = (load_base("tiny", device="cpu", seed=i) for i in (0, 1))
    with torch.no_grad():
        for i, model in enumerate((teacher, student)):
            torch.manual_seed(i)
            for p in model.parameters():  # so that a wrong position or mask shows
                p.add_(torch.randn_like(p) * 0.2)
    end = student.config.eos_token_id
    for model in (teacher, student):
        model.config.pad_token_id = model.generation_config.pad_token_id = end
    prompts = torch.tensor([[end, end, 40, 41], [50, 51, 52, 53]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    new = torch.tensor([[60, end, end, end, end], [70, 71, 72, 73, 74]])
    ids = torch.cat([prompts, new], 1)
    written = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    student.generate, teacher.generate = _Recorder(ids), _refuse
    logs = [_logged(student)[0], _logged(teacher)[0]]
    loss = answer(student, teacher, prompts.clone(), mask.clone(), 5)
    got = _number(loss, "The loss")
    if not student.generate.calls:
        raise Mistake("The student does not write anything.")
    _called(student.generate.calls[0], prompts, mask)
    for log, who in zip(logs, ("student", "teacher"), strict=True):
        if not log:
            raise Mistake(f"The {who} does not score what was written.")
    full = torch.cat([mask, torch.ones_like(new)], 1)
    with torch.no_grad():
        s, t = (model(ids, attention_mask=full).logits for model in (student, teacher))
        bare_s, bare_t = (model(ids).logits for model in (student, teacher))
    kl = _kl(s, t)  # (batch, seq); position i predicts the token at i + 1
    after = slice(3, 8)
    right = kl[:, after][written].mean().item()
    real = torch.cat([mask[:, 1:].bool(), written], 1)
    by_id = new != end
    known = {
        "the divergence is taken in the forward direction.": _kl(t, s)[:, after][written].mean(),
        "it is taken where the new tokens stand, not where they are predicted.": (
            kl[:, 4:][written].mean()
        ),
        "the tokens of the prompt are counted too.": kl[:, :-1][real].mean(),
        "every position is counted, the padding in front too.": kl.mean(),
        "what stands behind the end of a row is counted.": kl[:, after].mean(),
        "the end token, which the student wrote, is not counted.": kl[:, after][by_id].mean(),
        "it is a sum over the new tokens, not a mean.": kl[:, after][written].sum(),
        "it is a sum for each row, not a mean over the tokens.": kl[:, after][written].sum() / 2,
        "it is a mean over all new positions, those behind an end being zero.": (
            (kl[:, after] * written).mean()
        ),
        "neither model is told which tokens of the prompts are padding.": (
            _kl(bare_s, bare_t)[:, after][written].mean()
        ),
        "the teacher is not told which tokens of the prompts are padding.": (
            _kl(s, bare_t)[:, after][written].mean()
        ),
        "the student is not told which tokens of the prompts are padding.": (
            _kl(bare_s, t)[:, after][written].mean()
        ),
    }
    _compare(got, right, known, "On a text that the check lets the student write")
    if not loss.requires_grad:
        raise Mistake("The loss has no gradient: the student cannot learn from it.")
    loss.backward()
    if any(p.grad is not None for p in teacher.parameters()):
        raise Mistake("A gradient reaches the teacher: it would be moved towards the student.")
    if any(p.grad is None for p in student.parameters()):
        raise Mistake("No gradient reaches the student's weights.")


def _called(call, prompts, mask):
    """The student was asked to write what it should."""
    if call["input_ids"] is None or not torch.equal(call["input_ids"], prompts):
        raise Mistake("The student does not continue the prompts it was given.")
    config = call.get("generation_config")
    options = {**(config.to_dict() if config is not None else {}), **call}
    if options.get("attention_mask") is None or not torch.equal(options["attention_mask"], mask):
        raise Mistake("While it writes, the student takes the padding for a part of the prompt.")
    if options.get("max_new_tokens") != 5:
        raise Mistake("The number of new tokens is not the one that was asked for.")
    if not options.get("do_sample"):
        raise Mistake("The student writes its likeliest text, and so the same in every step.")
    if options.get("top_k") != 0:
        raise Mistake("The texts are not drawn from all of the student's distribution.")


def _half_way(batch, s, t, alpha, temperature):
    """The loss of task 2, and known mistakes of a step: values by what is wrong."""
    targets = batch["labels"] != -100
    labels = batch["labels"][:, 1:]
    hard = nn.functional.cross_entropy(s[:, :-1][targets[:, 1:]], labels[targets[:, 1:]])
    soft, known = _soft_mistakes(s, t, targets, temperature)
    square = temperature**2

    def mixed(part):
        return alpha * hard + (1 - alpha) * square * part

    mistakes = {f"in the soft part, {what}": mixed(value) for what, value in known.items()}
    swapped = (1 - alpha) * hard + alpha * square * soft
    return mixed(soft), {"alpha goes to the wrong part.": swapped, **mistakes}


def distil_step(answer):
    """Check a function (student, teacher, optimizer, batch, alpha, temperature) -> float."""
    (teacher, _), (student, _) = (load_base("tiny", device="cpu", seed=i) for i in (0, 1))
    with torch.no_grad():
        for i, model in enumerate((teacher, student)):
            torch.manual_seed(i)
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.2)
    batch = {
        "input_ids": torch.tensor([[0, 0, 40, 41, 42, 43], [50, 51, 52, 53, 54, 55]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
        "labels": torch.tensor([[-100] * 4 + [42, 43], [-100] * 3 + [53, 54, 55]]),
    }
    given = {key: value.clone() for key, value in batch.items()}
    alpha, temperature, lr = 0.2, 3.0, 0.05
    inputs = given["input_ids"]
    with torch.no_grad():
        s, t = (m(inputs, given["attention_mask"]).logits for m in (student, teacher))
    reference = copy.deepcopy(student)
    optimizer = torch.optim.SGD([*student.parameters(), *teacher.parameters()], lr=lr)
    for p in [*student.parameters(), *teacher.parameters()]:
        p.grad = torch.ones_like(p)  # what a step before has left
    before = [p.clone() for p in student.parameters()]
    teacher_before = [p.clone() for p in teacher.parameters()]
    teacher.train()
    student.eval()
    (log_s, handle_s), (log_t, handle_t) = _logged(student), _logged(teacher)
    got = answer(student, teacher, optimizer, batch, alpha, temperature)
    handle_s.remove()
    handle_t.remove()
    if not log_t:
        raise Mistake("The teacher is not asked.")
    if not log_s:
        raise Mistake("The student is not asked.")
    if any(training for _, training, _ in log_t):
        raise Mistake("The teacher is in training mode, so its targets change with its dropout.")
    if not all(training for _, training, _ in log_s):
        raise Mistake("The student is not in training mode while it learns.")
    if any(mask is None or not torch.equal(mask, given["attention_mask"]) for mask, _, _ in log_t):
        raise Mistake("The teacher takes the padding for text: it got no attention mask.")
    if any(mask is None or not torch.equal(mask, given["attention_mask"]) for mask, _, _ in log_s):
        raise Mistake("The student takes the padding for text: it got no attention mask.")
    if not all(torch.equal(batch[key], value) for key, value in given.items()):
        raise Mistake("The batch has been changed. It comes back in the next epoch.")
    if any(logits.requires_grad for _, _, logits in log_t):
        raise Mistake(
            "The teacher's forward pass builds a graph: memory for a backward pass that is none of "
            "the teacher's business."
        )
    if isinstance(got, torch.Tensor) and got.requires_grad:
        raise Mistake("What is returned hangs on the graph, which so lives on after the step.")
    if not isinstance(got, float):
        raise Mistake(f"Return the loss as a float; this is a {type(got).__name__}.")
    right, known = _half_way(given, s, t, alpha, temperature)
    _compare(got, right.item(), known, "The loss of a step")
    if all(torch.equal(p, q) for p, q in zip(student.parameters(), before, strict=True)):
        raise Mistake("After the step the student is what it was.")
    reference.train()
    logits = reference(inputs, given["attention_mask"]).logits
    _half_way(given, logits, t, alpha, temperature)[0].backward()
    moved = [q - lr * p.grad for q, p in zip(before, reference.parameters(), strict=True)]
    if _all_near(student.parameters(), [q - lr for q in moved]):
        raise Mistake("The gradient of the step before is still in it.")
    if _all_near(student.parameters(), [q - lr for q in before]):
        raise Mistake("The student moves by the gradient of the step before alone.")
    if not _all_near(student.parameters(), moved):
        raise Mistake("The loss is right, but the student does not move by its gradient.")
    if not _all_near(teacher.parameters(), teacher_before):
        raise Mistake("The step changes the weights of the teacher, which the optimiser holds too.")


def _all_near(params, values):
    pairs = zip(params, values, strict=True)
    return all(torch.allclose(p, value, atol=1e-5) for p, value in pairs)
