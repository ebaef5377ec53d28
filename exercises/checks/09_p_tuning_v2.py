"""Checks of exercise 09: they name the mistake and stay silent about the solution."""

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from checks import Mistake
from minipeft import load_base


def _model(name):
    """A tiny model whose norms and biases are not the ones and zeros of a fresh one."""
    model, _ = load_base(name, device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__:
                module.weight.uniform_(0.5, 2.0)
            elif isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.normal_()
    return model


@torch.no_grad()
def _truth(model, prompts, ids):
    """Logits of all positions, and the cache, with prompts (layers, n, hidden) put in."""
    n = prompts.shape[1]
    embeds = model.get_input_embeddings()(ids)  # (batch, seq, hidden)
    embeds = torch.cat([embeds.new_zeros(len(ids), n, embeds.shape[-1]), embeds], 1)

    def enter(i):
        def hook(module, args):
            front = prompts[i].expand(len(ids), -1, -1)
            return (torch.cat([front, args[0][:, n:]], 1), *args[1:])

        return hook

    handles = [b.register_forward_pre_hook(enter(i)) for i, b in enumerate(model.model.layers)]
    cache = DynamicCache()
    logits = model(inputs_embeds=embeds, past_key_values=cache).logits
    for handle in handles:
        handle.remove()
    return logits, cache.layers


def _watch(model):
    """Lists of what each block takes in and gives out, whoever calls it; and the hooks."""
    layers = model.model.layers
    taken, given, handles = [[] for _ in layers], [[] for _ in layers], []
    for i, block in enumerate(layers):
        # The norm is the first thing in a block, so it sees what overwriting made of the input.
        handles.append(
            block.input_layernorm.register_forward_pre_hook(
                lambda module, args, i=i: taken[i].append(args[0].detach().clone())
            )
        )
        handles.append(
            block.register_forward_hook(
                lambda module, args, output, i=i: given[i].append(output.detach().clone())
            )
        )
    return taken, given, handles


def deep_prompt(answer):
    """Check a function (model, prompts, ids) -> logits (batch, seq, vocab) of the real tokens."""
    model = _model("tiny-llama")
    ids = torch.arange(10, 20).view(2, 5)
    n, seq = 3, 5
    prompts = torch.randn(len(model.model.layers), n, model.config.hidden_size)
    everything, _ = _truth(model, prompts, ids)
    before = model(ids).logits
    prompts.requires_grad_()
    taken, given, handles = _watch(model)
    counted = []  # for how many positions the model has made its rotations, before any block runs
    handles.append(
        model.model.rotary_emb.register_forward_pre_hook(
            lambda module, args, kwargs: counted.append(kwargs["position_ids"].shape[-1]),
            with_kwargs=True,
        )
    )
    error, got = None, None
    try:
        got = answer(model, prompts, ids)
    except NotImplementedError:  # which is a RuntimeError
        raise
    except (RuntimeError, IndexError) as caught:
        error = caught
    for handle in handles:
        handle.remove()
    prompt = prompts.detach()
    for i, inputs in enumerate(taken):
        if len(inputs) > 1:
            raise Mistake(f"Block {i} ran {len(inputs)} times in one call; once is enough.")
        if not inputs:
            break
        _entrance(i, inputs[0], prompt, given[i - 1][0] if i else None, n, seq)
        text = given[i - 1][0][:, n:] if i else model.get_input_embeddings()(ids)
        if not torch.allclose(inputs[0][:, n:], text, atol=1e-5):
            raise Mistake(f"At the entrance of block {i} the text itself has been changed.")
    if error is not None and counted == [seq]:
        raise Mistake(
            f"The model made ready for {seq} positions, and then block 0 takes in {n + seq}. The "
            "sequence must have its full length before the first block."
        ) from error
    if error is not None:
        raise Mistake(f"The call raises an error: {error}") from error
    if not all(taken):
        raise Mistake(f"Block {taken.index([])} never ran.")
    if not isinstance(got, torch.Tensor) or got.dim() != 3:
        raise Mistake("Return the logits themselves, one tensor (batch, seq, vocab).")
    if got.shape[1] == n + seq:
        raise Mistake("The logits of the virtual positions are still among those you return.")
    if got.shape != before.shape:
        raise Mistake(f"The logits have the shape {tuple(got.shape)}, not {tuple(before.shape)}.")
    if torch.allclose(got, everything[:, :seq], atol=1e-5):
        raise Mistake("The logits were cut at the wrong end: real ones are missing.")
    if not torch.allclose(got, everything[:, n:], atol=1e-5):
        raise Mistake("Every block takes in the right states, but the logits are not the model's.")
    if not torch.allclose(model(ids).logits, before, atol=1e-6):
        raise Mistake(
            "After your call the model no longer does what it did before: something of yours is "
            "still attached to it, and every later call will meet it."
        )
    got.square().sum().backward()
    if prompts.grad is None or not all(grad.any() for grad in prompts.grad):
        raise Mistake("No gradient arrives at some of the prompts, so they could never be trained.")


def _entrance(i, states, prompts, previous, n, seq):
    """Refuse a wrong front of the states (batch, length, hidden) that block i takes in."""
    length = states.shape[1]
    if length == seq:
        raise Mistake(
            "The sequence is as long as the text: the virtual positions took the place of real "
            "tokens instead of standing in front of them."
        )
    if length > n + seq:
        raise Mistake(
            f"Block {i} takes in {length} positions instead of {n + seq}: the sequence gets longer "
            "from block to block."
        )
    if length < seq:
        raise Mistake(f"Block {i} takes in {length} positions, fewer than the text has.")
    front, wanted = states[:, :n], prompts[i]
    if torch.allclose(states[:, -n:], wanted.expand_as(front), atol=1e-5):
        raise Mistake(
            f"Block {i} has its prompt in the last {n} positions. There it destroys real tokens, "
            "and a causal model lets nothing before it see it."
        )
    if torch.allclose(front, wanted.expand_as(front), atol=1e-5):
        return
    for j, other in enumerate(prompts):
        if j != i and torch.allclose(front, other.expand_as(front), atol=1e-5):
            raise Mistake(f"Block {i} takes in the prompt that belongs to block {j}.")
    if previous is not None and torch.allclose(front, previous[:, :n], atol=1e-5):
        raise Mistake(
            f"Block {i} has at its front what block {i - 1} computed there. Its own prompt is "
            "nowhere: that is soft prompting at the embeddings only."
        )
    if previous is not None and torch.allclose(front - wanted, previous[:, :n], atol=1e-4):
        raise Mistake(
            f"Block {i} has at its front the sum of its prompt and what block {i - 1} computed "
            "there. The two are not to be mixed."
        )
    raise Mistake(f"The first {n} positions that block {i} takes in are not its prompt.")


def _rotated(model, x, positions):
    cos, sin = model.model.rotary_emb(x, positions[None])
    return apply_rotary_pos_emb(x[None], x[None], cos, sin)[0][0]


@torch.no_grad()
def keys_and_values(answer):
    """Check a function (model, i, h) -> keys, values of block i, each (kv_heads, n, head_dim)."""
    for name in ("tiny-llama", "tiny-qwen2"):
        model = _model(name)
        n = 4
        prompts = torch.randn(len(model.model.layers), n, model.config.hidden_size)
        _, cache = _truth(model, prompts, torch.arange(10, 15)[None])
        for i, layer in enumerate(cache):
            got = answer(model, i, prompts[i])
            if not isinstance(got, (tuple, list)) or len(got) != 2:
                raise Mistake("Return two tensors, the keys and the values.")
            truth = layer.keys[0, :, :n], layer.values[0, :, :n]
            where = f"Block {i} of {name}"
            _shape(where, got, tuple(truth[0].shape), n)
            for kind, mine, true in zip(("keys", "values"), got, truth, strict=True):
                if not torch.allclose(mine, true, atol=1e-4):
                    _explain(f"{where}, {kind}", model, i, prompts[i], kind, mine)


def _shape(where, got, wanted, n):
    for kind, mine in zip(("keys", "values"), got, strict=True):
        if tuple(mine.shape) == (n, wanted[0], wanted[2]):
            raise Mistake(f"{where}: in the {kind}, heads and positions are in each other's place.")
        if tuple(mine.shape) != wanted:
            raise Mistake(f"{where}: the {kind} have the shape {tuple(mine.shape)}, not {wanted}.")


def _explain(where, model, i, h, kind, mine):
    """Find which mistake gives these keys or values, and say so."""
    positions = torch.arange(len(h))

    def variant(layer=i, norm="input_layernorm", bias=True, at=positions, swapped=True):
        block = model.model.layers[layer]
        project = block.self_attn.k_proj if kind == "keys" else block.self_attn.v_proj
        x = getattr(block, norm)(h) if norm else h
        x = project(x) if bias else linear(x, project.weight)  # (n, kv_heads * head_dim)
        heads, n, head_dim = mine.shape
        x = x.view(n, heads, head_dim).transpose(0, 1) if swapped else x.view(mine.shape)
        return x if at is None or kind == "values" else _rotated(model, x, at)

    def same(x):
        return torch.allclose(mine, x, atol=1e-4)

    if same(variant(norm=None)):
        raise Mistake(f"{where}: a block normalises its input before it projects; yours does not.")
    if same(variant(norm="post_attention_layernorm")):
        raise Mistake(f"{where}: this is the norm in front of the MLP, not that of the attention.")
    if same(variant(bias=False)) and not same(variant()):
        raise Mistake(f"{where}: the bias of the projection is missing.")
    if same(variant(swapped=False)):
        raise Mistake(
            f"{where}: the numbers are cut into heads across the tokens. One row of the projection "
            "holds all heads of one token."
        )
    for other in range(len(model.model.layers)):
        if other != i and same(variant(layer=other)):
            raise Mistake(f"{where}: these are made with the weights of block {other}.")
    if kind == "values" and same(_rotated(model, variant(), positions)):
        raise Mistake(f"{where}: they are rotated. Attention compares positions by keys only.")
    if kind == "keys" and same(variant(at=None)):
        raise Mistake(f"{where}: they are not rotated, as if every one stood at position 0.")
    if kind == "keys" and same(variant(at=positions.flip(0))):
        raise Mistake(f"{where}: the positions run backwards.")
    for shift in range(1, 40):
        if kind == "keys" and same(variant(at=positions + shift)):
            raise Mistake(
                f"{where}: they are rotated as if the virtual tokens stood at the positions "
                f"{shift} to {shift + len(h) - 1}. What stands in front of the text?"
            )
    raise Mistake(f"{where}: they are not what the model itself has in its cache.")


def count(answer):
    """Check a function (form, layers, hidden, kv_heads, head_dim, n) -> trained numbers."""
    models = {
        "GPT-2 medium": (24, 1024, 16, 64),
        "SmolLM2-135M": (30, 576, 3, 64),
        "one with wide heads": (28, 1024, 8, 128),
    }
    for name, shape in models.items():
        layers, hidden, kv_heads, head_dim = shape
        kv, n = kv_heads * head_dim, 10
        case = f"{name}, hidden form"
        got = answer("hidden", *shape, n)
        if got == n * hidden:
            raise Mistake(f"{case}: that is one prompt, at the embeddings. Each block has its own.")
        if got == 2 * layers * n * hidden:
            raise Mistake(f"{case}: keys and values are made of one and the same state.")
        if got == layers * n * kv != layers * n * hidden:
            raise Mistake(f"{case}: a state is as wide as the model, not as its keys.")
        if got == (layers + 1) * n * hidden:
            raise Mistake(f"{case}: one prompt too many. Nothing stands behind the last block.")
        if got != layers * n * hidden:
            raise Mistake(f"{case}: {got} is not the number of entries of all prompts.")
        case = f"{name}, key-value form"
        got = answer("key_value", *shape, n)
        if got == layers * n * kv:
            raise Mistake(f"{case}: only the keys are counted, or only the values.")
        if got == 2 * n * kv:
            raise Mistake(f"{case}: that is one block out of {layers}.")
        if got == 2 * layers * n * hidden != 2 * layers * n * kv:
            raise Mistake(
                f"{case}: with {kv_heads} key-value heads of {head_dim}, a key is {kv} numbers "
                f"wide, and not {hidden}."
            )
        if got == 2 * layers * n * head_dim:
            raise Mistake(f"{case}: that is one head out of {kv_heads}.")
        if got != 2 * layers * n * kv:
            raise Mistake(f"{case}: {got} is not the number of entries of all keys and values.")


def last_states(answer):
    """Check a function (states, mask, n) -> (batch, hidden), n virtual positions in front."""
    n, hidden = 3, 4
    cases = {
        "padded at the right": [[1, 1, 1, 1, 1, 0, 0], [1] * 7],
        "padded at the left": [[0, 0, 1, 1, 1, 1, 1], [1] * 7],
        "not padded": [[1] * 7] * 2,
    }
    torch.manual_seed(0)
    for name, rows in cases.items():
        mask = torch.tensor(rows)
        states = torch.randn(2, n + 7, hidden)
        got = answer(states, mask, n)
        if not isinstance(got, torch.Tensor) or tuple(got.shape) != (2, hidden):
            shape = tuple(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
            raise Mistake(f"Two texts give {shape}; it must be one state each, (2, {hidden}).")
        for row in range(2):
            _judge_state(f"A batch {name}, row {row}", got[row], states[row], mask[row], n)


def _judge_state(where, got, states, mask, n):
    real = mask.nonzero()[:, 0] + n
    wanted = real[-1].item()
    found = [j for j, state in enumerate(states) if torch.equal(state, got)]
    if found == [wanted]:
        return
    means = {
        "all positions, padding among them": states.mean(0),
        "all text positions": states[n:].mean(0),
        "the real tokens": states[real].mean(0),
        "the prompt and the real tokens": torch.cat([states[:n], states[real]]).mean(0),
    }
    for what, mean in means.items():
        if torch.allclose(mean, got, atol=1e-6):
            raise Mistake(f"{where}: this is the mean over {what}. Take one state.")
    if not found:
        raise Mistake(f"{where}: this is the state of no position.")
    at = found[0]
    if at == wanted - n:
        raise Mistake(f"{where}: position {at} is {n} too early: the states begin with the prompt.")
    if at < n:
        raise Mistake(f"{where}: position {at} is a virtual one.")
    if not mask[at - n]:
        raise Mistake(f"{where}: position {at} is padding.")
    if at == real[0]:
        raise Mistake(f"{where}: this is the first real token, which has seen no other.")
    raise Mistake(
        f"{where}: position {at} is a real token but not the last one. How many there are does not "
        "say where they are."
    )


def free_dimensions(answer):
    """Check a function (tie, h) -> the rank of the Jacobian of h -> (keys, values)."""

    def tie(hidden, kv, normed, same=False):
        generator = torch.Generator().manual_seed(kv)
        pair = torch.randn(2, kv, hidden, generator=generator, dtype=torch.float64)
        w_k, w_v = pair[0], pair[0] * 2 if same else pair[1]

        def keys_values(h):
            x = h / h.square().mean().sqrt() if normed else h
            return w_k @ x, w_v @ x

        return keys_values

    h = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def measured(case, *settings):
        got = answer(tie(8, *settings), h)
        if isinstance(got, torch.Tensor) and got.dim():
            raise Mistake(f"{case}: return one whole number, not {got.numel()} of them.")
        return int(got)

    case = "8 numbers in, keys and values of 3 each, with a norm"
    got = measured(case, 3, True)
    if got == 3:
        raise Mistake(f"{case}: 3 is what the keys alone, or the values alone, can do.")
    if got == 8:
        raise Mistake(f"{case}: 8 is the size of h. There are not even so many outputs.")
    if got != 6:
        raise Mistake(f"{case}: {got} is not the rank of the Jacobian.")
    case = "8 numbers in, keys and values of 8 each, with a norm"
    got = measured(case, 8, True)
    if got == 16:
        raise Mistake(f"{case}: 16 is the number of outputs, and 8 numbers cannot move them all.")
    if got == 14:
        raise Mistake(f"{case}: the ranks of both are added up, but the same h moves both.")
    if got == 8:
        raise Mistake(
            f"{case}: not 8. One direction of h changes nothing behind the norm. Measure the "
            "function that you are given, at h."
        )
    if got != 7:
        raise Mistake(f"{case}: {got} is not the rank of the Jacobian.")
    for settings, wanted, case in (
        ((8, False), 8, "8 in, keys and values of 8 each, without a norm"),
        ((3, True, True), 3, "8 in, 3 keys, and values that are always twice the keys"),
    ):
        got = measured(case, *settings)
        if got != wanted:
            raise Mistake(f"{case}: {got} is not the rank; the weights count, not only the sizes.")
