"""Wrong answers to exercise 15: (check, source of the answer, part of the message expected)."""

_CHAT = """
def chat_row(turns, encode, role_ids, end_id):
    ids, labels = [], []
    for role, text in turns:
        said = [*encode(text), end_id]
        ids += [role_ids[role], *said]
        labels += [-100, *(said if role == "assistant" else [-100] * len(said))]
    return ids, labels
"""

_RING = """
import torch

def ring_all_reduce(vectors):
    N = len(vectors)
    chunks = [list(vector.clone().chunk(N)) for vector in vectors]
    sent = [0] * N
    for step in range(2 * (N - 1)):
        out = [(rank - step) % N for rank in range(N)]
        flying = [chunks[rank][out[rank]].clone() for rank in range(N)]
        for rank in range(N):
            right = (rank + 1) % N
            if step < N - 1:
                chunks[right][out[rank]] += flying[rank]
            else:
                chunks[right][out[rank]] = flying[rank]
            sent[rank] += len(flying[rank])
    return [torch.cat(mine) for mine in chunks], sent
"""


_PACK = """
import torch

def pack(rows):
    ids = torch.tensor([[i for row, _ in rows for i in row]])
    labels = torch.tensor([[i for _, row in rows for i in [-100, *row[1:]]]])
    positions = torch.cat([torch.arange(len(row)) for row, _ in rows])[None]
    text = torch.cat([torch.full((len(row),), k) for k, (row, _) in enumerate(rows)])
    mask = (text[:, None] == text) & torch.ones(len(text), len(text)).tril().bool()
    return ids, labels, positions, mask[None, None]
"""


def _edit(source, old, new):
    assert source.count(old) == 1, old
    return source.replace(old, new)


_LABELS = 'labels += [-100, *(said if role == "assistant" else [-100] * len(said))]'
_MASKED = "[-100] * (len(said) + 1)"


def _labels(end):
    """A turn's labels, with this label for its end."""
    return f"""text = said[:-1] if role == "assistant" else [-100] * (len(said) - 1)
        labels += [-100, *text, {end}]"""


WRONG = [
    ("chat_row", _edit(_CHAT, _LABELS, "labels += [-100, *said]"), "the user's too"),
    (
        "chat_row",
        _edit(_CHAT, _LABELS, "labels += [role_ids[role], *said]"),
        "every id is a target",
    ),
    (
        "chat_row",
        _edit(_CHAT, _LABELS, f"labels = [-100] * (len(ids) - len(said)) + said"),  # noqa: F541
        "Only the last turn",
    ),
    (
        "chat_row",
        _edit(
            _CHAT,
            _LABELS,
            _labels("-100"),
        ),
        "never learns to stop",
    ),
    (
        "chat_row",
        _edit(
            _CHAT,
            _LABELS,
            f'labels += [role_ids[role], *said] if role == "assistant" else {_MASKED}',
        ),
        "the program writes it",
    ),
    (
        "chat_row",
        _edit(
            _CHAT,
            _LABELS,
            _labels("end_id"),
        ),
        "those of the other roles should not be",
    ),
    (
        "chat_row",
        _edit(_CHAT, 'role == "assistant"', 'role != "assistant"'),
        "the other way around",
    ),
    (
        "chat_row",
        _edit(_CHAT, "return ids, labels", "return ids, labels[1:] + [-100]"),
        "off by one",
    ),
    (
        "chat_row",
        _edit(_CHAT, "return ids, labels", "return ids, [max(label, 0) for label in labels]"),
        "has the label 0",
    ),
    (
        "chat_row",
        _edit(_CHAT, "said = [*encode(text), end_id]", "said = encode(text)"),
        "do not end",
    ),
    (
        "chat_row",
        _edit(_CHAT, "return ids, labels", "return ids[:-1], labels[:-1]"),
        "The last turn does not end",
    ),
    ("chat_row", _edit(_CHAT, "ids += [role_ids[role], *said]", "ids += said"), "says whose it is"),
    (
        "chat_row",
        _edit(
            _CHAT,
            "return ids, labels",
            "import torch\n    return torch.tensor(ids), torch.tensor(labels)",
        ),
        "Return lists",
    ),
    # What the assistant says is looked for in the whole row, so the user's same words count too.
    (
        "chat_row",
        _CHAT
        + """
def chat_row(turns, encode, role_ids, end_id):
    ids, mine = [], set()
    for role, text in turns:
        ids += [role_ids[role], *encode(text), end_id]
        mine |= set(encode(text)) if role == "assistant" else set()
    labels = [i if i in mine or i == end_id else -100 for i in ids]
    return ids, labels
""",
        "More ends of turns",
    ),
    ("ring_all_reduce", _edit(_RING, "vector.clone()", "vector"), "have been changed"),
    (
        "ring_all_reduce",
        _edit(_RING, "torch.cat(mine) for", "torch.cat(mine) / N for"),
        "The results are means",
    ),
    (
        "ring_all_reduce",
        _edit(_RING, "for step in range(2 * (N - 1))", "for step in range(N - 1)"),
        "the all-gather is missing",
    ),
    (
        "ring_all_reduce",
        _edit(_RING, "chunks[right][out[rank]] = flying", "chunks[right][out[rank]] += flying"),
        "something is added twice",
    ),
    (
        "ring_all_reduce",
        _edit(_RING, "+= flying[rank]\n", "+= 0 * flying[rank]\n"),
        "chunks end as",
    ),
    (
        "ring_all_reduce",
        "def ring_all_reduce(vs):\n    return [v.clone() for v in vs], [0] * len(vs)",
        "nothing was added",
    ),
    (
        "ring_all_reduce",
        _edit(_RING, "sent[rank] += len(flying[rank])", "sent[rank] += 1"),
        "or rounds",
    ),
    (
        "ring_all_reduce",
        _edit(_RING, "+= len(flying[rank])", "+= flying[rank].nbytes"),
        "These are bytes",
    ),
    (
        "ring_all_reduce",
        _edit(_RING, "sent[rank] +=", "sent[rank] += 0 if step < N - 1 else"),
        "Only one half",
    ),
    (
        "ring_all_reduce",
        _edit(_RING, "+= len(flying[rank])", "+= len(vectors[0])"),
        "not the whole vector",
    ),
    # Everything goes to rank 0 and back: right sums, and one rank carries the traffic.
    (
        "ring_all_reduce",
        """
def ring_all_reduce(vectors):
    N, n = len(vectors), len(vectors[0])
    return [sum(vectors).clone() for _ in vectors], [(N - 1) * n] + [n] * (N - 1)
""",
        "sends equally much",
    ),
    (
        "ring_all_reduce",
        """
def ring_all_reduce(vectors):
    total, N = sum(v.clone() for v in vectors), len(vectors)
    return [total] * N, [2 * (N - 1) * len(total) // N] * N
""",
        "share one tensor",
    ),
    (
        "ring_all_reduce",
        _RING
        + "\n_ring = ring_all_reduce\n\ndef ring_all_reduce(vectors):\n"
        + "    return _ring(vectors)[0]\n",
        "Return two lists",
    ),
    (
        "ring_all_reduce",
        _RING.replace("range(N)", "range(3)").replace("% N", "% 3"),
        "end in IndexError",
    ),
    ("pack", _edit(_PACK, "[-100, *row[1:]]", "row"), "the first of the next"),
    ("pack", _edit(_PACK, "[-100, *row[1:]]", "[*row[:-1], -100]"), "predicted from inside"),
    ("pack", _edit(_PACK, "[-100, *row[1:]]", "[*row[1:], -100]"), "shifted already"),
    (
        "pack",
        _edit(
            _PACK,
            "    positions =",
            "    labels = ids.clone()\n    labels[0, 0] = -100\n    positions =",
        ),
        "they were",
    ),
    (
        "pack",
        _edit(
            _edit(_PACK, "[-100, *row[1:]]", "row"),
            "    positions =",
            "    labels[0, 0] = -100\n    positions =",
        ),
        "the later texts have one too",
    ),
    (
        "pack",
        _edit(
            _PACK,
            "torch.cat([torch.arange(len(row)) for row, _ in rows])",
            "torch.arange(ids.numel())",
        ),
        "run on over the texts",
    ),
    ("pack", _edit(_PACK, "torch.arange(len(row))", "1 + torch.arange(len(row))"), "begin at 1"),
    (
        "pack",
        _edit(_PACK, "return ids, labels, positions,", "return ids, labels, text[None],"),
        "count inside",
    ),
    ("pack", _edit(_PACK, "(text[:, None] == text) & ", ""), "the texts before its own"),
    (
        "pack",
        _edit(_PACK, " & torch.ones(len(text), len(text)).tril().bool()", ""),
        "after it in its text",
    ),
    ("pack", _edit(_PACK, "mask[None, None]", "~mask[None, None]"), "inverted"),
    ("pack", _edit(_PACK, "mask[None, None]", "mask.T[None, None]"), "transposed"),
    ("pack", _edit(_PACK, ".tril()", ".tril(-1)"), "does not see itself"),
    ("pack", _edit(_PACK, "mask[None, None]", "mask[None, None].float()"), "not boolean"),
    ("pack", _edit(_PACK, "mask[None, None]", "mask[None]"), "not (1, 1,"),
    ("pack", _edit(_PACK, "return ids, labels", "return ids[0], labels"), "The ids have the shape"),
    (
        "pack",
        _edit(
            _PACK,
            "    positions =",
            "    rows[0][1][0] = -100\n    rows[1][1][0] = -100\n    positions =",
        ),
        "rows that were passed in",
    ),
    # Two equal texts, taken for one.
    (
        "pack",
        _edit(
            _PACK,
            "torch.full((len(row),), k) for k, (row, _) in enumerate(rows)",
            "torch.full((len(pair[0]),), rows.index(pair)) for pair in rows",
        ),
        "equal are taken for one",
    ),
    ("chat_row", _edit(_CHAT, "return ids, labels", "return tuple(ids), labels"), "two lists, not"),
    # What is a target is guessed from the ids.
    (
        "chat_row",
        """
def chat_row(turns, encode, role_ids, end_id):
    ids, labels, on = [], [], False
    for role, text in turns:
        ids += [role_ids[role], *encode(text), end_id]
    for i in ids:
        labels.append(i if on else -100)
        if i == role_ids["assistant"]:
            on = True
        if i == end_id:
            on = False
    return ids, labels
""",
        "cannot be looked for in the ids",
    ),
]
