"""Checks of exercise 05: they name the mistake and stay silent about the solution."""

import warnings

import torch
from torch import nn

from checks import Mistake
from minipeft import load_base

ARCHITECTURES = ("tiny-llama", "tiny-gpt2", "tiny-bloom", "tiny-qwen2", "tiny-gpt_neox")
BLOCKS = {
    "tiny-llama": "model.layers", "tiny-gpt2": "transformer.h", "tiny-bloom": "transformer.h",
    "tiny-qwen2": "model.layers", "tiny-gpt_neox": "gpt_neox.layers",
}  # fmt: skip


def _load(name):
    return load_base(name, device="cpu")[0]


def _trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def _same_model(result, model):
    if result is not model:
        raise Mistake("Return the model that was passed in, changed in place.")


def _refuses(answer, *arguments):
    try:
        answer(*arguments)
    except ValueError:
        return True
    except (IndexError, KeyError, AttributeError, StopIteration, TypeError):
        pass
    return False


class _Part(nn.Module):
    """A block in which one name contains another."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.q_proj_extra = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


def train_only(answer):
    """Check a function (model, *patterns) -> the model, only the matched modules trainable."""

    def fresh():
        return nn.ModuleDict({"first": _Part(), "second": _Part()})

    model = fresh()
    model["first"].norm(torch.ones(4)).sum().backward()
    _same_model(answer(model, "*.q_proj"), model)
    got = _trainable(model)
    wanted = {f"{part}.q_proj.{kind}" for part in model for kind in ("weight", "bias")}
    if len(got) == len(list(model.parameters())):
        raise Mistake("With the pattern '*.q_proj' everything is trainable: nothing was frozen.")
    if not got:
        raise Mistake(
            "The pattern '*.q_proj' unfroze nothing. Patterns name modules, and a parameter's name "
            "goes on behind that of its module."
        )
    if any("extra" in name for name in got):
        raise Mistake(
            "'*.q_proj' also unfroze a q_proj_extra. The whole name of a module must fit, not a "
            "piece of it."
        )
    if got != wanted:
        raise Mistake(f"With '*.q_proj' these are trainable: {sorted(got)}.")
    if model["first"].norm.weight.grad is not None:
        raise Mistake(
            "A parameter that was frozen just now still carries the gradient of an earlier "
            "backward pass. An optimiser that holds it would go on applying it."
        )
    answer(model, "first")
    if "second.q_proj.weight" in _trainable(model):
        raise Mistake("A second call leaves trainable what only the first call had asked for.")
    if len(_trainable(model)) != 6:
        raise Mistake(
            "The pattern 'first' is a module with modules inside: all their parameters belong to "
            f"it. {len(_trainable(model))} of 6 tensors are trainable."
        )
    answer(model, "first.norm", "second.norm")
    if _trainable(model) != {
        f"{part}.norm.{kind}" for part in model for kind in ("weight", "bias")
    }:
        raise Mistake("With two patterns, what either of them matches is to be trainable.")
    if not _refuses(answer, fresh(), "*.k_proj"):
        raise Mistake("A pattern that matches no module is passed over; raise a ValueError.")
    if not _refuses(answer, fresh(), "first.norm", "*.k_proj"):
        raise Mistake(
            "One pattern matched and one did not, and there was no ValueError: a typing mistake "
            "would freeze a part in silence. Look at each pattern by itself."
        )


def train_last_blocks(answer):
    """Check a function (model, k) -> the model, only its last k blocks trainable."""
    for name in ARCHITECTURES:
        model = _load(name)
        try:
            result = answer(model, 1)
        except NotImplementedError:
            raise
        except Exception as error:
            raise Mistake(
                f"{name}: {type(error).__name__}: {error}. Does your function rely on a name that "
                "only some architectures use?"
            ) from error
        _same_model(result, model)
        path = BLOCKS[name]
        names = [n for n, _ in model.named_parameters()]
        first = {n for n in names if n.startswith(f"{path}.0.")}
        last = {n for n in names if n.startswith(f"{path}.1.")}
        got = _trainable(model)
        if got == first:
            raise Mistake(f"{name}: that is the first block; the last one was asked for.")
        if not last <= got:
            raise Mistake(
                f"{name}: of the {len(last)} tensors of the last block only "
                f"{len(last & got)} are trainable. A block is a module, not a tensor."
            )
        if got & first:
            raise Mistake(f"{name}: with k=1 the first block of two is trainable as well.")
        if got - last:
            raise Mistake(
                f"{name}: {sorted(got - last)[0]} is trainable, but it stands in no block. Only "
                "the blocks were asked for."
            )
        answer(model, 2)
        if _trainable(model) != first | last:
            raise Mistake(f"{name}: with k=2 not both blocks are trainable, or more than those.")
    model = _load("tiny-llama")
    model.model.layers[0].experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    decoy = nn.ModuleList([nn.Linear(2, 2) for _ in range(5)])
    children = dict(model.named_children())
    for child in children:
        delattr(model, child)
    model.decoy = decoy  # before the blocks
    for child, module in children.items():
        setattr(model, child, module)
    answer(model, 1)
    if any("decoy" in name for name in _trainable(model)):
        raise Mistake(
            "A model with two lists of modules: the wrong one was taken for the blocks. The "
            "configuration says how long the right one is."
        )
    if any("experts" in name for name in _trainable(model)) or not _trainable(model):
        raise Mistake("A list inside of a block was taken for the list of blocks.")
    if not _refuses(answer, _load("tiny-llama"), 3):
        raise Mistake("A model of two blocks has no last three; raise a ValueError.")
    if not _refuses(answer, _load("tiny-llama"), 0):
        raise Mistake("k=0 is accepted. Look at what blocks[-0:] is, and raise a ValueError.")


class _Bias(nn.Module):
    """A module of that name, whose weight is no bias."""

    def __init__(self):
        super().__init__()
        self.bias_net, self.plain = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)


def train_biases(answer):
    """Check a function (model) -> the model, only its biases trainable."""
    for name in ("tiny-gpt2", "tiny-bloom", "tiny-qwen2", "tiny-gpt_neox"):
        model = _load(name)
        _same_model(answer(model), model)
        got = _trainable(model)
        biases = {n for n, _ in model.named_parameters() if n.split(".")[-1] == "bias"}
        if got - biases:
            raise Mistake(f"{name}: {sorted(got - biases)[0]} is trainable, and it is no bias.")
        missing = sorted(biases - got)
        if missing:
            owner = type(model.get_submodule(missing[0].rpartition(".")[0])).__name__
            if owner == "LayerNorm":
                raise Mistake(f"{name}: {missing[0]} is frozen. Norms have biases too.")
            raise Mistake(
                f"{name}: {missing[0]} is frozen. It is the bias of a {owner}; which kinds of "
                "module have one differs from model to model."
            )
    model = _Bias()
    answer(model)
    if model.bias_net.weight.requires_grad:
        raise Mistake("The weight of a module called bias_net is trainable; only its bias is one.")
    llama = _load("tiny-llama")
    if not _refuses(answer, llama):
        raise Mistake("Llama has no bias at all: a run would train nothing. Raise a ValueError.")
    if not _trainable(llama):
        raise Mistake(
            "The refused Llama came back with everything frozen. Look first, then change the model."
        )


def count_by_part(answer):
    """Check a function (model) -> {child: (trainable, total)}."""
    for name in ARCHITECTURES:
        model = _load(name)
        model.requires_grad_(False)
        backbone = next(iter(dict(model.named_children())))
        model.get_submodule(BLOCKS[name])[1].requires_grad_(True)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        head = (
            0 if model.config.tie_word_embeddings else model.get_output_embeddings().weight.numel()
        )
        got = answer(model)
        if not isinstance(got, dict) or list(got) != [backbone, "lm_head"]:
            raise Mistake(f"Return a dict with one key for each child: {backbone}, lm_head.")
        if not all(isinstance(v, tuple) and len(v) == 2 for v in got.values()):
            raise Mistake("Each value is a tuple of two numbers: (trainable, total).")
        tensors = len(list(model.get_submodule(backbone).parameters()))
        if got[backbone][1] == tensors:
            raise Mistake(f"{name}: that is the number of tensors. Count the numbers in them.")
        if got[backbone] == (total - head, trainable):
            raise Mistake(f"{name}: the two numbers are the wrong way round.")
        if sum(v[1] for v in got.values()) > total and head == 0:
            raise Mistake(
                f"{name}: the parts sum to {sum(v[1] for v in got.values())}, but the model has "
                f"{total} parameters. Which tensor has two names?"
            )
        if got[backbone][1] != total - head:
            raise Mistake(
                f"{name}: {backbone} has {total - head} parameters, not {got[backbone][1]}. A "
                "tied tensor counts where it comes first."
            )
        if got[backbone][0] != trainable:
            raise Mistake(f"{name}: {trainable} of them are trainable, not {got[backbone][0]}.")
        if got["lm_head"] != (0, head):
            raise Mistake(f"{name}: the head is frozen; its pair is {(0, head)}.")


def make_optimizer(answer):
    """Check a function (model, lr, weight_decay) -> AdamW over what is trainable."""
    model = _load("tiny-llama")
    model.requires_grad_(False)
    block = model.model.layers[1].requires_grad_(True)
    optimizer = answer(model, 1e-2, 0.1)
    if not isinstance(optimizer, torch.optim.AdamW):
        raise Mistake(f"Return a torch.optim.AdamW; this is a {type(optimizer).__name__}.")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {id(p): n for n, p in model.named_parameters()}
    frozen = [names[i] for i in held if i in names and not names[i].startswith("model.layers.1.")]
    if frozen:
        raise Mistake(
            f"The optimiser holds {sorted(frozen)[0]}, which is frozen. Whoever writes zeros into "
            "its gradient would see weight decay move it."
        )
    wanted = {id(p) for p in block.parameters()}
    if held != wanted:
        raise Mistake(f"It holds {len(held)} of the {len(wanted)} trainable tensors.")
    for group in optimizer.param_groups:
        if group["lr"] != 1e-2:
            raise Mistake(f"The learning rate is {group['lr']}, not the 0.01 that was passed.")
        if group["weight_decay"] != 0.1:
            raise Mistake(f"The decay is {group['weight_decay']}, not the 0.1 that was passed.")
    if not all(p.requires_grad for p in block.parameters()) or model.lm_head.weight.requires_grad:
        raise Mistake("Making the optimiser changed what is trainable.")
    tied = _load("tiny-gpt2")
    tied.requires_grad_(False)
    tied.lm_head.requires_grad_(True)
    with warnings.catch_warnings():  # torch warns of what is said below
        warnings.simplefilter("ignore")
        optimizer = answer(tied, 1e-2, 0.0)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if len(held) != 1:
        raise Mistake(f"A tied head is one tensor, but the optimiser holds {len(held)}.")
    if not _refuses(answer, _load("tiny-llama").requires_grad_(False), 1e-2, 0.1):
        raise Mistake(
            "Nothing is trainable, and there is no ValueError: the run would do nothing for hours."
        )
