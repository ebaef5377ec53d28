"""Virtual tokens: trainable positions in the input of a model, shared by four techniques.

`model.virtual_tokens.place` says where they go:

  "front"      vectors in front of the embedded text; the sequence grows by n
               (prompt tuning, P-tuning)
  "hidden"     as "front"; in addition, every block gets its own vectors at these positions
               (P-tuning v2)
  "cache"      keys and values prepended to the text's own; every layer attends to n more
               positions, and the sequence keeps its length (prefix-tuning, P-tuning v2)
  "attention"  as "cache", for a model without a KV cache: passed to each attention module
               (P-tuning v2)
  "template"   vectors in place of placeholder tokens in the text (P-tuning)

All except "template" add n columns to the attention mask and n to the position ids of the text.
"front" and "hidden" also pad the labels with -100, and cut off the logits and hidden states there.

This is done by forward hooks, so the model keeps its Hugging Face class, and `generate`, `Trainer`
and `deepcopy` work as before.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel

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


class VirtualTokens(nn.Module):
    """The trainable parameters of a technique with virtual tokens, as `model.virtual_tokens`.

    forward() returns (n, hidden) for "front" and "template", and (layers, 2, kv_heads, n, head_dim)
    for "cache". forward(layer) returns (n, hidden) for "hidden", and (2, kv_heads, n, head_dim) for
    "cache" and "attention".
    """

    place: str
    num_virtual_tokens: int  # n


def attach(
    model: PreTrainedModel,
    virtual_tokens: VirtualTokens,
    technique: str,
    before: Callable[..., object] | None = None,
) -> PreTrainedModel:
    """Freeze `model`, attach the virtual tokens, and try them on a few tokens.

    before: a forward pre-hook used instead of `_insert`. Its first two arguments are first and
    limit, as `positions_of` returns them.
    Returns the model. Raises ValueError, and leaves the model unchanged, if a check fails.
    """
    place = virtual_tokens.place
    with adding(model, technique), refusing(model):
        words = trial_words(model)
        first, limit = positions_of(model, words[None])
        places = [place] if has_numbers(model) and place != "attention" else []
        if place == "hidden":
            places += ["cache"] * len(places)  # folding or saving makes them keys and values
        trials = [Trial(model, where, words, first, limit) for where in places]
        freeze_base(model)
        model.virtual_tokens = virtual_tokens.train(model.training)
        hook = partial(before or _insert, first, limit)
        model.register_forward_pre_hook(hook, with_kwargs=True)
        model.register_forward_hook(_remove_outputs, with_kwargs=True)
        if place == "hidden":
            for i, block in enumerate(blocks(model)):
                block.register_forward_pre_hook(partial(_overwrite, model, i), with_kwargs=True)
        if place == "cache":
            survive_checkpointing(model)
        if place == "attention":
            open_attentions(model, partial(_keys_values, model))
        for trial in trials:
            trial.check(model)
        if has_numbers(model) and place == "attention":
            check_attentions(model, words[None])
    return model


def refuse(model: PreTrainedModel, num_virtual_tokens: object, head: str = "lm_head") -> None:
    """Raise ValueError for fewer than one virtual token, and for a model that already has a
    technique or, with head="lm_head", has no language-model head."""
    refuse_size("num_virtual_tokens", num_virtual_tokens, "length")
    refuse_tuned(model)
    if head == "lm_head" and model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no language-model head. For classification take "
            "add_p_tuning_v2."
        )


def _insert(first, limit, model, args, kwargs):
    """Forward pre-hook: insert the virtual tokens, and extend mask, position ids and labels."""
    virtual, n = model.virtual_tokens, model.virtual_tokens.num_virtual_tokens
    kwargs, cache_name = named_inputs(model, args, kwargs)
    cache = kwargs.get(cache_name)
    past = past_length(cache)
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    text = ids if embeds is None else embeds  # (batch, seq) or (batch, seq, hidden)
    refuse_shapes(ids, embeds, kwargs)
    batch, seq = text.shape[:2]
    starts = past == 0  # otherwise the virtual tokens are already in the cache
    front = starts and virtual.place in LONGER
    if embeds is not None and not starts:
        raise ValueError("To go on from a cache, give input_ids, not inputs_embeds.")
    known = max(past, n)  # positions before the text of this call
    if limit and known + seq > limit:
        raise ValueError(
            f"{n} virtual and {known - n + seq} real tokens are more than the {limit} positions "
            f"that {type(model).__name__} has learned; shorten the text."
        )
    if virtual.place != "attention":  # there each attention module extends its own mask
        extend_mask(kwargs, n, known, batch, seq)
    extend_positions(model, kwargs, first, n, n * front, text)
    if front:
        embeds = embedded(model, ids) if embeds is None else embeds
        if virtual.place == "front":
            vectors = virtual().to(embeds).expand(batch, -1, -1)  # (batch, n, hidden)
        else:  # overwritten before the first block
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


def _keys_values(model, layer):
    return model.virtual_tokens(layer)  # (2, kv_heads, n, head_dim)


def _overwrite(model, layer, block, args, kwargs):
    """Pre-hook of block `layer`: put its own hidden states at the virtual positions."""
    virtual = model.virtual_tokens
    cache = next((v for v in (*args, *kwargs.values()) if isinstance(v, Cache)), None)
    if virtual.place != "hidden" or (cache is not None and cache.get_seq_length(layer)):
        return None  # folded, or these positions are in the cache
    hidden = hidden_of(args, kwargs)  # (batch, n + seq, hidden)
    states = virtual(layer).to(hidden).expand(len(hidden), -1, -1)  # (batch, n, hidden)
    return with_hidden(args, kwargs, torch.cat([states, hidden[:, states.shape[1] :]], 1))


def _remove_outputs(model, args, kwargs, output):
    """Forward hook: remove the outputs at virtual positions."""
    if isinstance(output, tuple):
        raise ValueError("Virtual tokens need return_dict=True, which is the default.")
    if kwargs.get("inputs_embeds") is not None and model.virtual_tokens.place in LONGER:
        seq = kwargs["inputs_embeds"].shape[1] - model.virtual_tokens.num_virtual_tokens
        output.logits = output.logits[:, -seq:]  # (batch, seq or logits_to_keep, vocab)
        if output.hidden_states is not None:
            output.hidden_states = tuple(h[:, -seq:] for h in output.hidden_states)
    if kwargs.get("use_cache") is False:  # the caller did not ask for the cache of the prefix
        kept = {k: v for k, v in output.items() if k not in ("cache", "past_key_values")}
        output = type(output)(**kept)
    return output
