"""P-tuning: let a small encoder write the vectors of the virtual tokens (Liu et al. 2021).

    v_i = MLP([LSTM(e_1..e_n) forward at i : backward at i])      section 2.2.1, "Optimization"

The vectors stand in front of the input, or inside a template, between words that stay words
(section 2.2). After training their encoder has done its work: its outputs are a fixed table.
"""

from functools import partial

import torch
from torch import nn

from minipeft.refusals import refuse_size
from minipeft.technique.asked import embedded
from minipeft.technique.inputs import count_positions, named_inputs, past_length
from minipeft.technique.on_model import technique_of
from minipeft.technique.words import place_of, width_of
from minipeft.virtual_tokens import attach, refuse

ENCODERS = ("lstm", "mlp")


class PromptEncoder(nn.Module):
    """The vectors (n, hidden) of n virtual tokens, as an encoder's output or as a plain table.

    encoder "lstm": two bidirectional LSTM layers of `width` each way, then a two-layer MLP.
    encoder "mlp": three linear layers, applied to each token by itself. None: the table alone.
    Layers and sizes are those of HF peft, which took them from the authors' code.
    """

    def __init__(self, n, hidden, encoder, width, placeholder_id, place):
        super().__init__()
        self.num_virtual_tokens, self.placeholder_id = n, placeholder_id
        self.place = "front" if placeholder_id is None else "template"
        self.encoder, self.width = encoder, width
        self.embedding = nn.Embedding(n, hidden, **place)
        linear = partial(nn.Linear, **place)
        if encoder == "lstm":
            self.lstm = nn.LSTM(hidden, width, 2, batch_first=True, bidirectional=True, **place)
            self.mlp = nn.Sequential(
                linear(2 * width, 2 * width), nn.ReLU(), linear(2 * width, hidden)
            )
        elif encoder == "mlp":
            self.mlp = nn.Sequential(
                linear(hidden, width), nn.ReLU(),
                linear(width, width), nn.ReLU(), linear(width, hidden),
            )  # fmt: skip

    def forward(self):
        vectors = self.embedding.weight  # (n, hidden)
        # Not in half precision: the encoder runs once a step, and not every CPU has such an LSTM.
        with torch.autocast(vectors.device.type, enabled=False):
            if self.encoder == "lstm":
                if vectors.is_cuda:  # in eval mode cuDNN has no backward pass
                    self.lstm.train()  # which changes no number: there is no dropout
                vectors = self.lstm(vectors[None])[0][0]  # (n, 2 * width)
            return self.mlp(vectors) if self.encoder else vectors  # (n, hidden)


def add_p_tuning(
    model, num_virtual_tokens=10, encoder="lstm", encoder_hidden_size=None, placeholder_id=None
):
    """Freeze `model` and add virtual tokens that a small encoder writes. Returns the model.

    encoder              "lstm" or "mlp"; see `PromptEncoder`.
    encoder_hidden_size  its width; by default the hidden size of the model.
    placeholder_id       None: the virtual tokens stand in front. A token id: every row of input_ids
                         holds this id n times, wherever the template wants a virtual token, and
                         they are replaced in order. The sequence keeps its length. It may be any
                         number that no text contains, also one beyond the vocabulary.
    The trainables are float32, also on a half-precision base (float64 on a float64 one).
    Raises ValueError for an unknown encoder, a size below 1, and a model that has a technique
    already or no language-model head; when called, for a row with another number of placeholders.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"encoder={encoder!r} is none of {', '.join(map(repr, ENCODERS))}.")
    if placeholder_id is not None and type(placeholder_id) is not int:
        raise ValueError(f"placeholder_id={placeholder_id!r} is no token id; give a whole number.")
    refuse(model, num_virtual_tokens)
    hidden = width_of(model)
    width = hidden if encoder_hidden_size is None else encoder_hidden_size
    refuse_size("encoder_hidden_size", width, "width")
    place = place_of(model)
    written = PromptEncoder(num_virtual_tokens, hidden, encoder, width, placeholder_id, place)
    return attach_encoder(model, written)


def attach_encoder(model, written):
    """Freeze `model` and put the vectors of a `PromptEncoder` in. Returns the model."""
    before = _fill_template if written.place == "template" else None
    return attach(model, written, "p_tuning", before)


def _fill_template(first, limit, model, args, kwargs):
    """Before the forward: put the vectors where the placeholders are. Nothing gets longer."""
    virtual, n = model.virtual_tokens, model.virtual_tokens.num_virtual_tokens
    kwargs, cache_name = named_inputs(model, args, kwargs)
    if past_length(kwargs.get(cache_name)):  # generation goes on: the template is in the cache
        return (), kwargs
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError("A template is found by its token ids; give input_ids.")
    ids, labels = kwargs["input_ids"], kwargs.get("labels")
    holes = ids == virtual.placeholder_id  # (batch, seq)
    if not (holes.sum(1) == n).all():
        raise ValueError(
            f"Each row needs the placeholder {virtual.placeholder_id} {n} times, once for each "
            f"virtual token; these rows have it {holes.sum(1).tolist()} times."
        )
    if labels is not None and (labels == virtual.placeholder_id).any():
        raise ValueError("A placeholder is a label, but nobody can predict it; label it -100.")
    if kwargs.get("position_ids") is None:
        count_positions(kwargs, first, ids.shape[1])
    embeds = embedded(model, ids.masked_fill(holes, 0))  # (batch, seq, hidden)
    vectors = virtual().to(embeds).repeat(len(ids), 1)  # (batch * n, hidden), row by row
    embeds = embeds.masked_scatter(holes[..., None], vectors)
    return (), kwargs | {"inputs_embeds": embeds, "input_ids": None}


@torch.no_grad()
def fold_p_tuning(model):
    """Replace the encoder by the table of its outputs, which trains on as n * hidden numbers.

    The model computes what it did, bit for bit. Returns the model.
    Raises ValueError if there is no P-tuning on the model, or it is folded already.
    """
    written = getattr(model, "virtual_tokens", None)
    if technique_of(model) != "p_tuning" or not written.encoder:
        raise ValueError("There is no encoder of P-tuning on this model to fold.")
    model.virtual_tokens = table_of(model, written(), written.placeholder_id)
    return model


def table_of(model, vectors, placeholder_id):
    """A `PromptEncoder` without an encoder: a table of `vectors` (n, hidden)."""
    table = PromptEncoder(*vectors.shape, None, None, placeholder_id, place_of(model))
    with torch.no_grad():
        table.embedding.weight.copy_(vectors)
    return table.train(model.training)
