"""Wrong answers to exercise 07: (check, source of the answer, part of the message expected)."""


def _from(source):
    def changed(old, new):
        assert old in source, old
        return source.replace(old, new)

    return changed


_encoder = _from("""
class Encoder(nn.Module):
    def __init__(self, n, hidden, width):
        super().__init__()
        self.embedding = nn.Embedding(n, hidden)
        self.lstm = nn.LSTM(hidden, width, num_layers=2, bidirectional=True, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, hidden)
        )

    def forward(self):
        states, (last, _) = self.lstm(self.embedding.weight[None])
        return self.mlp(states)[0]
""")
_count = _from("""
def count(n, hidden, width):
    lstm = sum(2 * (4 * width * (d + width) + 8 * width) for d in (hidden, 2 * width))
    mlp = 2 * width * 2 * width + 2 * width + 2 * width * hidden + hidden
    return n * hidden + lstm + mlp, n * hidden
""")
_fold = _from("""
def fold(encoder):
    was_training = encoder.training
    encoder.eval()
    vectors = encoder().detach().clone()
    encoder.train(was_training)
    return nn.Embedding.from_pretrained(vectors, freeze=False)
""")
_fill = _from("""
def fill(input_ids, vectors, embedding, placeholder_id):
    holes = input_ids == placeholder_id
    if (holes.sum(1) != len(vectors)).any():
        raise ValueError("count")
    words = embedding(input_ids.masked_fill(holes, 0))
    return words.masked_scatter(
        holes[..., None], vectors.to(words.dtype).repeat(len(input_ids), 1)
    )
""")
_build = _from("""
def build(parts, answer_ids, placeholder_id):
    prompt = []
    for part in parts:
        prompt += [placeholder_id] * part if isinstance(part, int) else part
    ids = prompt + answer_ids
    mask = [1] * len(ids)
    labels = [-100] * len(prompt) + answer_ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
""")
_moved = _from("""
def moved(module, i, target, lr):
    module = copy.deepcopy(module)
    before = module().detach().clone()
    ((module()[i] - target) ** 2).sum().backward()
    with torch.no_grad():
        for p in module.parameters():
            p -= lr * p.grad
        return (module() - before).norm(dim=-1)
""")
_BY_HAND = """
def fill(input_ids, vectors, embedding, placeholder_id):
    holes = input_ids == placeholder_id
    if (holes.sum(1) != len(vectors)).any():
        raise ValueError("count")
    words = embedding(input_ids.masked_fill(holes, 0)).clone()
    for row in range(len(input_ids)):
        {}
    return words
"""

WRONG = [
    # Task 1
    ("encoder", _encoder("nn.Embedding(n, hidden)", "nn.Parameter(torch.randn(n, hidden))"),
     "attribute embedding is missing or is not an nn.Embedding"),
    ("encoder", _encoder("nn.Embedding(n, hidden)", "nn.Embedding(hidden, n)"),
     "the embedding has the shape (6, 5)"),
    ("encoder", _encoder("bidirectional=True", "bidirectional=False")
     .replace("nn.Linear(2 * width", "nn.Linear(width"), "from left to right only"),
    ("encoder", _encoder("num_layers=2, ", ""), "has 1 layer instead of two"),
    ("encoder", _encoder("nn.LSTM(hidden, width", "nn.LSTM(hidden, width // 2"),
     "the state of the LSTM has 2 numbers"),
    ("encoder", _encoder("nn.ReLU(), ", ""), "and is Linear, Linear"),
    ("encoder", _encoder("nn.ReLU()", "nn.Tanh()"), "and is Linear, Tanh, Linear"),
    ("encoder", _encoder("nn.Linear(2 * width, 2 * width)", "nn.Linear(width, 2 * width)"),
     "go [(4, 8), (8, 6)] from in to out"),
    ("encoder", _encoder("width, hidden)\n        )", "width, hidden, bias=False)\n        )"),
     "has no bias"),
    ("encoder", _encoder("self.embedding.weight[None]", "torch.arange(len(self.embedding.weight))"),
     "raises an error"),
    ("encoder", _encoder("(states)[0]", "(states)"), "a batch dimension is left over"),
    ("encoder", _encoder("self.mlp(states)[0]", "states[0]"), "these are the states of the LSTM"),
    ("encoder", _encoder("weight[None]", "weight.detach()[None]"), "No gradient reaches"),
    ("encoder", _encoder(
        "self.mlp(states)[0]",
        "self.mlp(torch.cat([last[-2], last[-1]], -1)).expand(len(states[0]), -1)",
     ), "All 5 vectors are the same"),
    ("encoder", _encoder(", batch_first=True", ""), "depends on row i alone"),
    ("encoder", _encoder("(states)", "(states.chunk(2, -1)[0].repeat(1, 1, 2))"),
     "in its backward direction"),
    ("encoder", _encoder("(states)", "(states.chunk(2, -1)[1].repeat(1, 1, 2))"),
     "in its forward direction"),
    ("encoder", _encoder("(states)[0]", "(states)[0] + self.embedding.weight"),
     "are not the MLP of the LSTM's states"),
    # Task 2
    ("count", _count(" + lstm + mlp, n * hidden", " + lstm + mlp"),
     "Return a pair"),
    ("count", _count("mlp, n * hidden", "mlp, n * width"), "A table of 10 vectors"),
    ("count", _count("2 * (4", "(4"), "each way has weights of its own"),
    ("count", _count("(hidden, 2 * width))", "(hidden, width))"), "what both directions"),
    ("count", _count("8 * width", "4 * width"), "torch's LSTM has two biases"),
    ("count", _count(" + 8 * width", ""), "biases of the LSTM are not"),
    ("count", _count("return n * hidden + lstm", "return lstm"), "The embedding is trained too"),
    ("count", _count("2 * width * 2 * width + 2 * width + 2 * width * hidden + hidden",
                     "2 * width * 2 * width + 2 * width * hidden"),
     "biases of the MLP are not"),
    ("count", _count("return n * hidden", "return hidden"), "a row for each virtual token"),
    ("count", _count("(4 * width", "(3 * width"), "is not the number of entries of the encoder"),
    # Task 3
    ("fold", "def fold(encoder):\n    return encoder().detach()", "Return a plain nn.Embedding"),
    ("fold", _fold("encoder().detach().clone()", "encoder.embedding.weight.detach().clone()"),
     "before LSTM and MLP"),
    ("fold", _fold("    encoder.eval()\n", ""), "while dropout was on"),
    ("fold", _fold("    encoder.train(was_training)\n", ""), "and is in eval mode"),
    ("fold", _fold("encoder.train(was_training)", "encoder.train()"), "and is in training mode"),
    ("fold", _fold(", freeze=False", ""), "so it cannot be trained on"),
    ("fold", _fold("encoder.eval()", "encoder.eval().requires_grad_(False)"), "the fold froze"),
    ("fold", _fold("(vectors,", "(vectors.flip(0),"), "in another order"),
    ("fold", _fold("(vectors,", "(vectors.mean(0, keepdim=True),"), "The table has the shape"),
    ("fold", _fold("(vectors,", "(encoder.mlp(encoder.lstm(encoder.embedding.weight[:, None])[0])"
                   "[:, 0].detach(),"), "does not hold the vectors"),
    ("fold", """
def fold(encoder):
    was_training = encoder.training
    vectors = encoder.eval()().detach().clone()
    encoder.train(was_training)
    encoder.embedding.weight.data = vectors
    return encoder.embedding
""", "changed the weights of the encoder"),
    ("fold", _fold("vectors = encoder().detach().clone()",
                   "vectors = encoder(); vectors.sum().backward(); vectors = vectors.detach()"),
     "leaves gradients in the encoder"),
    # Task 4
    ("fill", _fill("embedding(input_ids.masked_fill(holes, 0))", "embedding(input_ids)"),
     "there is an IndexError"),
    ("fill", _fill("input_ids.masked_fill(holes, 0)", "input_ids.masked_fill_(holes, 0)"),
     "was changed in place"),
    ("fill", _fill(".repeat(len(input_ids), 1)", ".repeat_interleave(len(input_ids), 0)"),
     "row 0 do not get the vectors in order"),
    ("fill", _fill(".repeat(len(input_ids), 1)", ""), "raises an error"),
    ("fill", _fill("vectors.to", "vectors.flip(0).to"), "from last to first"),
    ("fill", _fill("vectors.to", "vectors.detach().to"), "does not reach the vectors"),
    ("fill", _fill(".to(words.dtype)", ""), "With a bfloat16 embedding"),
    ("fill", """
def fill(input_ids, vectors, embedding, placeholder_id):
    holes = input_ids == placeholder_id
    if (holes.sum(1) != len(vectors)).any():
        raise ValueError("count")
    words = embedding(input_ids.masked_fill(holes, 0))
    return torch.where(holes[..., None], vectors[0].to(words.dtype), words)
""", "Every placeholder got the first vector"),
    ("fill", """
def fill(input_ids, vectors, embedding, placeholder_id):
    words = embedding(input_ids)
    return torch.cat([vectors.expand(len(input_ids), -1, -1), words], 1)
""", "in a template nothing gets longer"),
    ("fill", """
def fill(input_ids, vectors, embedding, placeholder_id):
    with torch.no_grad():
        embedding.weight[placeholder_id] = vectors[0]
    return embedding(input_ids)
""", "the frozen embedding was overwritten"),
    ("fill", "def fill(input_ids, vectors, embedding, placeholder_id):\n"
             "    return embedding(input_ids)", "still have the embedding of their id"),
    ("fill", _BY_HAND.format(
        "start = holes[row].int().argmax(); words[row, start : start + len(vectors)] = vectors"),
     "need not be neighbors"),
    ("fill", _BY_HAND.format("words[row, holes[0]] = vectors.to(words.dtype)")
     .replace("range(len(input_ids))", "range(1)"), "Row 0 is right, but row 1"),
    ("fill", _fill('        raise ValueError("count")', "        pass"),
     "Two placeholders for three vectors are accepted"),
    ("fill", """
def fill(input_ids, vectors, embedding, placeholder_id):
    holes = input_ids == placeholder_id
    if (holes.sum(1) < len(vectors)).any():
        raise ValueError("count")
    words = embedding(input_ids.masked_fill(holes, 0))
    number = (holes.cumsum(1) - 1).clamp(0, len(vectors) - 1)
    return torch.where(holes[..., None], vectors.to(words.dtype)[number], words)
""",
     "Four placeholders for three vectors are accepted"),
    ("fill", _fill("(holes.sum(1) != len(vectors)).any()",
                   "holes.sum() != len(vectors) * len(input_ids)"),
     "A row with two placeholders beside one with four, for three vectors, is accepted"),
    # Task 5
    ("build", _build('return {"input_ids": ids, "attention_mask": mask, "labels": labels}',
                     "return ids, mask, labels"), "Return a dict"),
    ("build", _build("ids = prompt + answer_ids", "ids = prompt"), "ends before the answer"),
    ("build", _build("[placeholder_id] * part", "[placeholder_id]"), "gave one placeholder"),
    ("build", _build("prompt += [placeholder_id] * part if isinstance(part, int) else part",
                     "prompt = ([placeholder_id] * part + prompt if isinstance(part, int)"
                     " else prompt + part)"), "are in another order"),
    ("build", _build("else part", "else part[:2]"), "input_ids is [99, 99, 99, 11, 12, 99"),
    ("build", _build("[-100] * len(prompt)", "[-100] * (len(prompt) + sum(p for p in parts if "
                     "isinstance(p, int)))"), "come on top"),
    ("build", _build("[-100] * len(prompt) + answer_ids", "list(ids)"),
     "A placeholder is a target"),
    ("build", _build("[-100] * len(prompt)",
                     "[-100 if t == placeholder_id else t for t in prompt]"),
     "A word of the template is a target"),
    ("build", _build("[-100] * len(prompt) + answer_ids",
                     "[-100] * (len(prompt) - 1) + answer_ids + [-100]"), "The labels are shifted"),
    ("build", _build("[-100] * len(prompt) + answer_ids",
                     "[-100] * (len(prompt) + len(answer_ids) - 1) + answer_ids[-1:]"),
     "The labels end in"),
    ("build", _build("[1] * len(ids)", "[1] * (len(ids) + 5)"), "The mask has 16 entries"),
    ("build", _build("[1] * len(ids)", "[int(t != placeholder_id) for t in ids]"),
     "The mask hides the virtual tokens"),
    ("build", _build("[1] * len(ids)", "[1] * len(prompt) + [0] * len(answer_ids)"),
     "this row has no padding"),
    # Task 6
    ("moved", _moved("    module = copy.deepcopy(module)\n", ""),
     "The module itself took the step"),
    ("moved", _moved("    module = copy.deepcopy(module)\n",
                     "    module.zero_grad()\n    module = copy.deepcopy(module)\n"),
     "The gradients that the module had"),
    ("moved", _moved(".norm(dim=-1)", ".norm()"), "one length for each of 5 vectors"),
    ("moved", _moved("        return", "    return"), "still hangs on a graph"),
    ("moved", _moved(".detach().clone()", ".detach()"), "moved at all"),
    ("moved", _moved("module()[i]", "module()"), "The loss looks at all vectors"),
    ("moved", _moved(".sum().backward", ".mean().backward"), "the mean of the squares"),
    ("moved", _moved(".norm(dim=-1)", ".square().sum(-1)"), "the squares of the lengths"),
    ("moved", _moved("p -= lr", "p += lr"), "uphill"),
    ("moved", _moved("lr * p.grad", "p.grad"), "does not heed lr"),
    ("moved", _moved("for p in module.parameters()",
                     "for p in list(module.parameters())[:1]"), "Only the embedding took"),
    ("moved", _moved("lr * p.grad", "lr * p.grad.sign()"), "that of Adam"),
    # More of each
    ("encoder", _encoder("super().__init__()", "super().__init__(); self.norm = nn.LayerNorm(4)"),
     "the task does not name: norm.weight"),
    ("encoder", _encoder("batch_first=True", "batch_first=True, dropout=0.1"), "a dropout of 0.1"),
    ("encoder", _encoder("batch_first=True", "batch_first=True, bias=False"), "without biases"),
    ("encoder", _encoder("nn.Embedding(n, hidden)",
                         "nn.Embedding.from_pretrained(torch.randn(n, hidden))"), "is frozen"),
    ("encoder", _encoder("self.embedding.weight[None]",
                         "self.embedding(torch.arange(self.embedding.num_embeddings))[None]"),
     "makes a tensor on the CPU"),
    ("count", _count("return n * hidden", "return 10 * hidden"), "Right for (10, 576, 32)"),
    ("count", _count("mlp, n * hidden", "mlp, n * hidden / 1"), "in whole numbers"),
    ("count", _count("(4 * width", "(1 * width").replace("8 * width", "2 * width"), "four gates"),
    ("fold", _fold("vectors, freeze", "vectors.float(), freeze"), "and the table is torch.float32"),
    ("fold", _fold("    encoder.eval()\n", "    encoder.eval()\n    encoder.zero_grad()\n"),
     "after the fold they are gone"),
    ("fold", _fold("    was_training", "    torch.set_grad_enabled(False)\n    was_training"),
     "switched off everywhere"),
    ("fill", _fill("embedding(input_ids.masked_fill(holes, 0))",
                   "embedding.weight[input_ids.masked_fill(holes, 0)]"), "read from embedding.weight"),  # noqa: E501
    ("fill", _fill("raise ValueError", "raise KeyError"), "another error than ValueError"),
    ("fill", _fill("vectors.to(words.dtype).repeat(len(input_ids), 1)",
                   "vectors.to(words.dtype).repeat(2, 1)"), "For ids of the shape (3, 3)"),
    ("build", _build("prompt + answer_ids", "prompt + answer_ids + [2]"), "have their EOS already"),
    ("build", _build("[-100] * len(prompt)", "[0] * len(prompt)"), "A label is 0"),
    ("build", _build('"input_ids": ids', '"input_ids": torch.tensor(ids)'), "is a Tensor"),
    ("moved", _moved(".norm(dim=-1)", ".square().mean(-1).sqrt()"), "root of a mean"),
    ("moved", _moved(").sum().backward", ").sum().sqrt().backward"), "the distance itself"),
    ("moved", _moved("module()[i]", "module()[2]"), "With 5 vectors, i = 2"),
]  # fmt: skip
