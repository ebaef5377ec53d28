"""Check virtual tokens when they are added, by running a few tokens through the model.

A configuration can declare its window, its positions or its heads under names that nobody foresaw,
so the model itself is tried: virtual tokens that hold the vectors of typed words must have the
effect of these words. A failed check raises ValueError, and `on_model.adding` undoes the addition.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from minipeft.batching import position_ids_from_mask
from minipeft.freezing import blocks
from minipeft.technique.asked import (
    LENGTHS,
    cache_in,
    close,
    embedded,
    hidden_of,
    is_full,
    number_in,
    output_of,
    states_of,
    with_hidden,
)
from minipeft.technique.on_model import evaluating

WINDOWS = ("window", "chunk", "local", "span")  # parts of the names of settings for a window
N, LENGTH = 2, 4  # numbers of virtual tokens and of tokens of text in a trial


class Given(nn.Module):
    """N virtual tokens with given vectors: (n, hidden), or (layers, ...) for all layers."""

    placeholder_id: int | None = None

    def __init__(self, vectors: torch.Tensor, place: str) -> None:
        super().__init__()
        self.vectors, self.place, self.num_virtual_tokens = vectors, place, N

    def forward(self, layer: int | None = None) -> torch.Tensor:
        return self.vectors if layer is None else self.vectors[layer]


class Trial:
    """The plain model's outputs for a few tokens, to compare the tuned model's with.

        trial = Trial(model, place, words, first, limit)    # before any hook
        ...                                                 # hooks, model.virtual_tokens
        trial.check(model)                                  # ValueError if a check fails

    words: ids of ordinary tokens, (N + LENGTH,). first, limit: as `positions_of` returns them.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        place: str,
        words: torch.Tensor,
        first: int | None,
        limit: int | None,
    ) -> None:
        self.first, self.limit = first, limit
        typed, self.text = words[None, :N], words[None, N:]  # (1, n), (1, seq)
        both = torch.cat([typed, self.text], 1)  # (1, n + seq)
        self.placeholder_id: int | None = None
        self.sides: Sequence[str] = ("right", "left")
        self.layers: list[DynamicLayer] = []  # of the cache
        with evaluating(model):
            self.plain = output_of(model, input_ids=both)[:, N:]  # (1, seq, ...)
            without = output_of(model, input_ids=self.text)
            self.effect = (self.plain - without).double().norm().item()
            self.sides = self._passes(self._padded, model) or ()
            self.goes_on = self._passes(self._continued, model, without)
            if place == "cache":
                layers = cache_in(model(input_ids=typed, use_cache=True))[1].layers
                vectors = torch.stack([torch.stack([x.keys[0], x.values[0]]) for x in layers])
            elif place == "hidden":
                vectors = states_of(model, N, input_ids=both)
            else:
                vectors = embedded(model, typed)[0]
        self.virtual = Given(vectors, place)

    @torch.no_grad()
    def check(self, model: PreTrainedModel) -> None:
        """Give the virtual tokens the vectors of the typed words, and compare the outputs.

        Raises ValueError if they differ, also with padding, with a cache, or in a long text.
        """
        own, virtual = model.virtual_tokens, self.virtual
        self.placeholder_id = virtual.placeholder_id = getattr(own, "placeholder_id", None)
        model.virtual_tokens = virtual
        try:
            with evaluating(model):
                whole = output_of(model, input_ids=self._row(self.text))
                if not close(whole[:, -LENGTH:], self.plain, self.effect):
                    raise ValueError("with the vectors of words they do not do what the words do")
                if not self._reaches(model):
                    raise ValueError("a text longer than its window would not see them")
                if virtual.place in ("front", "template"):  # some models find the ids of vectors
                    virtual.vectors = 1.01 * virtual.vectors
                    output_of(model, input_ids=self._row(self.text))
                    virtual.vectors = virtual.vectors / 1.01
                lost = [side for side in self.sides if side not in self._padded(model)]
                if lost:
                    raise ValueError(f"padding on the {lost[0]} would change what they do")
                if self.goes_on and not self._passes(self._continued, model, whole):
                    raise ValueError("going on from its cache would change what they do")
        finally:
            model.virtual_tokens = own

    def _passes(self, check, *args):
        """The result of a check, or False if it raises. The tuned model must pass only what the
        plain model passes."""
        try:
            return check(*args)
        except Exception:
            return False

    def _row(self, text):
        """The input_ids for a text (1, seq): in a template, N placeholders come first."""
        if self.placeholder_id is None:
            return text
        return torch.cat([text.new_full((1, N), self.placeholder_id), text], 1)

    def _padded(self, model):
        """The sides on which padding does not change the output for a short row in a batch."""
        long, short = self._row(self.text), self._row(self.text[:, :2])
        missing = long.shape[1] - short.shape[1]
        token = getattr(model.config, "pad_token_id", None) or 0
        rows = {"long": (long, torch.ones_like(long))}  # {name: (input_ids, mask)}, (1, seq) each
        for side in self.sides:
            room = (0, missing) if side == "right" else (missing, 0)
            rows[side] = pad(short, room, value=token), pad(torch.ones_like(short), room)
        ids, mask = (torch.cat(tensors) for tensors in zip(*rows.values(), strict=True))  # (3, seq)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.first is not None and not hasattr(model, "virtual_tokens"):
            inputs["position_ids"] = self.first + position_ids_from_mask(mask)
        together = dict(zip(rows, output_of(model, **inputs), strict=True))
        alone = output_of(model, input_ids=short)[0]
        real = {"right": slice(None, short.shape[1]), "left": slice(missing, None)}
        return [x for x in self.sides if close(together[x][real[x]], alone, self.effect)]

    def _continued(self, model, whole):
        """Is the output for the last token, given a cache of the others, that in the whole text?"""
        text = self._row(self.text)
        name, cache = cache_in(model(input_ids=text[:, :-1], use_cache=True))
        if name is None:
            return False
        self.name, self.layers = name, list(getattr(cache, "layers", []))
        inputs = {"input_ids": text[:, -1:], "attention_mask": torch.ones_like(text), name: cache}
        return close(output_of(model, **inputs), whole[:, -1:], self.effect)

    def _reaches(self, model):
        """Does a token far from the virtual tokens attend to them, in each layer?

        One token is run with a filled cache, twice. Only the virtual keys and values in the cache
        differ between the two runs, and each block is given the same input. So the output of every
        block must differ. This is done with a cache longer than any window, where the virtual
        values are large, so that a small attention weight shows; and with 64 other positions like
        the virtual ones, for attention that selects only a few positions.
        """
        if not self.layers or not all(map(is_full, self.layers)):
            return True  # recurrent layers have no window
        far = self._beyond_windows(model)
        inputs, outputs = {}, []

        def same_input(i, block, args, kwargs):
            inputs.setdefault(i, hidden_of(args, kwargs))
            return with_hidden(args, kwargs, inputs[i])

        def remember(block, args, output):
            outputs.append(output[0] if isinstance(output, tuple) else output)

        handles = []
        for i, block in enumerate(blocks(model)):
            hook = partial(same_input, i)
            handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
            handles.append(block.register_forward_hook(remember))
        try:
            for others, large in {(min(far, 64), False), (far, True)}:
                inputs.clear(), outputs.clear()
                for sign in (1, -1):
                    self._run_after(model, others, sign, large)
                count = len(outputs) // 2
                pairs = zip(outputs[:count], outputs[count:], strict=True)
                if any(torch.equal(*pair) for pair in pairs):
                    return False
        finally:
            for handle in handles:
                handle.remove()
        return True

    def _run_after(self, model, others, sign, large):
        """Run one token with N virtual and `others` more positions in the cache."""
        cache, made = DynamicCache(), {}
        for layer in self.layers:  # layers of one shape and device share their tensors
            kind = (layer.keys.shape, layer.values.shape, layer.keys.device)
            if kind not in made:
                made[kind] = _Far(layer, others, sign, large)
            cache.layers.append(made[kind])
        columns = others + 1 + (N if self.virtual.place == "template" else 0)  # of text
        inputs = {"attention_mask": self.text.new_ones(1, columns), self.name: cache}
        model(input_ids=self.text[:, :1], **inputs)

    def _beyond_windows(self, model):
        """A length beyond every window in the configuration, as far as the positions allow."""
        limits = [self.limit, *(number_in(model.config, name) for name in LENGTHS)]
        far = max([64, *(size + 1 for size in _windows(model.config.to_dict()))])
        return max(1, min([far, *(limit - N - 1 for limit in limits if limit)]))


class _Far(DynamicLayer):
    """A cache layer that does not grow, of N virtual positions and `others` more.

    sign: of the virtual keys and values. large: are these values large and all others zero?
    """

    _layer_type = None  # keeps it out of transformers' registry of layer types

    def __init__(self, like, others, sign, large):
        super().__init__()
        self.lazy_initialization(like.keys, like.values)
        draw = torch.Generator(like.keys.device).manual_seed(0)
        for name, shape in (("keys", like.keys.shape), ("values", like.values.shape)):
            tensor = like.keys.new_zeros(*shape[:2], N + others, shape[-1])
            setattr(self, name, tensor if large else tensor.normal_(generator=draw))
        if large:
            self.values[:, :, :N] = min(others, 10_000)  # for attention weights of about 1 / others
        self.values[:, :, :N] *= sign

    def update(self, keys, values, *args, **kwargs):
        return torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)


def _windows(settings, named=False):
    """All integers in a configuration, at any depth, under names that hold one of WINDOWS."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            yield from _windows(value, named or any(part in str(name) for part in WINDOWS))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _windows(value, named)
    elif named and isinstance(settings, int) and not isinstance(settings, bool):
        yield settings
