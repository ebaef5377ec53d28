"""Right answers to exercise 02, written in other ways: (check, source of the answer)."""

RIGHT = [
    ("encode_pair", """
def encode_pair(tokenizer, prompt, answer):
    ids = list(tokenizer.encode(prompt))
    labels = [-100 for _ in ids]
    for token in tokenizer.encode(answer, add_special_tokens=False):
        ids.append(token)
        labels.append(token)
    ids.append(tokenizer.eos_token_id)
    labels.append(tokenizer.eos_token_id)
    return {"labels": labels, "input_ids": ids}
"""),
    # The end as a text, and a mask over the whole row.
    ("encode_pair", """
def encode_pair(tokenizer, prompt, answer):
    n = len(tokenizer(prompt).input_ids)
    ids = tokenizer(prompt).input_ids
    ids = ids + tokenizer(answer + tokenizer.eos_token, add_special_tokens=False).input_ids
    labels = ids.copy()
    labels[:n] = [-100] * n
    return dict(input_ids=ids, labels=labels, prompt=prompt)
"""),
    ("shorten", """
def shorten(row, max_length):
    ids, labels = list(row["input_ids"]), list(row["labels"])
    while len(ids) > max_length:
        if labels[1] != -100:
            raise ValueError("the next token is the first target")
        ids.pop(0)
        labels.pop(0)
    return {"input_ids": ids, "labels": labels}
"""),
    ("shorten", """
def shorten(row, max_length):
    n = len(row["labels"])
    if n <= max_length:
        return row
    start = n - max_length
    if any(label != -100 for label in row["labels"][: start + 1]):
        raise ValueError("too short")
    return {name: values[-max_length:] for name, values in row.items()}
"""),
    ("collate", """
from torch.nn.utils.rnn import pad_sequence

def collate(rows, pad_token_id):
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [torch.tensor(row["labels"]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
"""),
    ("collate", """
def collate(rows, pad_token_id):
    shape = (len(rows), max(len(row["labels"]) for row in rows))
    batch = {"input_ids": torch.full(shape, pad_token_id), "labels": torch.full(shape, -100)}
    lengths = torch.tensor([len(row["labels"]) for row in rows])
    for i, row in enumerate(rows):
        for name in batch:
            batch[name][i, : lengths[i]] = torch.tensor(row[name])
    batch["attention_mask"] = (torch.arange(shape[1]) < lengths[:, None]).long()
    return batch
"""),
    # As transformers does it: in float32, with labels that are padded and shifted.
    ("answer_loss", """
def answer_loss(logits, labels):
    labels = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    if bool((labels == -100).all()):
        raise ValueError("no target")
    return cross_entropy(logits.float().transpose(1, 2), labels)
"""),
    ("encode_pair", """
def encode_pair(tokenizer, prompt, answer):
    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    front = encode(prompt)
    if tokenizer(prompt)["input_ids"][:1] == [tokenizer.bos_token_id]:
        front = [tokenizer.bos_token_id] + front
    back = encode(answer) + [tokenizer.eos_token_id]
    return {"input_ids": front + back, "labels": [-100] * len(front) + back}
"""),
    ("encode_pair", """
def encode_pair(tokenizer, prompt, answer):
    front, back = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
    if back[0] == tokenizer.bos_token_id:
        back = back[1:]
    back = back + [tokenizer.eos_token_id]
    return {"input_ids": front + back, "labels": [-100] * len(front) + back}
"""),
    ("answer_loss", """
def answer_loss(logits, labels):
    losses = []
    for scores, wanted in zip(logits, labels, strict=True):
        for t in range(len(wanted) - 1):
            if wanted[t + 1] != -100:
                losses.append(scores[t].logsumexp(0) - scores[t, wanted[t + 1]])
    if len(losses) == 0:
        raise ValueError("no target")
    return sum(losses) / len(losses)
"""),
    ("answer_loss", """
def answer_loss(logits, labels):
    shifted = labels[:, 1:]
    targets = shifted != -100
    if targets.sum() == 0:
        raise ValueError("no target")
    log_probs = logits[:, :-1].log_softmax(-1)[targets]
    return -log_probs.gather(1, shifted[targets][:, None]).mean()
"""),
]  # fmt: skip
