"""Wrong answers to exercise 09: (check, source of the answer, part of the message expected)."""

from edits import edited

_DEEP = """
def deep_prompt(model, prompts, input_ids):
    batch, n = len(input_ids), prompts.shape[1]

    def entering(i):
        def hook(block, args):
            hidden = args[0]
            front = prompts[i].expand(batch, -1, -1)
            return (torch.cat([front, hidden[:, n:]], 1), *args[1:])
        return hook

    blocks = model.model.layers
    handles = [block.register_forward_pre_hook(entering(i)) for i, block in enumerate(blocks)]
    embeds = model.get_input_embeddings()(input_ids)
    embeds = torch.cat([prompts[0].expand(batch, -1, -1), embeds], 1)
    logits = model(inputs_embeds=embeds).logits
    for handle in handles:
        handle.remove()
    return logits[:, n:]
"""


def _deep(*changes):
    return edited(_DEEP, *changes)


_TIED = """
def keys_and_values(model, i, h):
    block = model.model.layers[i]
    x = block.input_layernorm(h)
    n, head_dim = len(h), block.self_attn.head_dim
    keys = block.self_attn.k_proj(x).view(n, -1, head_dim).transpose(0, 1)
    values = block.self_attn.v_proj(x).view(n, -1, head_dim).transpose(0, 1)
    keys = rope(model, keys, torch.arange(n))
    return keys, values
"""


def _tied(*changes):
    return edited(_TIED, *changes)


def _count(hidden="layers * n * hidden", key_value="2 * layers * n * kv_heads * head_dim"):
    return f"""
def count(form, layers, hidden, kv_heads, head_dim, n):
    return {hidden} if form == "hidden" else {key_value}
"""


def _last(body):
    return f"""
def last_states(states, attention_mask, n):
    rows = torch.arange(len(states))
    seq = attention_mask.shape[1]
    last = (torch.arange(seq) * attention_mask).argmax(1)
    return {body}
"""


def _free(body):
    return f"""
def free_dimensions(tie, h):
    rank = torch.linalg.matrix_rank
    keys, values = tie(h)
    of_keys, of_values = jacrev(lambda x: tie(x)[0])(h), jacrev(lambda x: tie(x)[1])(h)
    return {body}
"""


OVERWRITE = "torch.cat([front, hidden[:, n:]], 1)"
BACK = "torch.cat([hidden[:, :-n], front], 1)"
EMBED = "embeds = torch.cat([prompts[0].expand(batch, -1, -1), embeds], 1)"
WRONG = [
    (
        "deep_prompt",
        _deep((OVERWRITE, "torch.cat([hidden[:, :n] + front * (i > 0), hidden[:, n:]], 1)")),
        "the sum of its prompt",
    ),
    (
        "deep_prompt",
        _deep((OVERWRITE, "torch.cat([front, hidden[:, n * (i == 0) :]], 1)")),
        "gets longer",
    ),
    (
        "deep_prompt",
        _deep((OVERWRITE, "torch.cat([front, hidden[:, n * (i > 0) :]], 1)"), (EMBED, "pass")),
        "made ready for 5 positions",
    ),
    (
        "deep_prompt",
        _deep(("enumerate(blocks)", "enumerate(blocks[:1])")),
        "at the embeddings only",
    ),
    ("deep_prompt", _deep((OVERWRITE, BACK)), "in the last 3 positions"),
    ("deep_prompt", _deep(("prompts[i]", "prompts[0]")), "belongs to block 0"),
    ("deep_prompt", _deep((EMBED, "pass")), "took the place of real tokens"),
    ("deep_prompt", _deep(("logits[:, n:]", "logits")), "still among those"),
    ("deep_prompt", _deep(("logits[:, n:]", "logits[:, :-n]")), "at the wrong end"),
    ("deep_prompt", _deep(("        handle.remove()", "        pass")), "still attached"),
    ("deep_prompt", _deep(("prompts[i]", "prompts[i].detach()")), "No gradient arrives"),
    (
        "deep_prompt",
        _deep((OVERWRITE, "torch.cat([front, 0 * hidden[:, n:]], 1)")),
        "the text itself has been changed",
    ),
    (
        "deep_prompt",
        _deep(("logits = model(", "model(inputs_embeds=embeds); logits = model(")),
        "2 times in one call",
    ),
    ("deep_prompt", _deep((").logits", ")"), ("logits[:, n:]", "logits")), "the logits themselves"),
    (
        "keys_and_values",
        _tied(("block.input_layernorm(h)", "h")),
        "normalizes its input before it projects",
    ),
    ("keys_and_values", _tied(("input_lay", "post_attention_lay")), "in front of the MLP"),
    (
        "keys_and_values",
        _tied(
            (
                "block.self_attn.v_proj(x)",
                "torch.nn.functional.linear(x, block.self_attn.v_proj.weight)",
            )
        ),
        "bias of the projection",
    ),
    (
        "keys_and_values",
        _tied(("return keys, values", "return keys, rope(model, values, torch.arange(n))")),
        "compares positions by keys only",
    ),
    ("keys_and_values", _tied(("keys = rope(", "_ = rope(")), "they are not rotated, as if"),
    (
        "keys_and_values",
        _tied(("torch.arange(n)", "torch.arange(n) + n")),
        "stood at the positions 4 to 7",
    ),
    (
        "keys_and_values",
        _tied(("torch.arange(n)", "torch.arange(n).flip(0)")),
        "run backwards",
    ),
    (
        "keys_and_values",
        _tied(("view(n, -1, head_dim).transpose(0, 1)", "view(-1, n, head_dim)")),
        "cut into heads across the tokens",
    ),
    (
        "keys_and_values",
        _tied(("return keys, values", "return keys.transpose(0, 1), values.transpose(0, 1)")),
        "in each other's place",
    ),
    ("keys_and_values", _tied(("layers[i]", "layers[0]")), "with the weights of block 0"),
    ("keys_and_values", _tied(("return keys, values", "return keys")), "Return two tensors"),
    ("count", _count(hidden="n * hidden"), "Each block has its own"),
    ("count", _count(hidden="2 * layers * n * hidden"), "one and the same state"),
    ("count", _count(hidden="layers * n * kv_heads * head_dim"), "as wide as the model, not"),
    ("count", _count(hidden="(layers + 1) * n * hidden"), "one prompt too many"),
    ("count", _count(key_value="layers * n * kv_heads * head_dim"), "only the keys are counted"),
    ("count", _count(key_value="2 * n * kv_heads * head_dim"), "that is one block out of"),
    ("count", _count(key_value="2 * layers * n * hidden"), "a key is 192 numbers wide"),
    ("count", _count(key_value="2 * layers * n * head_dim"), "one head out of"),
    ("last_states", _last("states[:, -1]"), "is padding"),
    ("last_states", _last("states[rows, last]"), "is 3 too early"),
    ("last_states", _last("states[rows, attention_mask.sum(1) - 1 + n]"), "not the last one"),
    ("last_states", _last("states.mean(1)"), "mean over all positions, padding among them"),
    ("last_states", _last("states[:, n:].mean(1)"), "mean over all text positions"),
    (
        "last_states",
        _last("torch.stack([s[n:][m == 1].mean(0) for s, m in zip(states, attention_mask)])"),
        "mean over the real tokens",
    ),
    ("last_states", _last("states[:, 0]"), "is a virtual one"),
    ("last_states", _last("states[rows, attention_mask.argmax(1) + n]"), "has seen no other"),
    ("last_states", _last("states[:, last + n]"), "one state each"),
    ("free_dimensions", _free("rank(of_keys)"), "the keys alone, or the values alone"),
    ("free_dimensions", _free("len(h)"), "the size of h. There are not"),
    ("free_dimensions", _free("len(keys) + len(values)"), "16 is the number of outputs"),
    ("free_dimensions", _free("rank(of_keys) + rank(of_values)"), "are added up"),
    ("free_dimensions", _free("min(len(h), len(keys) + len(values))"), "not 8. One direction"),
    ("free_dimensions", _free("min(len(h) - 1, 2 * len(keys))"), "the weights count"),
    (
        "free_dimensions",
        _free("rank(torch.stack([of_keys, of_values]))"),
        "return one whole number",
    ),
    # Prompts again
    (
        "deep_prompt",
        _deep(("(entering(i))", "(lambda block, args: entering(i)(block, args))")),
        "All hooks look up the same i",
    ),
    (
        "deep_prompt",
        """
def deep_prompt(model, prompts, input_ids):  # the blocks of the notebook, never taken out again
    class Deep(torch.nn.Module):
        def __init__(self, block, own):
            super().__init__()
            self.block, self.own = block, own

        def forward(self, h, **rest):
            n = len(self.own)
            return self.block(torch.cat([self.own.expand(len(h), -1, -1), h[:, n:]], 1), **rest)

    for i, own in enumerate(prompts):
        model.model.layers[i] = Deep(model.model.layers[i], own)
    embeds = model.get_input_embeddings()(input_ids)
    embeds = torch.cat([prompts[0].expand(len(input_ids), -1, -1), embeds], 1)
    return model(inputs_embeds=embeds).logits[:, prompts.shape[1] :]
""",
        "Put the old blocks back",
    ),
    (
        "deep_prompt",
        _deep(("    blocks = ", "    model.requires_grad_(False)\n    blocks = ")),
        "no longer require grad after your call",
    ),
    (
        "deep_prompt",
        _deep(
            (
                "model(inputs_embeds=embeds)",
                "model(inputs_embeds=embeds, "
                "position_ids=(torch.arange(embeds.shape[1]) - n).clamp(min=0)[None])",
            )
        ),
        "they should count from 0",
    ),
    (
        "deep_prompt",
        _deep(
            (
                "model(inputs_embeds=embeds)",
                "model(inputs_embeds=embeds, attention_mask=(torch.arange(embeds.shape[1]) >= n)"
                ".long().expand(batch, -1))",
            )
        ),
        "A mask hides the virtual positions",
    ),
    (
        "deep_prompt",
        _deep(("prompts[i].expand(batch, -1, -1)", "prompts[i][None]")),
        "With 2 texts and 3 virtual tokens the call raises",
    ),
    (
        "deep_prompt",
        _deep((OVERWRITE, "torch.cat([front, hidden[:, 3:]], 1)")),
        "Is a number written down",
    ),
    (
        "deep_prompt",
        _deep(("return logits[:, n:]", "prompts.data.mul_(2)\n    return logits[:, n:]")),
        "changed the caller's prompts",
    ),
    (
        "deep_prompt",
        _deep(("logits[:, n:]", "logits[:, n:].log_softmax(-1)")),
        "but the logits are not the model's",
    ),
    # Keys and values again
    ("keys_and_values", _tied(("return keys, values", "return values, keys")), "in this order"),
    (
        "keys_and_values",
        _tied(("return keys, values", "return keys[None], values[None]")),
        "a batch dimension in front",
    ),
    (
        "keys_and_values",
        """
def keys_and_values(model, i, h):
    layer = model(inputs_embeds=h[None], use_cache=True).past_key_values.layers[i]
    return layer.keys[0], layer.values[0]
""",
        "went through the blocks before block",
    ),
    (
        "keys_and_values",
        _tied(("input_layernorm(h)", "input_layernorm(h.detach())")),
        "no gradient",
    ),
    (
        "keys_and_values",
        _tied(("    return keys", "    h.data.zero_()\n    return keys")),
        "changed h in place",
    ),
    ("keys_and_values", _tied(("torch.arange(n)", "torch.arange(n) * 2")), "has in its cache"),
    (
        "keys_and_values",
        _tied(("return keys, values", "return keys.squeeze(1), values.squeeze(1)")),
        "n=1: the keys have the shape",
    ),
    # Counts again
    ("count", _count(hidden="layers * hidden"), "that is one virtual token out of"),
    ("count", _count(hidden="10 * layers * hidden"), "would be right for 10 virtual tokens"),
    ("count", _count(hidden="30 * n * hidden"), "would be right for 30 blocks"),
    (
        "count",
        _count("2 * layers * n * kv_heads * head_dim", "layers * n * hidden"),
        "is the number of the key-value form",
    ),
    ("count", _count(key_value="2 * layers * kv_heads * head_dim"), "a single token per block"),
    # Last states again
    ("last_states", _last("states[rows, last + 3]"), "would be right with 3 virtual tokens"),
    ("last_states", _last("states[rows, last + n].detach()"), "No gradient goes back to states"),
    ("last_states", _last("states[:, n:].amax(1)"), "the largest number of each dimension"),
    (
        "last_states",
        _last("(states[:, n:] * attention_mask[..., None]).sum(1)"),
        "the sum over the real tokens",
    ),
    (
        "last_states",
        """
def last_states(states, attention_mask, n):
    attention_mask *= torch.arange(attention_mask.shape[1])
    return states[torch.arange(len(states)), attention_mask.argmax(1) + n]
""",
        "attention_mask in place",
    ),
    (
        "last_states",
        _last("torch.cat([states[:, :n], states[:, n:] * attention_mask[..., None]], 1)[:, -1]"),
        "the state of no position",
    ),
    # Free dimensions again
    (
        "free_dimensions",
        """
def free_dimensions(tie, h):
    h.requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda x: torch.cat(tie(x)), h)
    return int(torch.linalg.matrix_rank(jacobian))
""",
        "changed the caller's h",
    ),
    (
        "free_dimensions",
        """
def free_dimensions(tie, h):
    jacobian = jacrev(lambda x: torch.cat(tie(x)))(torch.ones_like(h))
    return int(torch.linalg.matrix_rank(jacobian))
""",
        "Take the Jacobian at h, nowhere else",
    ),
    (
        "free_dimensions",
        """
def free_dimensions(tie, h):
    jacobian = jacrev(lambda x: torch.stack(tie(x)).flatten())(h)
    return int(torch.linalg.matrix_rank(jacobian))
""",
        "because the two are not equally wide",
    ),
    (
        "deep_prompt",
        _deep(
            (
                EMBED,
                "embeds = torch.cat([torch.zeros(batch, n, 32, dtype=embeds.dtype), embeds], 1)",
            )
        ),
        "`meta` stands in for a GPU",
    ),
    (
        "last_states",
        _last("states[rows, last + n]"),
        "Tensor on device",
    ),
    (
        "deep_prompt",
        _deep(("enumerate(blocks)", "enumerate(blocks[:2])")),
        "Does a loop end too early",
    ),
    (
        "deep_prompt",
        _deep(("    return logits", "    model.train()\n    return logits")),
        "is in training mode",
    ),
    (
        "deep_prompt",
        _deep((OVERWRITE, "torch.cat([front, hidden[:, n:]], 1).float()")),
        "takes in states of torch.float32",
    ),
    (
        "keys_and_values",
        _tied(("block.self_attn.v_proj", "block.self_attn.k_proj")),
        "v_proj is not used",
    ),
    (
        "keys_and_values",
        _tied(("torch.arange(n)", "torch.arange(-n, 0)")),
        "the positions -4 to -1",
    ),
]
