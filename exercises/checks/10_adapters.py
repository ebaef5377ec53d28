"""Checks of exercise 10: they name the mistake and stay silent about the solution."""

import copy
from contextlib import contextmanager

import torch
from torch import nn
from transformers import BloomConfig, GPT2Config, LlamaConfig

from checks import Mistake
from minipeft import load_base


def _adapter(answer, activation=torch.tanh, hidden=6, bottleneck=4):
    torch.manual_seed(0)
    return answer(hidden, bottleneck, activation)


def _fill(module, std=1.0):
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=std)
    return module


def _start(module, x):
    """The new module gives back what it gets, or it is said why not."""
    got = module(x)
    if torch.equal(got, x):
        return
    if got.shape == x.shape and not got.any():
        raise Mistake(
            "A new adapter returns zeros, whatever it gets: it stands in for the projection's "
            "output instead of adding to it."
        )
    if torch.equal(got, torch.tanh(x)):
        raise Mistake("The activation is applied to the sum, so it also hits what is skipped.")
    if module.up.weight.any():
        raise Mistake(
            "A new adapter already changes what it gets, because both projections start at random. "
            "The model would no longer be the one that was pretrained."
        )
    if module.up.bias.any():
        raise Mistake("A new adapter adds a constant: a bias of its second projection is not zero.")
    raise Mistake("A new adapter does not give back exactly what it gets.")


def adapter(answer):
    """Check a class (hidden, bottleneck, activation) -> a module with down and up."""
    module = _adapter(answer)
    for name, shape in (("down", (4, 6)), ("up", (6, 4))):
        linear = getattr(module, name, None)
        if not isinstance(linear, nn.Linear):
            raise Mistake(f"The adapter has no nn.Linear called {name}.")
        if tuple(linear.weight.shape) != shape:
            raise Mistake(
                f"{name}.weight has the shape {tuple(linear.weight.shape)}; for hidden=6 and "
                f"bottleneck=4 it should be {shape}."
            )
        if linear.bias is None:
            raise Mistake(f"{name} has no bias.")
        if linear.weight.dtype != torch.float32:
            raise Mistake(
                f"{name} is {linear.weight.dtype}, not float32. Small updates would round away."
            )
    if not all(p.requires_grad for p in module.parameters()):
        raise Mistake("A part of the adapter is frozen, so it would never learn.")
    x = torch.randn(3, 5, 6)
    if not module.down.weight.any() and not module.up.weight.any():
        raise Mistake(
            "Both projections start at zero. Each one's gradient is a product with the other, so "
            "neither weight ever gets one."
        )
    given = x.clone()
    _start(module, x)
    _fill(module)
    got = module(x)
    if not torch.equal(x, given):
        raise Mistake("The adapter writes into the tensor it is given; others still need it.")
    x = given
    inner = module.down(x)

    def like(expected):
        return got.shape == expected.shape and torch.allclose(got, expected, atol=1e-4)

    if like(x + module.up(inner)):
        raise Mistake("Nothing happens between the projections: two linear maps are still one.")
    if like(x + torch.tanh(module.up(inner))):
        raise Mistake("The activation comes after the second projection, not between the two.")
    if like(x + module.up(torch.relu(inner))):
        raise Mistake("Given tanh as its activation, the adapter still uses a ReLU.")
    if not like(x + module.up(torch.tanh(inner))):
        raise Mistake("With random weights the output is not x + U f(D x + d) + u.")
    x.requires_grad_()
    module(x).square().sum().backward()
    names = [name for name, p in module.named_parameters() if p.grad is None]
    if names:
        raise Mistake(f"No gradient arrives at {names[0]}.")
    through = x.grad
    alone = torch.autograd.grad(
        (x + module.up(torch.tanh(module.down(x)))).square().sum(), x, retain_graph=True
    )[0]
    if through is None or not torch.allclose(through, alone, atol=1e-3):
        raise Mistake(
            "The gradient with respect to what comes in is not complete: adapters further down "
            "the model would learn from half of the truth."
        )
    half = x.detach().bfloat16()
    try:
        got = module(half)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise Mistake(
            f"On bfloat16 input the adapter fails: {str(error).splitlines()[0]}."
        ) from error
    if got.dtype != torch.bfloat16:
        raise Mistake(
            f"bfloat16 comes in and {str(got.dtype).removeprefix('torch.')} comes out. The next "
            "layer of the model is bfloat16."
        )
    if module.down.weight.dtype != torch.float32 or module.up.weight.dtype != torch.float32:
        raise Mistake("After bfloat16 input the adapter itself is no longer float32.")


_LLAMA = LlamaConfig(
    hidden_size=40, num_hidden_layers=3, intermediate_size=96, num_attention_heads=4, head_dim=8
)


def count(answer):
    """Check a function (config, bottleneck, placement) -> number of trainables."""
    h, m, layers = 40, 6, 3
    one = 2 * h * m + h + m
    try:
        got = {place: answer(_LLAMA, m, place) for place in ("houlsby", "pfeiffer")}
    except AttributeError as error:
        raise Mistake(f"With a configuration of Llama: {error}.") from error
    for place, n in (("houlsby", 2 * layers), ("pfeiffer", layers)):
        if got[place] == n * 2 * h * m:
            raise Mistake("The biases are left out.")
        if got[place] in {n * (2 * h * m + 2 * h), n * (2 * h * m + 2 * m)}:
            raise Mistake("The two biases of an adapter differ in length; one is as long as m.")
        if got[place] == n * (h * m + h + m) or got[place] == n * h * m:
            raise Mistake("Only one of the two projections is counted.")
        if got[place] == n // layers * one:
            raise Mistake("That is one block alone; every block has adapters of its own.")
        if got[place] in {layers * (one + 2 * 96 * m + 96 + m), layers * (2 * 96 * m + 96 + m)}:
            raise Mistake(
                "An adapter behind the feed-forward network is counted as wide as its middle. What "
                "comes out of that network is as wide as what went in."
            )
    if got["houlsby"] == got["pfeiffer"]:
        raise Mistake("Both placements have the same count.")
    if (got["houlsby"], got["pfeiffer"]) == (layers * one, 2 * layers * one):
        raise Mistake("The placements are taken for each other: it is Pfeiffer who keeps one.")
    if (got["houlsby"], got["pfeiffer"]) != (2 * layers * one, layers * one):
        raise Mistake(
            f"For hidden size 40, 3 blocks and a bottleneck of 6, {got['houlsby']:,} and "
            f"{got['pfeiffer']:,} are not the numbers of entries."
        )
    for name, config in (
        ("GPT-2", GPT2Config(n_embd=12, n_layer=2, n_head=3)),
        ("Bloom", BloomConfig(hidden_size=12, n_layer=2, n_head=3)),
    ):
        try:
            got = answer(config, 3, "houlsby")
        except (AttributeError, KeyError) as error:
            raise Mistake(
                f"On another architecture, {name}: {type(error).__name__}, {error}."
            ) from error
        if got != 4 * (2 * 12 * 3 + 12 + 3):
            raise Mistake(f"The count of a model of {name} comes out wrong: {got}.")
    try:
        answer(_LLAMA, m, "everywhere")
    except ValueError:
        return
    except (KeyError, UnboundLocalError) as error:
        raise Mistake(
            f"An unknown placement ends in a {type(error).__name__}, which tells the user nothing."
        ) from error
    raise Mistake("An unknown placement is counted all the same.")


@contextmanager
def _calls(adapter_class):
    """Within it, a list grows: (adapter, what it got) for each adapter that runs."""
    calls, forward = [], adapter_class.forward

    def recorded(self, x):
        calls.append((self, x.detach().clone()))
        return forward(self, x)

    adapter_class.forward = recorded
    try:
        yield calls
    finally:
        adapter_class.forward = forward


def _projections(model):
    """[(projection, block or part that adds the residual)] in the order in which they run."""
    if hasattr(model, "transformer"):
        return [p for b in model.transformer.h for p in (b.attn.c_proj, b.mlp.c_proj)]
    return [p for b in model.model.layers for p in (b.self_attn.o_proj, b.mlp.down_proj)]


def _outputs(model, ids, change=None):
    """Outputs and inputs of the projections of a model, and its logits; `change` is applied."""
    ins, outs, handles = [], [], []
    for i, projection in enumerate(_projections(model)):

        def hook(module, args, output, i=i):
            ins.append(args[0])
            outs.append(output)
            return None if change is None else change(i, output)

        handles.append(projection.register_forward_hook(hook))
    with torch.no_grad():
        logits = model(ids).logits
    for handle in handles:
        handle.remove()
    return ins, outs, logits


def _sums(model, ids):
    """What the residual stream holds behind attention and behind each block of a Llama."""
    found, handles = [], []
    for block in model.model.layers:
        handles += [
            block.post_attention_layernorm.register_forward_pre_hook(
                lambda module, args: found.append(args[0])
            ),
            block.register_forward_hook(lambda module, args, output: found.append(output)),
        ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return [x[0] if isinstance(x, tuple) else x for x in found]


def _same(a, b):
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


def _run(model, ids, adapter_class):
    """Logits, and the calls of adapters, or a Mistake if the model no longer runs."""
    with _calls(adapter_class) as calls, torch.no_grad():
        try:
            return model(ids).logits, calls
        except NotImplementedError:
            raise
        except (RuntimeError, TypeError, AttributeError) as error:
            raise Mistake(
                f"The model no longer runs: {str(error).splitlines()[0]}. Does each adapter fit "
                "what its projection returns?"
            ) from error


def add_adapters(answer, adapter_class):
    """Check a function (model, bottleneck, names) -> the model, given the class of task 1."""
    ids = torch.arange(40, 52).reshape(2, 6)
    model, _ = load_base("tiny", device="cpu")
    for block in model.model.layers:  # two names that contain another one; no forward uses them
        block.self_attn.o_proj_old, block.self_attn.lo_proj = nn.Linear(32, 32), nn.Linear(32, 32)
    untuned = copy.deepcopy(model)
    base = {id(p) for p in model.parameters()}
    torch.manual_seed(0)
    result = answer(model, 4, ("o_proj", "down_proj"))
    if result is not model:
        raise Mistake("Return the model that was passed in, changed in place.")
    logits, calls = _run(model, ids, adapter_class)
    owned = [m for m in model.modules() if isinstance(m, adapter_class)]
    if not calls:
        raise Mistake("No adapter runs when the model does.")
    if not owned:
        raise Mistake(
            "Adapters run, but the model does not know them: model.parameters() lists none of "
            "them, so nobody would train, save or move them."
        )
    if len(calls) == 4 and len({id(m) for m, _ in calls}) == 1:
        raise Mistake("One adapter serves all four places. Each place needs its own.")
    if len({id(m) for m, _ in calls}) < len(calls):
        raise Mistake("An adapter runs more than once in a forward pass: some places share it.")
    if len(owned) > 4:
        raise Mistake(
            f"{len(owned)} adapters are in a model of 2 blocks with o_proj and down_proj. There "
            "are layers called o_proj_old and lo_proj here, and neither is meant."
        )
    if len(calls) != 4:
        raise Mistake(f"{len(calls)} adapters run in 2 blocks with o_proj and down_proj each.")
    ins, outs, before = _outputs(untuned, ids)
    if not torch.equal(logits, before):
        raise Mistake("With untrained adapters the logits are no longer those of the base.")
    got = [x for _, x in calls]
    if any(_same(x, y) for x, y in zip(got, _sums(untuned, ids), strict=True)):
        raise Mistake(
            "An adapter gets the sum with the residual. It belongs before the block adds that."
        )
    if any(_same(x, y) for x, y in zip(got, ins, strict=True)):
        raise Mistake("An adapter gets what goes into its projection, not what comes out.")
    if not all(_same(x, y) for x, y in zip(got, outs, strict=True)):
        raise Mistake("The adapters do not get what o_proj and down_proj return.")
    frozen = [n for n, p in model.named_parameters() if id(p) in base and p.requires_grad]
    if frozen:
        raise Mistake(f"The base is not frozen: {frozen[0]} still requires grad.")
    if not all(p.requires_grad for m in owned for p in m.parameters()):
        raise Mistake("The adapters are frozen along with the base: nothing is left to train.")
    adapters = [_fill(m, 0.3) for m, _ in calls]
    logits, calls = _run(model, ids, adapter_class)
    reference = _outputs(untuned, ids, lambda i, output: adapters[i](output))[2]
    if _same(logits, before):
        raise Mistake("The adapters run, but what they return is thrown away.")
    if not _same(logits, reference):
        raise Mistake(
            "With random weights in the adapters the logits are not those of a model in which each "
            "projection's output is replaced by its adapter's."
        )
    _other_models(answer, adapter_class, ids)


def _other_models(answer, adapter_class, ids):
    """Names that do not fit, Conv1D, bfloat16."""
    untuned, _ = load_base("tiny-gpt2", device="cpu")
    for names in (("mlp.c_proj", "o_proj"), ("o_proj", "down_proj")):
        gpt2 = copy.deepcopy(untuned)
        try:
            answer(gpt2, 4, names)
        except ValueError:
            if any(isinstance(m, adapter_class) for m in gpt2.modules()):
                raise Mistake(
                    "The ValueError for a missing name comes too late: the first adapters are in "
                    "the model already."
                ) from None
            continue
        if any(isinstance(m, adapter_class) for m in gpt2.modules()):
            raise Mistake("A name that fits no module is passed over as long as another fits.")
        if names == ("o_proj", "down_proj"):
            raise Mistake(
                "GPT-2 has neither o_proj nor down_proj, and nothing is said: the user would train "
                "a model without adapters."
            )
    gpt2 = copy.deepcopy(untuned)
    torch.manual_seed(0)
    try:
        answer(gpt2, 4, ("attn.c_proj", "mlp.c_proj"))
    except ValueError as error:
        try:
            answer(copy.deepcopy(untuned), 4, ("c_proj",))
        except ValueError:
            raise Mistake(
                f"GPT-2 has attn.c_proj and mlp.c_proj, and yet: {error} Which class are they of?"
            ) from error
        raise Mistake(f"A name of two parts, attn.c_proj, finds nothing: {error}") from error
    try:
        logits, calls = _run(gpt2, ids, adapter_class)
    except Mistake as error:
        raise Mistake(
            "A GPT-2 with adapters does not run. Its projections are Conv1D, whose weight is "
            f"(in, out). {str(error.__cause__).splitlines()[0]}."
        ) from error
    if len(calls) != 4:
        raise Mistake(f"In GPT-2, {len(calls)} adapters run, of 2 blocks with two places each.")
    adapters = [_fill(m, 0.3) for m, _ in calls]
    reference = _outputs(untuned, ids, lambda i, output: adapters[i](output))[2]
    if not _same(_run(gpt2, ids, adapter_class)[0], reference):
        raise Mistake("In GPT-2 the adapters do not change the logits as they should.")
    gpt2 = copy.deepcopy(untuned)
    answer(gpt2, 4, ("mlp.c_proj",))
    _, calls = _run(gpt2, ids, adapter_class)
    if len(calls) != 2:
        raise Mistake(f"With mlp.c_proj alone, {len(calls)} adapters run in a GPT-2 of 2 blocks.")
    half = load_base("tiny", device="cpu", dtype=torch.bfloat16)[0]
    answer(half, 4, ("o_proj", "down_proj"))
    if {p.dtype for p in half.parameters() if p.requires_grad} != {torch.float32}:
        raise Mistake("In a bfloat16 model the adapters are not float32.")
    _run(half, ids, adapter_class)


def not_affine(answer):
    """Check a function (f, x, y) -> the largest absolute difference between the two sides."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 6), torch.randn(20, 6)
    plain, biased = nn.Linear(6, 5, bias=False), nn.Linear(6, 5)
    if float(answer(plain, x, y)) > 1e-4:
        raise Mistake("A linear layer without a bias does not come out as zero.")
    if float(answer(biased, x, y)) > 1e-4:
        raise Mistake(
            "A linear layer with a bias does not come out as zero. How often does the bias stand "
            "on each side?"
        )
    right = (2 * x * y).abs().max().item()  # of the square, the difference is 2 x y
    got = float(answer(torch.square, x, y))
    known = {
        0.0: "is zero, so it would be taken for affine",
        (2 * x * y).abs().mean().item(): "is the mean of the differences, not the largest",
        (2 * x * y)[0].abs().max().item(): "looks at the first row alone",
        (2 * x * y).square().max().item(): "is the square of the largest difference",
    }
    for value, what in known.items():
        if abs(got - value) < 1e-4:
            raise Mistake(f"For f(x) = x * x the result {what}.")
    both = (answer(torch.square, x.abs(), y.abs()), answer(torch.square, -x.abs(), y.abs()))
    if min(map(float, both)) < 1e-3:
        raise Mistake("A difference below zero is not found: its sign must not count.")
    if abs(got - right) > 1e-3:
        raise Mistake(f"For f(x) = x * x the result is {got:.4g} and not {right:.4g}.")


def _pair(adapter_class, activation, bias=True, shape=(5, 8)):
    torch.manual_seed(3)
    linear = nn.Linear(*shape, bias=bias)
    return linear, _fill(adapter_class(shape[1], 3, activation), 0.7)


def _merged(answer, linear, module):
    try:
        return answer(linear, module)
    except (NotImplementedError, ValueError):
        raise
    except (RuntimeError, AttributeError, TypeError) as error:
        bias = "with" if linear.bias is not None else "without"
        raise Mistake(
            f"For a projection {bias} bias, from {linear.in_features} to {linear.out_features} "
            f"features: {str(error).splitlines()[0]}."
        ) from error


def merge(answer, adapter_class):
    """Check a function (linear, adapter) -> nn.Linear, given the class of task 1."""
    for bias, shape in ((True, (5, 8)), (True, (8, 8)), (False, (5, 8))):
        linear, module = _pair(adapter_class, nn.Identity(), bias, shape)
        before = copy.deepcopy((linear, module))
        try:
            merged = _merged(answer, linear, module)
        except ValueError as error:
            raise Mistake(
                "An adapter without activation is refused, although it can be merged. How far from "
                "zero does rounding alone lead?"
            ) from error
        if type(merged) is not nn.Linear:
            raise Mistake(f"Return a plain nn.Linear; this is a {type(merged).__name__}.")
        for i, name in enumerate(("projection", "adapter")):
            now, old = (linear, module)[i].state_dict(), before[i].state_dict()
            if not all(torch.equal(now[key], old[key]) for key in old):
                raise Mistake(f"Merging has changed the {name} that was passed in.")
        with torch.no_grad():
            _like_one_of(merged, linear, module)
    linear, module = nn.Linear(5, 8), adapter_class(8, 3, torch.relu)
    try:
        merged = _merged(answer, linear, module)
    except ValueError as error:
        raise Mistake(
            "An untrained adapter with a ReLU is refused. It does nothing yet, so all is affine."
        ) from error
    x = torch.randn(40, 5)
    if not _same(merged(x), linear(x)):
        raise Mistake("Merged with an untrained adapter the projection gives something else.")
    for name, activation in (("ReLU", torch.relu), ("GELU", nn.GELU()), ("tanh", torch.tanh)):
        try:
            _merged(answer, *_pair(adapter_class, activation))
        except ValueError:
            continue
        raise Mistake(
            f"An adapter with {name} is merged without a word, though no nn.Linear can do what it "
            "does."
        )


def _like_one_of(merged, linear, module):
    """Compare with the right one, and with known wrong ones."""
    U, D, W = module.up.weight, module.down.weight, linear.weight
    change = U @ D
    b = torch.zeros(len(W)) if linear.bias is None else linear.bias
    inner, outer = U @ module.down.bias, module.up.bias
    right, bias = W + change @ W, b + change @ b + inner + outer

    def like(weight, bias):
        weights = _same(merged.weight, weight)
        return weights and merged.bias is not None and _same(merged.bias, bias)

    if _same(merged.weight, W):
        raise Mistake("The merged weight is the old one: the adapter is not in it.")
    if _same(merged.weight, change @ W):
        raise Mistake("The merged layer has lost the skip: only the way through the adapter is in.")
    square = W.shape[0] == W.shape[1]
    if square and (_same(merged.weight, W + change) or _same(merged.weight, W + W @ change)):
        raise Mistake(
            "The adapter is merged as if it saw the input of the projection. It sees the output."
        )
    if merged.bias is None:
        raise Mistake("The merged layer has no bias, but the adapter adds constants.")
    if _same(merged.weight, right):
        for value, what in (
            (b, "It is that of the projection alone."),
            (b + change @ b + outer, "The bias in the middle of the adapter is lost."),
            (b + change @ b + inner, "The last bias of the adapter is lost."),
            (b + inner + outer, "The projection's bias goes through the adapter as well."),
            (inner + outer, "What became of the projection's bias?"),
        ):
            if _same(merged.bias, value) and not _same(value, bias):
                raise Mistake(f"The weight is right and the bias is not. {what}")
    if not like(right, bias):
        raise Mistake("The merged layer does not give what projection and adapter give.")


def _set(params, values):
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)


def prepare(answer):
    """Check a function (model, bottleneck, lr) -> (the model, its optimiser), for a Llama."""
    model, _ = load_base("tiny", device="cpu")
    untuned, ids = copy.deepcopy(model), torch.arange(60, 72).reshape(2, 6)
    base = {id(p) for p in model.parameters()}
    torch.manual_seed(0)
    result = answer(model, 4, 0.03)
    pair = isinstance(result, tuple) and len(result) == 2
    if not pair or result[0] is not model or not isinstance(result[1], torch.optim.Optimizer):
        raise Mistake("Return the model, changed in place, and an optimiser.")
    optimizer = result[1]
    new = [p for p in model.parameters() if id(p) not in base]
    if not new:
        raise Mistake("The model has no new parameters: the adapters are not among its modules.")
    if any(p.dtype != torch.float32 for p in new):
        raise Mistake(
            f"The adapters are {new[0].dtype}. Small updates round away there, and Adam divides by "
            "an epsilon that this type takes for zero."
        )
    one = 2 * 32 * 4 + 32 + 4
    size = sum(p.numel() for p in new)
    if size == one:
        raise Mistake("One adapter serves both blocks.")
    if size == 4 * one:
        raise Mistake("There are two adapters in each block. Pfeiffer et al. have one.")
    if size != 2 * one:
        raise Mistake(f"The adapters of 2 blocks should have {2 * one} numbers, not {size}.")
    left = [n for n, p in model.named_parameters() if id(p) in base and p.requires_grad]
    if left:
        raise Mistake(f"The base would be trained too: {left[0]} requires grad.")
    if not all(p.requires_grad for p in new):
        raise Mistake("The adapters do not require grad: nothing at all would be trained.")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not held & {id(p) for p in new}:
        raise Mistake(
            "The optimiser holds no adapter. It knows only what existed when it was made, or what "
            "it was given."
        )
    if not all(id(p) in held for p in new):
        raise Mistake("The optimiser holds some tensors of the adapters, but not all.")
    if not all(group["lr"] == 0.03 for group in optimizer.param_groups):
        raise Mistake("The optimiser does not have the learning rate that was asked for.")
    with torch.no_grad():
        logits, before = model(ids).logits, untuned(ids).logits
        kept = [p.clone() for p in new]
        _set(new, [torch.zeros_like(p) for p in new])
        empty = model(ids).logits
        _set(new, kept)
    if not _same(empty, before):
        raise Mistake(
            "With zeros in all its weights an adapter should be a bare skip. Here the model then "
            "loses the output of what stands before the adapter."
        )
    if not torch.equal(logits, before):
        raise Mistake(
            "Before the first step the logits already differ: the adapters start as noise."
        )
    for start in (0, 4):
        for p in new[start : start + 4]:
            nn.init.normal_(p, std=0.3)
        with torch.no_grad():
            changed = model(ids).logits
        if _same(changed, logits):
            raise Mistake(
                "One of the adapters has no say: its weights change and no logit does. Which one "
                "runs in which block?"
            )
        logits = changed
    _, _, right = _outputs(untuned, ids, _places(new, odd=True))
    with torch.no_grad():
        logits = model(ids).logits
    if _same(logits, right):
        _step(model, optimizer, ids)
        return
    handles = [
        block.register_forward_hook(
            lambda module, args, output, i=i: _places(new)(2 * i + 1, output)
        )
        for i, block in enumerate(untuned.model.layers)
    ]
    with torch.no_grad():
        after = untuned(ids).logits
    for handle in handles:
        handle.remove()
    if _same(logits, after):
        raise Mistake(
            "The adapters change the sum of the feed-forward network and the residual. They belong "
            "to the network's output alone."
        )
    _, _, attention = _outputs(untuned, ids, _places(new, odd=False))
    if _same(logits, attention):
        raise Mistake("The adapters stand behind the attention.")
    raise Mistake("With random adapters the model computes something else than it should.")


def _places(params, odd=True):
    """A function (place, x) -> x behind the adapter of that place; places 1, 3 ... are the FFNs."""
    groups = [list(params)[i : i + 4] for i in range(0, len(params), 4)]

    def change(i, x):
        if i % 2 != odd:
            return x
        matrices = {tuple(p.shape): p for p in groups[i // 2]}
        inner = torch.relu(x @ matrices[4, 32].T + matrices[4,])
        return x + inner @ matrices[32, 4].T + matrices[32,]

    return change


def _step(model, optimizer, ids):
    """One step moves every tensor of the adapters."""
    before = [(p, p.clone()) for p in model.parameters() if p.requires_grad]
    optimizer.zero_grad()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    if any(torch.equal(p, old) for p, old in before):
        raise Mistake("One step leaves a tensor of the adapters as it was.")
