"""Virtual tokens: tokens that nobody typed, and what each of them asks of the inputs of a model.

They stand in one of these places, which `model.virtual_tokens` names in its `place`:

  "front"     vectors in front of the embedded text; the sequence grows by n, layer after layer
              (prompt tuning, P-tuning)
  "hidden"    the same, and each block begins with vectors of its own there (P-tuning v2)
  "cache"     keys and values in front of those of the text; in each layer the text sees n more
              positions and stays as long as it was (prefix-tuning, P-tuning v2)
  "attention" the same for a model without a cache, handed to each attention (P-tuning v2)
  "template"  vectors in place of tokens of the text (P-tuning)

But for the last, all want n more columns in the mask, and text whose positions begin n later. In
front the labels are lengthened too: none of the virtual tokens is a target. What the model gives
for the virtual positions is cut off its output.

It is done by hooks around the model's forward, so the model remains the Hugging Face model that it
was: `generate`, `Trainer` and `deepcopy` work as before. This is no technique; each has its module.
"""

import inspect
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn.functional import pad
from transformers import Cache, DynamicCache

from minipeft.batching import position_ids_from_mask
from minipeft.freezing import at_least_float32, blocks
from minipeft.refusals import refuse_size
from minipeft.technique.attention import check_attentions, open_attentions
from minipeft.technique.on_model import adding, evaluating, freeze_base, has_numbers, refuse_tuned
from minipeft.technique.trial import (
    LENGTH,
    N,
    Trial,
    cache_in,
    cache_shape,
    embedded,
    hidden_of,
    positions_of,
    takes,
    with_hidden,
)

CACHE_NAMES = {"past_key_values", "layer_past", "cache"}  # of the same thing in transformers
LONGER = ("front", "hidden")  # the places where the sequence grows


def attach(model, virtual_tokens, technique, before=None):
    """Freeze `model` and give it the module `virtual_tokens`, if it keeps what they promise.

    virtual_tokens: has `place`, `num_virtual_tokens` (n), and a forward that gives the vectors:
    without arguments (n, hidden) for "front", (layers, 2, kv_heads, n, head_dim) for "cache"; with
    the number of a layer that layer's, (n, hidden) for "hidden", (2, kv_heads, n, head_dim) for
    "cache" and "attention".
    before: the hook that puts them in, for a technique with a place of its own. It is given what
    `positions_of` says of the model first.
    Returns the model. Raises ValueError, the model as it was, for one that cannot have them.
    """
    place = virtual_tokens.place
    with adding(model, technique), refusing(model):
        words = trial_words(model)
        first, limit = positions_of(model, words[None])
        places = [place] if has_numbers(model) and place != "attention" else []
        if place == "hidden":
            places += ["cache"] * len(places)  # folded, and in a folder, they are keys and values
        trials = [Trial(model, where, words, first, limit) for where in places]
        freeze_base(model)
        model.virtual_tokens = virtual_tokens.train(model.training)
        before = partial(before or _lengthen, first, limit)
        model.register_forward_pre_hook(before, with_kwargs=True)
        model.register_forward_hook(_cut, with_kwargs=True)
        if place == "hidden":
            for i, block in enumerate(blocks(model)):
                block.register_forward_pre_hook(partial(_overwrite, model, i), with_kwargs=True)
        if place == "cache":
            survive_checkpointing(model)
        if place == "attention":
            open_attentions(model, partial(_of_layer, model))
        for trial in trials:
            trial.check(model)
        if has_numbers(model) and place == "attention":
            check_attentions(model, words[None])
    return model


@contextmanager
def refusing(model):
    """Turn whatever goes wrong in a trial into one sentence about this model."""
    try:
        yield
    except Exception as error:
        begin = f"{type(model).__name__} cannot have virtual tokens of this kind: "
        if str(error).startswith(begin):
            raise
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else ""
        if not isinstance(error, ValueError):
            reason = f"a trial ended in {type(error).__name__}: {reason}"
        raise ValueError(f"{begin}{reason}. Take LoRA, or another base model.") from error


def trial_words(model):
    """N + LENGTH ordinary tokens, different ones as far as there are: int64."""
    words = ordinary_tokens(model)
    steps = torch.linspace(0, len(words) - 1, N + LENGTH, device=words.device)
    return words[steps.long()]


def refuse(model, num_virtual_tokens, head="lm_head"):
    """Raise ValueError for a number, or a model, that virtual tokens cannot be added to."""
    refuse_size("num_virtual_tokens", num_virtual_tokens, "length")
    refuse_tuned(model)
    if head == "lm_head" and model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no language-model head. For classification take "
            "add_p_tuning_v2."
        )


def place_of(model):
    """{"device": ..., "dtype": ...} for new trainables: float32, or float64 on a float64 base."""
    weight = model.get_input_embeddings().weight
    return {"device": weight.device, "dtype": at_least_float32(weight.dtype)}


def width_of(model):
    """The width of the vectors that enter the model."""
    return vectors_of(model, trial_words(model)[:1]).shape[1]


@torch.no_grad()
def vectors_of(model, ids):
    """The vectors that enter the model for token ids (n,), as new trainables: (n, hidden)."""
    return embedded(model, ids).to(**place_of(model), copy=True)


def vocabulary_of(model):
    """The vectors of all tokens, as they enter the model: (vocab, hidden), in float32 or wider."""
    table = model.get_input_embeddings().weight
    return vectors_of(model, torch.arange(len(table), device=table.device))


def named_inputs(model, args, kwargs):
    """All inputs of this call by name, and the name under which this model takes its cache."""
    names = inspect.signature(model.forward).parameters
    # transformers renames `past_key_values` to `cache` in 5.24.
    return dict(zip(names, args, strict=False)) | kwargs, (
        "cache" if "cache" in names else "past_key_values"
    )


def past_length(cache):
    """How many positions a cache holds; refuses one with a fixed room, which n would overflow."""
    if cache is not None and getattr(cache, "is_compileable", False):
        raise ValueError(
            "A static cache has no room for virtual tokens; leave cache_implementation out, for a "
            "cache that grows."
        )
    return 0 if cache is None else cache.get_seq_length()


def _lengthen(first, limit, model, args, kwargs):
    """Before the forward: put the virtual tokens in, and lengthen what goes with the input."""
    virtual, n = model.virtual_tokens, model.virtual_tokens.num_virtual_tokens
    kwargs, cache_name = named_inputs(model, args, kwargs)
    cache = kwargs.get(cache_name)
    past = past_length(cache)
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    text = ids if embeds is None else embeds  # (batch, seq) or (batch, seq, hidden)
    _refuse_shapes(ids, embeds, kwargs)
    batch, seq = text.shape[:2]
    starts = past == 0  # otherwise the virtual tokens are in the cache already
    front = starts and virtual.place in LONGER
    if embeds is not None and not starts:
        raise ValueError("To go on from a cache, give input_ids, not inputs_embeds.")
    known = max(past, n)  # positions that precede the text of this call, as the model counts them
    if limit and known + seq > limit:
        raise ValueError(
            f"{n} virtual and {known - n + seq} real tokens are more than the {limit} positions "
            f"that {type(model).__name__} has learned; shorten the text."
        )
    if virtual.place != "attention":  # there each attention lengthens its own
        _extend_mask(kwargs, n, known, batch, seq)
    _extend_positions(model, kwargs, first, n, n * front, text)
    if front:
        embeds = embedded(model, ids) if embeds is None else embeds
        if virtual.place == "front":
            vectors = virtual().to(embeds).expand(batch, -1, -1)  # (batch, n, hidden)
        else:  # these hold the place until the first block
            vectors = embeds.new_zeros(batch, n, embeds.shape[-1])
        kwargs["inputs_embeds"] = torch.cat([vectors, embeds], 1)  # (batch, n + seq, hidden)
        kwargs["input_ids"] = None
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = pad(kwargs["token_type_ids"], (n, 0))  # (batch, n + seq)
        _extend_labels(model, kwargs, n, seq)
    elif starts and virtual.place == "cache":
        kwargs[cache_name] = _filled(model, cache, virtual(), batch)
        if isinstance(kwargs[cache_name], CheckpointedCache):
            kwargs["use_cache"] = False
    return (), kwargs


def _refuse_shapes(ids, embeds, kwargs):
    """Raise ValueError for inputs that are missing, empty, or do not go together."""
    if (ids is None) == (embeds is None):
        raise ValueError("Give either input_ids or inputs_embeds.")
    text, dims = (ids, 2) if embeds is None else (embeds, 3)
    if text.dim() != dims or 0 in text.shape:
        raise ValueError(
            f"The text has the shape {tuple(text.shape)}; give (batch, seq), with at least one row "
            "and one token."
        )
    batch, seq = text.shape[:2]
    fitting = {
        "attention_mask": lambda shape: len(shape) != 2 or shape[0] == batch,
        "labels": lambda shape: len(shape) != 2 or shape == (batch, seq),
        "position_ids": lambda shape: shape in ((batch, seq), (1, seq)),
        "token_type_ids": lambda shape: shape == (batch, seq),
    }
    for name, fits in fitting.items():
        given = kwargs.get(name)
        if given is not None and not fits(tuple(given.shape)):
            raise ValueError(
                f"{name} has the shape {tuple(given.shape)}, which does not go with a text of "
                f"{batch} rows and {seq} tokens."
            )


def _extend_mask(kwargs, n, known, batch, seq):
    """The mask gets n columns of its own dtype."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return
    if mask.dim() != 2:
        raise ValueError(
            f"The mask has {mask.dim()} dimensions; virtual tokens need one of (batch, seq)."
        )
    if mask.shape[1] + n != known + seq:
        raise ValueError(
            f"The mask has {mask.shape[1]} columns, but the call has {seq} tokens and the "
            f"cache {known - n} of text. To go on from a used cache, give the new tokens only "
            "and a mask over all of the text."
        )
    kwargs["attention_mask"] = torch.cat([mask.new_ones(batch, n), mask], 1)  # (batch, n + text)


def _extend_positions(model, kwargs, first, n, new, text):
    """Positions of the text go up by n. new: the virtual positions of this call itself, n or 0."""
    (batch, seq), device = text.shape[:2], text.device
    positions = kwargs.get("position_ids")
    if positions is None:
        skipped = n if model.virtual_tokens.place == "attention" else 0  # no columns of the mask
        if skipped and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = torch.ones(batch, seq, dtype=torch.int64, device=device)
        count_positions(kwargs, first, new + seq, skipped)
        return
    # Without a mask transformers takes positions that begin anew for documents in one row. The
    # others would not see the virtual tokens.
    if kwargs.get("attention_mask") is None and seq > 1 and (positions.diff(dim=-1) <= 0).any():
        raise ValueError(
            "position_ids begin anew within a row, so it holds several documents; virtual tokens "
            "would stand before the first one only. Give each document a row of its own."
        )
    virtual = (first or 0) + torch.arange(new, device=positions.device).expand(batch, -1)
    kwargs["position_ids"] = torch.cat([virtual, (positions + n).expand(batch, -1)], 1)


def count_positions(kwargs, first, last, skipped=0):
    """Give the `last` columns of the mask, if there is one, positions that pass over padding.

    Without a mask the model itself counts, which is right where nothing is padded. A model that
    takes no positions (first is None), as with ALiBi, counts the columns of the mask.
    """
    mask = kwargs.get("attention_mask")
    if mask is not None and first is not None:
        positions = position_ids_from_mask(mask)[:, -last:]  # (batch, last)
        kwargs["position_ids"] = first + skipped + positions


def _of_layer(model, layer):
    return model.virtual_tokens(layer)


def _extend_labels(model, kwargs, n, seq):
    """Labels for virtual tokens in front: none of them is a target."""
    labels, keep = kwargs.get("labels"), seq
    if not takes(model, "logits_to_keep"):
        kwargs["labels"] = labels if labels is None else pad(labels, (n, 0), value=-100)
        return
    if labels is not None:
        # The last virtual token predicts the first label, the others predict none. Their logits
        # would be the largest tensor of the step for nothing, so they are not made.
        keep = seq + 1
        kwargs["labels"] = pad(labels, (1, 0), value=-100)  # (batch, seq + 1)
    if not isinstance(kwargs.get("logits_to_keep"), torch.Tensor):
        kwargs["logits_to_keep"] = min(kwargs.get("logits_to_keep") or keep, keep)


def _overwrite(model, layer, block, args, kwargs):
    """Before block `layer`: its own states take the place of what came out of the block below."""
    virtual = model.virtual_tokens
    cache = next((v for v in (*args, *kwargs.values()) if isinstance(v, Cache)), None)
    if virtual.place != "hidden" or (cache is not None and cache.get_seq_length(layer)):
        return None  # folded, or these positions are in the cache
    hidden = hidden_of(args, kwargs)  # (batch, n + seq, hidden)
    states = virtual(layer).to(hidden).expand(len(hidden), -1, -1)  # (batch, n, hidden)
    return with_hidden(args, kwargs, torch.cat([states, hidden[:, states.shape[1] :]], 1))


def _filled(model, cache, keys_values, batch):
    """A cache of the virtual keys and values (layers, 2, kv_heads, n, head_dim) for each row."""
    cache = DynamicCache() if cache is None else cache
    stack = blocks(model)
    for i, both in enumerate(keys_values.to(model.dtype)):
        device = next(stack[i].parameters()).device  # a model may be split over several
        keys, values = (t.to(device).expand(batch, -1, -1, -1) for t in both)
        DynamicCache.update(cache, keys, values, i)  # (batch, kv_heads, n, head_dim) each
    if model.training and torch.is_grad_enabled() and _checkpoints(model):
        cache.__class__ = CheckpointedCache
    return cache


class CheckpointedCache(DynamicCache):
    """Says that under gradient checkpointing each attention is to have a cache of its own.

    Checkpointing runs a block twice, and a cache that it wrote to the first time would hold the
    text twice. So transformers takes the cache away from its blocks, prefix and all.
    `survive_checkpointing` gives each attention, each time, a new one that holds only the prefix.
    """


def _checkpoints(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def survive_checkpointing(model):
    """Let every attention fetch its own keys and values where its block has lost the cache."""
    for i, block in enumerate(blocks(model)):
        block._can_checkpoint_with_cache = True  # else transformers warns that it takes it away
        for module in block.modules():
            names = CACHE_NAMES & set(inspect.signature(module.forward).parameters)
            if names and module is not block:
                hook = partial(_fetch_again, model, i, names.pop())
                module.register_forward_pre_hook(hook, with_kwargs=True)


def _fetch_again(model, layer, name, attention, args, kwargs):
    names = list(inspect.signature(attention.forward).parameters)
    kwargs = dict(zip(names, args, strict=False)) | kwargs
    given = kwargs.get(name)
    if given is not None and not isinstance(given, CheckpointedCache):
        return None
    # From the parameters anew, so that the recomputed block has them in its own piece of graph.
    hidden = next(t for t in kwargs.values() if isinstance(t, torch.Tensor))
    keys_values = model.virtual_tokens(layer).to(hidden.device, model.dtype)
    batch = hidden.shape[0]
    cache = DynamicCache()
    DynamicCache.update(cache, *(t.expand(batch, -1, -1, -1) for t in keys_values), layer)
    return (), kwargs | {name: cache}


def _cut(model, args, kwargs, output):
    """After the forward: leave out what the model gave for virtual positions."""
    if isinstance(output, tuple):
        raise ValueError("Virtual tokens need return_dict=True, which is the default.")
    if kwargs.get("inputs_embeds") is not None and model.virtual_tokens.place in LONGER:
        seq = kwargs["inputs_embeds"].shape[1] - model.virtual_tokens.num_virtual_tokens
        output.logits = output.logits[:, -seq:]  # (batch, seq or logits_to_keep, vocab)
        if output.hidden_states is not None:
            output.hidden_states = tuple(h[:, -seq:] for h in output.hidden_states)
    if kwargs.get("use_cache") is False:  # then ours has served its turn, and nobody wants it
        kept = {k: v for k, v in output.items() if k not in ("cache", "past_key_values")}
        output = type(output)(**kept)
    return output


# ---- keys and values for every layer ------------------------------------------------------------


def key_value_shape(model):
    """(layers, kv_heads, head_dim) of the cache, read off the cache that one token leaves.

    Grouped-query attention has fewer kv_heads than heads. Raises ValueError for a model that keeps
    no keys and values, or not of one shape.
    """
    with refusing(model):
        return cache_shape(model, trial_words(model)[None, :1])


def per_layer(table, shape):
    """A table (n, layers * 2 * kv_heads * head_dim) as (layers, 2, kv_heads, n, head_dim).

    The order within a row is HF peft's: keys and values of layer 0, then those of layer 1, ...
    """
    layers, kv_heads, head_dim = shape
    return table.view(-1, layers, 2, kv_heads, head_dim).permute(1, 2, 3, 0, 4)


@torch.no_grad()
def table_of_cache(model, input_ids, n):
    """The first n positions of the cache that `input_ids` (1, seq) leave: (n, layers * 2 * kv)."""
    if input_ids.is_meta:  # a model without numbers has none to read
        layers, kv_heads, head_dim = key_value_shape(model)
        return torch.empty(n, layers * 2 * kv_heads * head_dim, **place_of(model))
    mask = torch.ones_like(input_ids)
    with evaluating(model):
        output = model(input_ids=input_ids, attention_mask=mask, use_cache=True)
    layers = cache_in(output)[1].layers
    device = place_of(model)["device"]
    both = [torch.stack([x.keys[0, :, :n], x.values[0, :, :n]]).to(device) for x in layers]
    table = torch.stack(both).permute(3, 0, 1, 2, 4).flatten(1)  # (n, layers * 2 * kv)
    return table.to(place_of(model)["dtype"])


def token_ids(model, text, tokenizer, n=None):
    """The ids of `text` without special tokens: (n,), cut or repeated to n if n is given.

    Raises ValueError if there is no tokenizer, or no token.
    """
    tokenizer = tokenizer or getattr(model, "minipeft_tokenizer", None)
    if tokenizer is None:
        raise ValueError("There is no tokenizer for the text; pass tokenizer=.")
    ids = tokenizer(text or "", add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError('To start from text, give some: text="Is this review positive?".')
    if n is not None:
        ids = (ids * -(-n // len(ids)))[:n]
    return torch.tensor(ids, device=place_of(model)["device"])


def ordinary_tokens(model, tokenizer=None):
    """The ids of the vocabulary that are no special tokens: an int64 tensor (ids,).

    The first rows of a table are often special tokens, and some tables have rows for no token.
    """
    tokenizer = tokenizer or getattr(model, "minipeft_tokenizer", None)
    table = model.get_input_embeddings().weight
    config, special = model.config, set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        special |= set(value if isinstance(value, list) else [value])
    size = len(table)
    if tokenizer is not None:
        special |= set(tokenizer.all_special_ids)
        special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        size = min(size, len(tokenizer))
    return torch.tensor([i for i in range(size) if i not in special], device=table.device)
