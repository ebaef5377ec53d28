"""Checks of exercise 06: they name the mistake and stay silent about the solution."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import nn

from checks import Mistake, first_line
from minipeft import load_base

COUNTING = ("tiny-gpt2", "tiny-llama", "tiny-qwen2", "tiny-gpt_neox")  # they take position_ids


@contextmanager
def _one_thread():
    """On tensors this small a second thread only waits, and on a busy machine it waits long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rows_of_ids(side):
    """Two rows, the first padded by three on `side`, and their mask: each (2, 6)."""
    ids = torch.tensor([[31, 32, 33], [41, 42, 43]])
    padding = torch.zeros(1, 3, dtype=torch.int64)
    more = torch.tensor([[44, 45, 46]])
    parts = [ids[:1], padding] if side == "right" else [padding, ids[:1]]
    rows = torch.cat([torch.cat(parts, 1), torch.cat([ids[1:], more], 1)])
    return rows, (rows > 0).long()


def _device(answer, tensor, *others):
    """Where the result is for a tensor on the device "meta", which stands for a GPU."""
    try:
        return answer(tensor.to("meta"), *others).device.type
    except (RuntimeError, TypeError) as error:
        if not str(error):
            raise  # nothing is written yet
        return "meta" if "no data" in str(error) else "cpu"  # it reads values: cannot be told


def extend_labels(answer):
    """Check a function (labels, n) -> labels for n virtual tokens and the text."""
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 5, 6, -100]])  # (2, 4)
    given = labels.clone()
    got = answer(labels, 3)
    if not torch.equal(labels, given):
        raise Mistake("The labels that came in were changed. The caller still needs them.")
    if not isinstance(got, torch.Tensor):
        raise Mistake(f"Return a tensor; this is a {type(got).__name__}.")
    if tuple(got.shape) == (2, 4):
        raise Mistake(
            "Labels of shape (2, 4) came out as long as they came in, but the model now gives "
            "logits for n positions more."
        )
    if tuple(got.shape) != (2, 7):
        raise Mistake(f"For n=3, labels (2, 4) became {tuple(got.shape)} instead of (2, 7).")
    if got.dtype != torch.int64:
        raise Mistake(f"Labels are ids, so int64; these are {got.dtype}.")
    wanted = torch.cat([labels.new_full((2, 3), -100), labels], 1)
    if not torch.equal(got, wanted):
        _explain_labels(got, labels, wanted)
    for rows, seq, n in ((1, 5, 2), (3, 2, 6)):
        labels = torch.arange(rows * seq).reshape(rows, seq) + 10
        try:
            got = answer(labels, n)
        except RuntimeError as error:
            if not str(error):
                raise
            got = error
        wanted = torch.cat([labels.new_full((rows, n), -100), labels], 1)
        if not isinstance(got, torch.Tensor) or not torch.equal(got, wanted):
            wrong = (
                "number of new labels does not follow n"
                if isinstance(got, torch.Tensor) and got.shape[1:] != wanted.shape[1:]
                else "rows or the labels of the text do not follow what comes in"
            )
            raise Mistake(
                f"Right for (2, 4) and n=3, not for {(rows, seq)} and n={n}: the {wrong}."
            )
    if _device(answer, labels, 2) != "meta":
        raise Mistake("The new labels are made on the CPU, also where the others are on a GPU.")


def _explain_labels(got, labels, wanted):
    """Raise the Mistake that fits labels of the right shape for n=3."""
    if torch.equal(got, torch.cat([labels, labels.new_full((2, 3), -100)], 1)):
        raise Mistake(
            "The extra labels stand after the real ones, so each target is asked for n positions "
            "too early, partly of virtual tokens. The loss falls, and the model learns to answer "
            "before it has read."
        )
    if torch.equal(got[:, :-1], wanted[:, 1:]) or torch.equal(got[:, 1:], wanted[:, :-1]):
        raise Mistake(
            "The labels are off by one. The model shifts them itself; who shifts them by hand "
            "does it twice."
        )
    extra = got[:, :3][got[:, :3] != -100]
    if len(extra) and extra[0] < 0:
        raise Mistake(f"A virtual token has the label {int(extra[0])}. The loss ignores only -100.")
    if len(extra):
        raise Mistake(
            f"A virtual token has the label {int(extra[0])}, so the loss trains the model to "
            "predict that token there. Which value does the loss leave out?"
        )
    lost = got[:, 3:][labels == -100]
    if torch.equal(got[:, 3:][labels != -100], labels[labels != -100]):
        raise Mistake(
            f"Where the text had -100 there is now {lost.tolist()}: the question and the padding "
            "would be trained as well."
        )
    raise Mistake("The labels of the text are no longer what they were.")


def extend_mask(answer):
    """Check a function (attention_mask, n) -> the mask of n virtual tokens and the text."""
    for side in ("left", "right"):
        _, mask = _rows_of_ids(side)
        given = mask.clone()
        got = answer(mask, 2)
        if not torch.equal(mask, given):
            raise Mistake("The mask that came in was changed. The caller still needs it.")
        if tuple(got.shape) == tuple(mask.shape):
            raise Mistake(
                "The mask is as long as before. transformers then takes the columns that are "
                "missing at its end for padding: the model is blind for the last n tokens."
            )
        if got.dim() == 4:
            raise Mistake(
                f"The mask has the shape {tuple(got.shape)}. Making four dimensions of it is the "
                "model's business."
            )
        if tuple(got.shape) != (2, 8):
            raise Mistake(f"For n=2, a mask (2, 6) became {tuple(got.shape)} instead of (2, 8).")
        _explain_mask(got, mask)
    for rows, n in ((2, 5), (3, 1)):
        mask = torch.ones(rows, 6, dtype=torch.int64)
        try:
            shape = tuple(answer(mask, n).shape)
        except RuntimeError as error:
            if not str(error):
                raise
            raise Mistake(f"Right for 2 rows, an error for {rows}: {error}") from error
        if shape != (rows, n + 6):
            raise Mistake(
                f"For n={n}, a mask {(rows, 6)} became {shape} instead of {(rows, n + 6)}: the "
                "number of new columns does not follow n."
            )
    for dtype in (torch.int64, torch.bool):
        got = answer(mask.to(dtype), 2)
        if got.dtype != dtype:
            raise Mistake(
                f"A mask of {dtype} came out as {got.dtype}. A float mask is added to the scores "
                "by some attention code instead of hiding padding, and in half precision it "
                "cannot count beyond 256 tokens."
            )
    if _device(answer, mask, 2) != "meta":
        raise Mistake(
            "The new columns are made on the CPU, also where the mask is on another device: on a "
            "GPU this fails. Let the mask make them, or name its device."
        )


def _explain_mask(got, mask):
    """Raise Mistake unless this is the mask (2, 6) after two ones per row."""
    ones = mask.new_ones(2, 2)
    wanted = torch.cat([ones, mask], 1)
    if not ((got == 0) | (got == 1)).all():
        raise Mistake(
            f"The mask holds {got.min().item():.3g} and {got.max().item():.3g}. It consists of 1 "
            "and 0; the model makes numbers to add out of it."
        )
    if torch.equal(got.long(), wanted):
        return
    if torch.equal(got.long(), torch.cat([mask, ones], 1)):
        raise Mistake(
            "The ones for the virtual tokens stand after the text. Padding then counts as "
            "text in one place and text as padding in another."
        )
    if not got[:, :2].any():
        raise Mistake(
            "The virtual tokens are masked: nothing attends to them, they get no gradient, "
            "and the prompt stays forever what it was."
        )
    if got.bool().all():
        raise Mistake("The mask is all ones: the padding of the text now counts as text.")
    if torch.equal(got[:, 2:].long(), 1 - mask):
        raise Mistake("The mask of the text is turned around: 1 means a token, 0 means padding.")
    if torch.equal(got.long().sum(1), wanted.sum(1)):
        raise Mistake(
            "Each row has as many ones as it should, but not where its tokens are: the padding "
            "stays beside the text, after the virtual tokens."
        )
    raise Mistake("The mask does not consist of n ones and then the mask of the text.")


def _sampled(answer, n, dtype=torch.float32):
    model, tokenizer = load_base("tiny-llama", device="cpu", dtype=dtype)
    return answer(model, tokenizer, n), model, tokenizer


@_one_thread()
def start_rows(answer):
    """Check a function (model, tokenizer, n) -> embeddings of n random ordinary tokens."""
    torch.manual_seed(0)
    got, model, tokenizer = _sampled(answer, 8)
    table = model.get_input_embeddings().weight
    if not isinstance(got, torch.Tensor) or tuple(got.shape) != (8, 32):
        found = tuple(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
        raise Mistake(f"For n=8 and a hidden size of 32 the result is {found}, not (8, 32).")
    if got.untyped_storage().data_ptr() == table.untyped_storage().data_ptr():
        raise Mistake(
            "The vectors are a view of the embedding table: they share its memory. Whoever trains "
            "them changes the frozen table, and with it the base model."
        )
    if not table.requires_grad:
        raise Mistake(
            "The call has frozen the table of the model. Whoever fine-tunes that model afterward "
            "would not notice. The model stays as it is."
        )
    if got.requires_grad and not got.is_leaf:
        raise Mistake(
            "The vectors still hang on the graph of the embedding table. They should be a plain "
            "copy of numbers."
        )

    if got.requires_grad:
        raise Mistake(
            "The vectors require grad. They are only a start, plain numbers; trained is the "
            "parameter that is made of them."
        )

    def ids_of(rows):
        """The token of each row, -1 where it is in no row of the table."""
        distance = torch.cdist(rows.float(), table.float())
        return torch.where(distance.min(1).values < 1e-4, distance.argmin(1), -1)

    ids = ids_of(got)
    if (ids < 0).any():
        raise Mistake("The vectors are not rows of the embedding table, so they are not tokens.")
    if torch.equal(ids, torch.arange(8)):
        raise Mistake(
            "These are the first rows of the table, and they begin with special tokens: padding, "
            "begin and end."
        )
    torch.manual_seed(1)
    again, drawn = ids_of(_sampled(answer, 8)[0]), torch.rand(1)
    torch.manual_seed(2)
    _sampled(answer, 8)
    if torch.equal(drawn, torch.rand(1)):
        raise Mistake(
            "The function seeds torch itself: each run gets the same tokens, and whatever is drawn "
            "after it is the same as well. Seeding is the caller's business."
        )
    if torch.equal(again, ids):
        raise Mistake("Another torch.manual_seed gives the same rows: nothing is drawn at random.")
    torch.manual_seed(0)
    if not torch.equal(ids_of(_sampled(answer, 8)[0]), ids):
        raise Mistake(
            "The same torch.manual_seed gives other rows: nobody can repeat such a run. Draw with "
            "torch's own generator."
        )
    if len(ids.unique()) == 1:
        raise Mistake("All the vectors start as one and the same token, so they start equal.")
    drawn = torch.zeros(len(table), dtype=torch.int64)
    for _ in range(20):  # 4,000 draws among about 250 tokens
        rows = _sampled(answer, 200)[0]
        if len(rows) != 200:
            raise Mistake(
                f"For n=200 there are {len(rows)} rows. Was a special token drawn and then left "
                "out? Leave them out before drawing."
            )
        ids = ids_of(rows)
        drawn += ids.bincount(minlength=len(table))
        special = sorted(set(ids.tolist()) & set(tokenizer.all_special_ids))
        if special:
            word = tokenizer.convert_ids_to_tokens(special[0])
            raise Mistake(f"Of 200 draws one is the special token {word}.")
        if len(ids.unique()) < 80 or int(ids.max()) < len(tokenizer) - 60:
            raise Mistake(
                f"200 draws from a vocabulary of {len(tokenizer)} give {len(ids.unique())} "
                f"different tokens, the last one {int(ids.max())}: part of it is never drawn."
            )
    if drawn.max() > 48:
        word = tokenizer.convert_ids_to_tokens(int(drawn.argmax()))
        raise Mistake(
            f"The token {word} came {int(drawn.max())} times in 4,000 draws, and {len(tokenizer)} "
            "tokens share them: it is drawn far more often than others."
        )
    marked, tokenizer = load_base("tiny-llama", device="cpu")
    tokenizer.add_special_tokens({"additional_special_tokens": ["e"]})  # a token of the vocabulary
    special = tokenizer.convert_tokens_to_ids("e")
    for _ in range(20):
        if special in ids_of(answer(marked, tokenizer, 200)).tolist():
            raise Mistake(
                "A tokenizer may have special tokens anywhere in its vocabulary, not only at the "
                "first places, and one of those was drawn. The tokenizer knows them all."
            )
    wide, tokenizer = load_base("tiny-llama", device="cpu")
    wide.resize_token_embeddings(4 * len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        wide.get_input_embeddings().weight[len(tokenizer) :] = 9.0
    if (answer(wide, tokenizer, 50) == 9.0).any():
        raise Mistake(
            "Where the table has more rows than the tokenizer has tokens, rows of no token are "
            "drawn: they were never trained."
        )
    try:
        rows = _sampled(answer, 8, torch.bfloat16)[0]
    except TypeError as error:
        raise Mistake(f"On a bfloat16 model the function fails: {error}") from error
    if rows.dtype != torch.float32:
        raise Mistake("On a bfloat16 model the vectors are not float32: small updates round away.")


def positions(answer):
    """Check a function (mask of virtual tokens and text) -> position ids."""
    for side in ("right", "left"):
        _, text = _rows_of_ids(side)
        for n in (2, 4):
            mask = torch.cat([text.new_ones(2, n), text], 1)  # (2, n + 6)
            given = mask.clone()
            got = answer(mask)
            if not torch.equal(mask, given):
                raise Mistake("The mask that came in was changed; the model still needs it.")
            if tuple(got.shape) != tuple(mask.shape):
                raise Mistake(f"A mask of {tuple(mask.shape)} gives positions {tuple(got.shape)}.")
            if got.dtype != torch.int64:
                raise Mistake(
                    f"Positions look up rows of a table, so they are int64, not {got.dtype}."
                )
            _explain_positions(got, mask, side, n)
    if not torch.equal(answer(mask.bool())[1], answer(mask)[1]):
        raise Mistake("A mask of bool gives other positions than the same mask of int64.")
    if _device(answer, mask) != "meta":
        raise Mistake("The positions are made on the CPU, also where the mask is on a GPU.")


def _explain_positions(got, mask, side, n):
    """Raise Mistake unless the real tokens of both rows are counted from 0."""
    count = [got[i][mask[i] == 1].tolist() for i in range(2)]
    wanted = [list(range(len(row))) for row in count]
    if torch.equal(got, mask.cumsum(0) - 1):
        raise Mistake("This counts down the columns, from row to row. Count along each row.")
    if count[1][0] == 1:
        raise Mistake("The first position is 1. Models count from 0.")
    if count[1][:n] == wanted[0][:n] and count[1][n] == 0:
        raise Mistake(
            "The text begins at 0 again: its first tokens share their positions with the "
            "virtual tokens."
        )
    if count[1] == wanted[1] and count[0][:2] == [0, 0]:
        raise Mistake(
            "In the padded row several virtual tokens have position 0. The padding stands after "
            "them, so do not subtract it from their columns."
        )
    if side == "left" and count[0] == [*range(n), *range(n + 3, n + 6)]:
        raise Mistake(
            "On a row that is padded on the left, the padding is counted: its text begins at "
            f"{n + 3} instead of {n}, so padding changes the answer."
        )
    if count != wanted:
        raise Mistake(f"With {n} virtual tokens the real tokens have the positions {count}.")
    if got.min() < 0 or got.max() > n + 5:
        raise Mistake("Padding has a position outside of 0 to n + seq - 1: no table has it.")


def _recomputed(model, prompt, input_ids, attention_mask, steps):
    """Greedy tokens without cache or padding, row by row: the slow truth. (batch, steps)"""
    rows = []
    for row, mask in zip(input_ids, attention_mask, strict=True):
        so_far, new = row[mask.bool()], []
        for _ in range(steps):
            words = model.get_input_embeddings()(so_far)
            logits = model(inputs_embeds=torch.cat([prompt, words])[None]).logits[0, -1]
            new.append(logits.argmax())
            so_far = torch.cat([so_far, new[-1][None]])
        rows.append(torch.stack(new))
    return torch.stack(rows)


@_one_thread()
@torch.no_grad()
def greedy(answer):
    """Check a function (model, prompt, input_ids, attention_mask, steps) -> new ids."""
    for name, side, n, steps in (
        ("tiny-gpt2", "left", 4, 6),
        ("tiny-llama", "left", 4, 6),
        ("tiny-qwen2", "left", 3, 4),
        ("tiny-gpt_neox", None, 1, 1),
    ):
        model = _loud(name)
        prompt = model.get_input_embeddings()(torch.arange(60, 60 + n)).detach()
        ids, mask = _rows_of_ids("left")
        if side is None:  # one row by itself
            ids, mask = ids[1:], mask[1:]
        wanted = _recomputed(model, prompt, ids, mask, steps)
        model.config.eos_token_id = model.generation_config.eos_token_id = int(wanted[-1, 0])
        calls = []
        with _watched(model, calls):
            try:
                got, broken = answer(model, prompt, ids, mask, steps), None
            except IndexError as error:
                got, broken = None, error
        width = n + ids.shape[1]
        if calls and calls[0].length != width:
            raise Mistake(
                f"The first call gets {calls[0].length} positions; prompt and text are {width}."
            )
        if broken:
            raise Mistake(f"{name} has no such position: {broken}.") from broken
        if not isinstance(got, torch.Tensor):
            raise Mistake(f"Return one tensor of ids; this is a {type(got).__name__}.")
        if tuple(got.shape) == (len(ids), ids.shape[1] + steps):
            raise Mistake("The ids of the text are in the result; return the new ones alone.")
        if got.shape[1:] == (1,) and steps > 1:
            raise Mistake(
                "After one token it stops. The first new token is the end token here, and the task "
                "says not to stop at it."
            )
        if tuple(got.shape) != (len(ids), steps):
            raise Mistake(
                f"For {len(ids)} rows and {steps} steps the result is {tuple(got.shape)}."
            )
        _explain_calls(calls, n, width)
        if not torch.equal(got, wanted):
            _explain_tokens(name, got, wanted, calls, mask)
    _in_odd_settings(answer, prompt, ids, mask)


def _loud(name, dtype=torch.float64):
    """A tiny model with ten times the usual weights: every token before and position counts."""
    model, _ = load_base(name, device="cpu", dtype=dtype, seed=1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(10)
    return model


@contextmanager
def _watched(model, calls):
    """Note of each call of the model how many positions it gets, with what, and its cache."""

    def before(module, args, kwargs):
        given = kwargs.get("inputs_embeds")
        given = kwargs.get("input_ids", args[0] if args else None) if given is None else given
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        calls.append(SimpleNamespace(length=given.shape[1], mask=mask, positions=positions))

    def after(module, args, output):
        calls[-1].cache = output.past_key_values

    handles = [model.register_forward_pre_hook(before, with_kwargs=True)]
    handles.append(model.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _explain_calls(calls, n, width):
    """Raise Mistake unless each position was computed once."""
    lengths = [call.length for call in calls]
    if lengths[1:2] == [n + 1]:
        raise Mistake(
            "The prompt is put in front again at every step, although its keys and values are "
            "in the cache: the model reads it once per new token, in the middle of the text."
        )
    if lengths[1:2] == [width + 1]:
        raise Mistake("Each call computes the whole row again. Hand the cache on.")
    if any(length != 1 for length in lengths[1:]):
        raise Mistake(f"The calls get {lengths} positions; after the first each should get 1.")
    if len(calls) > 1 and (calls[1].cache is None or calls[1].cache.get_seq_length() < width + 1):
        raise Mistake("The later calls do not get the cache, so they know one token alone.")


def _explain_tokens(name, got, wanted, calls, mask):
    """Raise the Mistake that fits tokens that are not the likeliest ones."""
    if torch.equal(got[:, :-1], wanted[:, 1:]):
        raise Mistake("The first new token is missing: the first call predicts it already.")
    agree = got == wanted
    first, second = calls[0], calls[1]
    grown = None if first.mask is None else torch.cat([first.mask, mask.new_ones(2, 1)], 1)
    if second.mask is not None and second.mask.shape == (2, calls[0].length + 1):
        if grown is not None and not torch.equal(second.mask, grown):
            raise Mistake(
                "The mask of the second call has the right length, but its new one is not after "
                "the text, where the new token is."
            )
        places = second.mask.sum(1, keepdim=True) - 1
        if second.positions is not None and not torch.equal(second.positions, places):
            raise Mistake(
                f"The first new tokens of the two rows get the positions "
                f"{second.positions.flatten().tolist()} instead of {places.flatten().tolist()}: "
                "each goes on where its own row stood."
            )
    if agree[1].all():
        raise Mistake(
            f"On {name} the unpadded row is right and the left-padded one is not. Look at "
            "the mask and the positions of the later calls."
        )
    if not agree[:, 0].all():
        raise Mistake(f"On {name} already the first new token is not the likeliest one.")
    raise Mistake(
        f"On {name} the first new token is right, and later ones are not those that "
        "the model gives when it reads everything anew. What grows with each step?"
    )


def _in_odd_settings(answer, prompt, ids, mask):
    """A model whose configuration turns the cache off, and one in half precision."""
    model = _loud("tiny-gpt_neox")
    model.config.use_cache = False
    calls = []
    with _watched(model, calls):
        answer(model, prompt, ids, mask, 2)
    if len(calls) < 2 or calls[1].cache is None:
        raise Mistake(
            "Where the model's configuration says use_cache=False, as it does after much training, "
            "there is no cache. Ask for it in the call."
        )
    model = _loud("tiny-llama", torch.bfloat16)
    try:
        answer(model, prompt.float(), ids, mask, 2)
    except RuntimeError as error:
        if not str(error):
            raise
        raise Mistake(
            f"A float32 prompt before a bfloat16 model fails: {first_line(error)}"
        ) from error


def _tuned(answer, name, side="right", dtype=torch.float64):
    """A wrapper whose prompt is a text, its inputs, and what the model does with the text typed."""
    model, _ = load_base(name, device="cpu", dtype=dtype)
    text = torch.arange(60, 65)
    prompt = model.get_input_embeddings().weight.detach()[text]
    ids, mask = _rows_of_ids(side)
    labels = torch.where(mask == 1, ids, -100)
    labels[:, 0] = -100
    rows = [row[m.bool()] for row, m in zip(ids, mask, strict=True)]
    with torch.no_grad():
        logits = [model(torch.cat([text, row])[None]).logits[0, 5:] for row in rows]
    logits = torch.cat(logits)  # (real tokens of both rows, vocab)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return answer(model, prompt), model, prompt, batch, logits


@_one_thread()
def prompt_tuned(answer):
    """Check a class (model, prompt) -> a module with model, prompt and forward."""
    tuned, model, prompt, batch, logits = _tuned(answer, "tiny-llama")
    for name in ("model", "prompt"):
        if not hasattr(tuned, name):
            raise Mistake(f"The module has no attribute {name}.")
    if tuned.model is not model:
        raise Mistake(
            "self.model is not the model that was passed in. A copy takes its memory twice, and "
            "the caller's own model stays as it was."
        )
    if not isinstance(tuned.prompt, nn.Parameter):
        raise Mistake("prompt is not an nn.Parameter, so no optimizer will ever find it.")
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    if any(p is tuned.prompt for p in model.parameters()):
        raise Mistake(
            "The prompt is registered in the base model, which then has a parameter more than "
            "before, also for everybody else who uses it."
        )
    if any(p.requires_grad for p in model.parameters()):
        raise Mistake(
            f"The base is not frozen: {trained:,} numbers are trained instead of the "
            f"{prompt.numel()} of the prompt. The loss falls, and it is fine-tuning that does it."
        )
    if trained != prompt.numel():
        raise Mistake(
            f"Trainable are {trained} parameters, and the prompt has {prompt.numel()}. What else "
            "does the module hold?"
        )
    if tuned.prompt.dtype != prompt.dtype:
        raise Mistake(f"A float64 prompt became {tuned.prompt.dtype}; float64 stays.")
    if not torch.equal(tuned.prompt, prompt):
        raise Mistake("The prompt does not start as the vectors that were given.")
    if tuned.prompt.data_ptr() == prompt.data_ptr():
        raise Mistake("The prompt shares the memory of the vectors that were given; copy them.")
    try:
        output = tuned(**batch)
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, NotImplementedError):
            raise
        raise Mistake(f"forward fails on tiny-llama: {first_line(error)}") from error
    _still(torch.float64, model)
    if not hasattr(output, "logits"):
        raise Mistake(f"forward returns a {type(output).__name__}, not the output of the model.")
    if output.logits.shape[1] != batch["input_ids"].shape[1]:
        raise Mistake(
            f"Texts of 6 tokens give logits for {output.logits.shape[1]} positions. Those of the "
            "virtual tokens are still there."
        )
    for side in ("right", "left"):
        for name in COUNTING:
            tuned, model, prompt, batch, logits = _tuned(answer, name, side)
            real = batch["attention_mask"].bool()
            output = tuned(**batch)
            got = output.logits[real]
            if not torch.allclose(got, logits, atol=1e-9):
                long_row = output.logits[1]  # it has no padding
                if torch.allclose(long_row[5:], logits[-6:][:1], atol=1e-9):
                    raise Mistake("The logits were cut at the wrong end: they begin too early.")
                with torch.no_grad():
                    bare = model(input_ids=batch["input_ids"][1:]).logits[0]
                if torch.allclose(long_row, bare, atol=1e-9):
                    raise Mistake("The logits are those of the text without any prompt.")
                if side == "left" and torch.allclose(long_row, logits[-6:], atol=1e-9):
                    raise Mistake(
                        f"On {name} the unpadded row is right, and the one padded on the left is "
                        "not. Where do its positions come from?"
                    )
                if side == "right" and torch.allclose(got[:3], logits[:3], atol=1e-9):
                    raise Mistake(f"On {name} one of two rows is right and the other is not.")
                raise Mistake(
                    f"On {name}, padded on the {side}, the logits differ from those of the same "
                    "text typed in front. Are mask and positions as long as the row?"
                )
            typed = nn.functional.cross_entropy(*_predictions(output.logits, batch["labels"]))
            if output.loss is None:
                raise Mistake("There are labels, but the output has no loss.")
            if not torch.allclose(output.loss, typed, atol=1e-6):
                raise Mistake(
                    f"The logits are right, and the loss is not: {output.loss:.4f} instead of "
                    f"{typed:.4f}. Which logits meet which labels?"
                )
    bare = tuned(batch["input_ids"], batch["attention_mask"])
    if bare.loss is not None:
        raise Mistake("Without labels there should be no loss.")
    if bare.logits.shape[1] != batch["input_ids"].shape[1]:
        raise Mistake("Without labels the logits of the virtual tokens are not cut off.")
    if output.loss.requires_grad:
        output.loss.backward()
    if tuned.prompt.grad is None or not tuned.prompt.grad.any():
        raise Mistake("No gradient arrives at the prompt. Was it detached or masked?")
    _with_other_numbers(answer)
    tuned, model, _, batch, _ = _tuned(answer, "tiny-llama", dtype=torch.bfloat16)
    if tuned.prompt.dtype != torch.float32:
        raise Mistake(
            f"On a bfloat16 model the prompt is {tuned.prompt.dtype}: small updates round away."
        )
    try:
        tuned(**batch)
    except RuntimeError as error:
        raise Mistake(f"forward fails on a bfloat16 model: {first_line(error)}") from error
    _still(torch.bfloat16, model)
    if tuned.prompt.dtype != torch.float32:
        raise Mistake(f"One forward pass has turned the prompt into {tuned.prompt.dtype}.")


def _still(dtype, model):
    if model.dtype != dtype:
        raise Mistake(f"The {dtype} model was turned into {model.dtype}. It is the caller's.")


def _with_other_numbers(answer):
    """One row and three, after one virtual token and seven."""
    for rows, n in ((1, 7), (3, 1)):
        model, _ = load_base("tiny-qwen2", device="cpu", dtype=torch.float64)
        text = torch.arange(50, 50 + n)
        ids = torch.arange(rows * 4).reshape(rows, 4) + 20
        with torch.no_grad():
            wanted = model(torch.cat([text.expand(rows, -1), ids], 1)).logits[:, n:]
        tuned = answer(model, model.get_input_embeddings().weight.detach()[text])
        try:
            got = tuned(ids, torch.ones_like(ids), ids).logits
        except (RuntimeError, ValueError) as error:
            got = first_line(error)
        if not isinstance(got, torch.Tensor) or got.shape != wanted.shape:
            said = got if isinstance(got, str) else f"logits {tuple(got.shape)}"
            raise Mistake(
                f"{rows} row(s) of 4 tokens after {n} virtual tokens do not fit, 2 rows after 5 "
                f"do: {said}."
            )
        if not torch.allclose(got, wanted, atol=1e-9):
            raise Mistake(f"The logits are right after 5 virtual tokens, and not after {n}.")


def _predictions(logits, labels):
    """Flat logits and the labels one position later."""
    return logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
