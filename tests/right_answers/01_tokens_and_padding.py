"""Right answers to exercise 01, written in other ways: (check, source of the answer)."""

RIGHT = [
    # As transformers does it: padding is at position 1.
    ("position_ids", """
def position_ids(attention_mask):
    places = attention_mask.long().cumsum(-1) - 1
    if attention_mask.shape[1] > 1:
        places.masked_fill_(attention_mask == 0, 1)
    return places
"""),
    ("position_ids", """
def position_ids(attention_mask):
    out = []
    for row in attention_mask.tolist():
        count, places = 0, []
        for real in row:
            places.append(count if real == 1 else 0)
            count += real
        out.append(places)
    return torch.tensor(out, dtype=torch.long, device=attention_mask.device)
"""),
    # Columns minus the column where the row begins.
    ("position_ids", """
def position_ids(attention_mask):
    columns = torch.arange(attention_mask.size(1), device=attention_mask.device)
    begin = attention_mask.argmax(dim=1, keepdim=True)
    return torch.relu(columns[None] - begin)
"""),
    ("pad_batch", """
from torch.nn.utils.rnn import pad_sequence

def pad_batch(rows, pad_token_id, side):
    if side != "left" and side != "right":
        raise ValueError("left or right")
    def padded(lists, value):
        return pad_sequence([torch.tensor(x) for x in lists], True, value, padding_side=side)
    ids = padded(rows, pad_token_id)
    return dict(attention_mask=padded([[1 for _ in row] for row in rows], 0), input_ids=ids)
"""),
    ("pad_batch", """
def pad_batch(rows, pad_token_id, side):
    seq = max([len(row) for row in rows])
    ids = torch.full((len(rows), seq), pad_token_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), seq), dtype=torch.int64)
    for i, row in enumerate(rows):
        match side:
            case "left":
                columns = slice(seq - len(row), None)
            case "right":
                columns = slice(0, len(row))
            case _:
                raise ValueError(side)
        ids[i, columns] = torch.tensor(row)
        mask[i, columns] = 1
    return {"input_ids": ids, "attention_mask": mask, "lengths": mask.sum(1)}
"""),
    ("last_logits", """
def last_logits(logits, attention_mask):
    return logits[torch.arange(logits.shape[0]), attention_mask.argmin(-1) - 1]
"""),
    ("last_logits", """
def last_logits(logits, attention_mask):
    rows = []
    for scores, mask in zip(logits, attention_mask, strict=True):
        rows.append(scores[mask.nonzero()[-1, 0]])
    return torch.stack(rows)
"""),
    ("last_logits", """
def last_logits(logits, attention_mask):
    last = attention_mask.cumsum(1).argmax(1)
    index = last[:, None, None].expand(-1, 1, logits.shape[2])
    return logits.gather(1, index).squeeze(1)
"""),
    ("padded_share", """
def padded_share(lengths, batch_size, grouped):
    order = list(lengths)
    if grouped:
        order.sort()
    padding = everything = 0
    while order:
        batch = [order.pop(0) for _ in range(min(batch_size, len(order)))]
        longest = max(batch)
        for length in batch:
            padding += longest - length
            everything += longest
    return padding / everything
"""),
    ("padded_share", """
def padded_share(lengths, batch_size, grouped):
    x = torch.tensor(lengths)
    if grouped:
        x = x.sort().values
    widths = torch.cat([part.max().expand(len(part)) for part in x.split(batch_size)])
    return 1 - x.sum() / widths.sum()
"""),
]  # fmt: skip
