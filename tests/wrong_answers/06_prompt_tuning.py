"""Wrong answers to exercise 06: (check, source of the answer, part of the message expected)."""

from edits import edited

_START = """
def start_rows(model, tokenizer, n):
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    ids = ordinary[torch.randint(len(ordinary), (n,))]
    return model.get_input_embeddings().weight.detach()[ids].float()
"""

_GREEDY = """
@torch.no_grad()
def greedy(model, prompt, input_ids, attention_mask, steps):
    words = model.get_input_embeddings()(input_ids)
    inputs = torch.cat([prompt.to(words.dtype).expand(len(words), -1, -1), words], 1)
    mask = extend_mask(attention_mask, len(prompt))
    cache, new = None, []
    for _ in range(steps):
        output = model(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=positions(mask)[:, -inputs.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        new.append(output.logits[:, -1].argmax(-1))
        inputs = model.get_input_embeddings()(new[-1][:, None])
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.stack(new, 1)
"""

_TUNED = """
class PromptTuned(nn.Module):
    def __init__(self, model, prompt):
        super().__init__()
        self.model = model.requires_grad_(False)
        dtype = torch.promote_types(prompt.dtype, torch.float32)
        self.prompt = nn.Parameter(prompt.detach().to(dtype, copy=True))

    def forward(self, input_ids, attention_mask, labels=None):
        n = len(self.prompt)
        words = self.model.get_input_embeddings()(input_ids)
        prompt = self.prompt.to(words.dtype).expand(len(words), -1, -1)
        mask = extend_mask(attention_mask, n)
        output = self.model(
            inputs_embeds=torch.cat([prompt, words], 1),
            attention_mask=mask,
            position_ids=positions(mask),
            labels=None if labels is None else extend_labels(labels, n),
        )
        output.logits = output.logits[:, n:]
        return output
"""


def _start(*pairs):
    return edited(_START, *pairs)


def _greedy(*pairs):
    return edited(_GREEDY, *pairs)


def _tuned(*pairs):
    return edited(_TUNED, *pairs)


def _labels(expression):
    return f"def extend_labels(labels, n):\n    return {expression}"


def _mask(expression):
    return f"def extend_mask(attention_mask, n):\n    return {expression}"


def _positions(expression):
    return f"def positions(attention_mask):\n    return {expression}"


ORDINARY = "[i for i in range(len(tokenizer)) if i not in special]"
PICKED = "ordinary[torch.randint(len(ordinary), (n,))]"
ROWS = "model.get_input_embeddings().weight.detach()[ids].float()"
PARAMETER = "nn.Parameter(prompt.detach().to(dtype, copy=True))"
GROWS = "        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)\n"
CALL_POSITIONS = "            position_ids=positions(mask)[:, -inputs.shape[1] :],\n"
LAST = "model.get_input_embeddings()(new[-1][:, None])"

WRONG = [
    ("extend_labels", _labels("pad(labels, (0, n), value=-100)"), "too early"),
    ("extend_labels", _labels("labels"), "as long as they came in"),
    ("extend_labels", _labels("pad(labels, (n, 0))"), "has the label 0"),
    ("extend_labels", _labels("pad(labels[:, :1], (n - 1, 0), value=-100)"), "became (2, 3)"),
    (
        "extend_labels",
        _labels("torch.cat([torch.full((len(labels), n), -100.0), labels], 1)"),
        "these are torch.float32",
    ),
    ("extend_labels", _labels("pad(labels[:, 1:], (n, 1), value=-100)"), "off by one"),
    ("extend_labels", _labels("pad(labels.roll(2, 1), (n, 0), value=-100)"), "no longer what"),
    (
        "extend_labels",
        _labels("pad(labels.fill_(-100), (n, 0), value=-100)"),
        "that came in were changed",
    ),
    ("extend_labels", _labels("pad(labels, (n, 0), value=-100).tolist()"), "this is a list"),
    ("extend_mask", _mask("attention_mask"), "blind for the last n tokens"),
    ("extend_mask", _mask("pad(attention_mask, (n, 0))"), "virtual tokens are masked"),
    (
        "extend_mask",
        _mask("torch.cat([torch.ones(len(attention_mask), n), attention_mask], 1)"),
        "came out as torch.float32",
    ),
    ("extend_mask", _mask("pad(attention_mask, (0, n), value=1)"), "stand after the text"),
    (
        "extend_mask",
        _mask("torch.ones(len(attention_mask), n + attention_mask.shape[1]).long()"),
        "all ones",
    ),
    ("extend_mask", _mask("pad(attention_mask, (1, 0), value=1)"), "became (2, 7)"),
    ("start_rows", _start((ROWS, "model.get_input_embeddings().weight[:n]")), "share its memory"),
    (
        "start_rows",
        _start((ROWS, "model.get_input_embeddings().weight[:n].detach().clone()")),
        "begin with special tokens",
    ),
    ("start_rows", _start((".detach()", "")), "hang on the graph"),
    ("start_rows", _start((ORDINARY, "range(len(tokenizer))")), "is the special token"),
    (
        "start_rows",
        _start((ROWS, "torch.randn(n, model.config.hidden_size) * 0.02")),
        "not rows of the embedding table",
    ),
    ("start_rows", _start((PICKED, "ordinary[:n]")), "nothing is drawn at random"),
    (
        "start_rows",
        _start((PICKED, "ordinary[torch.randint(len(ordinary), (n,), generator=new())]"))
        + "\ndef new():\n    g = torch.Generator()\n    g.seed()\n    return g\n",
        "nobody can repeat",
    ),
    (
        "start_rows",
        _start((PICKED, "ordinary[torch.randint(len(ordinary), (1,))].expand(n)")),
        "one and the same token",
    ),
    ("start_rows", _start(("len(ordinary), (n,)", "50, (n,)")), "part of it is never drawn"),
    (
        "start_rows",
        _start((ORDINARY, "[i for i in range(model.config.vocab_size) if i not in special]")),
        "rows of no token",
    ),
    ("start_rows", _start((".float()", "")), "the vectors are not float32"),
    ("start_rows", _start((ROWS, "ids")), "not (8, 32)"),
    (
        "positions",
        _positions("torch.arange(attention_mask.shape[1]).expand_as(attention_mask)"),
        "the padding is counted",
    ),
    ("positions", _positions("attention_mask.cumsum(-1)"), "Models count from 0"),
    ("positions", _positions("attention_mask.float().cumsum(-1) - 1"), "not torch.float32"),
    (
        "positions",
        _positions(
            "torch.cat([torch.arange(2).expand(2, -1), attention_mask[:, 2:].cumsum(-1) - 1], 1)"
        ),
        "begins at 0 again",
    ),
    (
        "positions",
        _positions("(attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, -1)"),
        "no table has it",
    ),
    ("positions", _positions("torch.arange(attention_mask.shape[1])"), "gives positions (8,)"),
    ("positions", _positions("attention_mask - 1"), "have the positions"),
    (
        "greedy",
        _greedy(
            (
                LAST,
                "torch.cat([prompt.expand(len(mask), -1, -1), "
                "model.get_input_embeddings()(new[-1][:, None])], 1)",
            ),
            (GROWS, "        mask = pad(mask, (0, len(prompt) + 1), value=1)\n"),
        ),
        "again at every step",
    ),
    ("greedy", _greedy((GROWS, "")), "What grows with each step"),
    (
        "greedy",
        _greedy(
            (CALL_POSITIONS, ""),
        ),
        "left-padded one is not",
    ),
    ("greedy", _greedy(("past_key_values=cache", "past_key_values=None")), "know one token alone"),
    (
        "greedy",
        _greedy(
            ("past_key_values=cache", "past_key_values=None"),
            (f"inputs = {LAST}", f"inputs = torch.cat([inputs, {LAST}], 1)"),
        ),
        "Hand the cache on",
    ),
    (
        "greedy",
        _greedy(("torch.stack(new, 1)", "torch.cat([input_ids, torch.stack(new, 1)], 1)")),
        "return the new ones alone",
    ),
    (
        "greedy",
        _greedy(("range(steps)", "range(steps + 1)"), ("stack(new, 1)", "stack(new[1:], 1)")),
        "The first new token is missing",
    ),
    ("greedy", _greedy(("stack(new, 1)", "stack(new[1:], 1)")), "the result is (2, 5)"),
    ("greedy", _greedy((".argmax(-1))", ".argmin(-1))")), "is not the likeliest one"),
    (
        "greedy",
        _greedy(
            (
                "inputs = torch.cat([prompt.to(words.dtype).expand(len(words), -1, -1), words], 1)",
                "inputs = words",
            ),
            ("extend_mask(attention_mask, len(prompt))", "attention_mask"),
        ),
        "prompt and text are 10",
    ),
    (
        "greedy",
        _greedy(
            (
                "=positions(mask)[:, -inputs.shape[1] :]",
                "=positions(mask)[:, -inputs.shape[1] :] - len(prompt)",
            )
        ),
        "has no such position",
    ),
    ("prompt_tuned", _tuned((".requires_grad_(False)", "")), "it is fine-tuning that does it"),
    ("prompt_tuned", _tuned((PARAMETER, "prompt.clone()")), "is not an nn.Parameter"),
    ("prompt_tuned", _tuned((PARAMETER, "nn.Parameter(prompt)")), "copy them"),
    (
        "prompt_tuned",
        _tuned((PARAMETER, "nn.Parameter(torch.zeros_like(prompt))")),
        "as the vectors that were given",
    ),
    ("prompt_tuned", _tuned(("        output.logits = output.logits[:, n:]\n", "")), "still there"),
    ("prompt_tuned", _tuned(("logits[:, n:]", "logits[:, :-n]")), "cut at the wrong end"),
    (
        "prompt_tuned",
        _tuned(("position_ids=positions(mask)", "position_ids=torch.arange(mask.shape[1])[None]")),
        "padded on the left",
    ),
    (
        "prompt_tuned",
        _tuned(
            ("inputs_embeds=torch.cat([prompt, words], 1)", "input_ids=input_ids"),
            ("attention_mask=mask", "attention_mask=attention_mask"),
            ("            position_ids=positions(mask),\n", ""),
            ("extend_labels(labels, n)", "labels"),
            ("        output.logits = output.logits[:, n:]\n", ""),
        ),
        "without any prompt",
    ),
    (
        "prompt_tuned",
        _tuned(
            ("attention_mask=mask", "attention_mask=attention_mask"),
        ),
        "as long as the row",
    ),
    (
        "prompt_tuned",
        _tuned(("extend_labels(labels, n)", "pad(labels, (0, n), value=-100)")),
        "Which logits meet which labels",
    ),
    (
        "prompt_tuned",
        _tuned(("else extend_labels(labels, n)", "else labels")),
        "forward fails on tiny-llama",
    ),
    ("prompt_tuned", _tuned(("self.prompt.to", "self.prompt.detach().to")), "gradient arrives"),
    (
        "prompt_tuned",
        _tuned(("torch.promote_types(prompt.dtype, torch.float32)", "prompt.dtype")),
        "the prompt is torch.bfloat16",
    ),
    ("prompt_tuned", _tuned((".to(words.dtype)", "")), "forward fails on a bfloat16 model"),
    (
        "extend_mask",
        """
def extend_mask(attention_mask, n):
    front = torch.ones(len(attention_mask), n, dtype=attention_mask.dtype)
    return torch.cat([front, attention_mask], 1)
""",
        "made on the CPU",
    ),
    (
        "extend_mask",
        """
def extend_mask(attention_mask, n):
    return torch.cat([attention_mask.new_ones(len(attention_mask), 2), attention_mask], 1)
""",
        "does not follow n",
    ),
    (
        "start_rows",
        edited(_START, ("[ids].float()", "[ids].float().requires_grad_()")),
        "require grad",
    ),
    (
        "start_rows",
        """
def start_rows(model, tokenizer, n):
    ids = torch.randint(3, len(tokenizer), (n,))
    return model.get_input_embeddings().weight.detach()[ids].float()
""",
        "anywhere in its vocabulary",
    ),
    (
        "prompt_tuned",
        edited(
            _TUNED,
            (
                "model.requires_grad_(False)",
                "__import__('copy').deepcopy(model).requires_grad_(False)",
            ),
        ),
        "A copy takes its memory twice",
    ),
    # Task 1
    ("extend_labels", _labels("pad(labels, (3, 0), value=-100)"), "does not follow n"),
    (
        "extend_labels",
        _labels("torch.cat([torch.full((2, n), -100), labels], 1)"),
        "do not follow what comes in",
    ),
    (
        "extend_labels",
        _labels("torch.cat([torch.full((len(labels), n), -100), labels], 1)"),
        "new labels are made on the CPU",
    ),
    ("extend_labels", _labels("pad(labels, (n, 0), value=-1)"), "ignores only -100"),
    (
        "extend_labels",
        _labels("pad(labels.masked_fill(labels == -100, 0), (n, 0), value=-100)"),
        "Where the text had -100",
    ),
    # Task 2
    ("extend_mask", _mask("pad(1 - attention_mask, (n, 0), value=1)"), "turned around"),
    (
        "extend_mask",
        _mask("(1.0 - pad(attention_mask, (n, 0), value=1)) * torch.finfo(torch.float32).min"),
        "The mask holds",
    ),
    (
        "extend_mask",
        _mask("pad(attention_mask, (n, 0), value=1)[:, None, None, :]"),
        "Making four dimensions",
    ),
    (
        "extend_mask",
        _mask("pad(attention_mask, (n, 0), value=1).sort(1, True).values"),
        "not where its tokens are",
    ),
    (
        "extend_mask",
        """
def extend_mask(attention_mask, n):
    attention_mask[:, :n] = 1
    return pad(attention_mask, (n, 0), value=1)
""",
        "that came in was changed",
    ),
    (
        "extend_mask",
        _mask("torch.cat([attention_mask.new_ones(2, n), attention_mask], 1)"),
        "an error for 3",
    ),
    (
        "extend_mask",
        _mask("pad(attention_mask, (n, 0), value=1).long()"),
        "came out as torch.int64",
    ),
    # Task 3
    (
        "start_rows",
        _start(("    special =", "    torch.manual_seed(0)\n    special =")),
        "The function seeds torch itself",
    ),
    (
        "start_rows",
        """
def start_rows(model, tokenizer, n):
    ids = torch.randint(len(tokenizer), (n,))
    special = torch.tensor(tokenizer.all_special_ids)
    return model.get_input_embeddings().weight.detach()[ids[~torch.isin(ids, special)]].float()
""",
        "drawn and then left out",
    ),
    (
        "start_rows",
        """
def start_rows(model, tokenizer, n):
    ids = torch.randint(len(tokenizer), (n,))
    for i in tokenizer.all_special_ids:
        ids[ids == i] = 50
    return model.get_input_embeddings().weight.detach()[ids].float()
""",
        "drawn far more often",
    ),
    (
        "start_rows",
        _start((".detach()", ".requires_grad_(False)")),
        "has frozen the table",
    ),
    (
        "start_rows",
        _start(("[ids].float()", ".numpy()[ids]"))
        .replace("return model", "return torch.tensor(model")
        .rstrip()
        + ").float()\n",
        "bfloat16 model the function fails",
    ),
    # Task 4
    (
        "positions",
        _positions("attention_mask.cumsum(-1, dtype=torch.int32) - 1"),
        "not torch.int32",
    ),
    (
        "positions",
        _positions(
            "(torch.arange(attention_mask.shape[1]) - (attention_mask == 0).sum(1, keepdim=True))"
            ".clamp(min=0)"
        ),
        "several virtual tokens have position 0",
    ),
    ("positions", _positions("attention_mask.cumsum(0) - 1"), "Count along each row"),
    ("positions", _positions("attention_mask.cumsum_(-1) - 1"), "the model still needs it"),
    (
        "positions",
        """
def positions(attention_mask):
    ids = torch.zeros(attention_mask.shape, dtype=torch.int64)
    for column in range(1, attention_mask.shape[1]):
        ids[:, column] = ids[:, column - 1] + attention_mask[:, column]
    return ids
""",
        "positions are made on the CPU",
    ),
    (
        "positions",
        _positions("attention_mask.cumsum(-1) - attention_mask"),
        "a bool tensor is not supported",
    ),
    # Task 5
    ("greedy", _greedy(("range(steps)", "range(6)")), "2 rows and 4 steps"),
    (
        "greedy",
        _greedy(("[mask, mask.new_ones(len(mask), 1)]", "[mask.new_ones(len(mask), 1), mask]")),
        "its new one is not after",
    ),
    (
        "greedy",
        _greedy(
            (
                "=positions(mask)[:, -inputs.shape[1] :]",
                "=positions(mask) if cache is None else "
                "torch.full((len(mask), 1), mask.shape[1] - 1)",
            )
        ),
        "goes on where its own row stood",
    ),
    (
        "greedy",
        _greedy(
            (
                "        inputs = model.get",
                "        if (new[-1] == model.config.eos_token_id).any():\n            break\n"
                "        inputs = model.get",
            )
        ),
        "After one token it stops",
    ),
    ("greedy", _greedy(("            use_cache=True,\n", "")), "Ask for it in the call"),
    ("greedy", _greedy((".to(words.dtype)", "")), "float32 prompt before a bfloat16"),
    ("greedy", _greedy(("torch.stack(new, 1)", "torch.stack(new, 1).tolist()")), "this is a list"),
    # Task 6
    (
        "prompt_tuned",
        _tuned(("n = len(self.prompt)", "n = 5")),
        "2 rows after 5 do",
    ),
    (
        "prompt_tuned",
        _tuned(
            (
                "output.logits = output.logits[:, n:]",
                "output.logits = output.logits if labels is None else output.logits[:, n:]",
            )
        ),
        "Without labels the logits",
    ),
    ("prompt_tuned", _tuned(("return output", "return output.loss")), "forward returns a Tensor"),
    (
        "prompt_tuned",
        _tuned(("model.requires_grad_(False)", "model.requires_grad_(False).float()")),
        "torch.float64 model was turned",
    ),
    (
        "prompt_tuned",
        _tuned(
            (
                "        n = len(self.prompt)",
                "        self.prompt.data = self.prompt.data.to(self.model.dtype)\n"
                "        n = len(self.prompt)",
            )
        ),
        "One forward pass has turned",
    ),
    (
        "prompt_tuned",
        _tuned(
            ("self.prompt = nn", "self.model.prompt = self.prompt = nn"),
        ),
        "registered in the base model",
    ),
    (
        "prompt_tuned",
        _tuned(
            (
                "        self.prompt = nn",
                "        self.scale = nn.Parameter(torch.ones(1))\n        self.prompt = nn",
            )
        ),
        "What else does the module hold",
    ),
    (
        "prompt_tuned",
        _tuned(("torch.promote_types(prompt.dtype, torch.float32)", "torch.float32")),
        "float64 stays",
    ),
    (
        "prompt_tuned",
        _tuned(
            (
                "        n = len(self.prompt)",
                "        if self.model.dtype == torch.bfloat16:\n            self.model.float()\n"
                "        n = len(self.prompt)",
            )
        ),
        "torch.bfloat16 model was turned",
    ),
]
