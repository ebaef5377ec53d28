"""Right answers to exercise 15, written in other ways: (check, source)."""

RIGHT = [
    (
        "chat_row",
        """
def chat_row(turns, encode, role_ids, end_id):
    pieces = []
    for role, text in turns:
        pieces.append((role_ids[role], False))
        for token in encode(text):
            pieces.append((token, role == "assistant"))
        pieces.append((end_id, role == "assistant"))
    return [i for i, _ in pieces], [i if mine else -100 for i, mine in pieces]
""",
    ),
    (
        "ring_all_reduce",
        """
import torch

def ring_all_reduce(vectors):
    N = len(vectors)
    held = torch.stack(vectors).view(N, N, -1).clone()  # (rank, chunk, size)
    ranks = torch.arange(N)
    sent = torch.zeros(N, dtype=torch.long)
    for phase in (0, 1):
        for step in range(N - 1):
            chunk = (ranks + phase - step) % N
            moving = held[ranks, chunk]
            right = (ranks + 1) % N
            held[right, chunk] = moving + (0 if phase else held[right, chunk])
            sent += held.shape[-1]
    return list(held.reshape(N, -1)), sent.tolist()
""",
    ),
    (
        "pack",
        """
import torch

def pack(rows):
    lengths = [len(ids) for ids, _ in rows]
    blocks = [torch.ones(n, n).tril() for n in lengths]
    mask = torch.block_diag(*blocks).bool()
    labels = torch.cat([torch.tensor(labels) for _, labels in rows])
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    labels[starts] = -100
    positions = torch.arange(sum(lengths)) - starts.repeat_interleave(torch.tensor(lengths))
    ids = torch.cat([torch.tensor(ids) for ids, _ in rows])
    return ids[None], labels[None], positions[None], mask.expand(1, 1, -1, -1)
""",
    ),
    (
        "pack",
        """
import torch

def pack(rows):
    texts = [torch.full((len(ids),), k) for k, (ids, _) in enumerate(rows)]
    text = torch.cat(texts)
    labels = []
    for ids, row in rows:
        labels += row if not labels else [-100, *row[1:]]
    order = torch.arange(len(text))
    mask = (text[:, None] == text) & (order[:, None] >= order)
    positions = torch.cat([torch.arange(len(t)) for t in texts])
    ids = torch.tensor(sum((ids for ids, _ in rows), []))
    return ids[None], torch.tensor(labels)[None], positions[None], mask[None, None]
""",
    ),
]
