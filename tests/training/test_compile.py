"""`train(compile=True)`: the same losses, the same model afterward, and one sentence if it fails.

inductor, which writes and compiles C++, is slow to start, so it is asked once. The other tests let
torch trace the step into a graph and run the graph as it is, which must give the very same bits.
"""

import shutil

import pytest
import torch
from test_loop import WIDE, run
from torch._dynamo.utils import counters
from torch._inductor import config, utils
from transformers import AutoModelForCausalLM, LlamaConfig

from minipeft import (
    Collator,
    add_adapters,
    add_lora,
    add_p_tuning,
    add_p_tuning_v2,
    add_prefix_tuning,
    add_prompt_tuning,
    remove,
)
from minipeft.quantization import quantize_base

CONFIG = LlamaConfig(**WIDE | {"num_hidden_layers": 1}, intermediate_size=24)
ROWS = [
    {"input_ids": list(range(5, 5 + n)), "labels": [-100] * first + list(range(5 + first, 5 + n))}
    for n, first in ((9, 3), (14, 6), (12, 9), (11, 1), (16, 12), (6, 2))
]
UNEQUAL = [Collator(0)(ROWS[i : i + 2]) for i in (0, 2, 4)]  # 14, 12 and 16 long
BUCKETS = [Collator(0, multiple_of=16)(ROWS[i : i + 2]) for i in (0, 2, 4)]


@pytest.fixture
def traced(monkeypatch):
    """Graphs are made and differentiated as for a compiler, and then run operation by operation."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda model, options: real(model, backend="aot_eager")
    )
    counters.clear()


class Stopping(list):
    """Batches that stop the run, as a keyboard does, when number `at` is asked for."""

    def __init__(self, batches, at):
        super().__init__(batches)
        self.at = at

    def __iter__(self):
        for i, batch in enumerate(super().__iter__()):
            if i == self.at:
                raise KeyboardInterrupt
            yield batch


def one_block():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)


def dropping_lora(model):
    torch.manual_seed(0)
    return add_lora(model, dropout=0.3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor_gives_equal_losses_dropout_included():
    losses = []
    for compile in (False, True):
        model = dropping_lora(one_block())
        names = list(model.state_dict())
        losses.append(run(model, BUCKETS, compile=compile).train_loss)
        assert list(model.state_dict()) == names and model._compiled_call_impl is None
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    assert losses[0][0] - losses[0][-1] > 1e-3  # and they change from step to step


METHODS = {
    "all": (lambda model: model, {"accumulation": 2}),
    "lora": (dropping_lora, {"precision": "bfloat16"}),
    "nf4": (lambda model: add_lora(quantize_base(model)), {}),
    "adapters": (add_adapters, {}),
    "prompt tuning": (add_prompt_tuning, {}),
    "p-tuning": (add_p_tuning, {}),
    "prefix-tuning": (add_prefix_tuning, {}),
    "p-tuning v2": (lambda model: add_p_tuning_v2(model, form="hidden"), {}),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_technique_trains_alike(traced, method):
    """Losses, gradient norms, evaluations and weights are the same bits."""
    add, options = METHODS[method]
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = add(one_block())
        history = run(model, BUCKETS, eval_batches=UNEQUAL, compile=compile, **options)
        found.append((vars(history), model))
        assert bool(counters["stats"]["unique_graphs"]) == compile
    (eager, a), (graph, b) = found
    assert eager == graph
    assert all(map(torch.equal, a.parameters(), b.parameters()))
    if method not in ("all", "nf4"):
        ids = UNEQUAL[0]["input_ids"]
        assert torch.equal(remove(b)(ids).logits, one_block()(ids).logits)


def test_buckets_are_one_shape_and_change_no_loss(traced):
    """Where the first target stands differs too, and does not make another graph."""
    assert {batch["input_ids"].shape for batch in BUCKETS} == {(2, 16)}
    losses, graphs = [], []
    for batches in (BUCKETS, UNEQUAL):
        counters.clear()
        losses.append(run(add_lora(one_block()), batches, max_steps=3, compile=True).train_loss)
        graphs.append(counters["stats"]["unique_graphs"])
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    assert graphs[0] == 1 < graphs[1]


def test_hidden_states_in_place_of_token_ids_are_compiled_too(traced):
    losses = []
    for compile in (False, True):
        model = add_lora(one_block())
        look_up = model.get_input_embeddings()
        batches = [
            {n: x for n, x in batch.items() if n != "input_ids"}
            | {"inputs_embeds": look_up(batch["input_ids"]).detach()}
            for batch in BUCKETS
        ]
        losses.append(run(model, batches, max_steps=3, compile=compile).train_loss)
    assert losses[0] == losses[1]


def test_a_run_resumes_compiled_or_not(traced, tmp_path):
    straight = run(add_lora(one_block()), BUCKETS, max_steps=4)
    again = add_lora(one_block())
    options = {"max_steps": 4, "save_every": 2, "checkpoint_dir": tmp_path}
    batches = Stopping(BUCKETS, at=2)
    with pytest.raises(KeyboardInterrupt):
        run(again, batches, compile=True, **options)
    assert again._compiled_call_impl is None
    history = run(add_lora(one_block()), BUCKETS, compile=True, **options)
    assert history == straight


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compile": "fast"}, "compile='fast' is none of"),
        ({"compile": 1}, "compile=1 is none of"),
        ({"compile": True, "gradient_checkpointing": True}, "does not go with gradient_check"),
        ({"compile": "reduce-overhead", "accumulation": 2}, "cannot accumulate"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        run(one_block(), **options)


def test_without_a_compiler_one_sentence_says_so_and_nothing_has_changed(monkeypatch):
    model = add_lora(one_block())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with utils.fresh_cache(), config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(ValueError, match="cannot compile this LlamaForCausalLM here .*g\\+\\+"):
            run(model, BUCKETS, compile=True)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    assert model._compiled_call_impl is None and model.lm_head.weight.grad is None
    run(model, BUCKETS, max_steps=1)  # and it trains as before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("how", [True, "reduce-overhead"])
def test_compiled_steps_and_cuda_graphs_give_equal_losses_on_cuda(how):
    losses = []
    for compile in (False, how):
        model = dropping_lora(one_block()).cuda()
        losses.append(run(model, BUCKETS, max_steps=12, compile=compile).train_loss)
    torch.testing.assert_close(*losses, rtol=0, atol=1e-4)
