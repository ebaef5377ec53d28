"""Right answers to exercise 07, written in other ways: (check, source of the answer)."""

RIGHT = [
    ("encoder", """
class Encoder(nn.Module):
    def __init__(self, n, hidden, width):
        super().__init__()
        both = width * 2
        self.mlp = nn.Sequential(nn.Linear(both, both), nn.ReLU(), nn.Linear(both, hidden))
        self.lstm = nn.LSTM(hidden, width, 2, bidirectional=True)
        self.embedding = nn.Embedding(n, hidden)
        self.register_buffer("ids", torch.arange(n), persistent=False)

    def forward(self):
        states = self.lstm(self.embedding(self.ids).unsqueeze(1))[0].squeeze(1)
        return torch.stack([self.mlp(state) for state in states])
"""),
    ("count", """
def count(n, hidden, width):
    total = n * hidden
    for size in (hidden, width + width):
        for _ in range(2):
            for _ in range(4):
                total += width * size + width * width + width + width
    total += (2 * width + 1) * 2 * width + (2 * width + 1) * hidden
    return total, n * hidden
"""),
    ("fold", """
def fold(encoder):
    other = copy.deepcopy(encoder).eval()
    vectors = other().detach()
    table = nn.Embedding(*vectors.shape, dtype=vectors.dtype, device=vectors.device)
    table.weight.data.copy_(vectors)
    return table
"""),
    ("fill", """
def fill(input_ids, vectors, embedding, placeholder_id):
    rows = []
    for ids in input_ids:
        places = [j for j, token in enumerate(ids.tolist()) if token == placeholder_id]
        if len(places) != len(vectors):
            raise ValueError("wrong number of placeholders")
        safe = ids.clone()
        safe[places] = 0
        words = embedding(safe).clone()
        words[places] = vectors.to(words.dtype)
        rows.append(words)
    return torch.stack(rows)
"""),
    ("build", """
def build(parts, answer_ids, placeholder_id):
    ids, labels = [], []
    for part in parts:
        for token in part if isinstance(part, list) else [placeholder_id] * part:
            ids.append(token)
            labels.append(-100)
    for token in answer_ids:
        ids.append(token)
        labels.append(token)
    return dict(labels=labels, input_ids=ids, attention_mask=[1 for _ in ids])
"""),
    ("moved", """
def moved(module, i, target, lr):
    other = copy.deepcopy(module)
    with torch.no_grad():
        before = module().clone()
    optimizer = torch.optim.SGD(other.parameters(), lr=lr)
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(other()[i], target, reduction="sum").backward()
    optimizer.step()
    return (other().detach() - before).pow(2).sum(1).sqrt()
"""),
]  # fmt: skip
