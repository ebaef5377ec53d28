"""Checks of exercise 05: they name the mistake and stay silent about the solution."""

import warnings

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from checks import Mistake
from minipeft import load_base

ARCHITECTURES = ("tiny-llama", "tiny-gpt2", "tiny-bloom", "tiny-qwen2", "tiny-gpt_neox")
BLOCKS = {
    "tiny-llama": "model.layers", "tiny-gpt2": "transformer.h", "tiny-bloom": "transformer.h",
    "tiny-qwen2": "model.layers", "tiny-gpt_neox": "gpt_neox.layers",
}  # fmt: skip
FIRST = (1e-2, 0.1)  # learning rate and decay of the first optimizer


def _load(name):
    return load_base(name, device="cpu")[0]


def _trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def _with_gradients(model):
    """The model, each parameter with the gradient of an earlier step, in training mode."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model.train()


def _changed_in_place(result, model):
    """What holds after tasks 1 to 3, on a model that came from _with_gradients."""
    if result is not model:
        copied = type(result) is type(model)
        raise Mistake(
            "A copy was changed; the caller's own model stays as it was."
            if copied
            else "Return the model that was passed in, changed in place."
        )
    if any("requires_grad" in vars(module) for module in model.modules()):
        raise Mistake(
            "A module got a new attribute `requires_grad`, which does nothing: the flag belongs to "
            "parameters. A module has a method for all of its own."
        )
    if not model.training:
        raise Mistake(
            "Freezing is not a mode: the model came in training mode and is now in eval mode."
        )
    frozen = [p.grad for p in model.parameters() if not p.requires_grad and p.grad is not None]
    if any(grad.any() for grad in frozen):
        raise Mistake(
            "A parameter that was frozen just now still carries the gradient of an earlier "
            "backward pass. An optimizer that holds it would go on applying it."
        )
    if frozen:
        raise Mistake(
            "A frozen parameter has a gradient of zero. That is not the same as none: weight decay "
            "would still move the parameter."
        )


def _refuses(answer, model, *arguments):
    """Whether the answer raises a ValueError; the model must then be as it was."""
    before = _trainable(model)
    try:
        answer(model, *arguments)
    except ValueError:
        if _trainable(model) != before:
            raise Mistake(
                "The ValueError comes too late: the refused model is partly frozen by then. Look "
                "first, then change the model."
            ) from None
        return True
    except (IndexError, KeyError, AttributeError, StopIteration, TypeError):
        pass
    return False


class _Part(nn.Module):
    """A block in which one name contains another."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.q_proj_extra = nn.Linear(4, 4), nn.Linear(4, 4)
        self.kq_proj, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)


def train_only(answer):
    """Check a function (model, *patterns) -> the model, only the matched modules trainable."""

    def fresh():
        deep = nn.ModuleDict({"third": _Part()})
        parts = {"first": _Part(), "second": _Part(), "first_deep": deep}
        return _with_gradients(nn.ModuleDict(parts))

    def of(*modules):
        return {n for n in names if n.startswith(tuple(f"{module}." for module in modules))}

    model = fresh()
    names = [name for name, _ in model.named_parameters()]
    queries = of("first.q_proj", "second.q_proj", "first_deep.third.q_proj")
    _changed_in_place(answer(model, "*.q_proj"), model)
    got = _trainable(model)
    if len(got) == len(names):
        raise Mistake("With the pattern '*.q_proj' everything is trainable: nothing was frozen.")
    if not got:
        raise Mistake(
            "The pattern '*.q_proj' unfroze nothing. Patterns name modules, and a parameter's name "
            "goes on after that of its module."
        )
    if any("extra" in name for name in got):
        raise Mistake(
            "'*.q_proj' also unfroze a q_proj_extra. The whole name of a module must fit, not a "
            "piece of it."
        )
    if any("kq_proj" in name for name in got):
        raise Mistake("'*.q_proj' also unfroze a kq_proj: the dot of a pattern is a dot.")
    if got == queries - of("first_deep"):
        raise Mistake(
            "'*.q_proj' misses first_deep.third.q_proj. A * stands for anything, dots included."
        )
    if got != queries:
        raise Mistake(f"With '*.q_proj' these are trainable: {sorted(got)}.")
    answer(model, "first")
    got = _trainable(model)
    if "second.q_proj.weight" in got:
        raise Mistake("A second call leaves trainable what only the first call had asked for.")
    if got == of("first.q_proj"):
        raise Mistake("Of the module 'first', what an earlier call had frozen stays frozen.")
    if got & of("first_deep"):
        raise Mistake("The pattern 'first' also unfroze first_deep, whose name only begins so.")
    if got != of("first"):
        raise Mistake(
            "The pattern 'first' is a module with modules inside: all their parameters belong to "
            f"it. {len(got)} of {len(of('first'))} tensors are trainable."
        )
    answer(model, "first.norm", "second.norm")
    if _trainable(model) != of("first.norm", "second.norm"):
        raise Mistake("With two patterns, what either of them matches must be trainable.")
    if _refuses(answer, model, "f*.norm"):
        raise Mistake("'f*.norm' is refused. A * may stand anywhere in a pattern.")
    if _trainable(model) != of("first.norm", "first_deep.third.norm"):
        raise Mistake(f"With 'f*.norm' these are trainable: {sorted(_trainable(model))}.")
    if _refuses(answer, model) or _trainable(model):
        raise Mistake("Without any pattern, everything should be frozen, and no error raised.")
    tied = _with_gradients(_load("tiny-gpt2"))
    if _refuses(answer, tied, "lm_head") or not tied.lm_head.weight.requires_grad:
        raise Mistake(
            "The pattern 'lm_head' does not reach a tied head, because its weight is listed under "
            "the name of the embedding alone. Go from modules to parameters."
        )
    if not _refuses(answer, fresh(), "*.k_proj"):
        raise Mistake("A pattern that matches no module is passed over; raise a ValueError.")
    for patterns in (("first.norm", "*.k_proj"), ("*.k_proj", "first.norm")):
        if not _refuses(answer, fresh(), *patterns):
            raise Mistake(
                "One pattern matched and one did not, and there was no ValueError: a typing "
                "mistake would freeze a part in silence. Look at each pattern by itself."
            )


def train_last_blocks(answer):
    """Check a function (model, k) -> the model, only its last k blocks trainable."""
    for name in ARCHITECTURES:
        model = _with_gradients(_load(name))
        try:
            result = answer(model, 1)
        except (AttributeError, StopIteration, IndexError, ValueError) as error:
            raise Mistake(
                f"{name}: {type(error).__name__}: {error}. Does your function rely on a name that "
                "only some architectures use?"
            ) from error
        _changed_in_place(result, model)
        path = BLOCKS[name]
        names = [n for n, _ in model.named_parameters()]
        first = {n for n in names if n.startswith(f"{path}.0.")}
        last = {n for n in names if n.startswith(f"{path}.1.")}
        got = _trainable(model)
        if len(got) == len(names):
            raise Mistake(f"{name}: everything is trainable; the rest was not frozen.")
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
        if _trainable(model) == last and _trainable(answer(_load(name), 2)) == first | last:
            raise Mistake(
                f"{name}: after k=1 a call with k=2 leaves the first block frozen. A function that "
                "only freezes cannot undo what was frozen before."
            )
        if _trainable(model) != first | last:
            raise Mistake(f"{name}: with k=2 not both blocks are trainable, or more than those.")
    _in_a_deeper_model(answer)
    _beside_other_lists(answer)
    if not _refuses(answer, _load("tiny-llama"), 3):
        raise Mistake("A model of two blocks has no last three; raise a ValueError.")
    if not _refuses(answer, _load("tiny-llama"), 0):
        raise Mistake("k=0 is accepted. Look at what blocks[-0:] is, and raise a ValueError.")
    if not _refuses(answer, _load("tiny-llama"), -1):
        raise Mistake("k=-1 is accepted: a slice turns it into all blocks but the first.")


def _in_a_deeper_model(answer):
    """Numbers of blocks other than two; block 10 comes after block 9."""
    for depth, wanted in ((5, (4, 3, 2, 5)), (11, (1, 2, 10))):
        config = GPTNeoXConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=depth, num_attention_heads=2,
            vocab_size=11, max_position_embeddings=16, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        deep = AutoModelForCausalLM.from_config(config)
        for k in wanted:
            if _refuses(answer, deep, k):
                raise Mistake(f"k={k} is refused on a model of {depth} blocks.")
            on = [
                i
                for i, block in enumerate(deep.gpt_neox.layers)
                if all(p.requires_grad for p in block.parameters())
            ]
            if on != list(range(depth - k, depth)):
                raise Mistake(
                    f"Of {depth} blocks, numbered from 0, k={k} leaves these trainable: {on}."
                )


def _beside_other_lists(answer):
    """A model with a list before the blocks and one inside of a block."""
    for length in (5, 1):
        model = _load("tiny-llama")
        model.model.layers[0].experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        children = dict(model.named_children())
        for child in children:
            delattr(model, child)
        model.decoy = nn.ModuleList([nn.Linear(2, 2) for _ in range(length)])
        for child, module in children.items():
            setattr(model, child, module)
        answer(model, 1)
        got = _trainable(model)
        if any("decoy" in name for name in got):
            raise Mistake(
                "A model with two lists of modules: the wrong one was taken for the blocks. The "
                "configuration says how long the right one is."
            )
        if any("experts" in name for name in got) or not got:
            raise Mistake("A list inside of a block was taken for the list of blocks.")


class _Bias(nn.Module):
    """Names that contain "bias" and are none, and one bias of the model's own."""

    def __init__(self):
        super().__init__()
        self.relative_attention_bias = nn.Embedding(3, 3)  # as in T5
        self.position_bias = nn.Parameter(torch.zeros(3, 3))
        self.bias = nn.Parameter(torch.zeros(3))


def train_biases(answer):
    """Check a function (model) -> the model, only its biases trainable."""
    for name in ("tiny-gpt2", "tiny-bloom", "tiny-qwen2", "tiny-gpt_neox"):
        model = _with_gradients(_load(name))
        _changed_in_place(answer(model), model)
        got = _trainable(model)
        shapes = {n: p.dim() for n, p in model.named_parameters()}
        biases = {n for n in shapes if n.split(".")[-1] == "bias"}
        if len(got) == len(shapes):
            raise Mistake(f"{name}: everything is trainable; nothing was frozen.")
        if got - biases and got == {n for n, dim in shapes.items() if dim == 1}:
            raise Mistake(
                f"{name}: every vector is trainable, {sorted(got - biases)[0]} among them. That is "
                "a scale, not a bias."
            )
        if got - biases:
            raise Mistake(f"{name}: {sorted(got - biases)[0]} is trainable, and it is not a bias.")
        missing = sorted(biases - got)
        if missing:
            owner = type(model.get_submodule(missing[0].rpartition(".")[0])).__name__
            if owner == "LayerNorm":
                raise Mistake(f"{name}: {missing[0]} is frozen. Norms have biases too.")
            raise Mistake(
                f"{name}: {missing[0]} is frozen. It is the bias of a {owner}; which kinds of "
                "module have one differs from model to model."
            )
        answer(model.requires_grad_(False))
        if _trainable(model) != biases:
            raise Mistake(f"{name}: on a model that came in frozen, the biases stay frozen.")
    model = _Bias()
    refused = _refuses(answer, model)
    if not refused and model.relative_attention_bias.weight.requires_grad:
        raise Mistake(
            "The weight of a module called relative_attention_bias is trainable. Only the last "
            "part of a parameter's name counts."
        )
    if not refused and model.position_bias.requires_grad:
        raise Mistake("A parameter called position_bias is trainable. Its own name is not `bias`.")
    if refused or not model.bias.requires_grad:
        raise Mistake(
            "The model itself has a parameter `bias`, whose name has no dot, and it was not found."
        )
    if not _refuses(answer, _load("tiny-llama")):
        raise Mistake("Llama has no bias at all: a run would train nothing. Raise a ValueError.")
    if not _refuses(answer, nn.Linear(2, 2, bias=False)):
        raise Mistake("Llama is refused, but a plain nn.Linear without a bias is not.")


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
        if isinstance(got, dict) and list(got) == [backbone]:
            raise Mistake(f"{name}: lm_head is missing. A child without parameters of its own, too,"
                          " has an entry.")  # fmt: skip
        if not isinstance(got, dict) or list(got) != [backbone, "lm_head"]:
            raise Mistake(f"Return a dict with one key for each child: {backbone}, lm_head.")
        if not all(isinstance(v, tuple) and len(v) == 2 for v in got.values()):
            raise Mistake("Each value is a tuple of two numbers: (trainable, total).")
        tensors = len(list(model.get_submodule(backbone).parameters()))
        if got[backbone][1] == tensors:
            raise Mistake(f"{name}: that is the number of tensors. Count the numbers in them.")
        if got[backbone] == (total - head, trainable):
            raise Mistake(f"{name}: the two numbers are the wrong way round.")
        if got[backbone] == (trainable, total - head - trainable):
            raise Mistake(f"{name}: the second number leaves the trainable parameters out.")
        if got[backbone][1] == 0:
            raise Mistake(f"{name}: {backbone} has no parameters of its own, but modules that do.")
        if sum(v[1] for v in got.values()) > total and head == 0:
            raise Mistake(
                f"{name}: the parts sum to {sum(v[1] for v in got.values())}, but the model has "
                f"{total} parameters. Which tensor has two names?"
            )
        if got[backbone][1] == total - head - model.get_input_embeddings().weight.numel():
            raise Mistake(
                f"{name}: the embedding is missing in {backbone}. A tied tensor counts where it "
                "comes first."
            )
        if got[backbone][1] != total - head:
            raise Mistake(
                f"{name}: {backbone} has {total - head} parameters, not {got[backbone][1]}. Two "
                "tensors may have the same shape, and even the same values."
            )
        if got[backbone][0] != trainable:
            raise Mistake(f"{name}: {trainable} of them are trainable, not {got[backbone][0]}.")
        if got["lm_head"] != (0, head):
            raise Mistake(f"{name}: the head is frozen; its pair is {(0, head)}.")
        if answer(model) != got:
            raise Mistake(
                "A second call on the same model gives other numbers. Something is kept between "
                "calls: a default argument, or a global?"
            )
    _without_a_config(answer)


def _without_a_config(answer):
    """A model of three parts that is not a Hugging Face model, on the CPU and without memory."""
    for device in ("cpu", "meta"):
        tied = nn.ModuleDict({"first": nn.Linear(3, 5), "again": nn.Linear(3, 5), "act": nn.ReLU()})
        tied.to_empty(device=device)
        tied["again"].weight = tied["first"].weight
        tied["first"].bias.requires_grad_(False)
        wanted = {"first": (15, 20), "again": (5, 5), "act": (0, 0)}
        got = answer(tied)
        if got == wanted:
            continue
        if device == "meta":
            raise Mistake(
                f"A model on the device 'meta' is counted as {got} instead of {wanted}. All its "
                "tensors have the address 0, so the address does not tell them apart."
            )
        raise Mistake(
            f"Two linear layers that share a weight, and a ReLU: {got} instead of {wanted}. The "
            "rule must hold for any model, without a configuration."
        )


def make_optimizer(answer):
    """Check a function (model, lr, weight_decay) -> AdamW over what is trainable."""
    for lr, decay in (FIRST, (3e-4, 0.5), (1e-2, 0.0)):
        model = _load("tiny-llama")
        model.requires_grad_(False)
        block = model.model.layers[1].requires_grad_(True)
        _holds(answer(model, lr, decay), model, block, lr, decay)
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    other[1].requires_grad_(False)
    held = [p for group in answer(other, 0.1, 0.1).param_groups for p in group["params"]]
    if {id(p) for p in held} != {id(p) for p in other.parameters() if p.requires_grad}:
        raise Mistake("The first and the last of three layers are trainable, not what it holds.")
    tied = _load("tiny-gpt2")
    tied.requires_grad_(False)
    tied.lm_head.requires_grad_(True)
    with warnings.catch_warnings():  # torch warns of what is said below
        warnings.simplefilter("ignore")
        optimizer = answer(tied, 1e-2, 0.0)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if len(held) != 1:
        raise Mistake(f"A tied head is one tensor, but the optimizer holds {len(held)}.")
    if not _refuses(answer, _load("tiny-llama").requires_grad_(False), 1e-2, 0.1):
        raise Mistake(
            "Nothing is trainable, and there is no ValueError: the run would do nothing for hours."
        )


def _holds(optimizer, model, block, lr, decay):
    """Raise Mistake unless it is AdamW over the parameters of the block, with these numbers."""
    if not isinstance(optimizer, torch.optim.AdamW):
        raise Mistake(f"Return a torch.optim.AdamW; this is {type(optimizer).__name__}.")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {id(p): n for n, p in model.named_parameters()}
    if not held <= set(names):
        raise Mistake("The optimizer holds copies: the parameters of the model will never move.")
    if not all(p.requires_grad for p in block.parameters()) or model.lm_head.weight.requires_grad:
        raise Mistake("Making the optimizer changed what is trainable.")
    frozen = [names[i] for i in held if not names[i].startswith("model.layers.1.")]
    if frozen:
        raise Mistake(
            f"The optimizer holds {sorted(frozen)[0]}, which is frozen. Whoever writes zeros into "
            "its gradient would see weight decay move it."
        )
    wanted = {id(p) for p in block.parameters()}
    if not held:
        raise Mistake("It holds nothing. Before the first backward pass nothing has a gradient.")
    if held != wanted:
        raise Mistake(f"It holds {len(held)} of the {len(wanted)} trainable tensors.")
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    if len(decays) > 1:
        raise Mistake(f"There are groups with the decays {sorted(decays)}; all get the same here.")
    for group in optimizer.param_groups:
        if (lr, decay) != FIRST and (group["lr"], group["weight_decay"]) == FIRST:
            raise Mistake("The rate and the decay do not follow what is passed: 0.01 and 0.1.")
        if decay == 0 != group["weight_decay"]:
            raise Mistake(f"No decay was asked for, and {group['weight_decay']} came out.")
        if group["lr"] != lr:
            raise Mistake(f"The learning rate is {group['lr']}, not the {lr} that was passed.")
        if group["weight_decay"] != decay:
            raise Mistake(f"The decay is {group['weight_decay']}, not the {decay} that was passed.")
