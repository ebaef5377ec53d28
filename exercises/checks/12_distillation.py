"""Checks of exercise 12: they name the mistake and stay silent about the solution."""

import copy
from types import SimpleNamespace

import torch
from torch.nn.functional import cross_entropy
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


def _unchanged(pairs, what):
    """The caller's tensors are what they were."""
    if not all(torch.equal(now, before) for now, before in pairs):
        raise Mistake(f"The {what} that came in were changed. The caller still needs them.")


def _follows_the_device(call, inputs):
    """New tensors are where the inputs are; "meta" stands for another device, say a GPU."""
    try:
        with torch.device("meta"):
            call()
    except (RuntimeError, TypeError) as error:
        if "expected device" in str(error):
            raise Mistake(
                f"Your function makes a tensor on the CPU, whatever the device of {inputs} is."
            ) from error


def divergence(answer):
    """Check a function (student_logits, teacher_logits, direction) -> mean KL of the rows."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5) * 2, torch.randn(2, 3, 5) * 2
    given = student.clone(), teacher.clone()
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    s, t = log_s.exp(), log_t.exp()
    rows = {"forward": _kl(teacher, student), "reverse": _kl(student, teacher)}
    got = {way: _number(answer(student, teacher, way)) for way in rows}
    _unchanged(zip((student, teacher), given, strict=True), "logits")
    right = {way: value.mean().item() for way, value in rows.items()}
    if _near(got["forward"], right["reverse"]) and _near(got["reverse"], right["forward"]):
        raise Mistake("The two directions are taken for each other.")
    if _near(got["forward"], got["reverse"]):
        raise Mistake("Both directions give the same, but the divergence is not symmetric.")
    entropy = {"forward": -(t * log_t).sum(-1).mean(), "reverse": -(s * log_s).sum(-1).mean()}
    names = {"forward": (t, log_t, s, log_s, student), "reverse": (s, log_s, t, log_t, teacher)}
    turned = {"forward": (teacher, student), "reverse": (student, teacher)}
    for way, value in right.items():
        p, log_p, q, log_q, logits = names[way]
        wrong_axis = (each.transpose(1, 2) for each in turned[way])
        terms = p * (log_p - log_q)
        known = {
            "its sign is wrong; a divergence is never below zero.": -value,
            "it is divided by the size of the vocabulary as well. A row is one unit.": value / 5,
            "it is a sum over the rows, not their mean.": value * 6,
            "it is divided by the first dimension alone; every row counts as one.": value * 3,
            "where a logarithm belongs, there is a probability.": (p * (log_p - q)).sum(-1).mean(),
            "that is a cross-entropy. It is not zero when the two agree.": value + entropy[way],
            "it is in bits, not in nats.": value / torch.tensor(2.0).log().item(),
            "logits are taken for logarithms of probabilities, but these sum to one when "
            "exponentiated.": (p * (log_p - logits)).sum(-1).mean(),
            "`log_target=True` promises a logarithm, and a probability was given.": (
                (p.exp() * (p - log_q)).sum(-1).mean()
            ),
            "the softmax is taken over another axis than the vocabulary, the last one.": (
                _kl(*wrong_axis).sum(-1).mean() / 3
            ),
            "terms of single tokens may be below zero, and were made positive.": (
                terms.abs().sum(-1).mean()
            ),
            "terms of single tokens may be below zero, and were cut off at zero.": (
                terms.clamp(min=0).sum(-1).mean()
            ),
        }
        _compare(got[way], value, known, f"In the {way} direction")
    for shape in ((4, 7), (6,)):
        pair = torch.randn(shape), torch.randn(shape)
        for way in rows:
            value = answer(*pair, way)
            expected = _kl(*(pair[::-1] if way == "forward" else pair)).mean().item()
            if not _near(_number(value), expected):
                raise Mistake(
                    f"Right on logits of shape (2, 3, 5). On shape {shape} the {way} divergence is "
                    f"{value.item():.4f} instead of {expected:.4f}: a size or an axis is fixed."
                )
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
    _extreme(answer, student, teacher)
    try:
        answer(student, teacher, "sideways")
    except ValueError:
        return
    except Exception as error:
        raise Mistake(
            f"An unknown direction raises {type(error).__name__} instead of ValueError."
        ) from error
    raise Mistake("An unknown direction is accepted.")


def _extreme(answer, student, teacher):
    """Logits far apart, and a logit of -inf."""
    far = 200 * student, 200 * teacher
    for way, pair in (("forward", far[::-1]), ("reverse", far)):
        got, right = answer(*far, way).item(), _kl(*pair).mean().item()
        if not abs(got) < float("inf"):
            raise Mistake(
                f"With logits of several hundred the {way} divergence is {got}, not {right:.1f}: "
                "a probability is rounded to 0 before its logarithm is taken."
            )
        if not _near(got, right, 1e-3):
            raise Mistake(
                f"With logits of several hundred the {way} divergence is {got:.1f}, not "
                f"{right:.1f}. Is a small number added to the probabilities, or a bound set?"
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
    t = ruled_out[..., keep].softmax(-1)
    expected = (t * (t.log() - student.log_softmax(-1)[..., keep])).sum(-1).mean()
    if not _near(result.item(), expected.item()):
        raise Mistake("Where the teacher rules a token out, the value is not the divergence.")


# Two rows of six tokens: the first has two targets and padding after them, the second three.
_LABELS = torch.tensor([[-100, -100, 3, 1, -100, -100], [-100, -100, -100, 2, 4, 0]])
# Three rows of four tokens without a prompt: also the first token of a row has a label.
_TEXTS = torch.tensor([[2, 1, 3, 4], [3, 0, -100, -100], [1, 4, 4, -100]])


def _targets(s, t, labels):
    """Logits of both models where a target is predicted, (targets, vocab), and the targets."""
    where = [
        (row, i) for row in range(len(labels)) for i in range(labels.shape[1] - 1)
        if labels[row, i + 1] != -100
    ]  # fmt: skip
    wanted = torch.tensor([labels[row, i + 1] for row, i in where])
    return torch.stack([s[i] for i in where]), torch.stack([t[i] for i in where]), wanted


def _parts(s, t, labels, T):
    """(hard, soft) of the loss, with T * T."""
    x, y, wanted = _targets(s, t, labels)
    return cross_entropy(x, wanted), _kl(y / T, x / T).mean() * T**2


def _soft_mistakes(s, t, labels, T):
    """Values of the soft part, with T * T, that come from known mistakes."""
    targets = labels != -100
    kl = _kl(t / T, s / T)  # (batch, seq)
    last = torch.zeros(len(s), 1, dtype=torch.bool)
    shifted = torch.cat([targets[:, 1:], last], 1)  # where a target is predicted
    late = torch.cat([last, targets[:, :-1]], 1)
    right = kl[shifted].mean()
    n = targets.sum()
    x, y, wanted = _targets(s, t, labels)
    log_s, log_t = (x / T).log_softmax(-1), (y / T).log_softmax(-1)
    known = {
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
        "targets whose id is 0 are dropped. Only -100 means that there is none.": (
            _kl(y / T, x / T)[wanted > 0].mean()
        ),
        "the temperature is 2, whatever was asked for.": _kl(y / 2, x / 2).mean() * 4 / T**2,
        "the temperature is applied twice.": _kl(y / T**2, x / T**2).mean(),
        "the teacher's probabilities are taken for its logits.": (
            _kl(y.softmax(-1) / T, x / T).mean()
        ),
    }
    squares = (x - y).square().mean()
    guessed = cross_entropy(x, y.argmax(-1))
    return {what: value * T**2 for what, value in known.items()} | {
        "that is a squared error of the logits, not a divergence.": squares,
        "that is a squared error of the logits, summed over the vocabulary.": (
            squares * s.shape[-1]
        ),
        "that is a squared error of the probabilities.": T**2 * (
            log_s.exp() - log_t.exp()
        ).square().mean(),
        "the teacher's likeliest token is taken as a label. The rest of its distribution is "
        "lost.": guessed,
        "the teacher's likeliest token is taken as a label, and T * T in front.": guessed * T**2,
    }  # fmt: skip


def _hard_mistakes(s, t, labels, T):
    """Values of the hard part that come from known mistakes."""
    x, y, wanted = _targets(s, t, labels)
    hard, n, targets = cross_entropy(x, wanted), len(wanted), labels != -100
    every = s[:, :-1].flatten(0, 1)
    return {
        "it is taken at the temperature; the labels know of none.": cross_entropy(x / T, wanted),
        "it is multiplied by T * T; that is for the soft part.": hard * T**2,
        "a position is asked for its own token, not for the next.": (
            cross_entropy(s[targets], labels[targets])
        ),
        "it is a sum, not a mean over the targets.": hard * n,
        "its sum is divided by all positions.": hard * n / labels.numel(),
        "its sum is divided by all positions but the last of each row.": hard * n / len(every),
        "its sum is divided by the number of rows.": hard * n / len(s),
        "its sign is wrong.": -hard,
        "where the label is -100, token 0 is asked for.": (
            cross_entropy(every, labels[:, 1:].flatten().clamp(min=0))
        ),
        "the teacher's likeliest token stands where the label belongs.": (
            cross_entropy(x, y.argmax(-1))
        ),
        "the labels are compared with the teacher's logits.": cross_entropy(y, wanted),
        "target tokens with id 0 have no part in it.": (
            cross_entropy(x[wanted > 0], wanted[wanted > 0])
        ),
    }


def distillation_loss(answer):
    """Check a function (student_logits, teacher_logits, labels, alpha, temperature) -> loss."""
    torch.manual_seed(0)
    s, t, T = torch.randn(2, 6, 7) * 2, torch.randn(2, 6, 7) * 2, 3.0
    labels, given = _LABELS.clone(), (s.clone(), t.clone())
    hard, soft = (part.item() for part in _parts(s, t, labels, T))
    got = {}
    for alpha in (0.0, 0.25, 1.0):
        got[alpha] = _number(answer(s, t, labels, alpha, T))
        _unchanged([(labels, _LABELS)], "labels")
        _unchanged(zip((s, t), given, strict=True), "logits")
    if _near(got[0.0], hard) and _near(got[1.0], soft):
        raise Mistake("alpha goes to the wrong part: at alpha=1 only the labels should count.")
    if _near(got[0.0], hard + soft) or _near(got[1.0], hard + soft):
        raise Mistake("One of the two parts counts in full, whatever alpha is.")
    if _near(got[0.0], got[1.0]):
        raise Mistake("The loss is the same for every alpha.")
    _compare(got[0.0], soft, _soft_mistakes(s, t, labels, T), "The soft part, at alpha=0")
    _compare(got[1.0], hard, _hard_mistakes(s, t, labels, T), "The hard part, at alpha=1")
    if not _near(got[0.25], 0.25 * hard + 0.75 * soft):
        raise Mistake("Each part alone is right, but at alpha=0.25 they are not mixed as they are.")
    _unpredicted(answer)
    x, y = s.clone().requires_grad_(), t.clone().requires_grad_()
    loss = answer(x, y, labels, 0.25, T)
    if not loss.requires_grad:
        raise Mistake("No gradient reaches the student.")
    loss.backward()
    if y.grad is not None and y.grad.any():
        raise Mistake("A gradient reaches the teacher's logits: the teacher would be trained too.")
    reference = s.clone().requires_grad_()
    hard, soft = _parts(reference, t, labels, T)
    (0.25 * hard + 0.75 * soft).backward()
    if x.grad is None or not torch.allclose(x.grad, reference.grad, atol=1e-5):
        raise Mistake("The loss is right, but its gradient with respect to the student is not.")
    _follows_the_device(lambda: answer(s, t, labels, 0.25, T), "the labels")
    a, b = s.bfloat16(), t.bfloat16()
    exact = answer(a.float(), b.float(), labels, 0.25, T).item()
    for pair in ((a, b), (a.float(), b), (a, b.float())):
        got = answer(*pair, labels, 0.25, T)
        if got.dtype not in (torch.float32, torch.float64) or abs(got.item() - exact) > 1e-5 * abs(
            exact
        ):
            raise Mistake(
                "On bfloat16 logits the loss is computed in bfloat16, which has three digits. Sums "
                "over a vocabulary need more."
            )


def _unpredicted(answer):
    """Texts without a prompt: the first label of a row is predicted nowhere."""
    s, t, T = torch.randn(3, 4, 5), torch.randn(3, 4, 5), 1.5
    x, y, wanted = _targets(s, t, _TEXTS)
    labeled, n = (_TEXTS != -100).sum(), len(wanted)
    ends = _TEXTS[:, 0]  # asked for at the last position by who rolls the labels
    rolled = torch.cat([x, s[:, -1]]), torch.cat([y, t[:, -1]]), torch.cat([wanted, ends])
    known = [
        (
            "the last position of a row is asked for its first token.",
            (cross_entropy(rolled[0], rolled[2]), _kl(rolled[1] / T, rolled[0] / T).mean() * T**2),
        ),
        (
            "the divisor counts the first tokens too, which nothing predicts.",
            [part * n / labeled for part in _parts(s, t, _TEXTS, T)],
        ),
    ]
    for alpha in (0.0, 1.0, 0.6):

        def mix(parts, alpha=alpha):
            return (alpha * parts[0] + (1 - alpha) * parts[1]).item()

        given = _TEXTS.clone()
        found = _number(answer(s, t, given, alpha, T))
        _unchanged([(given, _TEXTS)], "labels")
        _compare(
            found, mix(_parts(s, t, _TEXTS, T)),
            {what: mix(parts) for what, parts in known},
            f"On three texts without a prompt, alpha={alpha}",
        )  # fmt: skip
    beside = torch.tensor([[2, 1, 3, 4], [-100] * 4])
    what = "With a row without a target beside one that has some, the loss"
    found, right = _number(answer(s[:2], t[:2], beside, 0.6, T), what), _parts(s, t, beside, T)
    if not _near(found, (0.6 * right[0] + 0.4 * right[1]).item()):
        raise Mistake(f"{what} is not that of the targets there are.")


def _deep(kind="llama", blocks=4, tied=True):
    """A model of some blocks, as the tiny ones of load_base are of two."""
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": blocks,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tied,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:  # from block 2 on they attend to the last three tokens alone
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


def _tensors(model):
    """{name: parameter or buffer}"""
    return dict([*model.named_parameters(), *model.named_buffers()])


def _is_tied(model):
    return model.lm_head.weight is model.model.embed_tokens.weight


def _cut(answer, teacher, keep):
    """The student, after whatever is visible in its weights and its config was looked at."""
    untouched, number = copy.deepcopy(teacher), len(teacher.model.layers)
    student = answer(teacher, keep)
    if student is teacher or len(teacher.model.layers) != number:
        raise Mistake("The teacher itself has been cut; it should stay as it was.")
    if teacher.config.num_hidden_layers != number:
        raise Mistake("The config of the teacher says another number of blocks now.")
    if type(student) is not type(teacher):
        raise Mistake(f"The student is a {type(student).__name__}, the teacher is not.")
    layers = student.model.layers
    if len(layers) != len(keep):
        raise Mistake(f"With keep={keep} the student has {len(layers)} blocks.")
    if student.config.num_hidden_layers != len(keep):
        raise Mistake(
            f"The student has {len(keep)} blocks, and its config says "
            f"{student.config.num_hidden_layers}. Saved and loaded, it would be another model."
        )
    if student.model.config.num_hidden_layers != len(keep):
        raise Mistake("student.config is right, but student.model.config is another one.")
    owned = {tensor.data_ptr() for tensor in _tensors(teacher).values()}
    for name, tensor in _tensors(student).items():
        if tensor.data_ptr() in owned:
            raise Mistake(
                f"{name} of the student is in the same memory as the teacher's: whoever changes "
                "the one changes the other."
            )
    places = [p.data_ptr() for layer in layers for p in layer.parameters()]
    if len(set(places)) < len(places):
        raise Mistake(
            f"With keep={keep} one block stands in two places of the student: what the one learns, "
            "the other gets too."
        )
    dtypes = {p.dtype for p in student.parameters()}
    if dtypes != {teacher.dtype}:
        raise Mistake(f"The teacher is in {teacher.dtype}, the student in {dtypes.pop()}.")
    _same_blocks(layers, untouched.model.layers, keep)
    if _is_tied(untouched) != _is_tied(student):
        raise Mistake(
            "The teacher's head is tied to its embedding, the student's is not."
            if _is_tied(untouched)
            else "The teacher's head has weights of its own, the student's is its embedding."
        )
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
    _as_it_was(teacher, untouched)
    return student


def _same_blocks(layers, source, keep):
    """The blocks of the student are those of the teacher, in the order of keep."""
    found = [
        next((j for j, other in enumerate(source) if _same_block(layer, other)), None)
        for layer in layers
    ]
    if None in found:
        raise Mistake(
            f"Block {found.index(None)} of the student has the weights of none of the teacher's."
        )
    if found == list(keep):
        return
    if found == sorted(keep):
        raise Mistake(
            f"With keep={keep} the student's blocks stand in the teacher's order, {found}."
        )
    raise Mistake(f"With keep={keep} the student has the teacher's blocks {found}.")


def _as_it_was(teacher, untouched):
    """Nothing about the teacher has changed."""
    state, old = teacher.state_dict(), untouched.state_dict()
    if not all(torch.equal(state[key], old[key]) for key in old):
        raise Mistake("The weights of the teacher have changed.")
    numbers = [layer.self_attn.layer_idx for layer in teacher.model.layers]
    if numbers != list(range(len(numbers))):
        raise Mistake("The blocks of the teacher have been given other numbers.")
    pairs = zip(teacher.parameters(), untouched.parameters(), strict=True)
    if any(p.requires_grad != q.requires_grad for p, q in pairs):
        raise Mistake("The teacher was frozen or unfrozen on the way.")
    if teacher.training != untouched.training:
        raise Mistake("The teacher was put into another mode on the way.")


def student_from_layers(answer):
    """Check a function (teacher, keep) -> a new model made of these blocks of the teacher."""
    teacher = _deep().requires_grad_(False)
    student = _cut(answer, teacher, (1, 3))
    if not all(p.requires_grad for p in student.parameters()):
        raise Mistake("The student is as frozen as the teacher.")
    _cut(answer, _deep(), (3, 1))
    _cut(answer, _deep(blocks=3).train(), [2, 0, 2])
    _cut(answer, _deep(tied=False), range(1, 3))
    _cut(answer, _deep(blocks=5).bfloat16(), (4,))
    for keep in ((1, 3), (3, 0)):
        _cut_qwen2(answer, keep)
    for keep in ((), (0, 4), (0, -1)):
        try:
            answer(_deep(), keep)
        except ValueError:
            continue
        except IndexError as error:
            raise Mistake(
                f"keep={keep} for a teacher of 4 blocks ends in an IndexError, not a ValueError."
            ) from error
        raise Mistake(f"keep={keep} is accepted for a teacher of 4 blocks.")


def _cut_qwen2(answer, keep):
    teacher = _deep("qwen2")
    student = _cut(answer, teacher, keep)
    kinds, found = _deep("qwen2").config.layer_types, student.config.layer_types
    if teacher.config.layer_types != kinds:
        raise Mistake("The list layer_types of the teacher has been cut.")
    if len(found) != 2:
        raise Mistake(f"For two blocks of Qwen2, config.layer_types has {len(found)} entries.")
    if list(found) != [kinds[i] for i in keep]:
        raise Mistake(
            f"With keep={keep} config.layer_types of the student is {list(found)}. That is not "
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


class _Recorder:
    """Stands in for a model's generate: notes how it was called, returns a fixed text."""

    def __init__(self, ids):
        self.ids, self.calls = ids, []

    def __call__(self, inputs=None, **kwargs):
        inputs = kwargs.pop("input_ids", inputs)
        self.calls.append({"input_ids": inputs, **kwargs})
        if kwargs.get("return_dict_in_generate"):
            return SimpleNamespace(sequences=self.ids)
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


def _pair():
    """A tiny teacher and a tiny student, shaken, so that a wrong position or mask shows."""
    models = [load_base("tiny", device="cpu", seed=i)[0] for i in (0, 1)]
    with torch.no_grad():
        for i, model in enumerate(models):
            torch.manual_seed(i)
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.2)
    return models


def on_policy_loss(answer):
    """Check a function (student, teacher, input_ids, attention_mask, max_new_tokens) -> loss."""
    teacher, student = _pair()
    end = student.config.eos_token_id
    _on_policy(
        answer, student, teacher, end=end, pad=end, most=5,
        prompts=torch.tensor([[end, end, 40, 41], [50, 51, 52, 53]]),
        mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
        new=torch.tensor([[60, end, end, end, end], [70, 71, 72, 73, 74]]),
        written=torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool(),
        where="On a text that the check lets the student write",
    )  # fmt: skip
    _on_policy(  # token 7 ends a row, all rows end early, and padding's id is also a word
        answer, student, teacher, end=7, pad=0, most=4,
        prompts=torch.tensor([[0, 40, 41], [50, 0, 52], [0, 0, 42]]),
        mask=torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]]),
        new=torch.tensor([[7, 0, 0], [60, 61, 7], [62, 7, 0]]),
        written=torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0]]).bool(),
        where="On a text in which token 7 ends a row, and all rows end after 3 of 4 tokens",
    )  # fmt: skip
    del student.generate  # and once with a text that the student does write
    _number(answer(student, teacher, torch.tensor([[50, 51]]), torch.ones(1, 2).long(), 3))


def _on_policy(answer, student, teacher, end, pad, most, prompts, mask, new, written, where):
    """One text, with the value and the gradient of its loss."""
    for model in (teacher, student):
        model.zero_grad()
        model.config.eos_token_id = model.generation_config.eos_token_id = end
        model.config.pad_token_id = model.generation_config.pad_token_id = pad
    ids = torch.cat([prompts, new], 1)
    student.generate, teacher.generate = _Recorder(ids.clone()), _refuse
    (log_s, handle_s), (log_t, handle_t) = _logged(student), _logged(teacher)
    given = prompts.clone(), mask.clone()
    loss = answer(student, teacher, *given, most)
    handle_s.remove()
    handle_t.remove()
    got = _number(loss, "The loss")
    if not student.generate.calls:
        raise Mistake("The student does not write anything.")
    _unchanged(zip(given, (prompts, mask), strict=True), "prompts or their mask")
    _called(student.generate.calls[0], prompts, mask, most, end, pad, len(student.lm_head.weight))
    for log, who in ((log_s, "student"), (log_t, "teacher")):
        if not log:
            raise Mistake(f"The {who} does not score what was written.")
    full = torch.cat([mask, torch.ones_like(new)], 1)
    scored = student(ids, attention_mask=full).logits
    with torch.no_grad():
        t = teacher(ids, attention_mask=full).logits
        bare_s, bare_t = student(ids).logits, teacher(ids).logits
        by_id = [model(ids, attention_mask=(ids != pad).long()).logits
                 for model in (student, teacher)]  # fmt: skip
    right = _kl(scored, t)[:, prompts.shape[1] - 1 : -1][written].mean()
    known = _on_policy_mistakes(scored.detach(), t, bare_s, bare_t, ids, mask, written, end, most)
    known["the mask is made of the ids, and hides a word that has the id of the padding."] = _kl(
        *by_id
    )[:, prompts.shape[1] - 1 : -1][written].mean()
    _compare(got, right.item(), known, where)
    if not loss.requires_grad:
        raise Mistake("The loss has no gradient: the student cannot learn from it.")
    _follows_the_device(lambda: answer(student, teacher, *given, most), "the prompts")
    loss.backward()
    if any(p.grad is not None for p in teacher.parameters()):
        raise Mistake("A gradient reaches the teacher: it would be moved toward the student.")
    if not all(p.requires_grad for p in teacher.parameters()):
        raise Mistake("The teacher has been frozen, and stays so for its owner.")
    if any(p.grad is None for p in student.parameters()):
        raise Mistake("No gradient reaches the student's weights.")
    found = torch.cat([p.grad.flatten() for p in student.parameters()])
    expected = torch.autograd.grad(right, list(student.parameters()))
    expected = torch.cat([grad.flatten() for grad in expected])
    if found.norm() < 1e-3 * expected.norm():
        raise Mistake(
            f"The value is right, but the gradient's norm is {found.norm():.1e} instead of "
            f"{expected.norm():.3f}: the student's probabilities are detached, and the rest "
            "cancels."
        )
    if not torch.allclose(found, expected, atol=1e-3 * expected.abs().max().item()):
        raise Mistake("The value is right, but the student's weights get another gradient.")


def _on_policy_mistakes(s, t, bare_s, bare_t, ids, mask, written, end, most):
    """Values of the loss that come from known mistakes."""
    kl, width = _kl(s, t), mask.shape[1]  # position i predicts the token at i + 1
    after = slice(width - 1, -1)
    new = ids[:, width:]
    real = torch.cat([mask[:, 1:].bool(), written], 1)
    n = written.sum(1)
    ended = (ids == end).long()
    from_start = ((ended.cumsum(1) - ended) == 0)[:, width:]
    by_most = torch.cat([torch.ones_like(written[:, :1]), written], 1)[:, -most:]
    log_s, log_t = (
        each.log_softmax(-1)[:, after].gather(2, new[..., None])[..., 0][written] for each in (s, t)
    )
    return {
        "the divergence is taken in the forward direction.": _kl(t, s)[:, after][written].mean(),
        "it is taken where the new tokens stand, not where they are predicted.": (
            kl[:, width:][written].mean()
        ),
        "the tokens of the prompt are counted too.": kl[:, :-1][real].mean(),
        "every position is counted, the padding in front too.": kl.mean(),
        "what comes after the end of a row is counted.": kl[:, after].mean(),
        "the end token, which the student wrote, is not counted.": (
            kl[:, after][written & (new != end)].mean()
        ),
        "it is a sum over the new tokens, not a mean.": kl[:, after][written].sum(),
        "it is a sum for each row, not a mean over the tokens.": (
            kl[:, after][written].sum() / len(ids)
        ),
        "it is a mean over all new positions, those after an end being zero.": (
            (kl[:, after] * written).mean()
        ),
        "it is a mean of the rows' means, so tokens of short texts count more.": (
            ((kl[:, after] * written).sum(1) / n).mean()
        ),
        "an end token in the prompt, where it may be padding, ends the row.": (
            kl[:, after][from_start].mean()
        ),
        "max_new_tokens says where the new tokens begin, but the student may write fewer.": (
            kl[:, -most - 1 : -1][by_most[:, -kl[:, -most - 1 : -1].shape[1] :]].mean()
        ),
        "only the probabilities of the tokens drawn are compared. The divergence sums over the "
        "vocabulary.": (log_s - log_t).mean(),
        "that is a policy gradient's stand-in for the loss. Here the divergence itself can be "
        "computed.": (log_s * (log_s - log_t)).mean(),
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


# Options of generate that leave the student's distribution as it is.
_NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0,
            "min_p": 0.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "no_repeat_ngram_size": 0,
            "num_beams": 1, "num_return_sequences": 1, "min_new_tokens": 0}  # fmt: skip


def _called(call, prompts, mask, most, end, pad, vocabulary):
    """The student was asked to write what it should."""
    if call["input_ids"] is None or not torch.equal(call["input_ids"], prompts):
        raise Mistake("The student does not continue the prompts it was given.")
    config = call.get("generation_config")
    options = {**(config.to_dict() if config is not None else {}), **call}
    if options.get("attention_mask") is None or not torch.equal(options["attention_mask"], mask):
        raise Mistake("While it writes, the student takes the padding for a part of the prompt.")
    number = options.get("max_new_tokens")
    if number is None and options.get("max_length") is not None:
        number = options["max_length"] - prompts.shape[1]
    if number != most:
        raise Mistake("The number of new tokens is not the one that was asked for.")
    if not options.get("do_sample"):
        raise Mistake("The student writes its likeliest text, and so the same in every step.")
    top = options.get("top_k")
    if top is None or 0 < top < vocabulary:
        raise Mistake("The texts are not drawn from all of the student's distribution.")
    for name, neutral in _NEUTRAL.items():
        if options.get(name) not in (None, neutral):
            raise Mistake(f"{name}={options[name]} changes what the student writes.")
    if options.get("eos_token_id") not in (None, end, [end]):
        raise Mistake("The student is told to stop at another token than its own end token.")


def _batches():
    """Two batches, padded on the left; the second has other sizes."""
    return [
        {
            "input_ids": torch.tensor([[0, 0, 40, 41, 42, 43], [50, 51, 52, 53, 54, 55]]),
            "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
            "labels": torch.tensor([[-100] * 4 + [42, 43], [-100] * 3 + [53, 54, 55]]),
        },
        {
            "input_ids": torch.tensor([[0, 61, 62, 2], [63, 64, 65, 2], [0, 0, 66, 2]]),
            "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]),
            "labels": torch.tensor([[-100] * 2 + [62, 2], [-100, 64, 65, 2], [-100] * 3 + [2]]),
        },
    ]


def _same_batch(batch, given):
    if batch.keys() != given.keys() or any(not torch.equal(batch[k], given[k]) for k in given):
        raise Mistake("The batch has been changed. It comes back in the next epoch.")


def _scored(log, batch, who):
    """The model was asked, about the text and not about the padding."""
    if not log:
        raise Mistake(f"The {who} is not asked.")
    masks = [mask for mask, _, _ in log]
    if any(mask is None or not torch.equal(mask, batch["attention_mask"]) for mask in masks):
        raise Mistake(f"The {who} takes the padding for text: it got no attention mask.")


def teacher_targets(answer):
    """Check a function (teacher, batch) -> the teacher's logits."""
    for batch in _batches():
        teacher = _pair()[0].train()
        given = {key: value.clone() for key, value in batch.items()}
        with torch.no_grad():
            right = teacher(given["input_ids"], given["attention_mask"]).logits
        log, handle = _logged(teacher)
        try:
            got = answer(teacher, batch)
            graphs = torch.is_grad_enabled()
        finally:
            torch.set_grad_enabled(True)
            handle.remove()
        _same_batch(batch, given)
        _scored(log, given, "teacher")
        if any(training for _, training, _ in log):
            raise Mistake("The teacher is in training mode, so dropout changes its targets.")
        if teacher.training:
            raise Mistake("The teacher is put back into training mode. Leave it in eval mode.")
        if not graphs:
            raise Mistake("Gradients stay switched off after the call, for the student too.")
        if not all(p.requires_grad for p in teacher.parameters()):
            raise Mistake(
                "The teacher has been frozen. Whoever trains it afterward wonders why it stays."
            )
        if any(logits.requires_grad for _, _, logits in log):
            raise Mistake(
                "The teacher's forward pass builds a graph: memory for a backward pass that never "
                "comes."
            )
        _are_logits(got, right)


def _are_logits(got, right):
    if not isinstance(got, torch.Tensor):
        raise Mistake(f"Return the logits as a tensor; this is a {type(got).__name__}.")
    if got.shape != right.shape:
        raise Mistake(
            f"The logits have the shape {tuple(right.shape)}, and the result {tuple(got.shape)}."
        )
    for what, value in {
        "probabilities": right.softmax(-1),
        "logarithms of probabilities": right.log_softmax(-1),
    }.items():
        if torch.allclose(got, value, atol=1e-5):
            raise Mistake(f"These are {what}. The loss divides logits by its temperature.")
    if not torch.allclose(got, right, atol=1e-5):
        raise Mistake("The result is not what the teacher says about this batch.")


def _step_mistakes(batch, s, t, alpha, temperature):
    """Losses of a step that come from known mistakes."""
    labels = batch["labels"]
    hard, soft = _parts(s, t, labels, temperature)
    known = _soft_mistakes(s, t, labels, temperature)
    late = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    of_late, of_scaled = (
        _parts(s, t, late, temperature),
        _parts(s / temperature, t / temperature, labels, temperature),
    )
    of_shares = _parts(s.softmax(-1), t.softmax(-1), labels, temperature)
    exchanged = _parts(t, s, labels, temperature)
    of_alpha = _parts(s, t, labels, alpha)

    def mixed(parts):
        return alpha * parts[0] + (1 - alpha) * parts[1]

    return {
        "alpha goes to the wrong part.": mixed((soft, hard)),
        "student and teacher have changed places.": mixed(exchanged),
        "the labels are shifted twice.": mixed(of_late),
        "both parts see logits that are already divided by the temperature.": mixed(of_scaled),
        "probabilities are taken for logits.": mixed(of_shares),
        "alpha and the temperature have changed places.": (
            temperature * of_alpha[0] + (1 - temperature) * of_alpha[1]
        ),
        "all tokens of the text are targets, whatever the labels say.": (
            mixed(_parts(s, t, batch["input_ids"], temperature))
        ),
        "it is the labels' part alone.": hard,
        "it is the teacher's part alone.": soft,
    } | {f"in the soft part, {what}": mixed((hard, value)) for what, value in known.items()}


def student_loss(answer):
    """Check a function (student, targets, batch, alpha, temperature) -> loss."""
    teacher, student = _pair()
    for batch, alpha, temperature in zip(_batches(), (0.2, 0.7), (3.0, 1.5), strict=True):
        given = {key: value.clone() for key, value in batch.items()}
        inputs = given["input_ids"], given["attention_mask"]
        with torch.no_grad():
            s, t = student(*inputs).logits, teacher(*inputs).logits
        student.eval().zero_grad()
        log, handle = _logged(student)
        targets = t.clone()
        got = answer(student, targets, batch, alpha, temperature)
        handle.remove()
        _same_batch(batch, given)
        _unchanged([(targets, t)], "teacher's logits")
        _scored(log, given, "student")
        if not all(training for _, training, _ in log):
            raise Mistake("The student is not in training mode while it learns.")
        if not student.training:
            raise Mistake("The student is put back into eval mode, and it goes on learning.")
        right = sum(w * part for w, part in zip(
            (alpha, 1 - alpha), _parts(s, t, given["labels"], temperature), strict=True
        ))  # fmt: skip
        known = _step_mistakes(given, s, t, alpha, temperature)
        _compare(_number(got, "The loss"), right.item(), known, "The loss of a step")
        if not got.requires_grad:
            raise Mistake(
                "The value is right, but without a graph the student cannot learn from it."
            )
        if any(p.grad is not None for p in student.parameters()):
            raise Mistake("The backward pass is made here already. It belongs to task 7.")
        _as_reference(got, student, given, t, alpha, temperature)


def _gradient(student, batch, t, alpha, temperature):
    """The gradients of the loss of a step, by the formula."""
    logits = student(batch["input_ids"], batch["attention_mask"]).logits
    hard, soft = _parts(logits, t, batch["labels"], temperature)
    return torch.autograd.grad(alpha * hard + (1 - alpha) * soft, list(student.parameters()))


def _as_reference(loss, student, batch, t, alpha, temperature):
    params = list(student.parameters())
    found = torch.autograd.grad(loss, params, allow_unused=True)
    expected = _gradient(student, batch, t, alpha, temperature)
    if any(grad is None for grad in found) or not _all_near(found, expected):
        raise Mistake("The loss of a step is right, but not its gradient in the student's weights.")


def distil_step(answer):
    """Check a function (student, teacher, optimizer, batch, alpha, temperature) -> float."""
    for batch, alpha, temperature in zip(_batches(), (0.2, 0.7), (3.0, 1.5), strict=True):
        teacher, student = _pair()
        _step(answer, student, teacher, batch, alpha, temperature)


def _step(answer, student, teacher, batch, alpha, temperature, lr=0.05, decay=0.1):
    given = {key: value.clone() for key, value in batch.items()}
    inputs = given["input_ids"], given["attention_mask"]
    with torch.no_grad():
        s, t = student(*inputs).logits, teacher(*inputs).logits
    gradient = _gradient(student, given, t, alpha, temperature)
    params = list(student.parameters())
    optimizer = torch.optim.SGD([*params, *teacher.parameters()], lr=lr, weight_decay=decay)
    calls, step = [], optimizer.step
    optimizer.step = lambda *args, **kwargs: (calls.append(1), step(*args, **kwargs))[1]
    for p in [*params, *teacher.parameters()]:
        p.grad = torch.ones_like(p)  # what a step before has left
    before = [p.detach().clone() for p in params]
    teacher_before = [p.detach().clone() for p in teacher.parameters()]
    teacher.train()
    student.eval()
    logs = [_logged(student)[0], _logged(teacher)[0]]
    got = answer(student, teacher, optimizer, batch, alpha, temperature)
    for log, who in zip(logs, ("student", "teacher"), strict=True):
        _scored(log, given, who)
    for log, who, wanted in zip(logs, ("student", "teacher"), (True, False), strict=True):
        if any(training != wanted for _, training, _ in log):
            raise Mistake(f"The {who} is in the wrong mode: dropout is for those who learn.")
    _same_batch(batch, given)
    if isinstance(got, torch.Tensor) and got.requires_grad:
        raise Mistake("What is returned hangs on the graph, which so lives on after the step.")
    if not isinstance(got, float):
        raise Mistake(f"Return the loss as a float; this is a {type(got).__name__}.")

    def moved(grads):
        return [q - lr * (g + decay * q) for q, g in zip(before, grads, strict=True)]

    if not calls:
        raise Mistake("The optimizer that came in makes no step.")
    if len(calls) > 1:
        raise Mistake(f"The optimizer makes {len(calls)} steps in one call.")
    if _all_near(params, moved([torch.ones_like(g) for g in gradient])):
        raise Mistake("The student moves by the gradient of the step before alone.")
    if _all_near(params, moved([g + 1 for g in gradient])):
        raise Mistake("The gradient of the step before is still in it.")
    if _all_near(params, moved([2 * g for g in gradient])):
        raise Mistake("The student moves by twice the gradient. Is backward called twice?")
    if _all_near(params, before) or _all_near(params, moved([0 * g for g in gradient])):
        raise Mistake("When the optimizer makes its step, there is no gradient any more.")
    known = _step_mistakes(given, s, t, alpha, temperature)
    hard, soft = _parts(s, t, given["labels"], temperature)
    with torch.no_grad():
        late = _parts(student(*inputs).logits, t, given["labels"], temperature)
    known["that is the loss after the step, which costs another pass."] = (
        alpha * late[0] + (1 - alpha) * late[1]
    )
    right = (alpha * hard + (1 - alpha) * soft).item()
    known["it is rounded."] = round(right, 2)
    _compare(got, right, known, "The loss returned")
    if not _all_near(params, moved(gradient)):
        raise Mistake("The loss is right, but the student does not move by its gradient.")
    if not _all_near(teacher.parameters(), teacher_before):
        if all(p.grad is not None and not p.grad.any() for p in teacher.parameters()):
            raise Mistake("The teacher's gradients are zeros, so weight decay still moves it.")
        raise Mistake("The step changes the weights of the teacher, which the optimizer holds too.")


def _all_near(params, values):
    pairs = zip(params, values, strict=True)
    return all(torch.allclose(p, value, atol=1e-5) for p, value in pairs)
