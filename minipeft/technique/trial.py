"""Try once, on adding, what virtual tokens promise: a few tokens through the model tell.

A configuration can name its window, its positions or its heads in ways that nobody foresaw. The
model itself cannot: virtual tokens that hold the vectors of typed words must do what the words do.
What fails here is refused by name, and `technique.adding` leaves the model as it was.
"""

from functools import partial

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import DynamicCache
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

WINDOWS = ("window", "chunk", "local", "span")  # parts of names under which a window is declared
N, LENGTH = 2, 4  # virtual tokens and tokens of text in a trial
SIDES = ("right", "left")


class Given(nn.Module):
    """Virtual tokens of given vectors: (n, hidden), or (layers, ...) for those of every layer."""

    def __init__(self, vectors, place, n=N):
        super().__init__()
        self.vectors, self.place, self.num_virtual_tokens = vectors, place, n

    def forward(self, layer=None):
        return self.vectors if layer is None else self.vectors[layer]


class Trial:
    """What the plain model does with a few tokens, to hold the tuned one against it.

        trial = Trial(model, place, words, first, limit)    # before any hook
        ...                                                 # hooks, model.virtual_tokens
        trial.check(model)                                  # ValueError if a promise is not kept

    words: ids of ordinary tokens, (N + LENGTH,). first, limit: as `positions_of` gives them.
    """

    @torch.no_grad()
    def __init__(self, model, place, words, first, limit):
        self.first, self.limit, self.words = first, limit, None
        typed, self.text = words[None, :N], words[None, N:]  # (1, n), (1, seq)
        both = torch.cat([typed, self.text], 1)  # (1, n + seq)
        with evaluating(model):
            self.plain = output_of(model, input_ids=both)[:, N:]  # (1, seq, ...)
            without = output_of(model, input_ids=self.text)
            self.effect = (self.plain - without).double().norm()
            self.sides, self.layers = SIDES, []
            self.sides = self._kept(self._padded, model) or ()
            self.goes_on = self._kept(self._continued, model, without)
            if place == "cache":  # what the typed words leave there
                layers = cache_in(model(input_ids=typed, use_cache=True))[1].layers
                vectors = torch.stack([torch.stack([x.keys[0], x.values[0]]) for x in layers])
            elif place == "hidden":
                vectors = states_of(model, N, input_ids=both)
            else:
                vectors = embedded(model, typed)[0]
        self.words = Given(vectors, place)

    @torch.no_grad()
    def check(self, model):
        """Put the typed words where the virtual tokens stand: they must do what words do."""
        own = model.virtual_tokens
        self.words.placeholder_id = getattr(own, "placeholder_id", None)
        model.virtual_tokens = self.words
        try:
            with evaluating(model):
                whole = output_of(model, input_ids=self._row(self.text))
                if not close(whole[:, -LENGTH:], self.plain, self.effect):
                    raise ValueError("with the vectors of words they do not do what the words do")
                if not self._reaches(model):
                    raise ValueError("a text longer than its window would not see them")
                if self.words.place in ("front", "template"):  # some models look words up by vector
                    self.words.vectors = 1.01 * self.words.vectors
                    output_of(model, input_ids=self._row(self.text))
                    self.words.vectors = self.words.vectors / 1.01
                lost = [side for side in self.sides if side not in self._padded(model)]
                if lost:
                    raise ValueError(f"padding on the {lost[0]} would change what they do")
                if self.goes_on and not self._kept(self._continued, model, whole):
                    raise ValueError("going on from its cache would change what they do")
        finally:
            model.virtual_tokens = own

    def _kept(self, promise, *args):
        """Is a promise kept? What the plain model cannot do is not asked of the tuned one."""
        try:
            return promise(*args)
        except Exception:  # whatever stopped it
            return False

    def _row(self, text):
        """A text (1, seq) as the tuned model is given it: a template has its placeholders."""
        if self.words is None or self.words.place != "template":
            return text
        return torch.cat([text.new_full((1, N), self.words.placeholder_id), text], 1)

    def _padded(self, model):
        """The sides on which padding leaves a short row, beside a long one, what it is alone."""
        long, short = self._row(self.text), self._row(self.text[:, :2])
        room = long.shape[1] - short.shape[1]
        token = getattr(model.config, "pad_token_id", None) or 0
        right = pad(short, (0, room), value=token), pad(torch.ones_like(short), (0, room))
        left = pad(short, (room, 0), value=token), pad(torch.ones_like(short), (room, 0))
        rows = {"long": (long, torch.ones_like(long)), "right": right, "left": left}
        rows = {name: rows[name] for name in ("long", *self.sides)}
        ids, mask = (torch.cat(tensors) for tensors in zip(*rows.values(), strict=True))  # (3, seq)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.first is not None and not hasattr(model, "virtual_tokens"):
            inputs["position_ids"] = self.first + position_ids_from_mask(mask)
        together = dict(zip(rows, output_of(model, **inputs), strict=True))
        alone = output_of(model, input_ids=short)[0]
        real = {"right": slice(None, short.shape[1]), "left": slice(room, None)}
        return [x for x in self.sides if close(together[x][real[x]], alone, self.effect)]

    def _continued(self, model, whole):
        """Does the last token, after a cache of the others, get what it gets in the whole text?"""
        text = self._row(self.text)
        name, cache = cache_in(model(input_ids=text[:, :-1], use_cache=True))
        if name is None:
            return False
        self.name, self.layers = name, list(getattr(cache, "layers", []))
        inputs = {"input_ids": text[:, -1:], "attention_mask": torch.ones_like(text), name: cache}
        return close(output_of(model, **inputs), whole[:, -1:], self.effect)

    def _reaches(self, model):
        """Does a token far away see the virtual tokens, in each layer?

        Keys and values are put into its cache in their place, and there alone they differ between
        two runs, in which each block is given the same states. Once beyond all windows, where they
        are large, so that a small weight shows; and once among 64 others like them, where attention
        to a few chosen ones would miss them.
        """
        if not self.layers or not all(map(is_full, self.layers)):
            return True  # recurrent layers have no window
        far = self._beyond_windows(model)
        states, found = {}, []

        def same(i, block, args, kwargs):
            states.setdefault(i, hidden_of(args, kwargs))
            return with_hidden(args, kwargs, states[i])

        def remember(block, args, output):
            found.append(output[0] if isinstance(output, tuple) else output)

        handles = []
        for i, block in enumerate(blocks(model)):
            handles.append(block.register_forward_pre_hook(partial(same, i), with_kwargs=True))
            handles.append(block.register_forward_hook(remember))
        try:
            for others, large in {(min(far, 64), False), (far, True)}:
                states.clear(), found.clear()
                for sign in (1, -1):
                    self._run_after(model, others, sign, large)
                count = len(found) // 2
                pairs = zip(found[:count], found[count:], strict=True)
                if any(torch.equal(*pair) for pair in pairs):
                    return False
        finally:
            for handle in handles:
                handle.remove()
        return True

    def _run_after(self, model, others, sign, large):
        """One token after N virtual ones, of this sign, and `others` more in its cache."""
        filled, made = DynamicCache(), {}
        for layer in self.layers:  # one layer serves all that are alike
            like = (layer.keys.shape, layer.values.shape, layer.keys.device)
            made.setdefault(like, _Far(layer, others, sign, large))
            filled.layers.append(made[like])
        columns = others + 1 + (N if self.words.place == "template" else 0)  # of text
        inputs = {"attention_mask": self.text.new_ones(1, columns), self.name: filled}
        model(input_ids=self.text[:, :1], **inputs)

    def _beyond_windows(self, model):
        """More tokens than any window that the configuration hints at, but no more than fit."""
        limits = [self.limit, *(number_in(model.config, name) for name in LENGTHS)]
        far = max([64, *(size + 1 for size in _windows(model.config.to_dict()))])
        return max(1, min([far, *(limit - N - 1 for limit in limits if limit)]))


class _Far(DynamicLayer):
    """A cache layer of N positions that matter and `others` that do not; it does not grow."""

    _layer_type = None  # transformers keeps a list of layers by type: this is for nobody else

    def __init__(self, like, others, sign, large):
        super().__init__()
        self.lazy_initialization(like.keys, like.values)
        draw = torch.Generator(like.keys.device).manual_seed(0)
        for name, shape in (("keys", like.keys.shape), ("values", like.values.shape)):
            tensor = like.keys.new_zeros(*shape[:2], N + others, shape[-1])
            setattr(self, name, tensor if large else tensor.normal_(generator=draw))
        if large:
            self.values[:, :, :N] = min(others, 10_000)  # a weight of about 1/others times that
        self.values[:, :, :N] *= sign

    def update(self, keys, values, *args, **kwargs):
        return torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)


def _windows(settings, named=False):
    """Whole numbers of a configuration, at any depth, whose name tells of a window."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            yield from _windows(value, named or any(part in str(name) for part in WINDOWS))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _windows(value, named)
    elif named and isinstance(settings, int) and not isinstance(settings, bool):
        yield settings
