"""Wrong answers to exercise 08: (check, source of the answer, part of the message expected)."""

from edits import edited

_ATTENTION = """
import torch

def prefix_attention(q, k, v, prefix_k, prefix_v, mask):
    batch, heads, seq, head_dim = q.shape
    kv_heads, n, _ = prefix_k.shape
    k = torch.cat([prefix_k.expand(batch, -1, -1, -1), k], 2)
    v = torch.cat([prefix_v.expand(batch, -1, -1, -1), v], 2)
    k = k.repeat_interleave(heads // kv_heads, 1)
    v = v.repeat_interleave(heads // kv_heads, 1)
    text = torch.ones(seq, seq).tril().bool() & mask.bool()[:, None, None, :]
    seen = torch.cat([text.new_ones(batch, 1, seq, n), text], 3)
    scores = q @ k.mT / head_dim**0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v
"""

_SPLIT = """
def split(table, config):
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    parts = table.view(len(table), config.num_hidden_layers, 2, kv_heads, head_dim)
    parts = parts.permute(1, 2, 3, 0, 4)
    return [(layer[0], layer[1]) for layer in parts]
"""

_LENGTHEN = """
import torch

def lengthen(mask, n):
    mask = torch.cat([mask.new_ones(len(mask), n), mask], 1)
    positions = mask.cumsum(-1) - 1
    return mask, positions[:, n:]
"""

_PROJECTION = """
import torch
from torch import nn

class Projection(nn.Module):
    def __init__(self, n, layers, width, hidden):
        super().__init__()
        self.embedding = nn.Embedding(n, width)
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, layers * 2 * width)

    def forward(self):
        return self.second(torch.tanh(self.first(self.embedding.weight)))
"""

_COUNT = """
def count(config, n, hidden=None):
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = kv_heads * head_dim
    row = config.num_hidden_layers * 2 * width
    if hidden is None:
        return n * row
    return n * width + (width + 1) * hidden + (hidden + 1) * row
"""


def _edit(source, *texts):
    return edited(source, *zip(texts[::2], texts[1::2], strict=True))


def _fold(body):
    return f"import torch\nfrom torch import nn\n\ndef fold(projection):\n    {body}\n"


PUT_K = "torch.cat([prefix_k.expand(batch, -1, -1, -1), k], 2)"
PUT_V = "torch.cat([prefix_v.expand(batch, -1, -1, -1), v], 2)"
END_K = "torch.cat([k, prefix_k.expand(batch, -1, -1, -1)], 2)"
END_V = "torch.cat([v, prefix_v.expand(batch, -1, -1, -1)], 2)"
SEEN = "torch.cat([text.new_ones(batch, 1, seq, n), text], 3)"
SOFTMAX = "scores.softmax(-1) @ v"
APART = "scores[..., :n].softmax(-1) @ v[:, :, :n] + scores[..., n:].softmax(-1) @ v[:, :, n:]"
MASK = "torch.cat([mask.new_ones(len(mask), n), mask], 1)"
DIVIDED = "scores = q @ k.mT / head_dim**0.5"
HIDDEN_SCORES = "scores = scores.masked_fill(~seen, -torch.inf)"
REPEAT = ".repeat_interleave(heads // kv_heads, 1)"
TABLE = "self.second(torch.tanh(self.first(self.embedding.weight)))"
BOTH = "n * width + (width + 1) * hidden + (hidden + 1) * row"
NO_KV_HEADS = 'getattr(config, "num_key_value_heads", None) or heads'
NO_HEAD_DIM = 'getattr(config, "head_dim", None) or config.hidden_size // heads'
VIEW = "table.view(len(table), config.num_hidden_layers, 2, kv_heads, head_dim)"
PERMUTED = "parts = parts.permute(1, 2, 3, 0, 4)"

WRONG = [
    # The whole square is causal, counted from its upper left corner, as is_causal=True does.
    (
        "prefix_attention",
        _edit(
            _ATTENTION,
            SEEN,
            "torch.ones(seq, n + seq).tril().bool() & "
            "torch.cat([mask.new_ones(batch, n), mask], 1).bool()[:, None, None, :]",
        ),
        "never in the future",
    ),
    (
        "prefix_attention",
        _edit(_ATTENTION, PUT_K, END_K, PUT_V, END_V),
        "in the order of the keys",
    ),
    ("prefix_attention", _edit(_ATTENTION, "seen = " + SEEN, "seen = text"), "An error"),
    (
        "prefix_attention",
        _edit(_ATTENTION, "text.new_ones(", "text.new_zeros("),
        "No token sees the prefix",
    ),
    ("prefix_attention", _edit(_ATTENTION, " / head_dim**0.5", ""), "are not divided"),
    ("prefix_attention", _edit(_ATTENTION, "head_dim**0.5", "head_dim"), "not by its square root"),
    (
        "prefix_attention",
        _edit(_ATTENTION, ".repeat_interleave(heads // kv_heads, 1)",
              ".repeat(1, heads // kv_heads, 1, 1)"),
        "stand side by side",
    ),
    ("prefix_attention", _edit(_ATTENTION, SOFTMAX, APART), "a softmax each"),
    (
        "prefix_attention",
        _edit(_ATTENTION, "prefix_k.expand", "prefix_v .expand", "prefix_v.expand",
              "prefix_k.expand"),
        "prefix are swapped",
    ),
    (
        "prefix_attention",
        _edit(_ATTENTION, " & mask.bool()[:, None, None, :]",
              ".logical_and(torch.ones(batch, 1, 1, seq))"),
        "Padding is seen",
    ),
    (
        "prefix_attention",
        _edit(_ATTENTION, "    scores = q",
              "    q = torch.cat([q.new_zeros(batch, heads, n, head_dim), q], 2)\n"
              "    seen = torch.cat([seen.new_ones(batch, 1, n, n + seq), seen], 2)\n"
              "    scores = q"),
        "no queries",
    ),
    ("prefix_attention", _edit(_ATTENTION, ".tril()", ".tril(-1)"), "does not see itself"),
    (
        "prefix_attention",
        _edit(_ATTENTION, SOFTMAX,
              "torch.cat([scores[..., :n] * 0, scores[..., n:]], 3).softmax(-1) @ v"),
        "have no say",
    ),
    ("split", _edit(_SPLIT, NO_KV_HEADS, "heads"), "which of these numbers make up a row"),
    (
        "split",
        _edit(_SPLIT, NO_KV_HEADS, "heads", "kv_heads, head_dim)", "kv_heads, -1)"),
        "The parts have 4 heads",
    ),
    ("split", _edit(_SPLIT, PERMUTED, "parts = parts.permute(1, 2, 0, 3, 4)"), "their order is"),
    (
        "split",
        _edit(_SPLIT, VIEW, "table.view(config.num_hidden_layers, 2, kv_heads, -1, head_dim)",
              PERMUTED, ""),
        "virtual tokens are mixed",
    ),
    ("split", _edit(_SPLIT, "(layer[0], layer[1])", "(layer[1], layer[0])"), "values are swapped"),
    (
        "split",
        _edit(_SPLIT, "config.num_hidden_layers, 2,", "2, config.num_hidden_layers,",
              "(1, 2, 3, 0, 4)", "(2, 1, 3, 0, 4)"),
        "keys of all layers first",
    ),
    (
        "split",
        _edit(_SPLIT, "kv_heads, head_dim)", "head_dim, kv_heads)", "(1, 2, 3, 0, 4)",
              "(1, 2, 4, 0, 3)"),
        "not every second one",
    ),
    ("split", _edit(_SPLIT, "in parts]", "in parts.flip(0)]"), "reverse order"),
    ("split", _edit(_SPLIT, VIEW, VIEW.replace("table", "table.detach()", 1)), "No gradient"),
    ("split", _edit(_SPLIT, NO_KV_HEADS, "config.num_key_value_heads"), "a configuration of GPT-2"),
    ("split", _edit(_SPLIT, "in parts]", "in parts[:1]]"), "for each of the 3 layers"),
    ("lengthen", _edit(_LENGTHEN, "return mask, positions[:, n:]",
                       "return mask, positions[:, n:] - n"), "at position 0"),
    ("lengthen", _edit(_LENGTHEN, "mask.cumsum(-1) - 1", "mask.cumsum(-1)"), "one too far"),
    (
        "lengthen",
        _edit(_LENGTHEN, "mask.cumsum(-1) - 1", "torch.arange(mask.shape[1]).expand_as(mask)"),
        "columns of padding on the left",
    ),
    ("lengthen", _edit(_LENGTHEN, "positions[:, n:]", "positions"), "for each virtual token too"),
    ("lengthen", _edit(_LENGTHEN, "mask.new_ones(", "torch.ones("), "floating-point"),
    ("lengthen", _edit(_LENGTHEN, "mask.new_ones(", "mask.new_zeros("), "hides the prefix"),
    (
        "lengthen",
        _edit(_LENGTHEN, MASK, "torch.cat([mask, mask.new_ones(len(mask), n)], 1)"),
        "after those of the text",
    ),
    (
        "lengthen",
        _edit(_LENGTHEN, f"mask = {MASK}\n    positions = mask", "positions = n + mask",
              "positions[:, n:]", "positions"),
        "still has 5 columns",
    ),
    (
        "lengthen",
        _edit(_LENGTHEN, "positions[:, n:]", "positions[:, n:].masked_fill(mask[:, n:] == 0, -1)"),
        "outside the range",
    ),
    (
        "projection",
        _edit(_PROJECTION, "torch.tanh(self.first(self.embedding.weight))",
              "self.first(self.embedding.weight)"),
        "one linear layer written as two",
    ),
    (
        "projection",
        _edit(_PROJECTION, "self.second(torch.tanh(self.first(self.embedding.weight)))",
              "torch.tanh(self.second(self.first(self.embedding.weight)))"),
        "The tanh comes last",
    ),
    ("projection", _edit(_PROJECTION, "torch.tanh", "torch.relu"), "That is a ReLU"),
    ("projection", _edit(_PROJECTION, "layers * 2 * width", "layers * width"), "there are both"),
    (
        "projection",
        _edit(_PROJECTION, "nn.Embedding(n, width)", "nn.Embedding(n, layers * 2 * width)",
              "nn.Linear(width, hidden)", "nn.Linear(layers * 2 * width, hidden)"),
        "It is not yet the table",
    ),
    (
        "projection",
        _edit(_PROJECTION, "self.embedding.weight)", "self.embedding.weight.detach())"),
        "arrives at embedding.weight",
    ),
    (
        "projection",
        _edit(_PROJECTION, "nn.Linear(width, hidden)", "nn.Linear(width, hidden, bias=False)"),
        "has no bias",
    ),
    ("fold", _fold("return projection()"), "hangs on the graph"),
    ("fold", _fold("return projection().detach()"), "Return an nn.Parameter"),
    ("fold", _fold("return projection.embedding.weight"), "That is the embedding"),
    (
        "fold",
        _fold("return nn.Parameter(projection().detach(), requires_grad=False)"),
        "does not require grad",
    ),
    (
        "fold",
        _fold("projection.requires_grad_(False)\n    return nn.Parameter(projection())"),
        "has frozen the projection",
    ),
    (
        "fold",
        _fold("return nn.Parameter(projection.first(projection.embedding.weight).detach())"),
        "not the table that the projection gives",
    ),
    ("count", _edit(_COUNT, "num_hidden_layers * 2 *", "num_hidden_layers *"), "keys or values"),
    ("count", _edit(_COUNT, "config.num_hidden_layers * 2", "2"), "Only one layer"),
    ("count", _edit(_COUNT, NO_KV_HEADS, "heads"), "4 query heads share 2"),
    ("count", _edit(_COUNT, NO_HEAD_DIM, "config.hidden_size // heads"), "a head_dim of its own"),
    ("count", _edit(_COUNT, "if hidden is None:", "if True:"), "the same is counted"),
    ("count", _edit(_COUNT, "n * width +", "n * row +"), "the table is not a parameter"),
    ("count", _edit(_COUNT, "n * width + ", ""), "The embedding of the projection"),
    ("count", _edit(_COUNT, BOTH, "n * width + width * hidden + hidden * row"), "The biases"),
    ("count", _edit(_COUNT, "(hidden + 1) * row", "(hidden + 1) * row * n"), "not one for each"),
    (
        "count",
        _edit(_COUNT, NO_KV_HEADS, "config.num_key_value_heads"),
        "a configuration of Bloom",
    ),
    # Attention: the mask.
    ("prefix_attention", _edit(_ATTENTION, "-torch.inf", "0"), "exp(0) = 1"),
    ("prefix_attention", _edit(_ATTENTION, HIDDEN_SCORES, "", SOFTMAX,
                               "(scores.softmax(-1) * seen) @ v"), "after the softmax"),
    ("prefix_attention", _edit(_ATTENTION, HIDDEN_SCORES, "scores = scores + seen"),
     "was added to the scores"),
    ("prefix_attention", _edit(_ATTENTION, "mask.bool()", "(mask == 0)"), "wrong way around"),
    ("prefix_attention", _edit(_ATTENTION, "    batch,", "    mask -= 1\n    batch,",
                               "mask.bool()", "(mask == 0)"), "changed the mask"),
    # Attention: the scores.
    ("prefix_attention", _edit(_ATTENTION, SOFTMAX, "scores.softmax(-2) @ v"), "tokens that ask"),
    ("prefix_attention", _edit(_ATTENTION, "head_dim**0.5", "(heads * head_dim) ** 0.5"),
     "root of heads * head_dim"),
    ("prefix_attention", _edit(_ATTENTION, DIVIDED, "q /= head_dim**0.5\n    scores = q @ k.mT"),
     "changed the q"),
    # Attention: sizes of the visible check.
    ("prefix_attention", _edit(_ATTENTION, REPEAT, ".repeat_interleave(2, 1)"), "with heads = 6"),
    ("prefix_attention", _edit(_ATTENTION, "seq, n), text", "seq, 3), text"), "with n = 1"),
    ("prefix_attention", _edit(_ATTENTION, "head_dim**0.5", "8**0.5"), "with head_dim = 3"),
    ("prefix_attention", _edit(_ATTENTION, "torch.ones(seq, seq)", "torch.ones(5, 5)"),
     "with seq = 7"),
    ("prefix_attention", _edit(_ATTENTION, "new_ones(batch,", "new_ones(3,"), "with batch = 2"),
    # Attention: gradients, devices and dtypes.
    ("prefix_attention", _edit(_ATTENTION, "prefix_k.expand", "prefix_k.detach().expand"),
     "reaches prefix_k"),
    ("prefix_attention", _edit(_ATTENTION, "prefix_v.expand", "prefix_v.data.expand"),
     "reaches prefix_v"),
    ("prefix_attention", _edit(_ATTENTION, "def ", "@torch.no_grad()\ndef "), "reaches q"),
    ("prefix_attention", _ATTENTION, "a tensor on the CPU"),
    ("prefix_attention", _edit(_ATTENTION, "torch.ones(seq, seq)",
                               "torch.ones(seq, seq, device=q.device)", "-torch.inf", "-1e9"),
     "In float16 there is an error"),
    ("prefix_attention", _edit(_ATTENTION, "torch.ones(seq, seq)",
                               "torch.ones(seq, seq, device=q.device)", SOFTMAX,
                               "scores.float().softmax(-1) @ v.float()"),
     "an output of torch.float32"),
    # The split.
    ("split", _edit(_SPLIT, "num_hidden_layers, 2, kv_heads,", "num_hidden_layers, kv_heads, 2,",
                    "(1, 2, 3, 0, 4)", "(1, 3, 2, 0, 4)"), "keys and values of head 0 first"),
    ("split", _edit(_SPLIT, "[(layer[0]", "[(parts[0][0]", "layer[1])", "parts[0][1])"),
     "Every layer has"),
    ("split", _edit(_SPLIT, "(layer[0], layer[1])", "(layer[0].detach().numpy(), layer[1])"),
     "one is a ndarray"),
    ("split", _edit(_SPLIT, "[(layer[0], layer[1]) for layer in parts]",
                    "((layer[0], layer[1]) for layer in parts)"), "this is a generator"),
    ("split", _edit(_SPLIT, "(layer[0], layer[1])", "(layer[0][None], layer[1][None])"),
     "have a batch dimension"),
    ("split", _edit(_SPLIT, "(layer[0], layer[1])", "(layer[0], layer[1].data)"),
     "gradient of some values"),
    ("split", _edit(_SPLIT, "parts.permute(1, 2, 3, 0, 4)", "parts.permute(1, 2, 3, 0, 4).float()"),
     "a table in bfloat16"),
    ("split", _edit(_SPLIT, "    parts = parts.permute",
                    "    import torch\n    parts = torch.zeros(parts.shape).copy_(parts).permute"),
     "The parts are on the CPU"),
    ("split", _edit(_SPLIT, "table, config)", "table, config, pairs=[])", "return [",
                    "pairs += [", "in parts]", "in parts]\n    return pairs"), "A second call"),
    ("split", _edit(_SPLIT, "config.num_hidden_layers, 2", "3, 2"), "with 2 layers of 3 key heads"),
    ("split", _edit(_SPLIT, f"parts = {VIEW}",
                    f"table.data = {VIEW}.data\n    parts = table"), "table that was passed in"),
    ("split", _edit(_SPLIT, "    head_dim =", "    if not hasattr(config, 'head_dim'):\n"
                    "        config.head_dim = config.hidden_size // heads\n    head_dim ="),
     "changed the configuration"),
    # Mask and positions.
    ("lengthen", _edit(_LENGTHEN, "len(mask), n)", "len(mask), 3)", "[:, n:]", "[:, 3:]"),
     "n = 1: The mask has the shape"),
    ("lengthen", _edit(_LENGTHEN, "[:, n:]", "[:, 3:]"), "n = 1: The positions have the shape"),
    ("lengthen", _edit(_LENGTHEN, "return mask,", "return mask.bool(),"), "out as torch.bool"),
    ("lengthen", _edit(_LENGTHEN, "positions[:, n:]", "positions[:, n:].float()"),
     "positions are torch.float32"),
    ("lengthen", _edit(_LENGTHEN, "return mask,", "return torch.ones_like(mask),"),
     "the padding in the text is seen"),
    ("lengthen", _edit(_LENGTHEN, "mask.new_ones(len(mask), n)",
                       "torch.ones(len(mask), n, dtype=torch.int64)"), "tensors on the CPU"),
    ("lengthen", _edit(_LENGTHEN, "return mask, positions[:, n:]", "return positions[:, n:]"),
     "Return two things"),
    ("lengthen", _edit(_LENGTHEN, "    mask =", "    last = mask.cumsum_(1)\n    mask ="),
     "mask that was passed in"),
    ("lengthen", _edit(_LENGTHEN, "positions[:, n:]", "positions[:, n:].numpy()"),
     "not Tensor and ndarray"),
    ("lengthen", _edit(_LENGTHEN, "positions[:, n:]", "(positions[:, n:] * 2 - n)"),
     "do not count on from 3"),
    # The projection.
    ("projection", _edit(_PROJECTION, "torch.tanh", "nn.functional.gelu"), "That is a GELU"),
    ("projection", _edit(_PROJECTION, "forward(self)", "forward(self, ids)",
                         "self.embedding.weight", "self.embedding(ids)"), "need no argument"),
    ("projection", _edit(_PROJECTION, "self.embedding.weight",
                         "self.embedding(torch.arange(self.embedding.num_embeddings))"),
     "ids on the CPU"),
    ("projection", _edit(_PROJECTION, "super().__init__()",
                         "super().__init__()\n        self.norm = nn.LayerNorm(width)"),
     "the task does not name: norm.weight"),
    ("projection", _edit(_PROJECTION, "layers * 2 * width", "n * layers * 2 * width"),
     "gives the whole table"),
    ("projection", _edit(_PROJECTION, "layers * 2 * width", "2 * width"), "values of one layer"),
    ("projection", _edit(_PROJECTION, "self.first(self.embedding.weight)",
                         "self.first(torch.tanh(self.embedding.weight))"), "a second tanh"),
    ("projection", _edit(_PROJECTION, "    def forward(self):\n        return " + TABLE,
                         "        self.table = " + TABLE
                         + "\n\n    def forward(self):\n        return self.table"),
     "still gives the old table"),
    ("projection", _edit(_PROJECTION, "nn.Embedding(n, width)",
                         "nn.Embedding.from_pretrained(torch.randn(n, width))"),
     "embedding.weight is frozen"),
    ("projection", _edit(_PROJECTION, "nn.Linear(width, hidden)", "nn.Linear(width, 6)",
                         "nn.Linear(hidden,", "nn.Linear(6,"),
     "For (n, layers, width, hidden) = (2, 3, 5, 4)"),
    ("projection", _edit(_PROJECTION, "return " + TABLE, f"return {TABLE}.unflatten(1, (-1, 4))"),
     "forward gives the shape"),
    # The fold.
    ("fold", _fold("projection.eval()\n    return nn.Parameter(projection())"), "in eval mode"),
    ("fold", _fold("torch.set_grad_enabled(False)\n    return nn.Parameter(projection())"),
     "switched off everywhere"),
    ("fold", _fold("return nn.Parameter(projection().float())"), "has become torch.float32"),
    ("fold", _fold("table = nn.Parameter(projection())\n    del projection.first\n"
                   "    return table"),
     "took first.bias"),
    ("fold", _fold("projection.table = nn.Parameter(projection())\n    return projection.table"),
     "Folding left table"),
    ("fold", _fold("projection.zero_grad()\n    return nn.Parameter(projection())"),
     "changed the gradient"),
    ("fold", _fold("if not hasattr(projection, 'folded'):\n"
                   "        projection.folded = (projection().detach(),)\n"
                   "    return nn.Parameter(projection.folded[0])"), "A second fold"),
    # The count.
    ("count", _edit(_COUNT, "config.hidden_size //", "config.hidden_size /", "n * row",
                    "n * row * 1.0"), "The count is a float"),
    ("count", _edit(_COUNT, "return n * row", "return row"), "One virtual token"),
    ("count", _edit(_COUNT, BOTH, BOTH.replace("width", "config.hidden_size")),
     "The rows of the embedding"),
    ("count", _edit(_COUNT, "config.num_hidden_layers", "3"),
     "For Bloom-1b4-zh"),
    ("count", _edit(_COUNT, 'getattr(config, "num_key_value_heads", None) or heads',
                    'getattr(config, "num_key_value_heads", 16)'), "For GPT-2"),
]  # fmt: skip
