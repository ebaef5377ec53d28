"""Right answers to exercise 08, written in other ways: (check, source of the answer)."""

RIGHT = [
    # torch's own attention, with a boolean mask.
    ("prefix_attention", """
from torch.nn.functional import scaled_dot_product_attention

def prefix_attention(q, k, v, prefix_k, prefix_v, mask):
    rows, _, seq, _ = q.shape
    n = prefix_k.shape[1]
    keys = torch.cat((prefix_k[None].repeat(rows, 1, 1, 1), k), dim=-2)
    values = torch.cat((prefix_v[None].repeat(rows, 1, 1, 1), v), dim=-2)
    whole = torch.nn.functional.pad(mask, (n, 0), value=1).bool()
    order = torch.arange(n + seq, device=q.device)
    allowed = order[None, :] <= order[n:, None]
    allowed = allowed[None, None] & whole[:, None, None, :]
    return scaled_dot_product_attention(q, keys, values, attn_mask=allowed, enable_gqa=True)
"""),
    # One head of one token at a time.
    ("prefix_attention", """
def prefix_attention(q, k, v, prefix_k, prefix_v, mask):
    shared = q.shape[1] // k.shape[1]
    rows = []
    for i in range(q.shape[0]):
        heads = []
        for h in range(q.shape[1]):
            tokens = []
            for t in range(q.shape[2]):
                seen = [s for s in range(t + 1) if mask[i, s] == 1]
                keys = torch.cat([prefix_k[h // shared], k[i, h // shared][seen]])
                values = torch.cat([prefix_v[h // shared], v[i, h // shared][seen]])
                weights = torch.softmax(keys @ q[i, h, t] / q.shape[3] ** 0.5, 0)
                tokens.append(weights @ values)
            heads.append(torch.stack(tokens))
        rows.append(torch.stack(heads))
    return torch.stack(rows)
"""),
    # Two blocks of scores, a mask that is added, einsum over groups of heads.
    ("prefix_attention", """
import math

def prefix_attention(q, k, v, prefix_k, prefix_v, mask):
    b, h, s, d = q.shape
    g = k.shape[1]
    n = prefix_k.shape[1]
    q = q.reshape(b, g, h // g, s, d)
    of_prefix = torch.einsum("bgrsd,gnd->bgrsn", q, prefix_k)
    of_text = torch.einsum("bgrsd,bgtd->bgrst", q, k)
    hidden = torch.triu(torch.ones_like(of_text, dtype=torch.bool), 1)
    hidden = hidden | mask.eq(0)[:, None, None, None]
    bias = torch.zeros_like(of_text).masked_fill(hidden, torch.finfo(q.dtype).min / 2)
    weights = torch.cat([of_prefix / math.sqrt(d), of_text / math.sqrt(d) + bias], -1).softmax(-1)
    out = torch.einsum("bgrsn,gnd->bgrsd", weights[..., :n], prefix_v)
    out = out + torch.einsum("bgrst,bgtd->bgrsd", weights[..., n:], v)
    return out.flatten(1, 2)
"""),
    ("split", """
def split(table, config):
    kv = config.num_attention_heads
    if hasattr(config, "num_key_value_heads"):
        kv = config.num_key_value_heads
    size = config.hidden_size // config.num_attention_heads
    if hasattr(config, "head_dim"):
        size = config.head_dim
    answer, column = [], 0
    for _ in range(config.num_hidden_layers):
        pair = []
        for _ in range(2):
            heads = []
            for _ in range(kv):
                heads.append(table[:, column : column + size])
                column += size
            pair.append(torch.stack(heads))
        answer.append(pair)
    return answer
"""),
    ("split", """
def split(table, config):
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    chunks = table.chunk(2 * config.num_hidden_layers, dim=1)
    parts = [c.reshape(len(table), kv_heads, -1).transpose(0, 1) for c in chunks]
    return list(zip(parts[::2], parts[1::2]))
"""),
    ("lengthen", """
def lengthen(mask, n):
    longer = torch.nn.functional.pad(mask, (n, 0), value=1)
    positions = n + mask.cumsum(1) - mask
    return longer, positions
"""),
    # As transformers does it: padding is at position 1.
    ("lengthen", """
def lengthen(mask, n):
    rows, seq = mask.shape
    ones = torch.ones((rows, n), dtype=mask.dtype, device=mask.device)
    longer = torch.hstack([ones, mask])
    positions = longer.long().cumsum(-1) - 1
    positions.masked_fill_(longer == 0, 1)
    return longer, positions[:, -seq:]
"""),
    ("lengthen", """
def lengthen(mask, n):
    longer, positions = [], []
    for row in mask.tolist():
        longer.append([1] * n + row)
        count, places = n, []
        for real in row:
            places.append(count if real else 0)
            count += real
        positions.append(places)
    return torch.tensor(longer).to(mask.device), torch.tensor(positions).to(mask.device)
"""),
    ("projection", """
class Projection(torch.nn.Module):
    def __init__(self, n, layers, width, hidden):
        super().__init__()
        self.second = torch.nn.Linear(hidden, 2 * width * layers)
        self.first = torch.nn.Linear(width, hidden)
        self.embedding = torch.nn.Embedding(num_embeddings=n, embedding_dim=width)
        torch.nn.init.normal_(self.embedding.weight, std=0.02)
        self.activation = torch.nn.Tanh()
        self.register_buffer("ids", torch.arange(n), persistent=False)

    def forward(self):
        x = self.first(self.embedding(self.ids))
        return self.second(self.activation(x))
"""),
    ("projection", """
class Projection(nn.Module):
    def __init__(self, n, layers, width, hidden):
        super().__init__()
        self.n = n
        self.embedding = nn.Embedding(n, width)
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, layers * 2 * width)

    def forward(self):
        ids = torch.arange(self.n, device=self.first.weight.device)
        return torch.stack([self.second(self.first(self.embedding(i)).tanh()) for i in ids])
"""),
    ("fold", """
def fold(projection):
    return nn.Parameter(projection().detach().clone(), requires_grad=True)
"""),
    ("fold", """
import copy

def fold(projection):
    table = copy.deepcopy(projection)()
    folded = nn.Parameter(torch.empty_like(table))
    folded.data.copy_(table)
    return folded
"""),
    ("count", """
def count(config, n, hidden=None):
    kv_heads = config.num_attention_heads
    if "num_key_value_heads" in config.to_dict():
        kv_heads = config.num_key_value_heads
    size = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    total = 0
    for _ in range(config.num_hidden_layers):
        for _ in ("keys", "values"):
            for _ in range(kv_heads):
                total += size if hidden else n * size
    if hidden:
        total = total * hidden + total
        total += kv_heads * size * (n + hidden) + hidden
    return total
"""),
    ("count", """
def count(config, n, hidden=None):
    with torch.device("meta"):
        kv = getattr(config, "num_key_value_heads", config.num_attention_heads)
        kv = kv * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        if hidden is None:
            return nn.Embedding(n, 2 * kv * config.num_hidden_layers).weight.numel()
        module = Projection(n, config.num_hidden_layers, kv, hidden)
    return sum(p.numel() for p in module.parameters())
"""),
]  # fmt: skip
