"""Checks of exercise 06: they name the mistake and stay silent about the solution."""

from contextlib import contextmanager

import torch
from torch import nn

from checks import Mistake
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
    if torch.equal(got, wanted):
        return
    if torch.equal(got, torch.cat([labels, labels.new_full((2, 3), -100)], 1)):
        raise Mistake(
            "The extra labels stand behind the real ones, so each target is asked for n positions "
            "too early, partly of virtual tokens. The loss falls, and the model learns to answer "
            "before it has read."
        )
    if torch.equal(got[:, :-1], wanted[:, 1:]) or torch.equal(got[:, 1:], wanted[:, :-1]):
        raise Mistake(
            "The labels are off by one. The model shifts them itself; who shifts them by hand "
            "does it twice."
        )
    extra = got[:, :3][got[:, :3] != -100]
    if len(extra):
        raise Mistake(
            f"A virtual token has the label {int(extra[0])}, so the loss trains the model to "
            "predict that token there. Which value does the loss leave out?"
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
        if tuple(got.shape) != (2, 8):
            raise Mistake(f"For n=2, a mask (2, 6) became {tuple(got.shape)} instead of (2, 8).")
        front = torch.cat([mask.new_ones(2, 2), mask], 1)
        if torch.equal(got.long(), front):
            continue
        if torch.equal(got.long(), torch.cat([mask, mask.new_ones(2, 2)], 1)):
            raise Mistake(
                "The ones for the virtual tokens stand behind the text. Padding then counts as "
                "text in one place and text as padding in another."
            )
        if not got[:, :2].any():
            raise Mistake(
                "The virtual tokens are masked: nothing attends to them, they get no gradient, "
                "and the prompt stays for ever what it was."
            )
        if got.bool().all():
            raise Mistake("The mask is all ones: the padding of the text now counts as text.")
        raise Mistake("The mask does not consist of n ones and then the mask of the text.")
    if tuple(answer(mask, 5).shape) != (2, 11):
        raise Mistake(
            f"For n=5, a mask (2, 6) became {tuple(answer(mask, 5).shape)} instead of (2, 11): the "
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
    try:  # "meta" stands for any other device, such as a GPU
        device = answer(mask.to("meta"), 2).device.type
    except (RuntimeError, NotImplementedError) as error:
        if not str(error):
            raise
        device = "cpu"
    if device != "meta":
        raise Mistake(
            "The new columns are made on the CPU, also where the mask is on another device: on a "
            "GPU this fails. Let the mask make them, or name its device."
        )


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
        raise Mistake("The vectors are no rows of the embedding table, so they are no tokens.")
    if torch.equal(ids, torch.arange(8)):
        raise Mistake(
            "These are the first rows of the table, and they begin with special tokens: padding, "
            "begin and end."
        )
    torch.manual_seed(1)
    if torch.equal(ids_of(_sampled(answer, 8)[0]), ids):
        raise Mistake("Another torch.manual_seed gives the same rows: nothing is drawn at random.")
    torch.manual_seed(0)
    if not torch.equal(ids_of(_sampled(answer, 8)[0]), ids):
        raise Mistake(
            "The same torch.manual_seed gives other rows: nobody can repeat such a run. Draw with "
            "torch's own generator."
        )
    if len(ids.unique()) == 1:
        raise Mistake("All the vectors start as one and the same token, so they start equal.")
    for _ in range(20):  # 4,000 draws among about 250 tokens
        ids = ids_of(_sampled(answer, 200)[0])
        special = sorted(set(ids.tolist()) & set(tokenizer.all_special_ids))
        if special:
            word = tokenizer.convert_ids_to_tokens(special[0])
            raise Mistake(f"Of 200 draws one is the special token {word}.")
        if len(ids.unique()) < 80 or int(ids.max()) < len(tokenizer) - 60:
            raise Mistake(
                f"200 draws from a vocabulary of {len(tokenizer)} give {len(ids.unique())} "
                f"different tokens, the last one {int(ids.max())}: part of it is never drawn."
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
    if _sampled(answer, 8, torch.bfloat16)[0].dtype != torch.float32:
        raise Mistake("On a bfloat16 model the vectors are not float32: small updates round away.")


def positions(answer):
    """Check a function (mask of virtual tokens and text) -> position ids."""
    for side in ("right", "left"):
        _, mask = _rows_of_ids(side)
        mask = torch.cat([mask.new_ones(2, 2), mask], 1)  # (2, 8)
        got = answer(mask)
        if tuple(got.shape) != tuple(mask.shape):
            raise Mistake(f"A mask of (2, 8) gives positions of {tuple(got.shape)}.")
        if got.dtype.is_floating_point:
            raise Mistake(f"Positions look up rows of a table, so they are int64, not {got.dtype}.")
        count = [got[i][mask[i] == 1].tolist() for i in range(2)]
        if count[1][0] == 1:
            raise Mistake("The first position is 1. Models count from 0.")
        if count[1][:2] == [0, 1] and count[1][2] == 0:
            raise Mistake(
                "The text begins at 0 again: its first tokens share their positions with the "
                "virtual tokens."
            )
        if side == "left" and count[0] == [0, 1, 5, 6, 7]:
            raise Mistake(
                "On a row that is padded on the left, the padding is counted: its text begins at "
                "5 instead of 2, so padding changes the answer."
            )
        if count[0] != [0, 1, 2, 3, 4] or count[1] != list(range(8)):
            raise Mistake(f"The real tokens of the two rows have the positions {count}.")
        if got.min() < 0 or got.max() > 7:
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
    steps, n = 6, 4
    for name in COUNTING:
        model, _ = load_base(name, device="cpu", dtype=torch.float64, seed=1)
        # Ten times the usual weights: with them every token before and every position counts.
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
        prompt = model.get_input_embeddings()(torch.arange(60, 60 + n)).detach()
        ids, mask = _rows_of_ids("left")
        fed, caches = [], []  # how many positions each call gets, and the cache it leaves

        def before(module, args, kwargs, fed=fed):
            given = kwargs.get("inputs_embeds")
            given = kwargs.get("input_ids", args[0] if args else None) if given is None else given
            fed.append(given.shape[1])

        def after(module, args, output, caches=caches):
            caches.append(output.past_key_values)

        handles = [model.register_forward_pre_hook(before, with_kwargs=True)]
        handles.append(model.register_forward_hook(after))
        width, broken = n + ids.shape[1], None
        try:
            got = answer(model, prompt, ids, mask, steps)
        except IndexError as error:
            got, broken = None, error
        for handle in handles:
            handle.remove()
        if fed and fed[0] != width:
            raise Mistake(f"The first call gets {fed[0]} positions; prompt and text are {width}.")
        if broken:
            raise Mistake(f"{name} has no such position: {broken}.") from broken
        if tuple(got.shape) == (2, ids.shape[1] + steps):
            raise Mistake("The ids of the text are in the result; return the new ones alone.")
        if tuple(got.shape) != (2, steps):
            raise Mistake(f"For two rows and {steps} steps the result is {tuple(got.shape)}.")
        if fed[1:2] == [n + 1]:
            raise Mistake(
                "The prompt is put in front again at every step, although its keys and values are "
                "in the cache: the model reads it once per new token, in the middle of the text."
            )
        if fed[1:2] == [width + 1]:
            raise Mistake("Each call computes the whole row again. Hand the cache on.")
        if any(length != 1 for length in fed[1:]):
            raise Mistake(f"The calls get {fed} positions; after the first each should get 1.")
        if caches[1] is None or caches[1].get_seq_length() < width + 1:
            raise Mistake("The later calls do not get the cache, so they know one token alone.")
        wanted = _recomputed(model, prompt, ids, mask, steps)
        if torch.equal(got[:, :-1], wanted[:, 1:]):
            raise Mistake("The first new token is missing: the first call predicts it already.")
        if torch.equal(got[1], wanted[1]) and not torch.equal(got[0], wanted[0]):
            raise Mistake(
                f"On {name} the unpadded row is right and the left-padded one is not. Look at "
                "the mask and the positions of the later calls."
            )
        if not torch.equal(got, wanted):
            agree = got == wanted
            if agree[:, 0].all():
                raise Mistake(
                    f"On {name} the first new token is right, and later ones are not those that "
                    "the model gives when it reads everything anew. What grows with each step?"
                )
            raise Mistake(f"On {name} already the first new token is not the likeliest one.")


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
        raise Mistake("prompt is no nn.Parameter, so no optimiser will ever find it.")
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    if any(p.requires_grad for p in model.parameters()):
        raise Mistake(
            f"The base is not frozen: {trained:,} numbers are trained instead of the "
            f"{prompt.numel()} of the prompt. The loss falls, and it is fine-tuning that does it."
        )
    if not torch.equal(tuned.prompt, prompt):
        raise Mistake("The prompt does not start as the vectors that were given.")
    if tuned.prompt.data_ptr() == prompt.data_ptr():
        raise Mistake("The prompt shares the memory of the vectors that were given; copy them.")
    try:
        output = tuned(**batch)
    except (RuntimeError, ValueError, TypeError) as error:
        raise Mistake(f"forward fails on tiny-llama: {str(error).splitlines()[0]}") from error
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
    if tuned(batch["input_ids"], batch["attention_mask"]).loss is not None:
        raise Mistake("Without labels there should be no loss.")
    if output.loss.requires_grad:
        output.loss.backward()
    if tuned.prompt.grad is None or not tuned.prompt.grad.any():
        raise Mistake("No gradient arrives at the prompt. Was it detached or masked?")
    tuned, _, _, batch, _ = _tuned(answer, "tiny-llama", dtype=torch.bfloat16)
    if tuned.prompt.dtype != torch.float32:
        raise Mistake(
            f"On a bfloat16 model the prompt is {tuned.prompt.dtype}: small updates round away."
        )
    try:
        tuned(**batch)
    except RuntimeError as error:
        raise Mistake(f"forward fails on a bfloat16 model: {str(error).splitlines()[0]}") from error


def _predictions(logits, labels):
    """Flat logits and the labels one position later."""
    return logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
