"""Checks of exercise 10: they name the mistake and stay silent about the solution."""

import copy
from contextlib import contextmanager

import torch
from torch import nn
from transformers import BloomConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from checks import Mistake, first_line


def _same(a, b, atol=1e-5):
    return a.shape == b.shape and torch.allclose(a, b, atol=atol)


def _fill(module, std=1.0):
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=std)
    return module


def _tell(*rows):
    """Raise Mistake(why) for the first row (wrong, why) that is wrong."""
    for wrong, why in rows:
        if wrong:
            raise Mistake(why)


def _first_line(error):
    return first_line(error).removesuffix(".")


# Task 1


def adapter(answer):
    """Check a class (hidden, bottleneck, activation) -> a module with down and up."""
    torch.manual_seed(0)
    _parts(answer(6, 4, torch.tanh))
    x = torch.randn(3, 5, 6)
    given = x.clone()
    with torch.no_grad():
        _fill(answer(6, 4, torch.tanh))(x)
    if not torch.equal(x, given):
        raise Mistake("The adapter writes into the tensor it is given; others still need it.")
    _starts(answer, torch.tanh)
    _formula(answer)
    _starts(answer, torch.relu)
    _starts(answer, torch.sigmoid)
    _dtypes(answer)


def _parts(module):
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
    parameters = dict(module.named_parameters())
    known = {id(p) for layer in (module.down, module.up) for p in layer.parameters()}
    others = [name for name, p in parameters.items() if id(p) not in known]
    if others:
        raise Mistake(f"The adapter has a parameter that is not in the formula: {others[0]}.")
    if not all(p.requires_grad for p in parameters.values()):
        raise Mistake("A part of the adapter is frozen, so it would never learn.")
    D = module.down.weight
    if not D.any() and not module.up.weight.any():
        raise Mistake(
            "Both projections start at zero. Each one's gradient is a product with the other, so "
            "neither weight ever gets one."
        )
    if D.any() and torch.equal(D, D[:1].expand_as(D)):
        raise Mistake(
            "All rows of down.weight start alike. All units of the bottleneck would learn the "
            "same, as if there were only one."
        )


def _starts(answer, activation):
    """A new module gives back what it gets, and a few steps train all of it."""
    module, x = answer(6, 4, activation), torch.randn(3, 5, 6)
    got = module(x)
    if not torch.equal(got, x):
        _tell(
            (got.shape == x.shape and not got.any(),
             "A new adapter returns zeros, whatever it gets: it stands in for the projection's "
             "output instead of adding to it."),
            (torch.equal(got, activation(x)),
             "The activation is applied to the sum, so it also hits what is skipped."),
            (module.up.weight.any() and module.down.weight.any(),
             "A new adapter already changes what it gets, because both projections start at "
             "random. The model would no longer be the one that was pretrained."),
            (module.up.bias.any(),
             "A new adapter adds a constant: a bias of its second projection is not zero."),
            (True, "A new adapter does not give back exactly what it gets."),
        )  # fmt: skip
    target = torch.randn(3, 5, 6)
    for _ in range(4):
        loss = (module(x) - target).square().mean()
        if not loss.requires_grad:
            raise Mistake(
                "No gradient arrives at a new adapter. It gives back what it gets, but as if its "
                "weights took no part."
            )
        named = dict(module.named_parameters())
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        with torch.no_grad():
            for p, grad in zip(named.values(), grads, strict=True):
                if grad is not None:
                    p -= grad
    dead = [n for n, grad in zip(named, grads, strict=True) if grad is None or not grad.any()]
    if dead and any(grad is None for grad in grads):
        raise Mistake(f"No gradient arrives at {dead[0]}.")
    if dead:
        why = (
            " PyTorch takes the slope of a ReLU at zero as zero."
            if activation is torch.relu
            else ""
        )
        raise Mistake(
            f"With {activation.__name__} as activation, the gradient of {dead[0]} is still zero "
            f"after four steps.{why}"
        )


def _formula(answer):
    module = _fill(answer(6, 4, torch.tanh))
    x = torch.randn(3, 5, 6)
    got, inner = module(x), module.down(x)
    for wrong, why in (
        (x + module.up(inner), "Nothing happens between the projections: two linear maps are "
                               "still one."),
        (x + torch.tanh(module.up(inner)), "The activation comes after the second projection, not "
                                           "between the two."),
        (x + module.up(torch.relu(inner)), "Given tanh as its activation, the adapter still uses a "
                                           "ReLU."),
    ):  # fmt: skip
        _tell((_same(got, wrong, 1e-4), why))
    if not _same(got, x + module.up(torch.tanh(inner)), 1e-4):
        raise Mistake("With random weights the output is not x + U f(D x + d) + u.")
    other = _fill(answer(5, 8, torch.sigmoid))
    for shape in ((5,), (2, 5), (2, 3, 2, 5)):
        x = torch.randn(shape)
        try:
            right = _same(other(x), x + other.up(torch.sigmoid(other.down(x))), 1e-4)
        except (RuntimeError, ValueError) as error:
            raise Mistake(f"An input of shape {shape} fails: {_first_line(error)}.") from error
        if not right:
            raise Mistake(f"For hidden=5 and bottleneck=8, an input of shape {shape} comes out "
                          "wrong.")  # fmt: skip
    x = torch.randn(3, 5, 6).requires_grad_()
    weights = torch.randn(3, 5, 6)
    expected = x + module.up(torch.tanh(module.down(x)))
    through, alone = (
        torch.autograd.grad((y * weights).sum(), x, allow_unused=True)[0]
        for y in (module(x), expected)
    )
    if through is None or not _same(through, alone, 1e-3):
        raise Mistake(
            "The gradient with respect to what comes in is not complete: adapters further down "
            "the model would learn from half of the truth."
        )


def _dtypes(answer):
    for dtype in (torch.bfloat16, torch.float16):
        module = answer(4, 3, nn.Identity())
        with torch.no_grad():  # adds 4096 * (1 + 2**-12 - 1) to the first entry
            for p in module.parameters():
                p.zero_()
            module.down.weight[0, 0], module.down.bias[0] = 1 + 2**-12, -1.0
            module.up.weight[0, 0] = 4096.0
        name, x = str(dtype).removeprefix("torch."), torch.ones(2, 4, dtype=dtype)
        try:
            got = module(x)
        except NotImplementedError:
            raise
        except RuntimeError as error:
            raise Mistake(f"On {name} input the adapter fails: {_first_line(error)}.") from error
        if got.dtype != dtype:
            raise Mistake(
                f"Given {name}, the adapter returns {str(got.dtype).removeprefix('torch.')}. The "
                f"next layer of the model is {name}."
            )
        if {p.dtype for p in module.parameters()} != {torch.float32}:
            raise Mistake(f"After {name} input the adapter itself is no longer float32.")
        if got[0].tolist() != [2, 1, 1, 1]:
            raise Mistake(
                f"On {name} input the adapter does not compute in float32: with a weight of "
                f"1 + 2**-12 it returns {got[0].tolist()} where [2, 1, 1, 1] is exact."
            )


# Task 2


def _size(hidden, bottleneck):
    return 2 * hidden * bottleneck + hidden + bottleneck


def count(answer):
    """Check a function (config, bottleneck, placement) -> number of trainable parameters."""
    h, m, layers = 40, 8, 3
    llama = LlamaConfig(
        hidden_size=h, num_hidden_layers=layers, intermediate_size=96, num_attention_heads=4,
        head_dim=8,
    )  # fmt: skip
    one, wide = _size(h, m), _size(96, m)
    try:
        got = {place: answer(llama, m, place) for place in ("houlsby", "pfeiffer")}
    except AttributeError as error:
        raise Mistake(f"With a configuration of Llama: {error}.") from error
    if any(isinstance(n, float) for n in got.values()):
        raise Mistake(
            f"The count is {got['houlsby']}, a float. Parameters are counted in integers."
        )
    for place, n in (("houlsby", 2 * layers), ("pfeiffer", layers)):
        for known, why in (
            ((n * 2 * h * m,), "The biases are left out."),
            ((n * (2 * h * m + 2 * h), n * (2 * h * m + 2 * m)),
             "The two biases of an adapter differ in length; one is as long as m."),
            ((n * (h * m + h + m), n * h * m), "Only one of the two projections is counted."),
            ((n // layers * one,), "That is one block alone; every block has adapters of its own."),
            ((layers * (one + wide), layers * wide),
             "An adapter after the feed-forward network is counted as wide as its middle. What "
             "comes out of that network is as wide as what went in."),
            ((n * _size(32, m),), "The width of the heads together is counted, 4 * 8, not that of "
                                  "the hidden states, 40."),
            ((n * _size(h, 64),), "A bottleneck of 64 is counted, whatever is asked for."),
            ((n * _size(h, h // m),), "The bottleneck is taken for a factor by which the width "
                                      "shrinks."),
        ):  # fmt: skip
            _tell((got[place] in known, why))
    if got["houlsby"] == got["pfeiffer"]:
        raise Mistake("Both placements have the same count.")
    if (got["houlsby"], got["pfeiffer"]) == (layers * one, 2 * layers * one):
        raise Mistake("The placements are taken for each other: it is Pfeiffer who keeps one.")
    if (got["houlsby"], got["pfeiffer"]) != (2 * layers * one, layers * one):
        raise Mistake(
            f"For hidden size 40, 3 blocks and a bottleneck of 8, {got['houlsby']:,} and "
            f"{got['pfeiffer']:,} are not the numbers of parameters."
        )
    if answer(llama, m) != 2 * layers * one:
        raise Mistake("Without a placement the count is not that of houlsby.")
    for name, config in (
        ("GPT-2", GPT2Config(n_embd=12, n_layer=2, n_head=3)),
        ("Bloom", BloomConfig(hidden_size=12, n_layer=2, n_head=3)),
    ):
        for place, n in (("houlsby", 4), ("pfeiffer", 2)):
            try:
                got = answer(config, 3, place)
            except (AttributeError, KeyError) as error:
                raise Mistake(
                    f"On another architecture, {name}: {type(error).__name__}, {error}."
                ) from error
            if got != n * _size(12, 3):
                raise Mistake(f"The count of a model of {name} comes out wrong: {got}.")
    for unknown in ("everywhere", "Houlsby", "pfeif", ""):
        try:
            answer(llama, m, unknown)
        except ValueError:
            continue
        except (KeyError, UnboundLocalError) as error:
            raise Mistake(
                f"An unknown placement ends in a {type(error).__name__}, which tells the user "
                "nothing."
            ) from error
        raise Mistake(f"The unknown placement {unknown!r} is counted all the same.")


# Task 3


def _tree(*names):
    """A module with layers of these dotted names."""
    root = nn.Module()
    for name in names:
        node = root
        for part in name.split("."):
            if not hasattr(node, part):
                node.add_module(part, nn.Linear(2, 2))
            node = getattr(node, part)
    return root


_PARTS = ("self_attn.o_proj", "mlp.down_proj", "self_attn.lo_proj", "mlp.o_proj_old",
          "mlp.down_proj.lora")  # fmt: skip
_LLAMA = [f"model.layers.{i}.{part}" for part in _PARTS for i in range(2)]
_GPT2 = [f"transformer.h.{i}.{part}.c_proj" for part in ("attn", "mlp") for i in range(2)]


def places(answer):
    """Check a function (model, names) -> the dotted names that fit one of them."""
    llama, gpt2 = _tree(*_LLAMA, "lm_head"), _gpt2(8, 2)
    like = _tree("h.mlp.c_proj", "h.my_mlp.c_proj", "h.mlp_c_proj", "h.mlp.c_proj_old")
    for name, model, names, expected in (
        ("Llama", llama, ("o_proj",), _LLAMA[:2]),
        ("Llama", llama, ("down_proj", "o_proj"), _LLAMA[:4]),
        ("GPT-2", gpt2, ("c_proj",), _GPT2),
        ("GPT-2", gpt2, ("mlp.c_proj",), _GPT2[2:]),
        ("GPT-2", gpt2, ("c_proj", "attn.c_proj"), _GPT2),
        ("a small model", like, ("mlp.c_proj",), ("h.mlp.c_proj",)),
        ("Llama", llama, ("lm_head",), ("lm_head",)),
    ):
        asked = f"In {name}, with {', '.join(names)},"
        try:
            got = answer(model, names)
        except ValueError as error:
            if names == ("lm_head",):
                raise Mistake("A module whose whole name is lm_head is not found.") from error
            if "." in names[0]:
                raise Mistake(f"{asked} an ending of two parts finds nothing: {error}") from error
            raise Mistake(
                f"{asked} there is a ValueError although all fit: {error} Which class are the "
                "projections of?"
            ) from error
        if not isinstance(got, list):
            raise Mistake(f"Return a list of dotted names, not a {type(got).__name__}.")
        if got and not all(isinstance(each, str) for each in got):
            raise Mistake(f"Return dotted names; there is a {type(got[0]).__name__} among them.")
        if len(set(got)) < len(got):
            raise Mistake(f"{asked} a module that fits two endings is listed twice.")
        more, less = sorted(set(got) - set(expected)), sorted(set(expected) - set(got))
        if more:
            raise Mistake(f"{asked} {more[0]} does not fit, but is listed.")
        if less:
            raise Mistake(f"{asked} {less[0]} is missing.")
    for names, why in (
        (("o_proj",), "GPT-2 has no module o_proj, and nothing is said: the user would train a "
                      "model without adapters."),
        (("o_proj", "c_proj"), "An ending that fits no module is passed over as long as another "
                               "fits."),
        (("c_proj", "o_proj"), "Only the first ending is tested for fitting a module."),
    ):  # fmt: skip
        try:
            answer(gpt2, names)
        except ValueError:
            continue
        raise Mistake(why)


# Tasks 4 and 7


def _llama(hidden, blocks, dtype=torch.float32):
    """The heads together are 24 wide, so that the attention's projection is not square."""
    torch.manual_seed(hidden)
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=blocks, intermediate_size=48, num_attention_heads=2,
        num_key_value_heads=2, head_dim=12, vocab_size=80, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def _gpt2(hidden, blocks):
    torch.manual_seed(hidden)
    config = GPT2Config(n_embd=hidden, n_layer=blocks, n_head=2, vocab_size=80, n_positions=20)
    return GPT2LMHeadModel(config).eval()


_IDS = torch.arange(40, 52).reshape(2, 6)


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


def _run(model, adapter_class):
    """Logits, and the calls of adapters, or a Mistake if the model does not run."""
    with _calls(adapter_class) as calls:
        try:
            return model(_IDS).logits, calls
        except NotImplementedError:
            raise
        except (RuntimeError, TypeError, AttributeError) as error:
            raise Mistake(
                f"The {type(model).__name__} no longer runs: {_first_line(error)}. Does each "
                "adapter fit what its projection returns?"
            ) from error


def _projections(model):
    """The projections of attention and feed-forward network, in the order in which they run."""
    if hasattr(model, "transformer"):
        return [p for b in model.transformer.h for p in (b.attn.c_proj, b.mlp.c_proj)]
    return [p for b in model.model.layers for p in (b.self_attn.o_proj, b.mlp.down_proj)]


def _hooked(model, modules, change):
    """Logits of a model whose modules' outputs go through change(number of the module, output)."""
    handles = [
        module.register_forward_hook(lambda module, args, output, i=i: change(i, output))
        for i, module in enumerate(modules)
    ]
    logits = model(_IDS).logits
    for handle in handles:
        handle.remove()
    return logits


def _seen(model):
    """What goes into the projections, what comes out, and the sums with the residual (Llama)."""
    ins, outs, sums, handles = [], [], [], []

    def seen(module, args, output):
        ins.append(args[0])
        outs.append(output)

    for block in model.model.layers:
        handles += [
            p.register_forward_hook(seen) for p in (block.self_attn.o_proj, block.mlp.down_proj)
        ]
        handles += [
            block.post_attention_layernorm.register_forward_pre_hook(
                lambda module, args: sums.append(args[0])
            ),
            block.register_forward_hook(lambda module, args, output: sums.append(output)),
        ]
    with torch.no_grad():
        model(_IDS)
    for handle in handles:
        handle.remove()
    return ins, outs, [x[0] if isinstance(x, tuple) else x for x in sums]


def _gradient(logits, parameters):
    grads = torch.autograd.grad(logits.square().mean(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def _same_gradient(logits, reference, parameters):
    if not logits.requires_grad:
        return False
    pairs = zip(_gradient(logits, parameters), _gradient(reference, parameters), strict=True)
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in pairs)


def add_adapters(answer, adapter_class):
    """Check a function (model, bottleneck, names) -> the model, given the class of task 1."""
    model = _llama(20, 2)
    untuned, base = copy.deepcopy(model), {id(p) for p in model.parameters()}
    if answer(model, 4, ("o_proj", "down_proj")) is not model:
        raise Mistake("Return the model that was passed in, changed in place.")
    logits, calls = _run(model, adapter_class)
    owned = [m for m in model.modules() if isinstance(m, adapter_class)]
    _number(calls, owned)
    if not torch.equal(logits, untuned(_IDS).logits):
        raise Mistake("With untrained adapters the logits are no longer those of the base.")
    got, (ins, outs, sums) = [x for _, x in calls], _seen(untuned)
    same_sum, same_in, same_out = (
        [_same(x, y) for x, y in zip(got, others, strict=True)] for others in (sums, ins, outs)
    )
    _tell(
        (any(same_sum), "An adapter gets the sum with the residual. It belongs before the block "
                        "adds that."),
        (any(same_in), "An adapter gets what goes into its projection, not what comes out."),
        (not all(same_out), "The adapters do not get what o_proj and down_proj return."),
    )  # fmt: skip
    frozen = [n for n, p in model.named_parameters() if id(p) in base and p.requires_grad]
    if frozen:
        raise Mistake(f"The base is not frozen: {frozen[0]} still requires grad.")
    if not all(p.requires_grad for m in owned for p in m.parameters()):
        raise Mistake("The adapters are frozen along with the base: nothing is left to train.")
    widths = {tuple(m.down.weight.shape) for m in owned}
    if widths != {(4, 20)}:
        raise Mistake(f"For a bottleneck of 4 and a width of 20, down has the shapes {widths}.")
    _behind(model, untuned, adapter_class)

    # Other sizes, another architecture, some of the places; and the first model still works.
    gpt2 = _gpt2(12, 3)
    untuned_gpt2 = copy.deepcopy(gpt2)
    answer(gpt2, 5, ("mlp.c_proj",))
    _, calls = _run(gpt2, adapter_class)
    if len(calls) != 3:
        raise Mistake(f"With mlp.c_proj alone, {len(calls)} adapters run in a GPT-2 of 3 blocks.")
    sizes = {m.down.out_features for m, _ in calls}
    if sizes != {5}:
        raise Mistake(f"Asked for a bottleneck of 5, the adapters have {sizes}.")
    _behind(gpt2, untuned_gpt2, adapter_class, slice(1, None, 2))
    answer(_llama(20, 2), 4, ("o_proj", "down_proj"))
    _behind(model, untuned, adapter_class)
    _refuses(answer, adapter_class, untuned_gpt2)
    _elsewhere(answer, adapter_class)


def _number(calls, owned):
    """Four adapters run, each once, and the model knows them."""
    running = {id(m) for m, _ in calls}
    _tell(
        (not calls, "No adapter runs when the model does."),
        (not owned, "Adapters run, but the model does not know them: model.parameters() lists none "
                    "of them, so nobody would train, save or move them."),
        (len(calls) == 4 and len(running) == 1,
         "One adapter serves all four places. Each place needs its own."),
        (len(running) < len(calls),
         "An adapter runs more than once in a forward pass: some places share it."),
        (len(calls) != 4, f"{len(calls)} adapters run in 2 blocks with o_proj and down_proj each."),
        ({id(m) for m in owned} != running,
         f"The model has {len(owned)} adapters among its modules, and they are not the 4 that "
         "run."),
    )  # fmt: skip


def _behind(model, untuned, adapter_class, part=slice(None)):
    """Random adapters do the same as in a model in which they stand after the projections."""
    with torch.no_grad():
        _, calls = _run(model, adapter_class)
    adapters = [_fill(m, 0.3) for m, _ in calls]
    if not {id(m) for m in adapters} <= {id(m) for m in model.modules()}:
        raise Mistake(
            "After another model got adapters, those that run here are not this model's own. Does "
            "something outside the model keep them?"
        )
    logits, _ = _run(model, adapter_class)
    untuned.requires_grad_(False)
    modules = _projections(untuned)[part]
    right = _hooked(
        untuned, modules, lambda i, x: x + adapters[i].up(torch.relu(adapters[i].down(x)))
    )
    if _same(logits, untuned(_IDS).logits):
        raise Mistake("The adapters run, but what they return is thrown away.")
    if not _same(logits, right, 1e-4):
        as_they_are = _hooked(untuned, modules, lambda i, x: adapters[i](x))
        if _same(logits, as_they_are, 1e-4):
            raise Mistake("The adapters in the model have another activation than a ReLU.")
        raise Mistake(
            f"With random weights in the adapters the logits of a {type(model).__name__} are not "
            "those of a model in which each projection's output is replaced by its adapter's."
        )
    if not _same_gradient(logits, right, [p for m in adapters for p in m.parameters()]):
        raise Mistake(
            "The logits are right, but the gradient that reaches the adapters is not. Is "
            "something cut off on the way?"
        )


def _refuses(answer, adapter_class, untuned):
    for names in (("mlp.c_proj", "o_proj"), ("o_proj", "down_proj")):
        gpt2 = copy.deepcopy(untuned).requires_grad_(True)
        try:
            answer(gpt2, 4, names)
        except ValueError:
            if any(isinstance(m, adapter_class) for m in gpt2.modules()):
                raise Mistake(
                    "The ValueError for a missing name comes too late: the first adapters are in "
                    "the model already."
                ) from None
            if not all(p.requires_grad for p in gpt2.parameters()):
                raise Mistake(
                    "After the ValueError for a missing name the model is left frozen."
                ) from None
            continue
        raise Mistake(f"GPT-2 has no {names[-1]}, and there is no ValueError.")


def _elsewhere(answer, adapter_class):
    """A bfloat16 model, and one on another device; "meta" is a device without any numbers."""
    half = _llama(20, 2, torch.bfloat16)
    answer(half, 4, ("o_proj", "down_proj"))
    if {p.dtype for p in half.parameters() if p.requires_grad} != {torch.float32}:
        raise Mistake("In a bfloat16 model the adapters are not float32.")
    if {p.dtype for p in half.parameters() if not p.requires_grad} != {torch.bfloat16}:
        raise Mistake("A bfloat16 model is no longer bfloat16 after the adapters were added.")
    _run(half, adapter_class)
    moved = _llama(20, 2).to("meta")
    answer(moved, 4, ("o_proj", "down_proj"))
    devices = {str(p.device) for p in moved.parameters() if p.requires_grad}
    if devices != {"meta"}:
        raise Mistake(
            f"The model is on another device, here 'meta', and its adapters are on "
            f"{', '.join(sorted(devices))}. On a GPU it would not run."
        )


# Task 5


def not_affine(answer):
    """Check a function (f, x, y) -> the largest absolute difference between the two sides."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 20, 6)
    given = x.clone(), y.clone()
    plain, biased = nn.Linear(6, 5, bias=False), nn.Linear(6, 5)
    if type(got := answer(plain, x, y)) is not float:
        raise Mistake(f"The result is a {type(got).__name__}, not a Python float.")
    if answer(plain, x, y) > 1e-4:
        raise Mistake("A linear layer without a bias does not come out as zero.")
    if answer(biased, x, y) > 1e-4:
        raise Mistake(
            "A linear layer with a bias does not come out as zero. How often does the bias stand "
            "on each side?"
        )
    got = answer(torch.square, x, y)
    if not (torch.equal(x, given[0]) and torch.equal(y, given[1])):
        raise Mistake("The caller's x or y is changed.")
    if answer(torch.square, x, y) != got:
        raise Mistake("Two calls with the same x and y differ. Take the points that are given.")
    gap = (2 * x * y).abs()  # of the square
    known = {
        0.0: "is zero, so it would be taken for affine",
        gap.mean().item(): "is the mean of the differences, not the largest",
        gap.sum().item(): "is the sum of the differences, not the largest",
        gap.norm().item(): "is the norm of the differences, not the largest",
        gap[0].max().item(): "looks at the first row alone",
        gap.square().max().item(): "is the square of the largest difference",
        gap.max().item() / (x + y).square().max().item(): "is divided by the size of f",
    }
    for value, what in known.items():
        if abs(got - value) < 1e-4:
            raise Mistake(f"For f(x) = x * x the result {what}.")
    for sign in (1, -1):
        if answer(torch.square, sign * x.abs(), y.abs()) < 1e-3:
            raise Mistake("A difference below zero is not found: its sign must not count.")
    for f, a, b, what in (
        (torch.square, x, y, "x * x"),
        (lambda z: 3 - z**3, x[:1, :3], y[:1, :3], "3 - x ** 3"),
    ):
        right = (f(a + b) - f(a) - f(b) + f(0 * a)).abs().max().item()
        if abs((got := answer(f, a, b)) - right) > 1e-3:
            raise Mistake(f"For f(x) = {what} the result is {got:.4g} and not {right:.4g}.")


# Task 6


def _pair(adapter_class, activation, bias=True, shape=(5, 8), std=0.7):
    torch.manual_seed(3)
    linear = nn.Linear(*shape, bias=bias)
    return linear, _fill(adapter_class(shape[1], 3, activation), std)


def _merged(answer, linear, module):
    """The merged layer, or "refused"."""
    try:
        return answer(linear, module)
    except NotImplementedError:
        raise
    except ValueError:
        return "refused"
    except (RuntimeError, AttributeError, TypeError) as error:
        bias = "with" if linear.bias is not None else "without"
        raise Mistake(
            f"For a projection {bias} bias, from {linear.in_features} to {linear.out_features} "
            f"features: {_first_line(error)}."
        ) from error


def merge(answer, adapter_class):
    """Check a function (linear, adapter) -> nn.Linear, given the class of task 1."""
    for bias, shape in ((True, (5, 8)), (True, (8, 8)), (False, (5, 8)), (False, (8, 3))):
        linear, module = _pair(adapter_class, nn.Identity(), bias, shape)
        before = copy.deepcopy((linear, module))
        merged = _merged(answer, linear, module)
        _tell(
            (merged == "refused", "An adapter without activation is refused, although it can be "
                                  "merged. How far from zero does rounding alone lead?"),
            (type(merged) is not nn.Linear,
             f"Return a plain nn.Linear; this is a {type(merged).__name__}."),
        )  # fmt: skip
        for i, name in enumerate(("projection", "adapter")):
            now, old = (linear, module)[i].state_dict(), before[i].state_dict()
            if not all(torch.equal(now[key], old[key]) for key in old):
                raise Mistake(f"Merging has changed the {name} that was passed in.")
        if (merged.in_features, merged.out_features) != shape:
            raise Mistake(
                f"The merged layer goes from {merged.in_features} to {merged.out_features} "
                f"features, the projection from {shape[0]} to {shape[1]}."
            )
        with torch.no_grad():
            _like_one_of(merged, linear, module)
    linear, module = nn.Linear(5, 8), adapter_class(8, 3, torch.relu)
    merged = _merged(answer, linear, module)
    if merged == "refused":
        raise Mistake(
            "An untrained adapter with a ReLU is refused. It does nothing yet, so all is affine."
        )
    x = torch.randn(40, 5)
    if not _same(merged(x), linear(x)):
        raise Mistake("Merged with an untrained adapter the projection gives something else.")
    _scales(answer, adapter_class)
    for name, activation in (
        ("ReLU", torch.relu), ("GELU", nn.GELU()), ("tanh", torch.tanh), ("sine", torch.sin),
    ):  # fmt: skip
        if _merged(answer, *_pair(adapter_class, activation)) != "refused":
            raise Mistake(
                f"An adapter with {name} is merged without a word, though no nn.Linear can do what "
                "it does."
            )
    for seed in range(5):
        linear, module = _pair(adapter_class, lambda z: z.clamp(-5, 5))
        torch.manual_seed(seed)
        if _merged(answer, linear, module) != "refused":
            raise Mistake(
                "An adapter whose activation bends only beyond 5 is merged. Are the points many, "
                "and far enough from zero?"
            )


def _scales(answer, adapter_class):
    """Large and small outputs, and outputs below zero, are judged by their own size."""
    for factor, shift in ((1e4, 0.0), (1.0, -300.0)):
        linear, module = _pair(adapter_class, nn.Identity(), std=0.05)
        with torch.no_grad():
            linear.weight.mul_(factor)
            linear.bias.add_(shift)
        merged = _merged(answer, linear, module)
        if merged == "refused":
            size = f"weights {factor:g} times as large" if not shift else "outputs far below zero"
            raise Mistake(
                f"With {size} a mergeable adapter is refused. The measure must be compared with "
                "the absolute size of the outputs."
            )
        x = torch.randn(20, 5)
        expected = module(linear(x))
        if not _same(merged(x), expected, 1e-4 * expected.abs().max().item()):
            raise Mistake("With a large projection the merged layer gives something else.")
    linear, module = _pair(adapter_class, torch.relu, bias=False)
    with torch.no_grad():
        linear.weight.mul_(1e-5)
        for p in (module.down.bias, module.up.bias):
            p.zero_()
    if _merged(answer, linear, module) != "refused":
        raise Mistake(
            "With weights 1e-5 times as large an adapter with a ReLU is merged. The limit is "
            "fixed, but all outputs are small."
        )


def _like_one_of(merged, linear, module):
    """Compare with the right one, and with known wrong ones."""
    U, D, W = module.up.weight, module.down.weight, linear.weight
    change = U @ D
    b = torch.zeros(len(W)) if linear.bias is None else linear.bias
    inner, outer = U @ module.down.bias, module.up.bias
    right, bias = W + change @ W, b + change @ b + inner + outer

    sides = (W + change, W + W @ change) if W.shape[0] == W.shape[1] else ()
    _tell(
        (_same(merged.weight, W), "The merged weight is the old one: the adapter is not in it."),
        (_same(merged.weight, change @ W),
         "The merged layer has lost the skip: only the way through the adapter is in."),
        (any(_same(merged.weight, side) for side in sides),
         "The adapter is merged as if it saw the input of the projection. It sees the output."),
        (merged.bias is None, "The merged layer has no bias, but the adapter adds constants."),
        (_same(merged.weight, right + bias[:, None]),
         "Every column of the merged weight has the bias in it."),
    )  # fmt: skip
    if _same(merged.weight, right):
        for value, what in (
            (b, "It is that of the projection alone."),
            (b + change @ b + outer, "The bias in the middle of the adapter is lost."),
            (b + change @ b + inner, "The last bias of the adapter is lost."),
            (b + inner + outer, "The projection's bias goes through the adapter as well."),
            (change @ b + inner + outer, "The skip carries the projection's bias, too."),
            (inner + outer, "What became of the projection's bias?"),
        ):
            if _same(merged.bias, value) and not _same(value, bias):
                raise Mistake(f"The weight is right and the bias is not. {what}")
    if not (_same(merged.weight, right) and _same(merged.bias, bias)):
        raise Mistake("The merged layer does not give what projection and adapter give.")


# Task 7


def prepare(answer):
    """Check a function (model, bottleneck, lr) -> (the model, its optimizer), for a Llama."""
    first = _prepared(answer, _llama(32, 2), 4, 0.03)
    _prepared(answer, _llama(16, 3), 5, 0.002)
    try:
        _computes(*first)
    except (Mistake, RuntimeError) as error:
        raise Mistake(
            "A model computes something else after another one has been prepared. Do the two share "
            "something?"
        ) from error
    half = _llama(16, 2, torch.bfloat16)
    base = {id(p) for p in half.parameters()}
    answer(half, 3, 0.01)
    dtypes = {(id(p) in base, p.dtype) for p in half.parameters()}
    _tell(
        ((False, torch.float32) not in dtypes or (False, torch.bfloat16) in dtypes,
         "The adapters of a bfloat16 Llama are not float32."),
        ((True, torch.float32) in dtypes, "The base of a bfloat16 Llama is no longer bfloat16."),
    )  # fmt: skip
    try:
        half(_IDS)
    except RuntimeError as error:
        raise Mistake(f"A bfloat16 Llama does not run: {_first_line(error)}.") from error


def _prepared(answer, model, m, lr):
    """Check one model, given the bottleneck and the learning rate to ask for."""
    untuned, base = copy.deepcopy(model), {id(p) for p in model.parameters()}
    hidden, blocks = model.config.hidden_size, model.config.num_hidden_layers
    result = answer(model, m, lr)
    pair = isinstance(result, tuple) and len(result) == 2
    if not pair or result[0] is not model or not isinstance(result[1], torch.optim.Optimizer):
        raise Mistake("Return the model, changed in place, and an optimizer.")
    optimizer = result[1]
    new = [p for p in model.parameters() if id(p) not in base]
    if not new:
        raise Mistake("The model has no new parameters: the adapters are not among its modules.")
    if any(p.dtype != torch.float32 for p in new):
        raise Mistake(
            f"The adapters are {new[0].dtype}. Small updates round away there, and Adam divides by "
            "an epsilon that this type takes for zero."
        )
    one, size = _size(hidden, m), sum(p.numel() for p in new)
    _tell(
        (size == one, "One adapter serves all blocks."),
        (size == 2 * blocks * one,
         "There are two adapters in each block. Pfeiffer et al. have one."),
        (size != blocks * one,
         f"The adapters of {blocks} blocks of width {hidden} should have {blocks * one} parameters "
         f"with a bottleneck of {m}, not {size}."),
    )  # fmt: skip
    left = [n for n, p in model.named_parameters() if id(p) in base and p.requires_grad]
    if left:
        raise Mistake(f"The base would be trained too: {left[0]} requires grad.")
    if not all(p.requires_grad for p in new):
        raise Mistake("The adapters do not require grad: nothing at all would be trained.")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    _tell(
        (not held & {id(p) for p in new},
         "The optimizer holds no adapter. It knows only what existed when it was made, or what it "
         "was given."),
        (not held >= {id(p) for p in new},
         "The optimizer holds some tensors of the adapters, but not all."),
        (type(optimizer) is not torch.optim.AdamW,
         f"The optimizer is {type(optimizer).__name__}, not AdamW."),
        (any(group["lr"] != lr for group in optimizer.param_groups),
         "The optimizer does not have the learning rate that was asked for."),
    )  # fmt: skip
    logits, before = model(_IDS).logits, untuned(_IDS).logits
    kept = [p.detach().clone() for p in new]
    with torch.no_grad():
        for p in new:
            p.zero_()
        empty = model(_IDS).logits
        for p, value in zip(new, kept, strict=True):
            p.copy_(value)
    _tell(
        (not _same(empty, before),
         "With zeros in all its weights an adapter should be a bare skip. Here the model then "
         "loses the output of what stands before the adapter."),
        (not torch.equal(logits, before),
         "Before the first step the logits already differ: the adapters start as noise."),
    )  # fmt: skip
    _computes(model, untuned, new)
    values = [p.detach().clone() for p in new]
    optimizer.zero_grad()
    model(_IDS).logits.square().mean().backward()
    optimizer.step()
    if any(torch.equal(p, old) for p, old in zip(new, values, strict=True)):
        raise Mistake("One step leaves a tensor of the adapters as it was.")
    return model, untuned, new


def _computes(model, untuned, new):
    """Random adapters, of four tensors each, stand after the feed-forward networks."""
    groups = [new[i : i + 4] for i in range(0, len(new), 4)]
    for group in groups:
        before = model(_IDS).logits
        with torch.no_grad():
            for p in group:
                p.normal_(std=0.3)
        if _same(model(_IDS).logits, before):
            raise Mistake(
                "One of the adapters has no say: its weights change and no logit does. Which one "
                "runs in which block?"
            )

    def behind(i, x):
        if isinstance(x, tuple):
            return (behind(i, x[0]), *x[1:])
        hidden = x.shape[-1]
        D, U = (next(p for p in groups[i] if p.dim() == 2 and p.shape[d] == hidden) for d in (1, 0))
        d, u = (next(p for p in groups[i] if p.shape == (len(M),)) for M in (D, U))
        return x + torch.relu(x @ D.T + d) @ U.T + u

    untuned.requires_grad_(False)
    logits, layers = model(_IDS).logits, untuned.model.layers
    networks = _hooked(untuned, [block.mlp for block in layers], behind)
    if _same(logits, networks, 1e-4):
        if not _same_gradient(logits, networks, new):
            raise Mistake(
                "The logits are right, but the gradient of the adapters is not complete. Is it cut "
                "off somewhere?"
            )
        return
    if _same(logits, _hooked(untuned, layers, behind), 1e-4):
        raise Mistake(
            "The adapters change the sum of the feed-forward network and the residual. They belong "
            "to the network's output alone."
        )
    attention = [block.self_attn.o_proj for block in layers]
    if _same(logits, _hooked(untuned, attention, behind), 1e-4):
        raise Mistake("The adapters stand after the attention.")
    raise Mistake("With random adapters the model computes something else than it should.")
