"""Checks of exercise 08: they name the mistake and stay silent about the solution."""

import torch
from torch import nn
from transformers import BloomConfig, GPT2Config, LlamaConfig

from checks import Mistake

# Two rows of five tokens, the second padded on the left by two; four heads share two key heads.
_MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def _inputs():
    torch.manual_seed(0)
    q = torch.randn(2, 4, 5, 8)
    k, v = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    return q, k, v, torch.randn(2, 3, 8), torch.randn(2, 3, 8), _MASK.clone()


def _attention(q, k, v, prefix_k, prefix_v, mask, scale=8**0.5, tile=False, apart=False):
    """What is right, and with the switches some known ways of being wrong."""
    n, seq = prefix_k.shape[1], q.shape[2]
    both = [torch.cat([p.expand(2, -1, -1, -1), x], 2) for p, x in ((prefix_k, k), (prefix_v, v))]
    k, v = (x.repeat(1, 2, 1, 1) if tile else x.repeat_interleave(2, 1) for x in both)
    text = torch.ones(seq, seq).tril().bool() & mask.bool()[:, None, None]
    seen = torch.cat([torch.ones(2, 1, seq, n).bool(), text], 3)
    scores = (q @ k.mT / scale).masked_fill(~seen, -torch.inf)
    if apart:
        return scores[..., :n].softmax(-1) @ v[:, :, :n] + scores[..., n:].softmax(-1) @ v[:, :, n:]
    return scores.softmax(-1) @ v


def _changed(answer, before, at, index, value=5.0):
    """Which tokens (row, token) come out otherwise once input `at` is changed at `index`."""
    inputs = list(_inputs())
    inputs[at] = inputs[at].clone()
    inputs[at][index] += value
    after = answer(*inputs)
    return ~torch.isclose(after, before, atol=1e-5).all(3).all(1)  # (batch, seq)


def prefix_attention(answer):
    """Check a function (q, k, v, prefix_k, prefix_v, mask) -> (batch, heads, seq, head_dim)."""
    inputs = _inputs()
    real = _MASK.bool()
    try:
        got = answer(*inputs)
    except NotImplementedError:  # which is a RuntimeError
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        raise Mistake(
            f"An error: {str(error).splitlines()[0]}. There are 5 tokens, 3 virtual tokens, 2 key "
            "heads and 4 query heads here; do all your tensors count the same ones?"
        ) from error
    if got.shape == (2, 4, 8, 8):
        raise Mistake(
            "The output has a row for each virtual token too. Nobody asks for those: a prefix has "
            "keys and values, and no queries."
        )
    if got.shape != (2, 4, 5, 8):
        raise Mistake(f"The output has the shape {tuple(got.shape)}; it should be (2, 4, 5, 8).")
    if not got[real[:, None].expand(2, 4, 5)].isfinite().all():
        raise Mistake("The output of a real token is not finite. Does it see anything at all?")
    last = (slice(None), slice(None), 4)
    if _changed(answer, got, 2, last)[:, :4][real[:, :4]].any():
        raise Mistake(
            "A token sees tokens that come after it: changing the last one changes the output of "
            "earlier ones. Do the columns of the mask stand in the order of the keys?"
        )
    sees = [
        _changed(answer, got, 4, (slice(None), j, slice(None))) for j in range(3)
    ]  # whom the values of virtual token j reach
    if not any(row[real].any() for row in sees):
        raise Mistake("No token sees the prefix: changing its values changes nothing.")
    if not all(row[real].all() for row in sees):
        raise Mistake(
            "Not every token sees the whole prefix. A virtual token is never in the future: the "
            "causal order holds among the tokens of the text alone."
        )
    if not _changed(answer, got, 2, last)[:, 4].all():
        raise Mistake("A token does not see itself: changing its value leaves its output alone.")
    if _changed(answer, got, 2, (1, slice(None), slice(0, 2)))[real].any():
        raise Mistake("Padding is seen: changing its values changes the output of real tokens.")
    if not _changed(answer, got, 2, (0, slice(None), 0))[0].all():
        raise Mistake("A token does not see all tokens before it.")
    if not _changed(answer, got, 3, (slice(None), slice(0, 2)))[real].all():
        raise Mistake("The keys of the prefix have no say in how much of it is seen.")

    def like(expected):
        return torch.allclose(got.transpose(1, 2)[real], expected.transpose(1, 2)[real], atol=1e-4)

    q, k, v, prefix_k, prefix_v, mask = inputs
    if like(_attention(*inputs, scale=1.0)):
        raise Mistake("The scores are not divided by the square root of head_dim.")
    if like(_attention(*inputs, scale=8.0)):
        raise Mistake("The scores are divided by head_dim, not by its square root.")
    if like(_attention(*inputs, tile=True)):
        raise Mistake(
            "Query heads 0 and 2 share a key head in this answer. Those that share one stand side "
            "by side: 0 and 1, 2 and 3."
        )
    if like(_attention(*inputs, apart=True)):
        raise Mistake(
            "Prefix and text have a softmax each, so the weights of a token sum to 2. All that a "
            "token sees competes in one softmax."
        )
    if like(_attention(q, k, v, prefix_v, prefix_k, mask)):
        raise Mistake("Keys and values of the prefix are swapped.")
    if not like(_attention(*inputs)):
        raise Mistake("The output differs from that of attention over prefix and text.")


# One entry that differs from the rest on purpose: head_dim is not hidden_size // heads.
_LLAMA = LlamaConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=6
)
_GPT2 = GPT2Config(n_embd=12, n_layer=2, n_head=3)


def _row(config, kv_heads, head_dim):
    return config.num_hidden_layers * 2 * kv_heads * head_dim


def split(answer):
    """Check a function (table, config) -> [(keys, values), ...], each (kv_heads, n, head_dim)."""
    layers, kv_heads, n, head_dim = 3, 2, 5, 6
    table = torch.arange(float(n * _row(_LLAMA, kv_heads, head_dim))).view(n, -1).requires_grad_()
    try:
        got = answer(table, _LLAMA)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise Mistake(
            f"An error: {str(error).splitlines()[0]}. Here 4 query heads share 2 heads of keys "
            "and values, of 6 numbers each, in 3 layers: which of these numbers make up a row?"
        ) from error
    if len(got) != layers or any(len(pair) != 2 for pair in got):
        raise Mistake(f"Return a pair (keys, values) for each of the {layers} layers.")
    shapes = {tuple(part.shape) for pair in got for part in pair}
    if shapes == {(n, kv_heads, head_dim)} or shapes == {(kv_heads, head_dim, n)}:
        raise Mistake(
            f"The parts have the shape {shapes.pop()}: the axes are right and their order is not."
        )
    if any(shape[0] == 4 for shape in shapes):
        raise Mistake("The parts have 4 heads. How many heads of keys and values are there?")
    if shapes != {(kv_heads, n, head_dim)}:
        raise Mistake(f"The parts have the shapes {sorted(shapes)}, not (kv_heads, n, head_dim).")
    got = torch.stack([torch.stack(tuple(pair)) for pair in got])  # (layers, 2, kv, n, head_dim)
    flat = table.detach()
    right = flat.view(n, layers, 2, kv_heads, head_dim).permute(1, 2, 3, 0, 4)
    if torch.equal(got, flat.view(layers, 2, kv_heads, n, head_dim)):
        raise Mistake(
            "Numbers of different virtual tokens are mixed: row 0 of the keys of a layer must come "
            "from row 0 of the table alone. The shape is right, the order in memory is not."
        )
    if torch.equal(got, right.flip(1)):
        raise Mistake("Keys and values are swapped.")
    if torch.equal(got, flat.view(n, 2, layers, kv_heads, head_dim).permute(2, 1, 3, 0, 4)):
        raise Mistake(
            "This takes the keys of all layers first and then all values. In a row, each layer's "
            "keys are followed by its values."
        )
    if torch.equal(got, flat.view(n, layers, 2, head_dim, kv_heads).permute(1, 2, 4, 0, 3)):
        raise Mistake("The numbers of one head stand side by side in a row, not every second one.")
    if torch.equal(got, right.flip(0)):
        raise Mistake("The layers come in reverse order.")
    if not torch.equal(got, right):
        raise Mistake("The numbers do not stand where they should.")
    if not got.requires_grad:
        raise Mistake("No gradient reaches the table: the parts were detached from it.")
    table = torch.arange(2.0 * _row(_GPT2, 3, 4)).view(2, -1)
    try:
        got = answer(table, _GPT2)
    except AttributeError as error:
        raise Mistake(f"With a configuration of GPT-2: {error}.") from error
    shapes = {tuple(part.shape) for pair in got for part in pair}
    if shapes != {(3, 2, 4)}:
        raise Mistake(f"For GPT-2 with 3 heads of 4 numbers the parts have the shapes {shapes}.")


def lengthen(answer):
    """Check a function (mask, n) -> mask (batch, n + seq) and positions (batch, seq)."""
    n, seq = 3, 5
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    given = mask.clone()
    longer, positions = answer(mask, n)
    if not torch.equal(mask, given):
        raise Mistake("The mask that was passed in has been changed.")
    if longer.shape == mask.shape:
        raise Mistake(f"The mask still has {seq} columns, but {n + seq} positions are seen.")
    if longer.shape != (3, n + seq):
        raise Mistake(f"The mask has the shape {tuple(longer.shape)}, not {(3, n + seq)}.")
    if longer.is_floating_point():
        raise Mistake("The mask has become floating-point; it should keep the type it had.")
    right = torch.cat([torch.ones_like(mask[:, :n]), mask], 1)
    if torch.equal(longer, torch.cat([torch.zeros_like(mask[:, :n]), mask], 1)):
        raise Mistake("The mask hides the prefix: its columns are 0.")
    if torch.equal(longer, torch.cat([mask, torch.ones_like(mask[:, :n])], 1)):
        raise Mistake(
            "The new columns of the mask stand behind those of the text. Where in the cache is "
            "the prefix?"
        )
    if not torch.equal(longer, right):
        raise Mistake("The mask is not that of a prefix and the text behind it.")
    if positions.shape == (3, n + seq):
        raise Mistake(
            "There is a position for each virtual token too. The call has the tokens of the text "
            "only; the prefix is in the cache already."
        )
    if positions.shape != (3, seq):
        raise Mistake(f"The positions have the shape {tuple(positions.shape)}, not {(3, seq)}.")
    real = mask.bool()
    first = [row[m][0].item() for row, m in zip(positions, real, strict=True)]
    if first[0] == 0:
        raise Mistake(
            f"The first token of the text is at position 0, as if nothing stood before it. {n} "
            "virtual tokens do."
        )
    if first[0] == n + 1:
        raise Mistake(f"The first token is at {n + 1}, one too far: positions count from 0.")
    if first[1] == n + 2:
        raise Mistake(
            "Two columns of padding on the left move the tokens two positions up. Padding should "
            "change nothing."
        )
    wanted = (right.cumsum(-1) - 1)[:, n:]
    if not torch.equal(positions[real], wanted[real]):
        raise Mistake(f"The positions of the tokens are {positions[0].tolist()} in a full row.")
    if positions.min() < 0 or positions.max() >= n + seq:
        raise Mistake(
            "A position at padding is outside the range, which a table of learned positions would "
            "answer with an error."
        )


def projection(answer):
    """Check a class (n, layers, width, hidden) whose forward() gives (n, layers * 2 * width)."""
    torch.manual_seed(0)
    n, layers, width, hidden = 3, 2, 4, 6
    module = answer(n, layers, width, hidden)
    for name, kind in (("embedding", nn.Embedding), ("first", nn.Linear), ("second", nn.Linear)):
        if not isinstance(getattr(module, name, None), kind):
            raise Mistake(f"The module needs an attribute {name}, an nn.{kind.__name__}.")
    if tuple(module.embedding.weight.shape) != (n, width):
        raise Mistake(
            f"The embedding has the shape {tuple(module.embedding.weight.shape)}. It is not yet "
            f"the table; it has {width} numbers for each of {n} virtual tokens."
        )
    if module.second.out_features == layers * width:
        raise Mistake("The second layer gives keys or values for each layer; there are both.")
    if module.second.out_features != layers * 2 * width:
        raise Mistake(
            f"The second layer gives {module.second.out_features} numbers; a row of the table has "
            f"{layers * 2 * width}."
        )
    if module.first.out_features != hidden or module.second.in_features != hidden:
        raise Mistake("Between the two layers there should be `hidden` numbers.")
    if module.first.bias is None or module.second.bias is None:
        raise Mistake("A linear layer has no bias.")
    table = module()
    if tuple(table.shape) != (n, layers * 2 * width):
        raise Mistake(
            f"forward gives the shape {tuple(table.shape)}, not {(n, layers * 2 * width)}."
        )
    inner = module.first(module.embedding.weight)
    if torch.allclose(table, module.second(inner), atol=1e-6):
        raise Mistake(
            "Nothing stands between the two layers, so they are one linear layer written as two."
        )
    if torch.allclose(table, module.second(inner).tanh(), atol=1e-6):
        raise Mistake(
            "The tanh comes last. It would keep all keys and values between -1 and 1, which those "
            "of real tokens are not."
        )
    if torch.allclose(table, module.second(inner.relu()), atol=1e-6):
        raise Mistake("That is a ReLU between the two layers, not a tanh.")
    if not torch.allclose(table, module.second(inner.tanh()), atol=1e-6):
        raise Mistake("forward is not second(tanh(first(embedding))).")
    table.sum().backward()
    missing = [name for name, p in module.named_parameters() if p.grad is None]
    if missing:
        raise Mistake(f"No gradient arrives at {missing[0]}.")


def fold(answer, module_class):
    """Check a function (projection) -> a parameter with its table; also takes the class."""
    torch.manual_seed(0)
    module = module_class(3, 2, 4, 6)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    table = module().detach().clone()
    folded = answer(module)
    if isinstance(folded, torch.Tensor) and folded.grad_fn is not None:
        raise Mistake(
            "The result still hangs on the graph of the projection, so the projection cannot be "
            "dropped."
        )
    if not isinstance(folded, nn.Parameter):
        raise Mistake(f"Return an nn.Parameter; this is a {type(folded).__name__}.")
    if folded.shape == module.embedding.weight.shape:
        raise Mistake("That is the embedding, which goes in; the table is what comes out.")
    if folded.shape != table.shape or not torch.allclose(folded, table, atol=1e-6):
        raise Mistake("The result is not the table that the projection gives.")
    if not folded.requires_grad:
        raise Mistake("The result cannot be trained on: it does not require grad.")
    if not all(torch.equal(before[name], value) for name, value in module.state_dict().items()):
        raise Mistake("Folding has changed the projection.")
    if not all(p.requires_grad for p in module.parameters()):
        raise Mistake("Folding has frozen the projection.")


def count(answer):
    """Check a function (config, n, hidden=None) -> number of trainables."""
    n, layers, kv_heads, head_dim = 7, 3, 2, 6
    width, row = kv_heads * head_dim, 2 * layers * kv_heads * head_dim
    got = answer(_LLAMA, n)
    wide = {4 * head_dim, 32}  # of all query heads, or the hidden size
    if got == n * row // 2:
        raise Mistake("Without projection, keys or values are counted; there are both.")
    if got == n * row // layers:
        raise Mistake("Only one layer is counted: every layer has a prefix of its own.")
    if got in {n * 2 * layers * each for each in wide}:
        raise Mistake(
            "That is right for a model whose heads all have keys of their own. Here 4 query heads "
            "share 2."
        )
    if got == n * 2 * layers * kv_heads * 8:
        raise Mistake("This config has a head_dim of its own: 6, not hidden_size // heads.")
    if got != n * row:
        raise Mistake(f"{got} is not the size of the table of 7 virtual tokens without projection.")
    hidden = 10
    got = answer(_LLAMA, n, hidden)
    embedding, first, second = n * width, (width + 1) * hidden, (hidden + 1) * row
    if got == n * row:
        raise Mistake("With a projection the same is counted as without one.")
    if got == n * row + first + second:
        raise Mistake(
            "With a projection the table itself is no parameter: it is computed from the embedding."
        )
    if got == first + second:
        raise Mistake("The embedding of the projection is trained too.")
    if got == embedding + width * hidden + hidden * row:
        raise Mistake("The biases of the two linear layers are left out.")
    if got == embedding + first + second * n:
        raise Mistake("The second layer is one for all virtual tokens, not one for each.")
    if got != embedding + first + second:
        raise Mistake(f"{got} is not the size of embedding, first and second layer.")
    bloom = BloomConfig(vocab_size=46145, hidden_size=2048, n_layer=24, n_head=16)
    try:
        pair = answer(bloom, 10), answer(bloom, 10, 2048)
    except AttributeError as error:
        raise Mistake(f"With a configuration of Bloom: {error}.") from error
    if pair != (983_040, 205_641_728):
        raise Mistake(f"For Bloom-1b4-zh this gives {pair[0]:,} and {pair[1]:,}, which is not so.")
