"""Prefix-tuning: learn keys and values in front of every layer's own (Li and Liang 2021).

    attention of a token = softmax(q [P_k; K]^T / sqrt(d)) [P_v; V]      section 4.2

That is a cache that no text has written: n positions which every token of the text sees, and which
see nothing themselves. With projection the prefix comes out of an MLP while training (section 4.3).
"""

from torch import nn

from minipeft.refusals import refuse_size
from minipeft.technique.kv_cache import key_value_shape, per_layer, table_of_cache
from minipeft.technique.words import place_of, token_ids
from minipeft.virtual_tokens import attach, refuse


class Prefix(nn.Module):
    """Keys and values for all layers, as (layers, 2, kv_heads, n, head_dim).

    Without an MLP the embedding table has the keys and values themselves, n rows of
    layers * 2 * kv_heads * head_dim. With one it has n rows of kv_heads * head_dim, and the MLP
    (linear, tanh, linear) makes the long rows of them, as in section 4.3 and in HF peft.
    """

    place = "cache"

    def __init__(self, n, shape, place, width=None):
        super().__init__()
        layers, kv_heads, head_dim = self.shape = shape
        kv = kv_heads * head_dim
        self.num_virtual_tokens = n
        self.embedding = nn.Embedding(n, kv if width else layers * 2 * kv, **place)
        self.mlp = width and nn.Sequential(
            nn.Linear(kv, width, **place), nn.Tanh(), nn.Linear(width, layers * 2 * kv, **place)
        )

    def table(self, layer=None):
        """The prefix, a row for each virtual token: (n, layers * 2 * kv_heads * head_dim).

        With a layer, the columns of that layer only: (n, 2 * kv_heads * head_dim).
        """
        _, kv_heads, head_dim = self.shape
        size = 2 * kv_heads * head_dim
        columns = slice(None) if layer is None else slice(layer * size, (layer + 1) * size)
        if not self.mlp:
            return self.embedding.weight[:, columns]
        first, tanh, last = self.mlp
        inner = tanh(first(self.embedding.weight))  # (n, width)
        return nn.functional.linear(inner, last.weight[columns], last.bias[columns])

    def forward(self, layer=None):
        _, kv_heads, head_dim = self.shape
        if layer is None:
            return per_layer(self.table(), self.shape)  # (layers, 2, kv_heads, n, head_dim)
        (keys_values,) = per_layer(self.table(layer), (1, kv_heads, head_dim))
        return keys_values  # (2, kv_heads, n, head_dim)


def add_prefix_tuning(
    model,
    num_virtual_tokens=10,
    projection=False,
    encoder_hidden_size=None,
    text=None,
    tokenizer=None,
):
    """Freeze `model` and add n trainable keys and values to each of its layers. Returns the model.

    num_virtual_tokens   n: n * layers * 2 * kv_heads * head_dim trainables without projection.
                         None, with text: one for each token.
    projection           train an embedding and an MLP that writes the prefix; `fold_prefix_tuning`
                         drops them. encoder_hidden_size is the MLP's width (default: kv_heads *
                         head_dim, the hidden size where there is no grouped-query attention).
    text                 start from the keys and values that the frozen model computes for `text`,
                         cut or repeated to n tokens: untrained, the model does what it does with
                         the text typed in front. Otherwise the table starts normal with a
                         deviation of 0.1, near a prefix that says nothing (HF peft: 1, which
                         disturbs a model more than it helps), and the embedding of an MLP with 1.
    The trainables are float32, also on a half-precision base (float64 on a float64 one).
    Raises ValueError for a length or width below 1, text together with projection, layers without
    full attention, and a model that has a technique already or no language-model head.
    """
    if text is not None and projection:
        raise ValueError("An MLP cannot be made to start at a text; leave out text or projection.")
    if encoder_hidden_size is not None and not projection:
        raise ValueError("encoder_hidden_size is the width of the MLP; it needs projection=True.")
    if num_virtual_tokens is None and text is not None:
        num_virtual_tokens = len(token_ids(model, text, tokenizer))
    refuse(model, num_virtual_tokens)
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


def fold_prefix_tuning(model):
    """Replace embedding and MLP by the keys and values that they write. Returns the model.

    The model computes what it did, bit for bit; what is trained from here on is the table itself.
    Raises ValueError if there is no prefix on the model, or it has no MLP.
    """
    prefix = getattr(model, "virtual_tokens", None)
    if not isinstance(prefix, Prefix) or not prefix.mlp:
        raise ValueError("There is no projected prefix on this model to fold.")
    model.virtual_tokens = prefix_of(model, prefix.table().detach())
    return model


def prefix_of(model, table):
    """A `Prefix` without an MLP: `table` is (n, layers * 2 * kv_heads * head_dim)."""
    prefix = Prefix(len(table), key_value_shape(model), place_of(model))
    prefix.embedding.weight.data.copy_(table)
    return prefix.train(model.training)
