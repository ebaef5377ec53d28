"""Checks of exercise 07: they name the mistake and stay silent about the solution."""

import copy
import math

import torch
from torch import nn

from checks import Mistake, in_one_line

N, HIDDEN, WIDTH = 5, 6, 4


def _own_device(call):
    """Whether what a call creates is where its inputs are. New tensors would be on meta here."""
    try:
        with torch.device("meta"):
            return not call().is_meta
    except RuntimeError as error:
        return "device" not in str(error)


def encoder(answer):
    """Check a class (n, hidden, width) -> a module that gives (n, hidden) when called."""
    for sizes in ((N, HIDDEN, WIDTH), (2, 7, 3), (3, 4, 5)):
        torch.manual_seed(0)
        try:
            made = answer(*sizes)
            _right_parts(made, *sizes)
            _right_vectors(made, *sizes)
        except Mistake as error:
            if sizes == (N, HIDDEN, WIDTH):
                raise
            first = f"{(N, HIDDEN, WIDTH)} for (n, hidden, width)"
            raise Mistake(f"Right with {first}, but with {sizes}: {error}") from error
    used = []
    made.embedding.register_forward_pre_hook(lambda _, args: used.append(args[0].is_meta))
    if not _own_device(made) or any(used):
        raise Mistake("forward makes a tensor on the CPU, whatever device the encoder is on.")


def _right_parts(made, n, hidden, width):
    kinds = {"embedding": nn.Embedding, "lstm": nn.LSTM, "mlp": nn.Sequential}
    for name, kind in kinds.items():
        if not isinstance(getattr(made, name, None), kind):
            raise Mistake(f"The attribute {name} is missing or is not an nn.{kind.__name__}.")
    rows = tuple(made.embedding.weight.shape)
    if rows != (n, hidden):
        raise Mistake(
            f"With n={n} and hidden={hidden} the embedding has the shape {rows}; it needs a row of "
            f"size {hidden} for each virtual token."
        )
    lstm = made.lstm
    if not lstm.bidirectional:
        raise Mistake("The LSTM reads from left to right only.")
    if lstm.num_layers != 2:
        raise Mistake(f"The LSTM has {lstm.num_layers} layer instead of two.")
    if lstm.hidden_size != width:
        raise Mistake(
            f"With width={width} the state of the LSTM has {lstm.hidden_size} numbers each way."
        )
    if not lstm.bias:
        raise Mistake("The LSTM is made without biases.")
    if lstm.dropout:
        raise Mistake(f"The LSTM has a dropout of {lstm.dropout}, which the task does not ask for.")
    linears = [m for m in made.mlp if isinstance(m, nn.Linear)]
    if [type(m) for m in made.mlp] != [nn.Linear, nn.ReLU, nn.Linear]:
        names = ", ".join(type(m).__name__ for m in made.mlp)
        raise Mistake(f"The MLP should be Linear, ReLU, Linear, and is {names}.")
    sizes = [(m.in_features, m.out_features) for m in linears]
    if sizes != [(2 * width, 2 * width), (2 * width, hidden)]:
        raise Mistake(
            f"The linear layers of the MLP go {sizes} from in to out; after an LSTM of width "
            f"{width} that reads both ways, and up to hidden={hidden}, other sizes are needed."
        )
    if any(m.bias is None for m in linears):
        raise Mistake("A linear layer of the MLP has no bias.")
    more = [name for name, _ in made.named_parameters() if name.split(".")[0] not in kinds]
    if more:
        raise Mistake(f"There is a parameter that the task does not name: {more[0]}.")
    if not all(p.requires_grad for p in made.parameters()):
        raise Mistake("A part of the encoder is frozen. All of it is trained.")


def _right_vectors(made, n, hidden, width):
    try:
        vectors = made()
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise Mistake(f"Calling the encoder raises an error: {error}") from error
    shape = tuple(vectors.shape)
    if shape == (1, n, hidden):
        raise Mistake(f"The vectors have the shape {shape}: a batch dimension is left over.")
    if shape == (n, 2 * width):
        raise Mistake(f"The vectors have the shape {shape}: these are the states of the LSTM.")
    if shape != (n, hidden):
        raise Mistake(f"The vectors have the shape {shape} instead of {(n, hidden)}.")
    if not torch.equal(made(), vectors):
        raise Mistake("Two calls in a row give different vectors.")
    reaches = _dependence(made, vectors)
    if not reaches.any():
        raise Mistake("No gradient reaches the embedding, so its rows would never learn.")
    if all(torch.allclose(v, vectors[0]) for v in vectors):
        raise Mistake(
            f"All {n} vectors are the same. Each token has a state of its own, which is not the "
            "state in which the LSTM ends."
        )
    if torch.equal(reaches, reaches.diag().diag()):
        raise Mistake(
            f"Vector i depends on row i alone. The LSTM took the rows for {n} sequences of one "
            f"token, not for one sequence of {n}. Which dimension does it read along?"
        )
    old = vectors.detach()
    for p in made.parameters():  # whatever the encoder started from
        nn.init.normal_(p, std=0.5)
    vectors = made()
    if torch.allclose(vectors, old):
        raise Mistake("When the parameters change, the vectors stay the same.")
    with torch.no_grad():
        states = made.lstm(made.embedding.weight)[0]  # (n, 2 * width)
        ahead, back = states.split(width, -1)
        swapped = torch.cat([back, ahead], -1)
        for other, message in (
            (torch.cat([ahead, ahead], -1), "What the LSTM found in its backward direction is not used."),  # noqa: E501
            (torch.cat([back, back], -1), "What the LSTM found in its forward direction is not used."),  # noqa: E501
            (swapped, "The two directions of the LSTM are in the wrong order."),
            (states.relu(), "There is a ReLU too many, in front of the MLP."),
        ):  # fmt: skip
            if torch.allclose(vectors, made.mlp(other), atol=1e-6):
                raise Mistake(message)
        if torch.allclose(vectors, made.mlp(states).flip(0), atol=1e-6):
            raise Mistake("The vectors come out from last to first.")
        if not torch.allclose(vectors, made.mlp(states), atol=1e-5):
            raise Mistake("The vectors are not the MLP of the LSTM's states, token by token.")


def _dependence(made, vectors):
    """Does vector i depend on row j of the embedding? Booleans (n, n)."""
    n = len(vectors)
    if not vectors.requires_grad:
        return torch.zeros(n, n, dtype=torch.bool)
    rows = []
    for vector in vectors:
        (grad,) = torch.autograd.grad(
            vector.square().sum(), made.embedding.weight, retain_graph=True, allow_unused=True
        )
        rows.append(torch.zeros(n, dtype=torch.bool) if grad is None else grad.ne(0).any(-1))
    return torch.stack(rows)


def count(answer):
    """Check a function (n, hidden, width) -> (entries of the encoder, entries of the table)."""
    for n, hidden, width in ((10, 576, 32), (3, 40, 64), (1, 5, 2)):
        got = answer(n, hidden, width)
        if not isinstance(got, tuple) or len(got) != 2:
            raise Mistake("Return a pair: first the encoder's number, then the table's.")
        try:
            _right_count(*got, n, hidden, width)
        except Mistake as error:
            if n == 10:
                raise
            raise Mistake(
                f"Right for (10, 576, 32), but {(n, hidden, width)} gives {got}."
            ) from error


def _right_count(whole, table, n, hidden, width):
    if isinstance(whole, float) or isinstance(table, float):
        raise Mistake(f"Parameters are counted in whole numbers, but this is {(whole, table)}.")

    def right(directions=2, second=2, biases=2, rows=n * hidden, linear_bias=1, gates=4):
        layers = (hidden, second * width)
        lstm = directions * sum(gates * width * (d + width + biases) for d in layers)
        mlp = 2 * width * (2 * width + hidden) + linear_bias * (2 * width + hidden)
        return rows + lstm + mlp

    if (table, whole) == (right(), n * hidden):
        raise Mistake("The two numbers are swapped: the encoder comes first.")
    if table != n * hidden:
        raise Mistake(f"A table of {n} vectors of size {hidden} has not {table} entries.")
    known = {
        right(directions=1): "The LSTM reads both ways, and each way has weights of its own.",
        right(second=1): "The second layer of the LSTM reads what both directions of the first "
        "say.",
        right(second=hidden / width): "The second layer of the LSTM is counted as if it read the "
        "embedding, like the first.",
        right(biases=1): "torch's LSTM has two biases in each layer and direction; one is counted.",
        right(biases=0): "The biases of the LSTM are not counted.",
        right(rows=0): "The embedding is trained too, and is not in the encoder's number.",
        right(linear_bias=0): "The biases of the MLP are not counted.",
        right(gates=1): "An LSTM has four gates, each with weights of its own; one is counted.",
        right() - n * hidden + hidden: "The embedding has a row for each virtual token.",
        right(rows=2 * n * hidden): "The table is counted with the encoder, which computes it.",
    }
    if whole != right() and whole in known:
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
    made = encoder_class(2, 3, 5).double()
    _folded(answer, made, 0.0, True)
    _folded_with_gradients(answer, made)
    if not _own_device(lambda: answer(made).weight):
        raise Mistake("The table is made on the CPU, whatever device the encoder is on.")


def _folded(answer, made, dropout, training):
    before = copy.deepcopy(made.state_dict())
    with torch.no_grad():
        wanted = copy.deepcopy(made).eval()()
    table = answer(made)
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        raise Mistake("After your fold, gradients are switched off everywhere.")
    if any(not torch.equal(before[name], now) for name, now in made.state_dict().items()):
        raise Mistake("Folding changed the weights of the encoder itself.")
    if type(table) is not nn.Embedding:
        raise Mistake(f"Return a plain nn.Embedding; this is a {type(table).__name__}.")
    if made.training != training:
        raise Mistake(
            f"The encoder went in in {_mode(training)} mode, and is in {_mode(made.training)} mode "
            "afterward."
        )
    if made.lstm.dropout != dropout:
        raise Mistake(f"The fold set the LSTM's dropout to {made.lstm.dropout} and left it there.")
    if not all(p.requires_grad for p in made.parameters()):
        raise Mistake("The encoder's parameters no longer require grad: the fold froze them.")
    got = table.weight
    if got.shape != wanted.shape:
        raise Mistake(
            f"The table has the shape {tuple(got.shape)} instead of {tuple(wanted.shape)}."
        )
    if torch.equal(got, before["embedding.weight"]):
        raise Mistake("The table holds the rows of the embedding, before LSTM and MLP.")
    if got.dtype != wanted.dtype:
        raise Mistake(f"The vectors are {wanted.dtype}, and the table is {got.dtype}.")
    if torch.allclose(got, wanted.flip(0), atol=1e-6):
        raise Mistake("The vectors are in the table in another order.")
    if not torch.allclose(got, wanted, atol=1e-6):
        if dropout:
            raise Mistake("The table of an encoder with dropout was taken while dropout was on.")
        raise Mistake("The table does not hold the vectors that the encoder gives.")
    if not got.requires_grad:
        raise Mistake("The table does not require grad, so it cannot be trained on.")
    table(torch.arange(len(got))).sum().backward()
    if table.weight.grad is None:
        raise Mistake("The table's own weight gets no gradient.")
    if any(p.grad is not None for p in made.parameters()):
        raise Mistake("Folding, or training the table, leaves gradients in the encoder.")


def _folded_with_gradients(answer, made):
    """A fold in the middle of training, and a second one later."""
    made().sum().backward()
    grads = [p.grad.clone() for p in made.parameters()]
    old = answer(made).weight.detach().clone()
    if any(
        p.grad is None or not torch.equal(p.grad, grad)
        for p, grad in zip(made.parameters(), grads, strict=True)
    ):
        raise Mistake("The encoder had gradients, and after the fold they are gone or others.")
    with torch.no_grad():
        made.mlp[2].bias += 1
    if not torch.allclose(answer(made).weight, old + 1):
        raise Mistake("A second fold, after a training step, does not hold the new vectors.")


def _mode(training):
    return "training" if training else "eval"


class _Scaled(nn.Embedding):
    """As in Gemma: more than a look-up."""

    def forward(self, ids):
        return 3 * super().forward(ids)


def fill(answer):
    """Check a function (input_ids, vectors, embedding, placeholder_id) -> (batch, seq, hidden)."""
    torch.manual_seed(0)
    words = nn.Embedding(30, HIDDEN)
    vectors = torch.randn(3, HIDDEN, requires_grad=True)
    hole = 29
    ids = torch.tensor([[4, hole, hole, 5, 6, hole, 7], [hole, 8, hole, 9, hole, 10, 11]])
    old_ids, old_table = ids.clone(), words.weight.detach().clone()
    old_vectors = vectors.detach().clone()
    holes = ids == hole
    try:
        got = answer(ids, vectors, words, hole)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise Mistake(f"Filling two rows of one template raises an error: {error}") from error
    if not torch.equal(ids, old_ids):
        raise Mistake("input_ids was changed in place; whoever passed it in still needs it.")
    if not torch.equal(words.weight, old_table):
        raise Mistake("A row of the frozen embedding was overwritten.")
    if not torch.equal(vectors, old_vectors):
        raise Mistake("The vectors that were passed in have been changed.")
    if got.shape != (*ids.shape, HIDDEN):
        raise Mistake(
            f"The result has the shape {tuple(got.shape)} for ids of {tuple(ids.shape)}; in a "
            "template nothing gets longer: the placeholders' places are taken."
        )
    _right_places(got, ids, holes, vectors, words)
    if got.requires_grad:
        got[holes].sum().backward()
    if vectors.grad is None:
        raise Mistake("The gradient does not reach the vectors, so they would never learn.")
    if not torch.equal(vectors.grad, torch.full_like(vectors, 2)):
        raise Mistake("The gradient of the vectors does not come from both rows of the batch.")
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
    _other_templates(answer)
    if not _own_device(lambda: answer(ids, vectors, words, hole)):
        raise Mistake("Your function makes a tensor on the CPU, whatever the device of the ids is.")
    half = copy.deepcopy(words).to(torch.bfloat16)
    try:
        got = answer(ids, vectors, half, hole).dtype
    except RuntimeError:
        got = "an error"
    if got != torch.bfloat16:
        raise Mistake(f"With a bfloat16 embedding and float32 vectors there is {got}.")
    scaled = _Scaled.from_pretrained(old_table)
    if not torch.equal(answer(ids, vectors, scaled, hole)[~holes], scaled(ids)[~holes]):
        raise Mistake(
            "The words were read from embedding.weight. In some models the embedding does more "
            "than look up a row; call it."
        )
    _refuses(answer, ids, vectors, words, hole)


def _other_templates(answer):
    """Other numbers of rows, virtual tokens and tokens."""
    for batch, seq, n in ((1, 4, 1), (3, 3, 2), (2, 2, 2), (4, 9, 5)):
        words, vectors = nn.Embedding(20, 4), torch.randn(n, 4)
        ids = torch.randint(0, 19, (batch, seq))
        for row in ids:
            row[torch.randperm(seq)[:n]] = 19
        wanted = words(ids).detach().clone()
        for row, tokens in enumerate(ids.tolist()):
            places = [place for place, token in enumerate(tokens) if token == 19]
            wanted[row, places] = vectors
        what = f"For ids of the shape {(batch, seq)} with {n} virtual tokens in each row"
        try:
            got = answer(ids, vectors, words, 19)
        except (RuntimeError, ValueError, IndexError) as error:
            raise Mistake(f"{what} there is an error: {in_one_line(error)}") from error
        if got.shape != wanted.shape or not torch.equal(got, wanted):
            raise Mistake(f"{what} the result is wrong.")


def _refuses(answer, ids, vectors, words, hole):
    uneven = ids.clone()
    uneven[0, 1], uneven[1, 1] = 12, hole  # 2 and 4 placeholders, 6 together
    few = ids.clone()
    few[:, 2] = 12
    cases = {
        "Two placeholders for three vectors are": few,
        "Four placeholders for three vectors are": ids.masked_fill(ids == 7, hole)[:1],
        "A row with two placeholders beside one with four, for three vectors, is": uneven,
        "Rows without any placeholder are": ids.masked_fill(ids == hole, 12),
    }
    for what, wrong in cases.items():
        try:
            answer(wrong, vectors, words, hole)
        except ValueError:
            continue
        except Exception as error:
            raise Mistake(
                f"{what} refused with another error than ValueError: {in_one_line(error)}"
            ) from error
        raise Mistake(f"{what} accepted without a word.")


def _right_places(got, ids, holes, vectors, words):
    """Are words where words stand, and vectors where placeholders stand, in order?"""
    if torch.equal(got, words(ids)):
        raise Mistake("The placeholders still have the embedding of their id.")
    if torch.allclose(got[holes], vectors.repeat(2, 1) + words(ids)[holes]):
        raise Mistake("The vectors were added to the placeholder's embedding; they replace it.")
    if not torch.equal(got[~holes], words(ids)[~holes]):
        raise Mistake(
            "A word has not its own embedding any more. The virtual tokens need not be neighbors."
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
    _right_row(answer)
    others = [
        ([[4], 1, [5, 6], 4, [7]], [8, 9, 2], 300),
        ([2], [2], 50),
        ([[21, 22], [23], 1, 1], [31, 2], 7),
        ([[5, 5], 1, [5], 0], [5, 5], -1),
    ]
    for parts, reply, hole in others:
        prompt = []
        for part in parts:
            prompt.extend([hole] * part if isinstance(part, int) else part)
        wanted = {
            "input_ids": prompt + reply,
            "attention_mask": [1] * len(prompt + reply),
            "labels": [-100] * len(prompt) + reply,
        }
        try:
            row = answer(copy.deepcopy(parts), list(reply), hole)
        except (TypeError, ValueError, IndexError) as error:
            raise Mistake(f"For {parts} there is an error: {in_one_line(error)}") from error
        for key, right in wanted.items():
            if row[key] != right:
                raise Mistake(
                    f"The first template comes out right, but for {parts}, the answer {reply} and "
                    f"the placeholder {hole} {key} is {row[key]}."
                )


def _right_row(answer):
    parts, reply, hole = [3, [11, 12, 13], 2, [14]], [7, 2], 99
    given, words = copy.deepcopy(parts), list(reply)
    row = answer(given, words, hole)
    if not isinstance(row, dict) or set(row) != {"input_ids", "attention_mask", "labels"}:
        raise Mistake("Return a dict with input_ids, attention_mask and labels.")
    if given != parts:
        raise Mistake(f"The template that was passed in has become {given}.")
    if words != reply:
        raise Mistake(f"The answer_ids that were passed in have become {words}.")
    for key, value in row.items():
        if not isinstance(value, list):
            raise Mistake(f"Return lists; {key} is a {type(value).__name__}.")
    ids, mask, labels = (row[key] for key in ("input_ids", "attention_mask", "labels"))
    prompt = [hole] * 3 + [11, 12, 13] + [hole] * 2 + [14]
    wanted = prompt + reply
    if ids == prompt:
        raise Mistake("input_ids ends before the answer, which the model must read in training.")
    if ids == [hole, 11, 12, 13, hole, 14, *reply]:
        raise Mistake("Each number in the template gave one placeholder, whatever the number is.")
    if ids == [hole] * 3 + [[11, 12, 13]] + [hole] * 2 + [[14], *reply]:
        raise Mistake("A list of words was put into the row as one entry.")
    if ids[:-1] == wanted:
        raise Mistake(f"The row goes on with {ids[-1]}. The answer's ids have their EOS already.")
    if len(set(map(str, ids))) > len(set(wanted)):
        raise Mistake(f"There is an id in the row that nobody put there: {ids}.")
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
    if any(label not in (-100, 0) for label in labels[:8]):
        raise Mistake("A word of the template is a target; only the answer is.")
    if 0 in labels:
        raise Mistake("A label is 0, which is a token like any other. The loss leaves out -100.")
    if labels[-3:-1] == reply or labels[-1] == -100:
        raise Mistake("The labels are shifted, or the end of the answer is not a target.")
    if labels != [-100] * 9 + reply:
        raise Mistake(f"The labels end in {labels[-3:]}; the answer is {reply}.")
    if len(mask) != len(ids):
        raise Mistake(f"The mask has {len(mask)} entries for {len(ids)} ids.")
    if any(mask[i] == 0 for i, token in enumerate(ids) if token == hole):
        raise Mistake("The mask hides the virtual tokens, as if they were padding.")
    if mask != [1] * len(ids):
        raise Mistake(f"The mask is {mask}, but this row has no padding.")
    if any(type(each) is bool for each in mask):
        raise Mistake("The mask has True in it where other rows have the number 1.")


class _Table(nn.Module):
    """Vectors that nothing ties together."""

    def __init__(self, n=N, hidden=HIDDEN):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, hidden))

    def forward(self):
        return self.weight


def _step(module, i, target, lr, only=None, loss="one", steps=1):
    """What `moved` should give, or what it gives with one thing done wrong."""
    module = copy.deepcopy(module)
    before = module().detach().clone()
    names, params = zip(*module.named_parameters(), strict=True)
    for _ in range(steps):
        vectors = module()
        off = (vectors if loss == "all" else vectors[i]) - target
        value = off.square().mean() if loss == "mean" else off.square().sum()
        value = value.sqrt() if loss == "length" else value
        grads = torch.autograd.grad(value, params)
        if loss == "adam":
            grads = [grad.sign() for grad in grads]
        with torch.no_grad():
            for name, p, grad in zip(names, params, grads, strict=True):
                if only is None or only in name:
                    p -= lr * grad
    with torch.no_grad():
        return (module() - before).norm(dim=-1)


def moved(answer, encoder_class):
    """Check a function (module, i, target, lr) -> (n,); also takes the class of task 1."""
    torch.manual_seed(0)
    target, i, lr = torch.randn(HIDDEN), 2, 0.1
    table, tied = _Table(), encoder_class(N, HIDDEN, WIDTH)
    for module in (table, tied):
        module().sum().backward()  # gradients that are left over from something else
        _moved(answer, module, i, target, lr)
    for module, i, lr in (
        (_Table(3, 4), 0, 0.25), (encoder_class(3, 4, 2), 1, 0.02),
        (_Table(4, 3).double(), 3, 0.3),
    ):  # fmt: skip
        n, size = module().shape
        target = torch.randn(size, dtype=module().dtype)
        try:
            _moved(answer, module, i, target, lr)
        except Mistake as error:
            raise Mistake(
                f"With {N} vectors, i = 2 and lr = 0.1 the answer is right, but with {n} vectors, "
                f"i = {i}, lr = {lr} and {target.dtype}: {error}"
            ) from error
    if not _own_device(lambda: answer(module, i, target, lr)):
        raise Mistake("The lengths are on the CPU, whatever device the module is on.")


def _moved(answer, module, i, target, lr):
    n, given = len(module()), target.clone()
    old = [(p.detach().clone(), p.grad if p.grad is None else p.grad.clone())
           for p in module.parameters()]  # fmt: skip
    got = answer(module, i, target, lr)
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        raise Mistake("After your function, gradients are switched off everywhere.")
    for p, (value, grad) in zip(module.parameters(), old, strict=True):
        if not torch.equal(p, value):
            raise Mistake("The module itself took the step; it should stay as it is.")
        if grad is None and p.grad is not None:
            raise Mistake("The module had no gradients, and now it has.")
        if grad is not None and (p.grad is None or not torch.equal(p.grad, grad)):
            raise Mistake("The gradients that the module had are gone or others.")
        if not p.requires_grad:
            raise Mistake("The module's parameters are frozen afterward.")
    if not torch.equal(target, given):
        raise Mistake("The target that was passed in has been changed.")
    if not isinstance(got, torch.Tensor) or tuple(got.shape) != (n,):
        shape = tuple(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
        raise Mistake(f"The result is {shape} instead of one length for each of {n} vectors.")
    if got.requires_grad:
        raise Mistake("The result still hangs on a graph.")
    _right_lengths(got, module, i, target, lr)


def _right_lengths(got, module, i, target, lr):
    kind = "table" if isinstance(module, _Table) else "encoder"
    wanted = _step(module, i, target, lr)

    def is_(other):
        return torch.allclose(got, other.to(got.dtype), rtol=1e-3, atol=1e-6)

    if is_(wanted):
        return
    if not got.any():
        raise Mistake(
            f"No vector of the {kind} moved at all. Are the vectors before and after two tensors, "
            "or one?"
        )
    known = {
        "The loss looks at all vectors, so all of them have a reason of their own.": {"loss": "all"},  # noqa: E501
        "The loss is the mean of the squares, not their sum.": {"loss": "mean"},
        "The loss is the distance itself, not its square.": {"loss": "length"},
        "The step is that of Adam, which leaves out how large a gradient is.": {"loss": "adam"},
        "That is two steps, not one.": {"steps": 2},
        "Only the embedding took the step; LSTM and MLP are trained as well.": {"only": "embedding"},  # noqa: E501
    }  # fmt: skip
    for message, wrong in known.items():
        if (kind == "encoder" or "only" not in wrong) and is_(
            _step(module, i, target, lr, **wrong)
        ):
            raise Mistake(message)
    if is_(wanted.square()):
        raise Mistake("These are the squares of the lengths.")
    if is_(_step(module, i, target, -lr)):
        raise Mistake("The step went uphill: the loss grew.")
    if is_(_step(module, i, target, 1.0)):
        raise Mistake("The step does not heed lr.")
    if is_(wanted / math.sqrt(module().shape[1])):
        raise Mistake("This is the root of a mean over the entries, not the Euclidean length.")
    raise Mistake(f"After one step on vector {i} of the {kind}, the vectors moved elsewhere.")
