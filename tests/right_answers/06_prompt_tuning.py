"""Right answers to exercise 06, written in other ways: (check, source of the answer)."""

RIGHT = [
    (
        "extend_labels",
        """
def extend_labels(labels, n):
    rows = []
    for row in labels:
        front = torch.tensor([-100] * n, device=labels.device, dtype=labels.dtype)
        rows.append(torch.cat((front, row)))
    return torch.stack(rows)
""",
    ),
    (
        "extend_labels",
        """
def extend_labels(labels, n):
    batch, seq = labels.shape
    longer = torch.empty(batch, n + seq, dtype=torch.long, device=labels.device).fill_(-100)
    longer[:, n:] = labels
    return longer
""",
    ),
    (
        "extend_mask",
        """
def extend_mask(attention_mask, n):
    return pad(attention_mask, (n, 0), value=1)
""",
    ),
    (
        "extend_mask",
        """
def extend_mask(attention_mask, n):
    rows = [[1] * n + row for row in attention_mask.tolist()]
    return torch.tensor(rows, dtype=attention_mask.dtype, device=attention_mask.device)
""",
    ),
    (
        "start_rows",
        """
def start_rows(model, tokenizer, n):
    chance = torch.ones(len(tokenizer))
    chance[tokenizer.all_special_ids] = 0
    ids = torch.multinomial(chance, n, replacement=True)
    with torch.no_grad():
        return model.get_input_embeddings()(ids.to(model.device)).to(torch.float32)
""",
    ),
    (
        "start_rows",
        """
def start_rows(model, tokenizer, n):
    allowed = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    order = torch.randperm(len(allowed))[:n].tolist()
    table = model.get_input_embeddings().weight.data
    return torch.stack([table[allowed[i]].to(torch.float32).clone() for i in order])
""",
    ),
    (
        "positions",
        """
def positions(attention_mask):
    counted = torch.cumsum(attention_mask.int(), dim=1).to(torch.int64) - 1
    return counted.masked_fill(attention_mask == 0, 1)
""",
    ),
    (
        "positions",
        """
def positions(attention_mask):
    numbers = []
    for row in attention_mask.tolist():
        seen, line = 0, []
        for real in row:
            line.append(seen if real else 0)
            seen += int(real)
        numbers.append(line)
    return torch.tensor(numbers, device=attention_mask.device)
""",
    ),
    (
        "greedy",
        """
@torch.no_grad()
def greedy(model, prompt, input_ids, attention_mask, steps):
    embed = model.get_input_embeddings()
    batch, n = len(input_ids), len(prompt)
    mask = pad(attention_mask, (n, 0), value=1)
    front = prompt.to(model.dtype)[None].repeat(batch, 1, 1)
    place = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(inputs_embeds=torch.cat((front, embed(input_ids)), dim=1), attention_mask=mask,
                position_ids=place, use_cache=True)
    last = place[:, -1:]
    written = torch.empty(batch, 0, dtype=torch.long, device=input_ids.device)
    while True:
        token = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        written = torch.cat((written, token), dim=1)
        if written.shape[1] == steps:
            return written
        last = last + 1
        mask = pad(mask, (0, 1), value=1)
        out = model(input_ids=token, attention_mask=mask, position_ids=last,
                    past_key_values=out.past_key_values, use_cache=True)
""",
    ),
    (
        "greedy",
        """
@torch.no_grad()
def greedy(model, prompt, input_ids, attention_mask, steps):
    words = model.get_input_embeddings()(input_ids)
    front = prompt.to(words).expand(len(words), *prompt.shape)
    return model.generate(
        inputs_embeds=torch.cat([front, words], 1),
        attention_mask=pad(attention_mask, (len(prompt), 0), value=1),
        max_new_tokens=steps, do_sample=False, use_cache=True, eos_token_id=-1, pad_token_id=0,
    )
""",
    ),
    (
        "prompt_tuned",
        """
class PromptTuned(nn.Module):
    def __init__(self, model, prompt):
        super().__init__()
        self.model = model
        for p in self.model.parameters():
            p.requires_grad = False
        start = prompt.detach().clone()
        if start.dtype != torch.float64:
            start = start.float()
        self.prompt = nn.Parameter(start)

    def forward(self, input_ids, attention_mask, labels=None):
        batch, seq = input_ids.shape
        words = self.model.get_input_embeddings()(input_ids)
        front = torch.stack([self.prompt] * batch).to(self.model.dtype)
        mask = pad(attention_mask, (len(self.prompt), 0), value=1)
        more = {}
        if labels is not None:
            more["labels"] = pad(labels, (len(self.prompt), 0), value=-100)
        out = self.model(inputs_embeds=torch.cat((front, words), dim=1), attention_mask=mask,
                         position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **more)
        out["logits"] = out["logits"][:, -seq:, :]
        return out
""",
    ),
]
