"""Virtual tokens: tokens that nobody typed, and what each of them asks of the inputs of a model.

They stand in one of two places, which `model.virtual_tokens` names in its `place`:

  "front"  vectors in front of the embedded text; the sequence grows by n, layer after layer
           (prompt tuning, P-tuning, and P-tuning v2 in its hidden-state form)
  "cache"  keys and values in front of those of the text; in each layer the text sees n more
           positions and stays as long as it was (prefix-tuning, P-tuning v2)

Both want n more columns in the mask, and text whose positions begin at n. In front the
labels are lengthened too: none of the virtual tokens is a target. What the model gives for the
virtual positions is cut off its output.

It is done by hooks around the model's forward, so the model remains the Hugging Face model that it
was: `generate`, `Trainer` and `deepcopy` work as before. This is no technique; each has its module.
"""

import inspect
from functools import partial

import torch
from transformers import DynamicCache

from minipeft.batching import position_ids_from_mask
from minipeft.freezing import at_least_float32, blocks, freeze, refuse_size

CACHE_NAMES = {"past_key_values", "layer_past", "cache"}  # of the same thing in transformers


def attach(model, virtual_tokens, technique, before=None):
    """Freeze `model` and give it the module `virtual_tokens`. Returns the model.

    virtual_tokens: has `place`, `num_virtual_tokens` (n), and a forward without arguments that
    gives the vectors (n, hidden) for "front", or for "cache" (layers, 2, kv_heads, n, head_dim);
    there it also takes the number of a layer and gives that layer's (2, kv_heads, n, head_dim).
    before: the hook that puts them in, for a technique with a third place of its own.
    """
    freeze(model)
    model.virtual_tokens = virtual_tokens.train(model.training)
    model.minipeft_technique = technique
    model.register_forward_pre_hook(before or _lengthen, with_kwargs=True)
    model.register_forward_hook(_cut, with_kwargs=True)
    if virtual_tokens.place == "cache":
        survive_checkpointing(model)
    return model


def refuse(model, num_virtual_tokens, head="lm_head"):
    """Raise ValueError for a number, or a model, that virtual tokens cannot be added to."""
    refuse_size("num_virtual_tokens", num_virtual_tokens, "length")
    name = type(model).__name__
    if getattr(model, "minipeft_technique", None):
        raise ValueError(
            f"This {name} has {model.minipeft_technique} already; load the base model anew."
        )
    if head == "lm_head" and model.get_output_embeddings() is None:
        raise ValueError(
            f"{name} has no language-model head. For classification take add_p_tuning_v2."
        )
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"{name} has layers of {', '.join(sorted(kinds - {'full_attention'}))}, from which "
            "virtual tokens would drop out of sight; take a model with full attention throughout."
        )


def place_of(model):
    """{"device": ..., "dtype": ...} for new trainables: float32, or float64 on a float64 base."""
    weight = model.get_input_embeddings().weight
    return {"device": weight.device, "dtype": at_least_float32(weight.dtype)}


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


def _lengthen(model, args, kwargs):
    """Before the forward: put the virtual tokens in, and lengthen what goes with the input."""
    virtual, n = model.virtual_tokens, model.virtual_tokens.num_virtual_tokens
    kwargs, cache_name = named_inputs(model, args, kwargs)
    cache = kwargs.get(cache_name)
    past = past_length(cache)
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    text = ids if embeds is None else embeds  # (batch, seq) or (batch, seq, hidden)
    batch, seq = text.shape[:2]
    starts = past == 0  # otherwise the virtual tokens are in the cache already
    front = starts and virtual.place == "front"
    if embeds is not None and not starts:
        raise ValueError("To go on from a cache, give input_ids, not inputs_embeds.")
    _extend_mask_and_positions(model, kwargs, n, past, n * front, batch, seq)
    if front:
        embeds = model.get_input_embeddings()(ids) if embeds is None else embeds
        vectors = virtual().to(embeds.dtype).expand(batch, -1, -1)  # (batch, n, hidden)
        kwargs["inputs_embeds"] = torch.cat([vectors, embeds], 1)  # (batch, n + seq, hidden)
        kwargs["input_ids"] = None
        keep = seq
        if kwargs.get("labels") is not None:
            # The last virtual token predicts the first label, the others predict none. Their
            # logits would be the largest tensor of the step for nothing, so they are not made.
            keep = seq + 1
            nothing = kwargs["labels"].new_full((batch, 1), -100)
            kwargs["labels"] = torch.cat([nothing, kwargs["labels"]], 1)  # (batch, seq + 1)
        if not isinstance(kwargs.get("logits_to_keep"), torch.Tensor):
            kwargs["logits_to_keep"] = min(kwargs.get("logits_to_keep") or keep, keep)
    elif starts:
        kwargs[cache_name] = _filled(model, cache, virtual(), batch)
        if isinstance(kwargs[cache_name], CheckpointedCache):
            kwargs["use_cache"] = False
    return (), kwargs


def _extend_mask_and_positions(model, kwargs, n, past, new, batch, seq):
    """The mask gets n columns of its own dtype; positions of the text go up by n.

    past: positions in the cache. new: how many virtual positions this call itself adds (n or 0).
    """
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    known = max(past, n)  # positions that precede the text of this call, as the model counts them
    if mask is not None:
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
        mask = torch.cat([mask.new_ones(batch, n), mask], 1)  # (batch, n + text)
        kwargs["attention_mask"] = mask
    limit = getattr(model.config, "n_positions", None)  # a table of learned positions, as GPT-2's
    if limit and known + seq > limit:
        raise ValueError(
            f"{n} virtual and {known - n + seq} real tokens are more than the {limit} positions "
            f"that {type(model).__name__} has learned; shorten the text."
        )
    if positions is not None:
        virtual = torch.arange(new, device=positions.device).expand(batch, -1)
        kwargs["position_ids"] = torch.cat([virtual, (positions + n).expand(batch, -1)], 1)
    else:
        count_positions(model, kwargs, new + seq)


def count_positions(model, kwargs, last):
    """Give the `last` columns of the mask, if there is one, positions that pass over padding.

    Without a mask the model itself counts, which is right where nothing is padded. A model that
    takes no positions, as with ALiBi, counts the columns of the mask.
    """
    mask = kwargs.get("attention_mask")
    if mask is not None and "position_ids" in inspect.signature(model.forward).parameters:
        kwargs["position_ids"] = position_ids_from_mask(mask)[:, -last:]  # (batch, last)


def _filled(model, cache, keys_values, batch):
    """A cache of the virtual keys and values (layers, 2, kv_heads, n, head_dim) for each row."""
    cache = DynamicCache() if cache is None else cache
    for i, (keys, values) in enumerate(keys_values.to(model.dtype)):
        keys, values = (t.expand(batch, -1, -1, -1) for t in (keys, values))
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
    given = kwargs.get(name)
    if given is not None and not isinstance(given, CheckpointedCache):
        return None
    # From the parameters anew, so that the recomputed block has them in its own piece of graph.
    keys_values = model.virtual_tokens(layer).to(model.dtype)  # (2, kv_heads, n, head_dim)
    batch = next(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)).shape[0]
    cache = DynamicCache()
    DynamicCache.update(cache, *(t.expand(batch, -1, -1, -1) for t in keys_values), layer)
    return args, kwargs | {name: cache}


def _cut(model, args, kwargs, output):
    """After the forward: leave out what the model gave for virtual positions."""
    if isinstance(output, tuple):
        raise ValueError("Virtual tokens need return_dict=True, which is the default.")
    if kwargs.get("inputs_embeds") is not None and model.virtual_tokens.place == "front":
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
    """(layers, kv_heads, head_dim) of the cache. Grouped-query attention has kv_heads < heads."""
    config = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return (
        len(blocks(model)),
        kv_heads,
        (getattr(config, "head_dim", None) or config.hidden_size // heads),
    )


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
    was_training = model.training
    mask = torch.ones_like(input_ids)
    output = model.eval()(input_ids=input_ids, attention_mask=mask, use_cache=True)
    model.train(was_training)
    layers = (getattr(output, "cache", None) or output.past_key_values).layers
    both = [torch.stack([layer.keys[0, :, :n], layer.values[0, :, :n]]) for layer in layers]
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


# ---- the folder format of HF peft (checkpoints.py) ---------------------------------------------


def peft_config(model, virtual_tokens, heads, width):
    """What the adapter_config of every method with virtual tokens holds."""
    return {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": virtual_tokens.num_virtual_tokens,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": len(blocks(model)),
    }


def table_of_state(state, wanted):
    """The one table of an adapter; ValueError if its shape is not `wanted`, or it has company."""
    table = state.get("prompt_embeddings")
    if table is None or tuple(table.shape) != wanted or len(state) != 1:
        found = {key: tuple(tensor.shape) for key, tensor in state.items()}
        raise ValueError(
            "The adapter does not fit this base model: it should hold prompt_embeddings of the "
            f"shape {wanted}, and holds {found}."
        )
    return table
