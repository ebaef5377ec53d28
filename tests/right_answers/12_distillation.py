"""Right answers to exercise 12, written in other ways: (check, source of the answer)."""

RIGHT = [
    (
        "divergence",
        """
def divergence(student_logits, teacher_logits, direction):
    vocab = student_logits.shape[-1]
    s = student_logits.reshape(-1, vocab) - student_logits.logsumexp(-1).reshape(-1, 1)
    t = teacher_logits.reshape(-1, vocab) - teacher_logits.logsumexp(-1).reshape(-1, 1)
    if direction == "forward":
        p, q = t, s
    elif direction == "reverse":
        p, q = s, t
    else:
        raise ValueError(direction)
    gap = torch.where(p == -torch.inf, 0.0, p - q)
    return torch.einsum("rv,rv->", p.exp(), gap) / len(p)
""",
    ),
    (
        "divergence",
        """
import torch.nn.functional as F

def divergence(z, v, way="forward"):
    pairs = {"forward": (z, v), "reverse": (v, z)}
    if way not in pairs:
        raise ValueError("which way?")
    q, p = (F.log_softmax(each.flatten(0, -2) if each.dim() > 1 else each[None], dim=1)
            for each in pairs[way])
    return F.kl_div(q, p.softmax(1), reduction="batchmean")
""",
    ),
    (
        "distillation_loss",
        """
def distillation_loss(student_logits, teacher_logits, labels, alpha=0.5, temperature=2.0):
    hard = soft = n = 0
    for s, t, row in zip(student_logits.float(), teacher_logits.float(), labels):
        for i in range(1, len(row)):
            if row[i] == -100:
                continue
            n += 1
            hard = hard - torch.log_softmax(s[i - 1], 0)[row[i]]
            with torch.no_grad():
                p = torch.softmax(t[i - 1] / temperature, 0)
            soft = soft + torch.sum(p * (p.log() - torch.log_softmax(s[i - 1] / temperature, 0)))
    return (alpha * hard + (1 - alpha) * temperature * temperature * soft) / n
""",
    ),
    (
        "distillation_loss",
        """
import torch.nn.functional as F

def distillation_loss(student_logits, teacher_logits, labels, alpha, temperature):
    s = student_logits.to(torch.float32)
    t = teacher_logits.detach().to(torch.float32)
    wanted = torch.full_like(labels, -100)
    wanted[:, :-1] = labels[:, 1:]
    ce = F.cross_entropy(s.flatten(0, 1), wanted.flatten(), ignore_index=-100)
    kl = F.kl_div((s / temperature).log_softmax(2), (t / temperature).log_softmax(2),
                  reduction="none", log_target=True).sum(2)
    weight = (wanted >= 0) / (wanted >= 0).sum()
    return alpha * ce + (1 - alpha) * temperature ** 2 * (kl * weight).sum()
""",
    ),
    (
        "student_from_layers",
        """
def student_from_layers(teacher, keep):
    blocks = list(teacher.model.layers)
    if len(keep) == 0 or min(keep) < 0 or max(keep) >= len(blocks):
        raise ValueError("no such blocks")
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(keep)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[i] for i in keep]
    new = type(teacher)(config).to(teacher.dtype)
    state = {k: v for k, v in teacher.state_dict().items() if ".layers." not in k}
    new.load_state_dict(state, strict=False)
    for place, number in enumerate(keep):
        new.model.layers[place].load_state_dict(blocks[number].state_dict())
    return new.eval()
""",
    ),
    (
        "student_from_layers",
        """
def student_from_layers(teacher, keep):
    keep = list(keep)
    if not set(range(len(teacher.model.layers))) >= set(keep) or not keep:
        raise ValueError(f"no blocks {keep}")
    student = copy.deepcopy(teacher)
    old = student.model.layers
    student.model.layers = torch.nn.ModuleList()
    for i in keep:
        block = copy.deepcopy(old[i])
        block.self_attn.layer_idx = len(student.model.layers)
        student.model.layers.append(block)
    kinds = getattr(student.config, "layer_types", None)
    if kinds:
        student.config.layer_types = [kinds[i] for i in keep]
    student.config.num_hidden_layers = len(keep)
    for p in student.parameters():
        p.requires_grad = True
        p.grad = None
    return student.train()
""",
    ),
    (
        "on_policy_loss",
        """
from transformers import GenerationConfig

def on_policy_loss(student, teacher, input_ids, attention_mask, max_new_tokens):
    how = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=max_new_tokens,
                           eos_token_id=student.config.eos_token_id,
                           pad_token_id=student.config.eos_token_id)
    out = student.generate(input_ids=input_ids, attention_mask=attention_mask,
                           generation_config=how, return_dict_in_generate=True).sequences
    start, total, n = input_ids.shape[1], 0.0, 0
    mask = torch.nn.functional.pad(attention_mask, (0, out.shape[1] - start), value=1)
    z = student(input_ids=out, attention_mask=mask).logits
    v = teacher(input_ids=out, attention_mask=mask).logits.detach()
    for row in range(len(out)):
        for at in range(start, out.shape[1]):
            log_s, log_t = z[row, at - 1].log_softmax(0), v[row, at - 1].log_softmax(0)
            total = total + (log_s.exp() * (log_s - log_t)).sum()
            n += 1
            if out[row, at] == student.config.eos_token_id:
                break
    return total / n
""",
    ),
    (
        "on_policy_loss",
        """
def on_policy_loss(student, teacher, input_ids, attention_mask, max_new_tokens):
    with torch.no_grad():
        ids = student.generate(input_ids, attention_mask=attention_mask, do_sample=True, top_k=0,
                               top_p=1.0, temperature=1.0, pad_token_id=0,
                               max_length=input_ids.shape[1] + max_new_tokens)
    width = input_ids.shape[-1]
    answer = ids[:, width:]
    is_end = answer == student.config.eos_token_id
    first = torch.where(is_end.any(1), is_end.int().argmax(1), answer.shape[1])
    chosen = torch.arange(answer.shape[1], device=ids.device) <= first[:, None]
    mask = torch.cat([attention_mask, chosen.to(attention_mask.dtype)], dim=1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        t = teacher(ids, attention_mask=mask, position_ids=places).logits
    t = t.clone()[:, width - 1 : -1]
    s = student(ids, attention_mask=mask, position_ids=places).logits[:, width - 1 : -1]
    return divergence(s[chosen], t[chosen], "reverse")
""",
    ),
    (
        "teacher_targets",
        """
@torch.no_grad()
def teacher_targets(teacher, batch):
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return teacher.eval()(**inputs)[0]
""",
    ),
    (
        "teacher_targets",
        """
def teacher_targets(teacher, batch):
    teacher.train(False)
    with torch.inference_mode():
        output = teacher(**batch)
    return output["logits"].clone()
""",
    ),
    (
        "student_loss",
        """
def student_loss(student, targets, batch, alpha, temperature):
    output = student.train()(**batch)
    keep = batch["labels"][:, 1:] != -100
    s, t = output.logits[:, :-1][keep] / temperature, targets[:, :-1][keep] / temperature
    soft = kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean") * temperature**2
    return alpha * output.loss + (1 - alpha) * soft
""",
    ),
    (
        "distil_step",
        """
def distil_step(student, teacher, optimizer, batch, alpha, temperature):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None
    loss = student_loss(student, teacher_targets(teacher, batch), batch, alpha, temperature)
    number = float(loss.detach())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return number
""",
    ),
]
