"""Checks of exercise 09: they name the mistake and stay silent about the solution."""

import copy

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from checks import Mistake
from minipeft import load_base


def _model(name, blocks=2):
    """A tiny model whose norms and biases are not the ones and zeros of a fresh one."""
    model, _ = load_base(name, device="cpu")
    for i in range(2, blocks):
        model.model.layers.append(copy.deepcopy(model.model.layers[0]))
        model.model.layers[i].self_attn.layer_idx = i
    model.config.num_hidden_layers = blocks
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__:
                module.weight.uniform_(0.5, 2.0)
            elif isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.normal_()
    return model


@torch.no_grad()
def _truth(model, prompts, ids, mask=None):
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
    logits = model(inputs_embeds=embeds, past_key_values=cache, attention_mask=mask).logits
    for handle in handles:
        handle.remove()
    return logits, cache.layers


def _elsewhere(answer, *given):
    """Refuse an answer that makes tensors on the CPU while its own are on another device."""
    try:
        answer(*(x.to("meta") if isinstance(x, (nn.Module, torch.Tensor)) else x for x in given))
    except RuntimeError as error:  # others come from tensors that have no numbers
        if "on the expected device" in str(error):
            raise Mistake(
                f"On another device than the CPU it fails: {error} Here `meta` stands in for a GPU."
            ) from error


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
    model, other = _model("tiny-llama"), _model("tiny-qwen2").double()
    _prompted(answer, model, torch.arange(10, 20).view(2, 5), 3)
    _prompted(answer, other, torch.arange(30, 36).view(1, 6), 1)
    _prompted(answer, _model("tiny-llama", blocks=3), torch.arange(40, 52).view(3, 4), 2)
    prompts = torch.zeros(len(model.model.layers), 2, model.config.hidden_size)
    _elsewhere(answer, model, prompts, torch.arange(40, 52).view(3, 4))


def _prompted(answer, model, ids, n):
    """One call, with n virtual positions in front of ids (batch, seq)."""
    torch.manual_seed(n)
    shape = len(model.model.layers), n, model.config.hidden_size
    prompts = torch.randn(shape, dtype=model.dtype)
    everything, _ = _truth(model, prompts, ids)
    before, inside = model(ids).logits, _inside(model)
    prompt, text, seq = prompts.clone(), ids.clone(), ids.shape[1]
    prompts.requires_grad_()
    taken, given, handles = _watch(model)
    positions = []  # for which the model has made its rotations, before any block runs
    handles.append(
        model.model.rotary_emb.register_forward_pre_hook(
            lambda module, args, kwargs: positions.append((*args, *kwargs.values())[1][0].tolist()),
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
    for i, inputs in enumerate(taken):
        if len(inputs) > 1:
            raise Mistake(f"Block {i} ran {len(inputs)} times in one call; once is enough.")
        if not inputs:
            break
        _entrance(i, inputs[0], prompt, given[i - 1][0] if i else None, n, seq)
        real = given[i - 1][0][:, n:] if i else model.get_input_embeddings()(ids)
        if not torch.allclose(inputs[0][:, n:], real, atol=1e-5):
            raise Mistake(f"At the entrance of block {i} the text itself has been changed.")
    if error is not None and positions == [list(range(seq))]:
        raise Mistake(
            f"The model made ready for {seq} positions, and then block 0 takes in {n + seq}. The "
            "sequence must have its full length before the first block."
        ) from error
    if error is not None:
        raise Mistake(
            f"With {len(ids)} texts and {n} virtual tokens the call raises an error: {error}"
        ) from error
    if not all(taken):
        raise Mistake(f"Block {taken.index([])} never ran.")
    if positions != [list(range(n + seq))]:
        raise Mistake(
            f"The positions are {positions[0]}; they should count from 0 to {n + seq - 1}."
        )
    if not isinstance(got, torch.Tensor) or got.dim() != 3:
        raise Mistake("Return the logits themselves, one tensor (batch, seq, vocab).")
    if got.shape[1] == n + seq:
        raise Mistake("The logits of the virtual positions are still among those you return.")
    if got.shape != before.shape:
        raise Mistake(f"The logits have the shape {tuple(got.shape)}, not {tuple(before.shape)}.")
    if torch.allclose(got, everything[:, :seq], atol=1e-5):
        raise Mistake("The logits were cut at the wrong end: real ones are missing.")
    if not torch.allclose(got, everything[:, n:], atol=1e-5):
        hidden = torch.cat([torch.zeros(len(ids), n), torch.ones(ids.shape)], 1).long()
        if torch.allclose(got, _truth(model, prompt, ids, hidden)[0][:, n:], atol=1e-5):
            raise Mistake("A mask hides the virtual positions, so the text cannot attend to them.")
        raise Mistake("Every block takes in the right states, but the logits are not the model's.")
    if not torch.equal(prompts, prompt) or not torch.equal(ids, text):
        raise Mistake("The call changed the caller's prompts or input_ids in place.")
    now = _inside(model)
    if now[0] != inside[0]:
        raise Mistake("The model has other modules after your call. Put the old blocks back.")
    if now[2] != inside[2]:
        raise Mistake("After your call the model is in training mode; it was in eval mode before.")
    if now[1] != inside[1]:
        raise Mistake("Parameters of the model no longer require grad after your call, or do anew.")
    if not torch.allclose(model(ids).logits, before, atol=1e-6):
        raise Mistake(
            "After your call the model no longer does what it did before: something of yours is "
            "still attached to it, and every later call will meet it."
        )
    if got.requires_grad:
        got.square().sum().backward()
    if prompts.grad is None or not all(grad.any() for grad in prompts.grad):
        raise Mistake("No gradient arrives at some of the prompts, so they could never be trained.")


def _inside(model):
    """What a call must leave as it was: modules, which parameters are trainable, the mode."""
    flags = [p.requires_grad for p in model.parameters()]
    return [id(m) for m in model.modules()], flags, model.training


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
        raise Mistake(
            f"Block {i} takes in {length} positions, fewer than the {seq} of the text. Is a number "
            f"written down where n, now {n}, belongs?"
        )
    if states.dtype != prompts.dtype:
        raise Mistake(f"In a {prompts.dtype} model, block {i} takes in states of {states.dtype}.")
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
            late = " All hooks look up the same i, after the loop." * (i < j == len(prompts) - 1)
            raise Mistake(f"Block {i} takes in the prompt that belongs to block {j}.{late}")
    if previous is not None and torch.allclose(front, previous[:, :n], atol=1e-5):
        why = "Does a loop end too early?"
        if i == 1:
            why = "That is soft prompting at the embeddings only."
        raise Mistake(
            f"Block {i} has at its front what block {i - 1} computed there. Its own prompt is "
            f"nowhere. {why}"
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


def keys_and_values(answer):
    """Check a function (model, i, h) -> keys, values of block i, each (kv_heads, n, head_dim)."""
    for name, n in (("tiny-llama", 4), ("tiny-qwen2", 7), ("tiny-llama", 1)):
        model = _model(name)
        prompts = torch.randn(len(model.model.layers), n, model.config.hidden_size)
        _, cache = _truth(model, prompts, torch.arange(10, 15)[None])
        for i, layer in enumerate(cache):
            h = prompts[i].clone().requires_grad_()
            got = answer(model, i, h)
            if not isinstance(got, (tuple, list)) or len(got) != 2:
                raise Mistake("Return two tensors, the keys and the values.")
            truth = layer.keys[0, :, :n], layer.values[0, :, :n]
            where = f"Block {i} of {name}, n={n}"
            _shape(where, got, tuple(truth[0].shape), n)
            if _same(got[0], truth[1]) and _same(got[1], truth[0]):
                raise Mistake(f"{where}: these are the values and the keys, in this order.")
            for kind, mine, true in zip(("keys", "values"), got, truth, strict=True):
                if not _same(mine, true):
                    with torch.no_grad():
                        _explain(f"{where}, {kind}", model, i, prompts, kind, mine)
            if not torch.equal(h, prompts[i]):
                raise Mistake(f"{where}: the call changed h in place.")
            for kind, mine in zip(("keys", "values"), got, strict=True):
                if not _reached(h, mine):
                    raise Mistake(f"{where}: no gradient goes back from the {kind} to h.")


def _reached(h, result):
    """Whether a gradient goes back from the result to h."""
    if not result.requires_grad:
        return False
    loss = result.square().sum()
    (gradient,) = torch.autograd.grad(loss, h, retain_graph=True, allow_unused=True)
    return gradient is not None and bool(gradient.any())


def _same(a, b):
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-4)


def _shape(where, got, wanted, n):
    for kind, mine in zip(("keys", "values"), got, strict=True):
        if tuple(mine.shape) == (1, *wanted):
            raise Mistake(f"{where}: the {kind} have a batch dimension in front, which h has not.")
        if tuple(mine.shape) == (n, wanted[0], wanted[2]):
            raise Mistake(f"{where}: in the {kind}, heads and positions are in each other's place.")
        if tuple(mine.shape) != wanted:
            raise Mistake(f"{where}: the {kind} have the shape {tuple(mine.shape)}, not {wanted}.")


def _explain(where, model, i, prompts, kind, mine):
    """Find which mistake gives these keys or values, and say so."""
    h = prompts[i]
    positions = torch.arange(len(h))

    def variant(
        layer=i, norm="input_layernorm", bias=True, at=positions, swapped=True, projection=None
    ):
        block = model.model.layers[layer]
        project = getattr(block.self_attn, projection or f"{kind[0]}_proj")
        x = getattr(block, norm)(h) if norm else h
        x = project(x) if bias else linear(x, project.weight)  # (n, kv_heads * head_dim)
        heads, n, head_dim = mine.shape
        x = x.view(n, heads, head_dim).transpose(0, 1) if swapped else x.view(mine.shape)
        return x if at is None or kind == "values" else _rotated(model, x, at)

    def same(x):
        return _same(mine, x)

    embedded = model(inputs_embeds=h[None], use_cache=True).past_key_values.layers[i]
    if i and same((embedded.keys if kind == "keys" else embedded.values)[0]):
        raise Mistake(
            f"{where}: h went through the blocks before block {i}. It stands at the entrance of "
            f"block {i} itself."
        )
    if same(variant(norm=None)):
        raise Mistake(f"{where}: a block normalizes its input before it projects; yours does not.")
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
    if kind == "values" and same(variant(projection="k_proj")):
        raise Mistake(f"{where}: these are keys that are not rotated; v_proj is not used.")
    if kind == "values" and same(_rotated(model, variant(), positions)):
        raise Mistake(f"{where}: they are rotated. Attention compares positions by keys only.")
    if kind == "keys" and same(variant(at=None)):
        raise Mistake(f"{where}: they are not rotated, as if every one stood at position 0.")
    if kind == "keys" and same(variant(at=positions.flip(0))):
        raise Mistake(f"{where}: the positions run backwards.")
    for shift in (*range(1, 40), *range(-20, 0)):
        if kind == "keys" and same(variant(at=positions + shift)):
            raise Mistake(
                f"{where}: they are rotated as if the virtual tokens stood at the positions "
                f"{shift} to {shift + len(h) - 1}. What stands in front of the text?"
            )
    raise Mistake(f"{where}: they are not what the model itself has in its cache.")


def count(answer):
    """Check a function (form, layers, hidden, kv_heads, head_dim, n) -> trained numbers."""
    models = {
        "SmolLM2-135M": (30, 576, 3, 64),
        "GPT-2 medium": (24, 1024, 16, 64),
        "one with wide heads": (28, 1024, 8, 128),
    }
    for n, (name, shape) in zip((10, 7, 16), models.items(), strict=True):
        layers, hidden, kv_heads, head_dim = shape
        kv = kv_heads * head_dim
        case = f"{name}, hidden form"
        got = answer("hidden", *shape, n)
        if got == layers * hidden:
            raise Mistake(f"{case}: that is one virtual token out of {n}.")
        if got == 30 * n * hidden != layers * n * hidden:
            raise Mistake(f"{case}: that would be right for 30 blocks, and it has {layers}.")
        if got == 10 * layers * hidden != layers * n * hidden:
            raise Mistake(f"{case}: that would be right for 10 virtual tokens; these are {n}.")
        if got == 2 * layers * n * kv and kv != hidden:
            raise Mistake(f"{case}: this is the number of the key-value form.")
        if got == n * hidden:
            raise Mistake(f"{case}: that is one prompt, at the embeddings. Each block has its own.")
        if got == 2 * layers * n * hidden:
            raise Mistake(f"{case}: keys and values are made of one and the same state.")
        if got == layers * n * kv != layers * n * hidden:
            raise Mistake(f"{case}: a state is as wide as the model, not as its keys.")
        if got == (layers + 1) * n * hidden:
            raise Mistake(f"{case}: one prompt too many. Nothing comes after the last block.")
        if got != layers * n * hidden:
            raise Mistake(f"{case}: {got} is not the number of entries of all prompts.")
        case = f"{name}, key-value form"
        got = answer("key_value", *shape, n)
        if got == layers * n * kv:
            raise Mistake(f"{case}: only the keys are counted, or only the values.")
        if got == 2 * layers * kv:
            raise Mistake(f"{case}: these are the key and the value of a single token per block.")
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
    cases = (
        ("padded at the right", 3, [[1, 1, 1, 1, 1, 0, 0], [1] * 7]),
        ("padded at the left", 3, [[0, 0, 1, 1, 1, 1, 1], [1] * 7]),
        ("not padded", 3, [[1] * 7] * 2),
        ("with five virtual tokens", 5, [[0, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]]),
        ("with one virtual token", 1, [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]),
    )
    torch.manual_seed(0)
    for name, n, rows in cases:
        mask, hidden = torch.tensor(rows), 4
        states = torch.randn(len(rows), n + mask.shape[1], hidden)
        given = states.clone().requires_grad_()
        got = answer(given, mask, n)
        if not isinstance(got, torch.Tensor) or tuple(got.shape) != (len(rows), hidden):
            shape = tuple(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
            raise Mistake(
                f"{len(rows)} texts give {shape}; it must be one state each, "
                f"({len(rows)}, {hidden})."
            )
        if not torch.equal(mask, torch.tensor(rows)):
            raise Mistake("The call changed the caller's attention_mask in place.")
        for row in range(len(rows)):
            _judge_state(f"A batch {name}, row {row}", got[row], states[row], mask[row], n)
        if not got.requires_grad:
            raise Mistake("No gradient goes back to states: the prompt would never be trained.")
    _elsewhere(answer, states, mask, n)


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
    if torch.equal(states[real].max(0).values, got):
        raise Mistake(f"{where}: this is the largest number of each dimension, over the text.")
    if torch.allclose(states[real].sum(0), got, atol=1e-6) and len(real) > 1:
        raise Mistake(f"{where}: this is the sum over the real tokens. Take one of them.")
    if not found:
        raise Mistake(f"{where}: this is the state of no position.")
    at = found[0]
    if n != 3 and at == wanted - n + 3:
        raise Mistake(f"{where}: position {at} would be right with 3 virtual tokens, not with {n}.")
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
    given = h.clone()

    def measured(case, function):
        got = answer(function, h)
        if h.requires_grad or not torch.equal(h, given):
            raise Mistake(f"{case}: the call changed the caller's h, its numbers or requires_grad.")
        if isinstance(got, torch.Tensor) and got.dim():
            raise Mistake(f"{case}: return one whole number, not {got.numel()} of them.")
        return int(got)

    case = "8 numbers in, keys and values of 3 each, with a norm"
    got = measured(case, tie(8, 3, True))
    if got == 3:
        raise Mistake(f"{case}: 3 is what the keys alone, or the values alone, can do.")
    if got == 8:
        raise Mistake(f"{case}: 8 is the size of h. There are not even so many outputs.")
    if got != 6:
        raise Mistake(f"{case}: {got} is not the rank of the Jacobian.")
    case = "8 numbers in, keys and values of 8 each, with a norm"
    got = measured(case, tie(8, 8, True))
    if got == 16:
        raise Mistake(f"{case}: 16 is the number of outputs, and 8 numbers cannot move them all.")
    if got == 14:
        raise Mistake(f"{case}: the ranks of both are added up, but the same h moves both.")
    if got == 8:
        raise Mistake(
            f"{case}: not 8. One direction of h changes nothing after the norm. Measure the "
            "function that you are given, at h."
        )
    if got != 7:
        raise Mistake(f"{case}: {got} is not the rank of the Jacobian.")
    for settings, wanted, case in (
        ((8, False), 8, "8 in, keys and values of 8 each, without a norm"),
        ((3, True, True), 3, "8 in, 3 keys, and values that are always twice the keys"),
    ):
        got = measured(case, tie(8, *settings))
        if got != wanted:
            raise Mistake(f"{case}: {got} is not the rank; the weights count, not only the sizes.")
    case = "8 numbers in, a key of 8, and a value of 2"
    try:
        got = measured(case, lambda x: (x * 2, x[:2] * 3))
    except RuntimeError as error:
        raise Mistake(f"{case}: it fails, because the two are not equally wide: {error}") from error
    if got != 8:
        raise Mistake(f"{case}: {got} is not the rank of the Jacobian.")
    wanted = int((h > 0).sum())
    case = f"a function that passes on the positive numbers of h alone, which are {wanted}"
    got = measured(case, lambda x: (x.clamp(min=0), 2 * x.clamp(min=0)))
    if got != wanted:
        raise Mistake(f"{case}: {got} directions. Take the Jacobian at h, nowhere else.")
