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

from functools import partial

import torch
from torch.nn.functional import pad
from transformers import Cache

from minipeft.freezing import blocks
from minipeft.refusals import refuse_size
from minipeft.technique.asked import embedded, hidden_of, positions_of, with_hidden
from minipeft.technique.attention import check_attentions, open_attentions
from minipeft.technique.inputs import (
    extend_labels,
    extend_mask,
    extend_positions,
    named_inputs,
    past_length,
    refuse_shapes,
)
from minipeft.technique.kv_cache import CheckpointedCache, filled_cache, survive_checkpointing
from minipeft.technique.on_model import adding, freeze_base, has_numbers, refuse_tuned
from minipeft.technique.trial import Trial
from minipeft.technique.words import refusing, trial_words

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


def refuse(model, num_virtual_tokens, head="lm_head"):
    """Raise ValueError for a number, or a model, that virtual tokens cannot be added to."""
    refuse_size("num_virtual_tokens", num_virtual_tokens, "length")
    refuse_tuned(model)
    if head == "lm_head" and model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no language-model head. For classification take "
            "add_p_tuning_v2."
        )


def _lengthen(first, limit, model, args, kwargs):
    """Before the forward: put the virtual tokens in, and lengthen what goes with the input."""
    virtual, n = model.virtual_tokens, model.virtual_tokens.num_virtual_tokens
    kwargs, cache_name = named_inputs(model, args, kwargs)
    cache = kwargs.get(cache_name)
    past = past_length(cache)
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    text = ids if embeds is None else embeds  # (batch, seq) or (batch, seq, hidden)
    refuse_shapes(ids, embeds, kwargs)
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
        extend_mask(kwargs, n, known, batch, seq)
    extend_positions(model, kwargs, first, n, n * front, text)
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
        extend_labels(model, kwargs, n, seq)
    elif starts and virtual.place == "cache":
        kwargs[cache_name] = filled_cache(model, cache, virtual(), batch)
        if isinstance(kwargs[cache_name], CheckpointedCache):
            kwargs["use_cache"] = False
    return (), kwargs


def _of_layer(model, layer):
    return model.virtual_tokens(layer)


def _overwrite(model, layer, block, args, kwargs):
    """Before block `layer`: its own states take the place of what came out of the block below."""
    virtual = model.virtual_tokens
    cache = next((v for v in (*args, *kwargs.values()) if isinstance(v, Cache)), None)
    if virtual.place != "hidden" or (cache is not None and cache.get_seq_length(layer)):
        return None  # folded, or these positions are in the cache
    hidden = hidden_of(args, kwargs)  # (batch, n + seq, hidden)
    states = virtual(layer).to(hidden).expand(len(hidden), -1, -1)  # (batch, n, hidden)
    return with_hidden(args, kwargs, torch.cat([states, hidden[:, states.shape[1] :]], 1))


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
