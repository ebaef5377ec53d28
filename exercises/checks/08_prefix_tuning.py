"""Checks of exercise 08: they name the mistake and stay silent about the solution."""

import torch
from torch import nn
from transformers import BloomConfig, GPT2Config, LlamaConfig, Qwen2Config

from checks import Mistake, in_one_line
from checks.devices import follows_the_device

# Attention is tried with these sizes, and then with one of them changed at a time.
_SIZES = {"batch": 3, "heads": 4, "kv_heads": 2, "seq": 5, "head_dim": 8, "n": 3}
_OTHER = {"batch": 2, "heads": 6, "kv_heads": 4, "seq": 7, "head_dim": 3, "n": 1}
_NAMES = ("q", "k", "v", "prefix_k", "prefix_v", "mask")


def _inputs(**changes):
    """q, k, v, prefix_k, prefix_v, mask: a full row, one padded on the left, one on the right."""
    torch.manual_seed(0)
    batch, heads, kv_heads, seq, head_dim, n = (_SIZES | changes).values()
    q = torch.randn(batch, heads, seq, head_dim)
    k, v = torch.randn(2, batch, kv_heads, seq, head_dim)
    prefix_k, prefix_v = torch.randn(2, kv_heads, n, head_dim)
    mask = torch.ones(batch, seq, dtype=torch.int64)
    mask[1:2, :2], mask[2:3, 2:] = 0, 0
    return q, k, v, prefix_k, prefix_v, mask


def _attention(q, k, v, prefix_k, prefix_v, mask, wrong=""):
    """What is right, or what comes out with one thing done wrong."""
    batch, heads, seq, head_dim = q.shape
    kv_heads, n, _ = prefix_k.shape
    shared = heads // kv_heads
    k = torch.cat([prefix_k.expand(batch, -1, -1, -1), k], 2)
    v = torch.cat([prefix_v.expand(batch, -1, -1, -1), v], 2)
    if wrong == "tiled":
        k, v = k.repeat(1, shared, 1, 1), v.repeat(1, shared, 1, 1)
    else:
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    if wrong == "inverted":
        mask = 1 - mask
    text = torch.ones(seq, seq).tril().bool() & mask.bool()[:, None, None]
    seen = torch.cat([torch.ones(batch, 1, seq, n).bool(), text], 3)
    size = {"unscaled": 1, "head_dim": head_dim**2, "all heads": heads * head_dim}
    scores = q @ k.mT / size.get(wrong, head_dim) ** 0.5
    if wrong == "added":
        return (scores + seen).softmax(-1) @ v
    if wrong == "after":
        return (scores.softmax(-1) * seen) @ v
    scores = scores.masked_fill(~seen, 0 if wrong == "zero" else -torch.inf)
    if wrong == "columns":
        return scores.softmax(-2) @ v
    if wrong == "apart":
        return scores[..., :n].softmax(-1) @ v[:, :, :n] + scores[..., n:].softmax(-1) @ v[:, :, n:]
    return scores.softmax(-1) @ v


_KNOWN = {
    "unscaled": "The scores are not divided by the square root of head_dim.",
    "head_dim": "The scores are divided by head_dim, not by its square root.",
    "all heads": "The scores are divided by the square root of heads * head_dim. The size of one "
    "head counts.",
    "tiled": "Query heads 0 and 2 share a key head in this answer. Those that share one stand side "
    "by side: 0 and 1, 2 and 3.",
    "inverted": "The mask is read the wrong way around: 1 is a token, 0 is padding.",
    "added": "The mask was added to the scores. That raises the score of what is seen by 1, and "
    "hides nothing.",
    "after": "The mask was applied after the softmax, so the weights of a token no longer add up "
    "to 1.",
    "zero": "What is hidden has the score 0. The softmax makes exp(0) = 1 of it, so it still gets "
    "weight.",
    "columns": "The softmax runs over the tokens that ask. It must run over what each one sees.",
    "apart": "Prefix and text have a softmax each, so the weights of a token sum to 2. All that a "
    "token sees competes in one softmax.",
}


def prefix_attention(answer):
    """Check a function (q, k, v, prefix_k, prefix_v, mask) -> (batch, heads, seq, head_dim)."""
    inputs = _inputs()
    try:
        got = answer(*inputs)
    except NotImplementedError:  # which is a RuntimeError
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        raise Mistake(
            f"An error: {str(error).splitlines()[0]}. There are 5 tokens, 3 virtual tokens, 2 key "
            "heads and 4 query heads here; do all your tensors count the same ones?"
        ) from error
    for name, now, before in zip(_NAMES, inputs, _inputs(), strict=True):
        if not torch.equal(now, before):
            raise Mistake(f"Your function changed the {name} that was passed in.")
    if got.shape == (3, 4, 8, 8):
        raise Mistake(
            "The output has a row for each virtual token too. Nobody asks for those: a prefix has "
            "keys and values, and no queries."
        )
    if got.shape != (3, 4, 5, 8):
        raise Mistake(f"The output has the shape {tuple(got.shape)}; it should be (3, 4, 5, 8).")
    _right_attention(answer, got, inputs)
    for name, value in _OTHER.items():
        said = f"With {name} = {_SIZES[name]} the answer is right, with {name} = {value}"
        other = _inputs(**{name: value})
        try:
            right = _same(answer(*other), _attention(*other), other[-1])
        except (RuntimeError, IndexError, ValueError) as error:
            raise Mistake(f"{said} there is an error: {in_one_line(error)}") from error
        if not right:
            raise Mistake(f"{said} it is wrong. Is a size of the first case written into it?")
    _gradients(answer)
    if not follows_the_device(answer, *_inputs()):
        raise Mistake("Your function makes a tensor on the CPU, whatever the device of q is.")
    half = [x.half() for x in inputs[:-1]]
    try:
        got = answer(*half, inputs[-1])
    except RuntimeError as error:
        raise Mistake(f"In float16 there is an error: {in_one_line(error)}") from error
    if got.dtype != torch.float16:
        raise Mistake(f"From float16 inputs comes an output of {got.dtype}.")
    if not _same(got.float(), _attention(*inputs), inputs[-1], atol=0.02):
        raise Mistake("The output is right in float32, and wrong in float16.")


def _same(got, wanted, mask, atol=1e-4):
    """Whether two outputs agree at the real tokens."""
    real = mask.bool()
    if got.shape != wanted.shape:
        return False
    return torch.allclose(got.transpose(1, 2)[real], wanted.transpose(1, 2)[real], atol=atol)


def _changed(answer, before, at, index):
    """Which tokens (row, token) come out otherwise once input `at` is changed at `index`."""
    inputs = _inputs()
    inputs[at][index] += 5
    return ~torch.isclose(answer(*inputs), before, atol=1e-5).all(3).all(1)  # (batch, seq)


def _right_attention(answer, got, inputs):
    real, every = inputs[-1].bool(), slice(None)
    for wrong, message in _KNOWN.items():
        known = _attention(*inputs, wrong=wrong)
        rows = known.isfinite().all(3).all(2).all(1)
        if _same(got[rows], known[rows], inputs[-1][rows]):
            raise Mistake(message)
    if not got.transpose(1, 2)[real].isfinite().all():
        raise Mistake("The output of a real token is not finite. Does it see anything at all?")
    last = (every, every, 4)
    if _changed(answer, got, 2, last)[:, :4][real[:, :4]].any():
        raise Mistake(
            "A token sees tokens that come after it: changing the last one changes the output of "
            "earlier ones. Do the columns of the mask stand in the order of the keys?"
        )
    # Whom the values of each virtual token reach.
    sees = [_changed(answer, got, 4, (every, j)) for j in range(3)]
    if not any(row[real].any() for row in sees):
        raise Mistake("No token sees the prefix: changing its values changes nothing.")
    if not all(row[real].all() for row in sees):
        raise Mistake(
            "Not every token sees the whole prefix. A virtual token is never in the future: the "
            "causal order holds among the tokens of the text alone."
        )
    if not _changed(answer, got, 2, last)[:2, 4].all():
        raise Mistake("A token does not see itself: changing its value leaves its output alone.")
    if _changed(answer, got, 2, (1, every, slice(0, 2)))[real].any():
        raise Mistake("Padding is seen: changing its values changes the output of real tokens.")
    if not _changed(answer, got, 2, (0, every, 0))[0].all():
        raise Mistake("A token does not see all tokens before it.")
    if not _changed(answer, got, 3, (every, slice(0, 2)))[real].all():
        raise Mistake("The keys of the prefix have no say in how much of it is seen.")
    q, k, v, prefix_k, prefix_v, mask = inputs
    if _same(got, _attention(q, k, v, prefix_v, prefix_k, mask), mask):
        raise Mistake("Keys and values of the prefix are swapped.")
    if not _same(got, _attention(*inputs), mask):
        raise Mistake("The output differs from that of attention over prefix and text.")


def _gradients(answer):
    """Does training reach all that comes in?"""
    found = []
    for function in (answer, _attention):
        inputs = [x.requires_grad_(x.is_floating_point()) for x in _inputs()]
        loss = function(*inputs).transpose(1, 2)[inputs[-1].bool()].square().sum()
        if loss.requires_grad:
            loss.backward()
        found.append([x.grad for x in inputs[:-1]])
    for name, ours, right in zip(_NAMES, *found, strict=False):
        if ours is None or not ours.any():
            raise Mistake(f"No gradient reaches {name}: your function cuts it off.")
        if not torch.allclose(ours, right, atol=1e-4):
            raise Mistake(f"The output is right, but the gradient of {name} is not.")


# (configuration, kv_heads, head_dim). In the first, head_dim is not hidden_size // heads.
_LLAMA = LlamaConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=6
)
_CONFIGS = {
    "GPT-2": (GPT2Config(n_embd=12, n_layer=2, n_head=3), 3, 4),
    "Qwen2": (
        Qwen2Config(
            hidden_size=40, num_hidden_layers=1, num_attention_heads=5, num_key_value_heads=1
        ),
        1, 8,
    ),
    "Llama": (
        LlamaConfig(
            hidden_size=48, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=3
        ),
        3, 8,
    ),
}  # fmt: skip


def _table(config, kv_heads, head_dim, n):
    """A table in which each number is another one: (n, layers * 2 * kv_heads * head_dim)."""
    return torch.arange(float(n * config.num_hidden_layers * 2 * kv_heads * head_dim)).view(n, -1)


def _parts(table, layers, kv_heads, head_dim):
    """(layers, 2, kv_heads, n, head_dim)"""
    return table.view(len(table), layers, 2, kv_heads, head_dim).permute(1, 2, 3, 0, 4)


def split(answer):
    """Check a function (table, config) -> [(keys, values), ...], each (kv_heads, n, head_dim)."""
    layers, kv_heads, n, head_dim = 3, 2, 5, 6
    table = _table(_LLAMA, kv_heads, head_dim, n)
    before = table.clone()
    try:
        got = answer(table.requires_grad_(), _LLAMA)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise Mistake(
            f"An error: {str(error).splitlines()[0]}. Here 4 query heads share 2 heads of keys "
            "and values, of 6 numbers each, in 3 layers: which of these numbers make up a row?"
        ) from error
    if not hasattr(got, "__len__"):
        raise Mistake(f"Return a list; this is a {type(got).__name__}.")
    if len(got) != layers or any(len(pair) != 2 for pair in got):
        raise Mistake(f"Return a pair (keys, values) for each of the {layers} layers.")
    kinds = {type(part).__name__ for pair in got for part in pair if not torch.is_tensor(part)}
    if kinds:
        raise Mistake(f"Keys and values must be tensors of torch; one is a {kinds.pop()}.")
    if table.shape != before.shape or not torch.equal(table, before):
        raise Mistake("The table that was passed in has been changed.")
    shapes = {tuple(part.shape) for pair in got for part in pair}
    if shapes == {(n, kv_heads, head_dim)} or shapes == {(kv_heads, head_dim, n)}:
        raise Mistake(
            f"The parts have the shape {shapes.pop()}: the axes are right and their order is not."
        )
    if any(shape[0] == 4 for shape in shapes):
        raise Mistake("The parts have 4 heads. How many heads of keys and values are there?")
    if shapes == {(1, kv_heads, n, head_dim)}:
        raise Mistake("The parts have a batch dimension. The prefix is the same for every row.")
    if shapes != {(kv_heads, n, head_dim)}:
        raise Mistake(f"The parts have the shapes {sorted(shapes)}, not (kv_heads, n, head_dim).")
    got = _stacked(got)
    _right_numbers(got.detach(), before, layers, kv_heads, n, head_dim)
    if got.requires_grad:
        got.sum().backward()
    if table.grad is None:
        raise Mistake("No gradient reaches the table: the parts were detached from it.")
    if not torch.equal(table.grad, torch.ones_like(table)):
        cut = _parts(table.grad, layers, kv_heads, head_dim).sum((0, 2, 3, 4)) == 0
        which = "keys" if cut[0] else "values" if cut[1] else "parts"
        raise Mistake(f"The gradient of some {which} does not reach the table.")
    if not torch.equal(_stacked(answer(before, _LLAMA)), got):
        raise Mistake("A second call with the same table gives something else.")
    if not follows_the_device(answer, before, _LLAMA):
        raise Mistake("The parts are on the CPU, whatever the device of the table is.")
    if _stacked(answer(before.bfloat16(), _LLAMA)).dtype != torch.bfloat16:
        raise Mistake("From a table in bfloat16 come parts of another type.")
    for name, (config, kv_heads, head_dim) in _CONFIGS.items():
        for n in (1, 2):
            table, settings = _table(config, kv_heads, head_dim, n), config.to_dict()
            try:
                got = answer(table, config)
            except AttributeError as error:
                raise Mistake(f"With a configuration of {name}: {error}.") from error
            except RuntimeError:
                got = []  # sizes that do not fit
            if config.to_dict() != settings:
                raise Mistake(f"Your function changed the configuration of {name}.")
            right = _parts(table, config.num_hidden_layers, kv_heads, head_dim)
            if not torch.equal(_stacked(got), right):
                raise Mistake(
                    f"For {name} with {config.num_hidden_layers} layers of {kv_heads} key heads of "
                    f"{head_dim}, and n = {n}, the parts are wrong."
                )


def _stacked(pairs):
    """(layers, 2, kv_heads, n, head_dim), of parts that fit together; else an empty tensor."""
    if len({part.shape for pair in pairs for part in pair}) != 1:
        return torch.empty(0)
    return torch.stack([torch.stack(tuple(pair)) for pair in pairs])


def _right_numbers(got, flat, layers, kv_heads, n, head_dim):
    right = _parts(flat, layers, kv_heads, head_dim)
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
    if torch.equal(got, flat.view(n, layers, kv_heads, 2, head_dim).permute(1, 3, 2, 0, 4)):
        raise Mistake(
            "This takes keys and values of head 0 first, then those of head 1. In a row, the keys "
            "of all heads of a layer come before its values."
        )
    if torch.equal(got, flat.view(n, layers, 2, head_dim, kv_heads).permute(1, 2, 4, 0, 3)):
        raise Mistake("The numbers of one head stand side by side in a row, not every second one.")
    if torch.equal(got, right.flip(0)):
        raise Mistake("The layers come in reverse order.")
    if torch.equal(got, right[:1].expand_as(right)):
        raise Mistake("Every layer has the keys and values of layer 0.")
    if not torch.equal(got, right):
        raise Mistake("The numbers do not stand where they should.")


def lengthen(answer):
    """Check a function (mask, n) -> mask (batch, n + seq) and positions (batch, seq)."""
    first = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    _right_lengthening(answer, first, 3)
    second = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 0]])
    for mask, n in ((first[:1], 3), (first, 1), (second, 1), (second, 2), (second[1:], 7)):
        try:
            _right_lengthening(answer, mask, n)
        except NotImplementedError:
            raise
        except (RuntimeError, IndexError, ValueError, Mistake) as error:
            said = str(error) if isinstance(error, Mistake) else in_one_line(error)
            raise Mistake(
                f"With 3 virtual tokens the answer is right, but for {mask.tolist()} and n = {n}: "
                f"{said}"
            ) from error
    if not follows_the_device(answer, first, 3):
        raise Mistake("Your function makes its tensors on the CPU, whatever the mask's device is.")


def _right_lengthening(answer, mask, n):
    batch, seq = mask.shape
    given = mask.clone()
    got = answer(mask, n)
    if not torch.equal(mask, given):
        raise Mistake("The mask that was passed in has been changed.")
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise Mistake("Return two things, the mask and the positions.")
    if not all(isinstance(each, torch.Tensor) for each in got):
        raise Mistake(
            f"Return tensors of torch, not {' and '.join(type(x).__name__ for x in got)}."
        )
    longer, positions = got
    if longer.shape == mask.shape:
        raise Mistake(f"The mask still has {seq} columns, but {n + seq} positions are seen.")
    if longer.shape != (batch, n + seq):
        raise Mistake(f"The mask has the shape {tuple(longer.shape)}, not {(batch, n + seq)}.")
    if longer.is_floating_point():
        raise Mistake("The mask has become floating-point; it should keep the type it had.")
    if longer.dtype != torch.int64:
        raise Mistake(f"The mask came in as int64 and comes out as {longer.dtype}.")
    ones, zeros = torch.ones_like(longer[:, :n]), torch.zeros_like(longer[:, :n])
    right = torch.cat([ones, mask], 1)
    if torch.equal(longer, torch.cat([zeros, mask], 1)):
        raise Mistake("The mask hides the prefix: its columns are 0.")
    if torch.equal(longer, torch.cat([mask, ones], 1)) and not torch.equal(longer, right):
        raise Mistake(
            "The new columns of the mask stand after those of the text. Where in the cache is "
            "the prefix?"
        )
    if torch.equal(longer, torch.ones_like(longer)) and not mask.all():
        raise Mistake("All of the mask is 1, so the padding in the text is seen.")
    if not torch.equal(longer, right):
        raise Mistake("The mask is not that of a prefix and the text after it.")
    if positions.shape == (batch, n + seq):
        raise Mistake(
            "There is a position for each virtual token too. The call has the tokens of the text "
            "only; the prefix is in the cache already."
        )
    if positions.shape != (batch, seq):
        raise Mistake(f"The positions have the shape {tuple(positions.shape)}, not {(batch, seq)}.")
    if positions.dtype != torch.int64:
        raise Mistake(
            f"The positions are {positions.dtype}. They pick rows of a table in many models, so "
            "they must be int64."
        )
    _right_positions(mask, n, positions)


def _right_positions(mask, n, positions):
    seq, real = mask.shape[1], mask.bool()
    for row, tokens in zip(positions, real, strict=True):
        begin, padding = row[tokens][0].item(), tokens.int().argmax().item()
        if begin == n:
            continue
        if begin == n + padding:
            raise Mistake(
                f"{padding} columns of padding on the left move the tokens up by {padding} "
                "positions. Padding should change nothing."
            )
        if begin == 0:
            raise Mistake(
                f"The first token of the text is at position 0, as if nothing stood before it. {n} "
                "virtual tokens do."
            )
        if begin == n + 1:
            raise Mistake(f"The first token is at {n + 1}, one too far: positions count from 0.")
        raise Mistake(f"The first token of a row is at position {begin} instead of {n}.")
    wanted = n - 1 + mask.cumsum(-1)
    if not torch.equal(positions[real], wanted[real]):
        row = (positions != wanted).logical_and(real).any(1).int().argmax()
        raise Mistake(
            f"The tokens of a row are at the positions {positions[row][real[row]].tolist()}, which "
            f"do not count on from {n}."
        )
    if positions.min() < 0 or positions.max() >= n + seq:
        raise Mistake(
            "A position at padding is outside the range, which a table of learned positions would "
            "answer with an error."
        )


def projection(answer):
    """Check a class (n, layers, width, hidden) whose forward() gives (n, layers * 2 * width)."""
    for sizes in ((3, 3, 4, 6), (2, 3, 5, 4), (1, 1, 3, 7)):
        torch.manual_seed(0)
        try:
            module = answer(*sizes)
            _right_module(module, *sizes)
            _right_table(module, *sizes)
        except Mistake as error:
            if sizes == (3, 3, 4, 6):
                raise
            names = "(n, layers, width, hidden)"
            raise Mistake(f"For {names} = {sizes}, but not for (3, 3, 4, 6): {error}") from error
    module, used = answer(3, 3, 4, 6).to("meta"), []
    module.embedding.register_forward_pre_hook(lambda _, args: used.append(args[0].device.type))
    module()
    if "cpu" in used:
        raise Mistake("forward looks rows up with ids on the CPU, wherever the module is.")


def _right_module(module, n, layers, width, hidden):
    for name, kind in (("embedding", nn.Embedding), ("first", nn.Linear), ("second", nn.Linear)):
        if not isinstance(getattr(module, name, None), kind):
            raise Mistake(f"The module needs an attribute {name}, an nn.{kind.__name__}.")
    if tuple(module.embedding.weight.shape) != (n, width):
        raise Mistake(
            f"The embedding has the shape {tuple(module.embedding.weight.shape)}. It is not yet "
            f"the table; it has {width} numbers for each of {n} virtual tokens."
        )
    gives, row = module.second.out_features, layers * 2 * width
    if gives != row:
        known = {
            row // 2: "The second layer gives keys or values for each layer; there are both.",
            2 * width: "The second layer gives keys and values of one layer; a row holds all.",
            n * row: "The second layer gives the whole table. It should give one row of it.",
        }
        other = f"The second layer gives {gives} numbers; a row of the table has {row}."
        raise Mistake(known.get(gives, other))
    if module.first.out_features != hidden or module.second.in_features != hidden:
        raise Mistake("Between the two layers there should be `hidden` numbers.")
    if module.first.bias is None or module.second.bias is None:
        raise Mistake("A linear layer has no bias.")
    names = {"embedding.weight", "first.weight", "first.bias", "second.weight", "second.bias"}
    more = [name for name, _ in module.named_parameters() if name not in names]
    if more:
        raise Mistake(f"There is a parameter that the task does not name: {more[0]}.")
    fixed = [name for name, p in module.named_parameters() if not p.requires_grad]
    if fixed:
        raise Mistake(f"{fixed[0]} is frozen. Everything in the projection is trained.")


def _right_table(module, n, layers, width, hidden):
    try:
        table = module()
    except TypeError as error:
        if "positional argument" in str(error):
            raise Mistake(f"forward should need no argument: {error}") from error
        raise
    if tuple(table.shape) != (n, layers * 2 * width):
        raise Mistake(
            f"forward gives the shape {tuple(table.shape)}, not {(n, layers * 2 * width)}."
        )
    old = table.detach()
    for p in module.parameters():  # whatever the module started from
        nn.init.normal_(p)
    table, rows = module(), module.embedding.weight
    if torch.allclose(table, old):
        raise Mistake("After a training step forward still gives the old table.")
    if torch.allclose(table, module.second(module.first(rows)), atol=1e-6):
        raise Mistake(
            "Nothing stands between the two layers, so they are one linear layer written as two."
        )
    if torch.allclose(table, module.second(module.first(rows)).tanh(), atol=1e-6):
        raise Mistake(
            "The tanh comes last. It would keep all keys and values between -1 and 1, which those "
            "of real tokens are not."
        )
    for other in (nn.ReLU(), nn.Sigmoid(), nn.GELU()):
        if torch.allclose(table, module.second(other(module.first(rows))), atol=1e-6):
            raise Mistake(f"That is a {type(other).__name__} between the two layers, not a tanh.")
    if torch.allclose(table, module.second(module.first(rows.tanh()).tanh()), atol=1e-6):
        raise Mistake("There is a second tanh, on the embedding.")
    if not torch.allclose(table, module.second(module.first(rows).tanh()), atol=1e-6):
        raise Mistake("forward is not second(tanh(first(embedding))).")
    if table.requires_grad:
        table.square().sum().backward()
    missing = [name for name, p in module.named_parameters() if p.grad is None]
    if missing:
        raise Mistake(f"No gradient arrives at {missing[0]}.")


def fold(answer, module_class):
    """Check a function (projection) -> a parameter with its table; also takes the class."""
    for sizes in ((3, 3, 4, 6), (1, 3, 5, 2)):
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(0)
            _right_fold(answer, module_class(*sizes).to(dtype))


def _right_fold(answer, module):
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module().sum().backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters()}
    table = module().detach().clone()
    folded = answer(module)
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        raise Mistake("After your fold, gradients are switched off everywhere.")
    if isinstance(folded, torch.Tensor) and folded.grad_fn is not None:
        raise Mistake(
            "The result still hangs on the graph of the projection, so the projection cannot be "
            "dropped."
        )
    if not isinstance(folded, nn.Parameter):
        raise Mistake(f"Return an nn.Parameter; this is a {type(folded).__name__}.")
    if folded.shape == module.embedding.weight.shape:
        raise Mistake("That is the embedding, which goes in; the table is what comes out.")
    if folded.dtype != table.dtype:
        raise Mistake(f"The table was {table.dtype} and has become {folded.dtype}.")
    if folded.shape != table.shape or not torch.allclose(folded, table, atol=1e-6):
        raise Mistake("The result is not the table that the projection gives.")
    if not folded.requires_grad:
        raise Mistake("The result cannot be trained on: it does not require grad.")
    after = module.state_dict()
    if set(before) - set(after):
        raise Mistake(f"Folding took {min(set(before) - set(after))} from the projection.")
    if set(after) - set(before):
        raise Mistake(f"Folding left {min(set(after) - set(before))} in the projection.")
    if not all(torch.equal(before[name], value) for name, value in after.items()):
        raise Mistake("Folding has changed the projection.")
    if not all(p.requires_grad for p in module.parameters()):
        raise Mistake("Folding has frozen the projection.")
    if not module.training:
        raise Mistake("Folding has left the projection in eval mode.")
    for name, p in module.named_parameters():
        if p.grad is None or not torch.equal(p.grad, grads[name]):
            raise Mistake(f"Folding has changed the gradient that {name} had.")
    with torch.no_grad():
        module.second.bias += 1
    if not torch.equal(folded, table):
        raise Mistake("When the projection is trained on, the folded table changes too.")
    if not torch.equal(answer(module), module()):
        raise Mistake("A second fold, after a training step, gives the old table.")


def count(answer):
    """Check a function (config, n, hidden=None) -> number of trainables."""
    n, layers, kv_heads, head_dim = 7, 3, 2, 6
    width, row = kv_heads * head_dim, 2 * layers * kv_heads * head_dim
    got = answer(_LLAMA, n)
    if isinstance(got, float):
        raise Mistake(f"The count is a float, {got}. Parameters are counted in whole numbers.")
    wide = {4 * head_dim, 32}  # of all query heads, or the hidden size
    if got == n * row // 2:
        raise Mistake("Without projection, keys or values are counted; there are both.")
    if got == n * row // layers:
        raise Mistake("Only one layer is counted: every layer has a prefix of its own.")
    if got == row:
        raise Mistake("One virtual token is counted, not all 7.")
    if got in {n * 2 * layers * each for each in wide}:
        raise Mistake(
            "That is right for a model whose heads all have keys of their own. Here 4 query heads "
            "share 2."
        )
    if got == n * 2 * layers * kv_heads * 8:
        raise Mistake("This config has a head_dim of its own: 6, not hidden_size // heads.")
    if got != n * row:
        raise Mistake(f"{got} is not the size of the table of 7 virtual tokens without projection.")
    _right_projected(answer(_LLAMA, n, 10), n, width, row, 10, wide)
    bloom = BloomConfig(vocab_size=46145, hidden_size=2048, n_layer=24, n_head=16)
    try:
        pair = answer(bloom, 10), answer(bloom, 10, 2048)
    except AttributeError as error:
        raise Mistake(f"With a configuration of Bloom: {error}.") from error
    if pair != (983_040, 205_641_728):
        raise Mistake(f"For Bloom-1b4-zh this gives {pair[0]:,} and {pair[1]:,}, which is not so.")
    for name, (config, kv_heads, head_dim) in {**_CONFIGS, "Llama": (_LLAMA, 2, 6)}.items():
        width = kv_heads * head_dim
        row = 2 * config.num_hidden_layers * width
        for n, hidden in ((4, None), (4, 3), (9, 1)):
            right = n * row if hidden is None else _projected(n, width, row, hidden)
            got = answer(config, n, hidden)
            if got != right or isinstance(got, float):
                raise Mistake(
                    f"For {name} with {config.num_hidden_layers} layers of {kv_heads} key heads of "
                    f"{head_dim}, n = {n} and hidden = {hidden} this gives {got}."
                )


def _projected(n, width, row, hidden):
    return n * width + (width + 1) * hidden + (hidden + 1) * row


def _right_projected(got, n, width, row, hidden, wide):
    embedding, first, second = n * width, (width + 1) * hidden, (hidden + 1) * row
    if got == n * row:
        raise Mistake("With a projection the same is counted as without one.")
    if got == n * row + first + second:
        raise Mistake(
            "With a projection the table is not a parameter: it is computed from the embedding."
        )
    if got == first + second:
        raise Mistake("The embedding of the projection is trained too.")
    if got == embedding + width * hidden + hidden * row:
        raise Mistake("The biases of the two linear layers are left out.")
    if got in {embedding + first + second * n, embedding + (first + second) * n}:
        raise Mistake("The second layer is one for all virtual tokens, not one for each.")
    if got in {_projected(n, each, row, hidden) for each in wide}:
        raise Mistake(
            f"The rows of the embedding have kv_heads * head_dim = {width} numbers, fewer than the "
            "hidden size here."
        )
    if got != embedding + first + second:
        raise Mistake(f"{got} is not the size of embedding, first and second layer.")
