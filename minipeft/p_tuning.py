"""P-tuning: a small encoder computes the vectors of the virtual tokens (Liu et al. 2021).

    v_i = MLP([LSTM(e_1..e_n) forward at i : backward at i])      section "Optimization"

The vectors go in front of the input, or between the words of a template. After
training, the encoder can be dropped: its outputs are a fixed table.
"""

from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from minipeft.refusals import refuse_no_model, refuse_size, require
from minipeft.technique.asked import embedded
from minipeft.technique.inputs import count_positions, named_inputs, past_length
from minipeft.technique.words import Place, place_of, width_of
from minipeft.virtual_tokens import VirtualTokens, attach, refuse

ENCODERS = ("lstm", "mlp")


class PromptEncoder(VirtualTokens):
    """The vectors (n, hidden) of n virtual tokens: the output of an encoder, or a plain table.

    encoder "lstm": two bidirectional LSTM layers of `width` per direction, then a two-layer MLP.
    encoder "mlp": three linear layers, applied to each token separately. None: only the table.
    Layers and sizes are those of HF peft; the authors' LSTM is half as wide.
    """

    def __init__(
        self,
        n: int,
        hidden: int,
        encoder: str | None,
        width: int,
        placeholder_id: int | None,
        factory_kwargs: Place,
    ) -> None:
        super().__init__()
        self.num_virtual_tokens, self.placeholder_id = n, placeholder_id
        self.place = "front" if placeholder_id is None else "template"
        self.encoder, self.width = encoder, width
        self.embedding = nn.Embedding(n, hidden, **factory_kwargs)
        linear = partial(nn.Linear, **factory_kwargs)
        if encoder == "lstm":
            self.lstm = nn.LSTM(
                hidden, width, 2, batch_first=True, bidirectional=True, **factory_kwargs
            )
            self.mlp = nn.Sequential(
                linear(2 * width, 2 * width), nn.ReLU(), linear(2 * width, hidden)
            )
        elif encoder == "mlp":
            self.mlp = nn.Sequential(
                linear(hidden, width), nn.ReLU(),
                linear(width, width), nn.ReLU(), linear(width, hidden),
            )  # fmt: skip

    def forward(self) -> torch.Tensor:
        vectors = self.embedding.weight  # (n, hidden)
        # No autocast: the encoder runs once per step, and not every CPU has a 16-bit LSTM.
        device = "cpu" if vectors.is_meta else vectors.device.type  # meta has none to switch off
        with torch.autocast(device, enabled=False):
            if self.encoder == "lstm":
                if vectors.is_cuda:  # cuDNN has no backward pass in eval mode
                    self.lstm.train()  # same outputs, since there is no dropout
                vectors = self.lstm(vectors[None])[0][0]  # (n, 2 * width)
            return self.mlp(vectors) if self.encoder else vectors  # (n, hidden)


def add_p_tuning(
    model: PreTrainedModel,
    num_virtual_tokens: int = 10,
    encoder: str = "lstm",
    encoder_hidden_size: int | None = None,
    placeholder_id: int | None = None,
) -> PreTrainedModel:
    """Freeze `model` and add virtual tokens computed by a small encoder. Returns the model.

    encoder              "lstm" or "mlp"; see `PromptEncoder`.
    encoder_hidden_size  width of the encoder; by default the hidden size of the model.
    placeholder_id       None: the virtual tokens go in front. An integer: every row of input_ids
                         contains it n times, and these positions get the virtual tokens in order;
                         the sequence keeps its length. It must not occur elsewhere in the text, and
                         may lie outside the vocabulary.
    Trainable parameters are float32 even on a half-precision base (float64 on a float64 base).
    Raises ValueError for an unknown encoder, a size below 1, and a model that already has a
    technique or has no language-model head. Calling the model raises it for rows with another
    number of placeholders than n.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"encoder={encoder!r} is none of {', '.join(map(repr, ENCODERS))}.")
    if placeholder_id is not None and type(placeholder_id) is not int:
        raise ValueError(f"placeholder_id={placeholder_id!r} must be a token id, a whole number.")
    refuse(model, num_virtual_tokens)
    hidden, place = width_of(model), place_of(model)
    width = hidden if encoder_hidden_size is None else encoder_hidden_size
    refuse_size("encoder_hidden_size", width, "width")
    virtual = PromptEncoder(num_virtual_tokens, hidden, encoder, width, placeholder_id, place)
    return attach_encoder(model, virtual)


def attach_encoder(model: PreTrainedModel, virtual: PromptEncoder) -> PreTrainedModel:
    """Freeze `model` and attach a `PromptEncoder` to it. Returns the model."""
    template = virtual.place == "template"
    return attach(model, virtual, "p_tuning", _fill_template if template else None)


def _fill_template(first, limit, model, args, kwargs):
    """Forward pre-hook: put the vectors at the placeholders. The sequence keeps its length."""
    virtual, n = model.virtual_tokens, model.virtual_tokens.num_virtual_tokens
    kwargs, cache_name = named_inputs(model, args, kwargs)
    ids, labels = kwargs.get("input_ids"), kwargs.get("labels")
    if past_length(kwargs.get(cache_name)):  # a later step of `generate`: the template is cached
        more = ids is not None and ids.shape[1] > 1 and (ids == virtual.placeholder_id).any()
        require(not more, "A template cannot go on from a cache; give the whole text at once.")
        return (), kwargs
    require(kwargs.get("inputs_embeds") is None, "A template is found by its ids; give input_ids.")
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
    vectors = virtual().to(embeds).repeat(len(ids), 1)  # (batch * n, hidden)
    embeds = embeds.masked_scatter(holes[..., None], vectors)  # (batch, seq, hidden)
    return (), kwargs | {"inputs_embeds": embeds, "input_ids": None}


@torch.no_grad()
def fold_p_tuning(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the encoder by a trainable table of its outputs, n * hidden parameters.

    The outputs of the model stay the same, bit for bit. Returns the model.
    Raises ValueError if the model has no P-tuning, or it is already folded.
    """
    refuse_no_model(model)
    virtual = getattr(model, "virtual_tokens", None)
    if not isinstance(virtual, PromptEncoder) or not virtual.encoder:
        raise ValueError("There is no encoder of P-tuning on this model to fold.")
    model.virtual_tokens = table_of(model, virtual(), virtual.placeholder_id)
    return model


def table_of(
    model: PreTrainedModel, vectors: torch.Tensor, placeholder_id: int | None
) -> PromptEncoder:
    """A `PromptEncoder` that is only a table, of `vectors` (n, hidden)."""
    n, hidden = vectors.shape
    table = PromptEncoder(n, hidden, None, 0, placeholder_id, place_of(model))
    with torch.no_grad():
        table.embedding.weight.copy_(vectors)
    return table.train(model.training)
