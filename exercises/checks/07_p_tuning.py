"""Checks of exercise 07: they name the mistake and stay silent about the solution."""

import copy

import torch
from torch import nn

from checks import Mistake

N, HIDDEN, WIDTH = 5, 6, 4


def encoder(answer):
    """Check a class (n, hidden, width) -> a module that gives (n, hidden) when called."""
    torch.manual_seed(0)
    made = answer(N, HIDDEN, WIDTH)
    kinds = {"embedding": nn.Embedding, "lstm": nn.LSTM, "mlp": nn.Sequential}
    for name, kind in kinds.items():
        if not isinstance(getattr(made, name, None), kind):
            raise Mistake(f"The attribute {name} is missing or is no nn.{kind.__name__}.")
    rows = tuple(made.embedding.weight.shape)
    if rows != (N, HIDDEN):
        raise Mistake(
            f"With n={N} and hidden={HIDDEN} the embedding has the shape {rows}; it needs a row of "
            f"size {HIDDEN} for each virtual token."
        )
    lstm = made.lstm
    if not lstm.bidirectional:
        raise Mistake("The LSTM reads from left to right only.")
    if lstm.num_layers != 2:
        raise Mistake(f"The LSTM has {lstm.num_layers} layer instead of two.")
    if lstm.hidden_size != WIDTH:
        raise Mistake(
            f"With width={WIDTH} the state of the LSTM has {lstm.hidden_size} numbers each way."
        )
    linears = [m for m in made.mlp if isinstance(m, nn.Linear)]
    if [type(m) for m in made.mlp] != [nn.Linear, nn.ReLU, nn.Linear]:
        names = ", ".join(type(m).__name__ for m in made.mlp)
        raise Mistake(f"The MLP should be Linear, ReLU, Linear, and is {names}.")
    sizes = [(m.in_features, m.out_features) for m in linears]
    wanted = [(2 * WIDTH, 2 * WIDTH), (2 * WIDTH, HIDDEN)]
    if sizes != wanted:
        raise Mistake(
            f"The linear layers of the MLP go {sizes} from in to out; after an LSTM of width "
            f"{WIDTH} that reads both ways, and up to hidden={HIDDEN}, other sizes are needed."
        )
    if any(m.bias is None for m in linears):
        raise Mistake("A linear layer of the MLP has no bias.")
    try:
        vectors = made()
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise Mistake(f"Calling the encoder raises an error: {error}") from error
    shape = tuple(vectors.shape)
    if shape == (1, N, HIDDEN):
        raise Mistake(f"The vectors have the shape {shape}: a batch dimension is left over.")
    if shape == (N, 2 * WIDTH):
        raise Mistake(f"The vectors have the shape {shape}: these are the states of the LSTM.")
    if shape != (N, HIDDEN):
        raise Mistake(f"The vectors have the shape {shape} instead of {(N, HIDDEN)}.")
    reaches = _dependence(made, vectors)
    if not reaches.any():
        raise Mistake("No gradient reaches the embedding, so its rows would never learn.")
    if all(torch.allclose(v, vectors[0]) for v in vectors):
        raise Mistake(
            f"All {N} vectors are the same. Each token has a state of its own, which is not the "
            "state in which the LSTM ends."
        )
    if torch.equal(reaches, reaches.diag().diag()):
        raise Mistake(
            f"Vector i depends on row i alone. The LSTM took the rows for {N} sequences of one "
            f"token, not for one sequence of {N}. Which dimension does it read along?"
        )
    with torch.no_grad():
        states = lstm(made.embedding.weight)[0]  # (n, 2 * width)
        ahead, back = states.split(WIDTH, -1)
        for one, name in ((ahead, "backward"), (back, "forward")):
            if torch.allclose(vectors, made.mlp(torch.cat([one, one], -1)), atol=1e-6):
                raise Mistake(f"What the LSTM found in its {name} direction is not used.")
        if not torch.allclose(vectors, made.mlp(states), atol=1e-6):
            raise Mistake("The vectors are not the MLP of the LSTM's states, token by token.")


def _dependence(made, vectors):
    """Does vector i depend on row j of the embedding? Booleans (n, n)."""
    if not vectors.requires_grad:
        return torch.zeros(N, N, dtype=torch.bool)
    rows = []
    for vector in vectors:
        (grad,) = torch.autograd.grad(
            vector.square().sum(), made.embedding.weight, retain_graph=True, allow_unused=True
        )
        rows.append(torch.zeros(N, dtype=torch.bool) if grad is None else grad.ne(0).any(-1))
    return torch.stack(rows)


def count(answer):
    """Check a function (n, hidden, width) -> (entries of the encoder, entries of the table)."""
    n, hidden, width = 10, 576, 32
    got = answer(n, hidden, width)
    if not isinstance(got, tuple) or len(got) != 2:
        raise Mistake("Return a pair: first the encoder's number, then the table's.")
    whole, table = got
    if table != n * hidden:
        raise Mistake(f"A table of {n} vectors of size {hidden} has not {table} entries.")

    def right(directions=2, second=2, biases=2, rows=n * hidden, linear_bias=1):
        layers = (hidden, second * width)
        lstm = directions * sum(4 * width * (d + width) + biases * 4 * width for d in layers)
        mlp = 2 * width * (2 * width + hidden) + linear_bias * (2 * width + hidden)
        return rows + lstm + mlp

    known = {
        right(directions=1): "The LSTM reads both ways, and each way has weights of its own.",
        right(
            second=1
        ): "The second layer of the LSTM reads what both directions of the first say.",
        right(biases=1): "torch's LSTM has two biases in each layer and direction; one is counted.",
        right(biases=0): "The biases of the LSTM are not counted.",
        right(rows=0): "The embedding is trained too, and is not in the encoder's number.",
        right(linear_bias=0): "The biases of the MLP are not counted.",
        right() - n * hidden + hidden: "The embedding has a row for each virtual token.",
    }
    if whole in known:
        raise Mistake(known[whole])
    if whole != right():
        raise Mistake(
            f"{whole} is not the number of entries of the encoder for {(n, hidden, width)}. "
            "Sum the parameters of a small one, part by part, and compare."
        )


def fold(answer, encoder_class):
    """Check a function (encoder) -> nn.Embedding of its vectors; also takes task 1."""
    for dropout in (0.0, 0.5):
        for training in (True, False):
            torch.manual_seed(0)
            made = encoder_class(N, HIDDEN, WIDTH).train(training)
            made.lstm.dropout = dropout
            _folded(answer, made, dropout, training)


def _folded(answer, made, dropout, training):
    before = copy.deepcopy(made.state_dict())
    with torch.no_grad():
        wanted = copy.deepcopy(made).eval()()
    table = answer(made)
    if any(not torch.equal(before[name], now) for name, now in made.state_dict().items()):
        raise Mistake("Folding changed the weights of the encoder itself.")
    if type(table) is not nn.Embedding:
        raise Mistake(f"Return a plain nn.Embedding; this is a {type(table).__name__}.")
    if made.training != training:
        raise Mistake(
            f"The encoder went in in {_mode(training)} mode, and is in {_mode(made.training)} mode "
            "afterwards."
        )
    if not all(p.requires_grad for p in made.parameters()):
        raise Mistake("The encoder's parameters no longer require grad: the fold froze them.")
    got = table.weight
    if got.shape != wanted.shape:
        raise Mistake(f"The table has the shape {tuple(got.shape)} instead of {(N, HIDDEN)}.")
    if torch.equal(got, before["embedding.weight"]):
        raise Mistake("The table holds the rows of the embedding, before LSTM and MLP.")
    if torch.allclose(got, wanted.flip(0), atol=1e-6):
        raise Mistake("The vectors are in the table in another order.")
    if not torch.allclose(got, wanted, atol=1e-6):
        if dropout:
            raise Mistake("The table of an encoder with dropout was taken while dropout was on.")
        raise Mistake("The table does not hold the vectors that the encoder gives.")
    if not got.requires_grad:
        raise Mistake("The table does not require grad, so it cannot be trained on.")
    table(torch.arange(N)).sum().backward()
    if table.weight.grad is None:
        raise Mistake("The table's own weight gets no gradient.")
    if any(p.grad is not None for p in made.parameters()):
        raise Mistake("Folding, or training the table, leaves gradients in the encoder.")


def _mode(training):
    return "training" if training else "eval"


def fill(answer):
    """Check a function (input_ids, vectors, embedding, placeholder_id) -> (batch, seq, hidden)."""
    torch.manual_seed(0)
    words = nn.Embedding(30, HIDDEN)
    vectors = torch.randn(3, HIDDEN, requires_grad=True)
    hole = 29
    ids = torch.tensor([[4, hole, hole, 5, 6, hole, 7], [hole, 8, hole, 9, hole, 10, 11]])
    old_ids, old_table = ids.clone(), words.weight.detach().clone()
    holes = ids == hole
    try:
        got = answer(ids, vectors, words, hole)
    except RuntimeError as error:
        raise Mistake(f"Filling two rows of one template raises an error: {error}") from error
    if not torch.equal(ids, old_ids):
        raise Mistake("input_ids was changed in place; whoever passed it in still needs it.")
    if not torch.equal(words.weight, old_table):
        raise Mistake("A row of the frozen embedding was overwritten.")
    if got.shape != (*ids.shape, HIDDEN):
        raise Mistake(
            f"The result has the shape {tuple(got.shape)} for ids of {tuple(ids.shape)}; in a "
            "template nothing gets longer: the placeholders' places are taken."
        )
    _right_places(got, ids, holes, vectors, words)
    got.sum().backward()
    if vectors.grad is None:
        raise Mistake("The gradient does not reach the vectors, so they would never learn.")
    for outside in (1000, -1):
        try:
            beyond = answer(ids.masked_fill(holes, outside), vectors, words, outside)
        except IndexError as error:
            raise Mistake(
                f"With placeholder_id={outside} and a vocabulary of 30 there is an IndexError: the "
                "embedding was asked for a row that it does not have."
            ) from error
        if not torch.equal(beyond, got):
            raise Mistake(f"With placeholder_id={outside} the result is another one.")
    half = words.to(torch.bfloat16)
    try:
        got = answer(ids, vectors, half, hole).dtype
    except RuntimeError:
        got = "an error"
    if got != torch.bfloat16:
        raise Mistake(f"With a bfloat16 embedding and float32 vectors there is {got}.")
    words.float()
    uneven = ids.clone()
    uneven[0, 1], uneven[1, 1] = 12, hole  # 2 and 4 placeholders, 6 together
    few = ids.clone()
    few[:, 2] = 12
    cases = {
        "Two placeholders for three vectors are": few,
        "Four placeholders for three vectors are": ids.masked_fill(ids == 7, hole)[:1],
        "A row with two placeholders beside one with four, for three vectors, is": uneven,
    }
    for what, wrong in cases.items():
        try:
            answer(wrong, vectors, words, hole)
        except ValueError:
            continue
        except (RuntimeError, IndexError) as error:
            raise Mistake(f"{what} no ValueError, but another error: {error}") from error
        raise Mistake(f"{what} accepted without a word.")


def _right_places(got, ids, holes, vectors, words):
    """Are words where words stand, and vectors where placeholders stand, in order?"""
    if torch.equal(got, words(ids)):
        raise Mistake("The placeholders still have the embedding of their id.")
    if not torch.equal(got[~holes], words(ids)[~holes]):
        raise Mistake(
            "A word has not its own embedding any more. The virtual tokens need not be neighbours."
        )
    first, second = got[0][holes[0]], got[1][holes[1]]  # each (n, hidden)
    if torch.equal(first, vectors[:1].expand_as(first)):
        raise Mistake("Every placeholder got the first vector.")
    if torch.equal(first, vectors.flip(0)):
        raise Mistake("The vectors are put in from last to first.")
    if not torch.equal(first, vectors):
        raise Mistake(
            "In a batch of two, the placeholders of row 0 do not get the vectors in order."
        )
    if not torch.equal(second, vectors):
        raise Mistake("Row 0 is right, but row 1 does not get all the vectors in order.")


def build(answer):
    """Check a function (parts, answer_ids, placeholder_id) -> input_ids, attention_mask, labels."""
    parts, reply, hole = [3, [11, 12, 13], 2, [14]], [7, 2], 99
    row = answer(copy.deepcopy(parts), list(reply), hole)
    if not isinstance(row, dict) or set(row) != {"input_ids", "attention_mask", "labels"}:
        raise Mistake("Return a dict with input_ids, attention_mask and labels.")
    ids, mask, labels = (list(row[key]) for key in ("input_ids", "attention_mask", "labels"))
    prompt = [hole] * 3 + [11, 12, 13] + [hole] * 2 + [14]
    wanted = prompt + reply
    if ids == prompt:
        raise Mistake("input_ids ends before the answer, which the model must read in training.")
    if ids == [hole, 11, 12, 13, hole, 14, *reply]:
        raise Mistake("Each number in the template gave one placeholder, whatever the number is.")
    if sorted(ids) == sorted(wanted) and ids != wanted:
        raise Mistake(f"The pieces of {parts} are in another order: {ids}.")
    if ids != wanted:
        raise Mistake(f"For {parts} and the answer {reply} input_ids is {ids}.")
    if len(labels) != len(ids):
        raise Mistake(
            f"{len(ids)} input_ids have {len(labels)} labels. In front of a text the virtual "
            "tokens come on top; here they are in the ids already."
        )
    if hole in labels:
        raise Mistake("A placeholder is a target, but no text ever holds it.")
    if any(label != -100 for label in labels[:8]):
        raise Mistake("A word of the template is a target; only the answer is.")
    if labels[-3:-1] == reply or labels[-1] == -100:
        raise Mistake("The labels are shifted, or the end of the answer is no target.")
    if labels != [-100] * 9 + reply:
        raise Mistake(f"The labels end in {labels[-3:]}; the answer is {reply}.")
    if len(mask) != len(ids):
        raise Mistake(f"The mask has {len(mask)} entries for {len(ids)} ids.")
    if any(mask[i] == 0 for i, token in enumerate(ids) if token == hole):
        raise Mistake("The mask hides the virtual tokens, as if they were padding.")
    if mask != [1] * len(ids):
        raise Mistake(f"The mask is {mask}, but this row has no padding.")


class _Table(nn.Module):
    """Vectors that nothing ties together."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, HIDDEN))

    def forward(self):
        return self.weight


def _step(module, i, target, lr, only=None, loss="one"):
    """What `moved` should give, or what it gives with one thing done wrong."""
    module = copy.deepcopy(module)
    vectors = module()
    before = vectors.detach().clone()
    off = (vectors if loss == "all" else vectors[i]) - target
    value = off.square().mean() if loss == "mean" else off.square().sum()
    names, params = zip(*module.named_parameters(), strict=True)
    with torch.no_grad():
        for name, p, grad in zip(names, params, torch.autograd.grad(value, params), strict=True):
            if only is None or only in name:
                p -= lr * grad
        return (module() - before).norm(dim=-1)


def moved(answer, encoder_class):
    """Check a function (module, i, target, lr) -> (n,); also takes the class of task 1."""
    torch.manual_seed(0)
    target, i, lr = torch.randn(HIDDEN), 2, 0.1
    table, tied = _Table(), encoder_class(N, HIDDEN, WIDTH)
    for module in (table, tied):
        module().sum().backward()  # gradients that are left over from something else
        old = [(p.detach().clone(), p.grad.clone()) for p in module.parameters()]
        got = answer(module, i, target, lr)
        for p, (value, grad) in zip(module.parameters(), old, strict=True):
            if not torch.equal(p, value):
                raise Mistake("The module itself took the step; it should stay as it is.")
            if p.grad is None or not torch.equal(p.grad, grad):
                raise Mistake("The gradients that the module had are gone or others.")
        if not isinstance(got, torch.Tensor) or tuple(got.shape) != (N,):
            shape = tuple(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
            raise Mistake(f"The result is {shape} instead of one length for each of {N} vectors.")
        if got.requires_grad:
            raise Mistake("The result still hangs on a graph.")
        _right_lengths(got, module, i, target, lr)


def _right_lengths(got, module, i, target, lr):
    kind = type(module).__name__.strip("_").lower()
    wanted = _step(module, i, target, lr)

    def is_(other):
        return torch.allclose(got, other, rtol=1e-3, atol=1e-6)

    if is_(wanted):
        return
    if not got.any():
        raise Mistake(
            f"No vector of the {kind} moved at all. Are the vectors before and after two tensors, "
            "or one?"
        )
    if is_(_step(module, i, target, lr, loss="all")):
        raise Mistake("The loss looks at all vectors, so all of them have a reason of their own.")
    if is_(_step(module, i, target, lr, loss="mean")):
        raise Mistake("The loss is the mean of the squares, not their sum.")
    if is_(wanted.square()):
        raise Mistake("These are the squares of the lengths.")
    if is_(_step(module, i, target, -lr)):
        raise Mistake("The step went uphill: the loss grew.")
    if is_(_step(module, i, target, 1.0)):
        raise Mistake("The step does not heed lr.")
    if hasattr(module, "embedding") and is_(_step(module, i, target, lr, only="embedding")):
        raise Mistake("Only the embedding took the step; LSTM and MLP are trained as well.")
    raise Mistake(f"After one step on vector {i} of the {kind}, the vectors moved elsewhere.")
