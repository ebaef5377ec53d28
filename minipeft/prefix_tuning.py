"""Prefix-tuning: train keys and values in front of those of the text (Li and Liang 2021).

    attention output of a token = softmax(q [P_k; K]^T / sqrt(d)) [P_v; V]      section 4.2

The prefix is a trainable KV cache of n positions that belong to no text; every token attends to
them in every layer. virtual_tokens.py hands it to the model, technique/kv_cache.py fills the cache.
With `projection`, an MLP computes it during training (section 4.3).
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minipeft.refusals import refuse_no_model, refuse_size
from minipeft.technique.kv_cache import key_value_shape, per_layer, table_of_cache
from minipeft.technique.words import Place, place_of, token_ids
from minipeft.virtual_tokens import VirtualTokens, attach, refuse


class Prefix(VirtualTokens):
    """Keys and values for all layers: (layers, 2, kv_heads, n, head_dim).

    Without an MLP the embedding table is the prefix: (n, layers * 2 * kv_heads * head_dim). With an
    MLP (linear, tanh, linear) the table has n rows of kv_heads * head_dim, and the MLP expands
    each row, as in section 4.3 and in HF peft.
    """

    place = "cache"

    def __init__(
        self,
        n: int,
        shape: tuple[int, int, int],
        factory_kwargs: Place,
        width: int | None = None,
    ) -> None:
        super().__init__()
        layers, kv_heads, head_dim = self.shape = shape
        kv = kv_heads * head_dim
        self.num_virtual_tokens = n
        columns = layers * 2 * kv
        self.embedding = nn.Embedding(n, kv if width else columns, **factory_kwargs)
        self.mlp: Any = None
        if width:
            first = nn.Linear(kv, width, **factory_kwargs)
            self.mlp = nn.Sequential(first, nn.Tanh(), nn.Linear(width, columns, **factory_kwargs))

    def table(self, layer: int | None = None) -> torch.Tensor:
        """The prefix, one row per virtual token: (n, layers * 2 * kv_heads * head_dim).

        With `layer`, only the columns of that layer: (n, 2 * kv_heads * head_dim).
        """
        _, kv_heads, head_dim = self.shape
        size = 2 * kv_heads * head_dim
        columns = slice(None) if layer is None else slice(layer * size, (layer + 1) * size)
        if not self.mlp:
            return self.embedding.weight[:, columns]
        first, tanh, last = self.mlp
        hidden = tanh(first(self.embedding.weight))  # (n, width)
        return nn.functional.linear(hidden, last.weight[columns], last.bias[columns])

    def forward(self, layer: int | None = None) -> torch.Tensor:
        _, kv_heads, head_dim = self.shape
        if layer is None:
            return per_layer(self.table(), self.shape)  # (layers, 2, kv_heads, n, head_dim)
        (keys_values,) = per_layer(self.table(layer), (1, kv_heads, head_dim))
        return keys_values  # (2, kv_heads, n, head_dim)


def add_prefix_tuning(
    model: PreTrainedModel,
    num_virtual_tokens: int | None = 10,
    projection: bool = False,
    encoder_hidden_size: int | None = None,
    text: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Freeze `model` and add n trainable keys and values to each of its layers. Returns the model.

    num_virtual_tokens   n, for n * layers * 2 * kv_heads * head_dim trainable parameters without
                         projection. None, with text: the number of tokens of the text.
    projection           train an embedding and an MLP that computes the prefix;
                         `fold_prefix_tuning` drops them.
    encoder_hidden_size  width of the MLP. Default: kv_heads * head_dim, which is the hidden size in
                         multi-head attention.
    text                 initialize with the keys and values that the frozen model computes for
                         `text`, truncated or repeated to n tokens: before training, the model
                         then behaves as if the text stood in front. Otherwise the table is drawn
                         from a normal distribution with standard deviation 0.1 (HF peft: 1, which
                         disturbs a model more); in front of an MLP, the embedding with 1.
    Trainable parameters are float32 even on a half-precision base (float64 on a float64 base).
    Raises ValueError for a length or width below 1, text together with projection, layers without
    full attention, and a model that already has a technique or has no language-model head.
    """
    if text is not None and projection:
        raise ValueError("An MLP cannot be made to start at a text; leave out text or projection.")
    if encoder_hidden_size is not None and not projection:
        raise ValueError("encoder_hidden_size is the width of the MLP; it needs projection=True.")
    if num_virtual_tokens is None and text is not None:
        num_virtual_tokens = len(token_ids(model, text, tokenizer))
    refuse(model, num_virtual_tokens)
    assert num_virtual_tokens is not None  # checked by `refuse`
    shape = key_value_shape(model)
    width = None
    if projection:
        width = shape[1] * shape[2] if encoder_hidden_size is None else encoder_hidden_size
        refuse_size("encoder_hidden_size", width, "width")
    prefix = Prefix(num_virtual_tokens, shape, place_of(model), width)
    if not projection:
        nn.init.normal_(prefix.embedding.weight, std=0.1)
    if text is not None:
        ids = token_ids(model, text, tokenizer, num_virtual_tokens)
        prefix.embedding.weight.data.copy_(table_of_cache(model, ids[None], num_virtual_tokens))
    return attach(model, prefix, "prefix_tuning")


def fold_prefix_tuning(model: PreTrainedModel) -> PreTrainedModel:
    """Replace embedding and MLP by a trainable table of the keys and values that they compute.

    The outputs of the model stay the same, bit for bit. Returns the model.
    Raises ValueError if the model has no prefix, or the prefix has no MLP.
    """
    refuse_no_model(model)
    prefix = getattr(model, "virtual_tokens", None)
    if not isinstance(prefix, Prefix) or not prefix.mlp:
        raise ValueError("There is no projected prefix on this model to fold.")
    model.virtual_tokens = prefix_of(model, prefix.table().detach())
    return model


def prefix_of(model: PreTrainedModel, table: torch.Tensor) -> Prefix:
    """A `Prefix` without an MLP. table: (n, layers * 2 * kv_heads * head_dim)."""
    prefix = Prefix(len(table), key_value_shape(model), place_of(model))
    prefix.embedding.weight.data.copy_(table)
    return prefix.train(model.training)
