"""memory.estimate against what torch measures, and against the arithmetic of the papers."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from memory_cases import (
    BLOOM,
    BLOOM_ZH,
    QWEN,
    SMOLLM2,
    WITHOUT_DROPOUT,
    asked_of_the_h100,
    assert_close,
    of_the_h100,
)
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, GPTNeoXConfig, LlamaConfig

from minipeft import (
    add_lora,
    add_p_tuning,
    add_p_tuning_v2,
    add_prefix_tuning,
    add_prompt_tuning,
    count_parameters,
    fold_p_tuning,
    fold_p_tuning_v2,
    fold_prefix_tuning,
    freeze,
    load_base,
    train,
    unfreeze,
)
from minipeft.memory import PARTS, estimate, measure
from minipeft.memory.cuda import workspace
from minipeft.memory.measure import Tracker
from minipeft.quantization import quantize_base

CONFIGS = {"smollm2": SMOLLM2, "gpt2": GPT2Config(), "bloom": BLOOM, "qwen2": QWEN}
LINEARS = {
    "smollm2": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc"],
    "bloom": ["query_key_value", "dense", "dense_h_to_4h"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "up_proj"],
}
BLOCKS = {"smollm2": "model.layers", "gpt2": "transformer.h", "bloom": "transformer.h"}
BLOCKS["qwen2"] = BLOCKS["smollm2"]


@st.composite
def steps(draw):
    name = draw(st.sampled_from(sorted(CONFIGS)))
    options = {
        "batch": draw(st.integers(1, 8)),
        "seq": draw(st.integers(64, 2048)),
        "checkpointing": draw(st.booleans()),
        "attention": draw(st.sampled_from(["fused", "eager"])),
        "precision": draw(st.sampled_from(["float32", "float32", "bfloat16"])),
        "optimizer": draw(st.sampled_from(["adamw", "adamw-foreach", "sgd"])),
        "device": draw(st.sampled_from(["cpu", "cuda"])),
    }
    kind = draw(st.sampled_from(["full", "lora", "lora", "last blocks", "norms", "head"]))
    if name == "gpt2":
        options["seq"] = min(options["seq"], 1024)
    if kind == "lora":
        targets = draw(st.lists(st.sampled_from(LINEARS[name]), min_size=1, unique=True))
        r, p = draw(st.integers(1, 64)), draw(st.sampled_from([0.0, 0.1]))
        return name, options, lambda model: add_lora(model, r=r, targets=targets, dropout=p)
    patterns = {
        "full": None,
        "last blocks": [f"{BLOCKS[name]}.{i}" for i in range(12 - draw(st.integers(1, 6)), 12)],
        "norms": ["*ln_*" if name == "gpt2" else "*norm*"],
        "head": ["lm_head"],
    }[kind]
    if patterns is None:
        return name, options, None
    return name, options, lambda model: unfreeze(freeze(model), *patterns)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(steps())
@example(("qwen2", {"batch": 8, "seq": 2048, "attention": "eager"}, None))
@example(("gpt2", {"batch": 1, "seq": 64}, None))
def test_prediction_is_within_two_percent_of_the_measurement(step):
    name, options, method = step
    config = CONFIGS[name]
    assert_close(estimate(config, method, **options), measure(config, method, **options))


@pytest.mark.parametrize(
    "config, targets, options",
    [
        # k of the first block needs no gradient, so q is not kept there
        (LlamaConfig(num_hidden_layers=1), "q_proj", {"attention": "eager"}),
        # transformers makes the embedded tokens require a gradient, and they stay
        (GPT2Config(n_layer=2), "c_attn", {"checkpointing": True, "seq": 400}),
        # the two gradients of a tied table and their sum stand at once
        (GPT2Config(n_layer=1), None, {"optimizer": "sgd", "seq": 10}),
        (GPT2Config(n_layer=2), "c_attn", {"dtype": torch.bfloat16}),
        # the peak falls on the optimizer's step
        (LlamaConfig(num_hidden_layers=2), None, {"seq": 8, "optimizer": "adamw-foreach"}),
        (GPT2Config(n_layer=2), None, {"seq": 8, "optimizer": "adamw8bit"}),
        # on CUDA a dropout mask has one byte an element, and fused attention keeps none
        (GPT2Config(n_layer=2), None, {"device": "cuda"}),
        (GPT2Config(n_layer=2), "c_attn", {"device": "cuda", "checkpointing": True}),
        (GPT2Config(n_layer=2), "c_attn", {"device": "cuda", "attention": "eager"}),
        (BloomConfig(n_layer=2), "dense", {"dtype": torch.bfloat16, "checkpointing": True}),
        (LlamaConfig(num_hidden_layers=2), "o_proj", {"precision": "bfloat16", "batch": 1}),
    ],
)
def test_details_that_are_small_in_a_large_model(config, targets, options):
    method = None if targets is None else lambda model: add_lora(model, targets=targets)
    options = {"batch": 2, "seq": 128} | options
    predicted, measured = (f(config, method, **options) for f in (estimate, measure))
    assert_close(predicted, measured, margin=0.001)


VIRTUAL_TOKENS = {
    "prompt": lambda model: add_prompt_tuning(model, 10),
    "lstm": lambda model: add_p_tuning(model, 10, "lstm", 32),
    "mlp": lambda model: add_p_tuning(model, 10, "mlp"),
    "mlp, folded": lambda model: fold_p_tuning(add_p_tuning(model, 10, "mlp")),
    "prefix": lambda model: add_prefix_tuning(model, 10),
    "projected": lambda model: add_prefix_tuning(model, 10, projection=True),
    "projected, folded": lambda model: fold_prefix_tuning(add_prefix_tuning(model, 10, True)),
    "key_value": lambda model: add_p_tuning_v2(model, 10),
    "hidden": lambda model: add_p_tuning_v2(model, 10, "hidden"),
    "hidden, folded": lambda model: fold_p_tuning_v2(add_p_tuning_v2(model, 10, "hidden")),
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
TINY = {
    "llama": LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=500, **SPECIAL,
    ),
    "gpt2": GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=500, **SPECIAL),
    "bloom": BloomConfig(hidden_size=64, n_layer=3, n_head=4, vocab_size=500, **SPECIAL),
}  # fmt: skip
MEDIUM = {
    "llama": LlamaConfig(
        hidden_size=512, intermediate_size=1400, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=8000, **SPECIAL,
    ),
    "gpt2": GPT2Config(n_embd=512, n_layer=3, n_head=8, vocab_size=8000, **SPECIAL),
    "bloom": BloomConfig(hidden_size=512, n_layer=3, n_head=8, vocab_size=8000, **SPECIAL),
}  # fmt: skip
STEPS = [
    {},
    {"checkpointing": True},
    {"precision": "bfloat16"},
    {"dtype": torch.bfloat16, "batch": 1},
    {"device": "cuda", "attention": "eager"},
]


@pytest.mark.parametrize("method", VIRTUAL_TOKENS)
@pytest.mark.parametrize("family", TINY)
def test_virtual_tokens_are_predicted_too(family, method):
    """In front of the text, in each block or in the cache, plain and folded."""
    method = VIRTUAL_TOKENS[method]
    for options in STEPS:
        options = {"batch": 2, "seq": 60} | options
        predicted, measured = (f(TINY[family], method, **options) for f in (estimate, measure))
        assert_close(predicted, measured)
    for options in ({"checkpointing": True}, {"seq": 16}):  # the last peaks at the encoder
        options = {"batch": 2, "seq": 128} | options
        predicted, measured = (f(MEDIUM[family], method, **options) for f in (estimate, measure))
        assert_close(predicted, measured)


def test_each_place_of_virtual_tokens_has_its_own_cost():
    """n tokens in front are n positions more in every block; a prefix is n more keys and values."""
    kept = {}
    for name in ("prompt", "prefix", "hidden"):
        memory = estimate(TINY["bloom"], VIRTUAL_TOKENS[name], batch=3, seq=50)
        kept[name] = sum(size for *_, size in memory.kept)
    without = estimate(TINY["bloom"], lambda m: unfreeze(freeze(m), "transformer.word_embeddings"),
                       batch=3, seq=50)  # fmt: skip
    without = sum(size for *_, size in without.kept)
    assert kept["prompt"] == kept["hidden"]
    assert kept["prefix"] - without == 4 * 3 * (2 * 10 * 64 + 4 * 50 * 10)  # k and v, the weights
    longer = 60 / 50
    assert without * longer < kept["prompt"] < without * longer**2


def test_a_template_is_refused_by_name():
    with pytest.raises(ValueError, match="no formulas for virtual tokens in the place 'template'"):
        estimate(TINY["llama"], lambda model: add_p_tuning(model, 3, "mlp", placeholder_id=7))

    def hooked(model):
        model.register_forward_pre_hook(lambda *_: None)
        return model

    with pytest.raises(ValueError, match="no formulas for a method that changes the input of the"):
        estimate(TINY["llama"], hooked)


def test_the_long_sequences_of_bloom_peak_in_the_forward_pass():
    """Its variables hold the scores twice while its attention runs."""
    for options in ({"batch": 4, "seq": 300}, {"batch": 1, "seq": 300, "checkpointing": True}):
        method = lambda model: add_lora(model, targets="query_key_value")  # noqa: E731
        predicted, measured = (f(TINY["bloom"], method, **options) for f in (estimate, measure))
        assert predicted.moment == "forward pass"
        assert_close(predicted, measured)


def test_lora_on_four_bit_weights_is_predicted_too():
    method = lambda model: add_lora(quantize_base(model), targets="c_attn")  # noqa: E731
    for options in ({"batch": 2, "seq": 128}, {"precision": "bfloat16"}, {"checkpointing": True}):
        predicted, measured = (
            f(GPT2Config(n_layer=2), method, **options) for f in (estimate, measure)
        )
        assert_close(predicted, measured, margin=0.001)
    blocks, rest = 2 * 12 * 768**2, (50257 + 1024) * 768 * 4  # linear weights of GPT-2; embeddings
    assert measured.parts["parameters"] == pytest.approx(rest + blocks * 4.127 / 8, rel=0.02)


SMALL = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 3}
SETTINGS = [
    {},
    {"precision": "bfloat16"},
    {"checkpointing": True},
    {"dtype": torch.bfloat16},
    {"precision": "bfloat16", "checkpointing": True},
]


def q_and_v_on_4_bits(model):
    return add_lora(quantize_base(model), targets=("q_proj", "v_proj"))


@pytest.mark.parametrize("vocab, options", [(300, o) for o in SETTINGS] + [(8000, {})])
def test_the_peak_of_train_on_a_4_bit_base_is_predicted(vocab, options):
    """With few logits it falls where a weight is made from its codes: that takes 6 bytes each."""
    config = LlamaConfig(**SMALL, intermediate_size=1024, vocab_size=vocab)
    predicted = estimate(config, q_and_v_on_4_bits, batch=4, seq=64, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=options.get("dtype", torch.float32))
    q_and_v_on_4_bits(model)
    ids = torch.randint(5, 300, (4, 64), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["attention_mask"][0, 0] = 0
    how = {
        "precision": options.get("precision", "float32"),
        "gradient_checkpointing": options.get("checkpointing", False),
    }
    standing = [*model.parameters(), *model.buffers(), *batch.values()]
    with Tracker(standing, 0, 0) as peak:
        train(model, [batch], max_steps=2, lr=1e-4, progress=False, **how)
    assert predicted.total == pytest.approx(peak.peak, rel=0.02), str(predicted)


@pytest.mark.parametrize(
    "targets, options", [("q_proj", o) for o in SETTINGS] + [("down_proj", {})]
)
def test_weights_made_from_4_bits_are_temporaries(targets, options):
    """The layers are so wide that hardly anything else stands."""
    config = LlamaConfig(**SMALL, intermediate_size=4096, vocab_size=100)
    method = lambda model: add_lora(quantize_base(model), targets=targets)  # noqa: E731
    options = {"batch": 1, "seq": 8} | options
    predicted, measured = (f(config, method, **options) for f in (estimate, measure))
    assert predicted.total == pytest.approx(measured.total, rel=0.015)
    largest = 256 * 4096
    assert 6 * largest <= predicted.at_peak["temporaries"] <= 6.6 * largest


def test_the_peaks_that_an_h100_had_are_predicted():
    """The allocator's peak of torch in 16 cases. Two workspaces of cuBLAS, 64 MiB, explain 13 of
    them to 0.2 %. In the three others, all in 16 bit, up to 0.7 % are missing: the allocator gives
    out blocks of 10 MiB and more in steps of 2 MiB, and a rest of up to 1 MiB goes with the block.
    (In Llama 7B at 1 x 2048 the inner tensors of the MLP have 43 MiB; three of them are kept in
    each of 32 blocks, and 96 MiB are missing.)"""
    assert workspace() == 2 * 32 * 2**20 or torch.cuda.is_available()
    errors = []
    for row in of_the_h100():
        config, method, options = asked_of_the_h100(row)
        memory = estimate(config, method, **options)
        errors.append(memory.total / 2**30 / float(row["allocated_gib"]) - 1)
    assert len(errors) == 16 and max(map(abs, errors)) < 0.01
    assert sum(abs(error) < 0.002 for error in errors) == 13


def test_parameters_gradients_and_adam_are_the_bytes_of_the_textbook():
    total = 134_515_008  # SmolLM2-135M, its head tied to the embeddings
    full = estimate(SMOLLM2, batch=1, seq=64)
    assert full.parts["parameters"] == pytest.approx(4 * total, abs=1000)  # and a few buffers
    assert full.parts["gradients"] == 4 * total
    assert full.parts["optimizer"] == 8 * total
    assert full.parts["inputs"] == 3 * 64 * 8
    lora = estimate(SMOLLM2, lambda model: add_lora(model, r=8), batch=1, seq=64)
    trainable = 30 * 8 * (576 + 576 + 576 + 192)
    assert lora.parts["gradients"] == 4 * trainable
    assert lora.parts["optimizer"] == 8 * trainable
    assert lora.parts["parameters"] == pytest.approx(4 * (total + trainable), abs=1000)
    half = estimate(SMOLLM2, batch=1, seq=64, dtype=torch.bfloat16)
    assert half.parts["optimizer"] == 4 * total
    assert estimate(SMOLLM2, batch=1, seq=64, optimizer="sgd").parts["optimizer"] == 0
    assert full.parts["logits"] == 3 * 64 * 49152 * 4


@pytest.mark.parametrize("b, s, h, a", [(2, 128, 256, 8), (1, 1024, 768, 12)])
def test_a_gpt_block_at_16_bit_keeps_what_korthikanti_derives(b, s, h, a):
    """Korthikanti et al. 2022, equation 1: s b h (34 + 5 a s / h) bytes a layer. It leaves out the
    mean and deviation of the two norms, 4 numbers a position."""
    config = GPT2Config(n_embd=h, n_head=a, n_layer=2, activation_function="gelu")
    block = estimate(config, batch=b, seq=s, attention="eager", dtype=torch.bfloat16, device="cuda")
    kept = sum(size for _, _, size in block.kept)
    # For one row the views of q, k and v keep as much as three copies do.
    assert kept - 4 * b * s * 4 == s * b * h * 34 + 5 * a * s * s * b


def test_one_formula_by_hand_for_a_llama_block():
    """Frozen but for LoRA on q and v, fused attention, float32, by the rules of the derivative."""
    b, s, h, i, a, k, d, r = 2, 96, 576, 1536, 9, 3, 64, 4
    kept = estimate(SMOLLM2, lambda model: add_lora(model, r=r), batch=b, seq=s).kept
    floats = (
        h + 1 + h  # norm 1: its input, 1/rms, and the normed x that A_q and A_v read
        + 2 * r  # A x of q and v
        + 4 * a * d + a  # q, k and v for all heads, the output, one number a row
        + s  # the mask as numbers
        + h + 1  # norm 2; what it gives goes into frozen layers
        + 3 * i  # gate, silu(gate), up
    )  # fmt: skip
    assert k * 3 == a
    cos_sin = 2 * s * d * 4
    assert sum(size for _, _, size in kept) == 4 * b * s * floats + cos_sin


def test_freezing_the_lower_blocks_leaves_only_the_upper_ones():
    last = lambda k: lambda m: unfreeze(freeze(m), *(f"transformer.h.{11 - i}" for i in range(k)))  # noqa: E731
    sizes = [
        estimate(WITHOUT_DROPOUT, last(k), batch=2, seq=64).parts["activations"]
        for k in (1, 2, 3, 4)
    ]
    steps_ = [b - a for a, b in zip(sizes, sizes[1:], strict=False)]
    assert steps_[0] == steps_[1] == steps_[2] > 0


def test_a_model_of_more_than_a_billion_parameters_is_measured_without_being_allocated():
    method = lambda model: add_lora(model, targets="query_key_value")  # noqa: E731
    predicted = estimate(BLOOM_ZH, method, batch=1, seq=256)
    measured = measure(BLOOM_ZH, method, batch=1, seq=256)
    trainable = 24 * 8 * (2048 + 3 * 2048)
    assert measured.parts["parameters"] == 4 * (1_303_111_680 + trainable)
    assert_close(predicted, measured)


def test_the_report_prints_and_plots():
    memory = estimate(SMOLLM2, batch=2, seq=64)
    text = str(memory)
    assert all(name in text for name in PARTS) and "GiB" in text and memory.moment in text
    block = memory.block()
    assert "b a s d" not in block.splitlines()[-1] and "one block" in block
    assert f"{sum(row[2] for row in memory.kept):,}" in block
    ax = memory.plot(label="full", unit="MiB")
    assert sum(bar.get_height() for bar in ax.patches) == pytest.approx(memory.total / 2**20)
    assert ax.get_ylabel() == "memory (MiB)"
    assert "total" in str(measure(SMOLLM2.__class__(num_hidden_layers=1, vocab_size=100)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch": 0}, "batch=0 must be a whole number"),
        ({"seq": 2.5}, "seq=2.5 must be a whole number"),
        ({"optimizer": "lion"}, "optimizer='lion' is none of adamw"),
        ({"precision": "fp8"}, "precision='fp8' is none of float32"),
        ({"attention": "flash"}, "attention='flash' is none of fused"),
        ({"method": freeze}, "Nothing is trainable"),
        ({"method": "lora"}, "method='lora' must be a function"),
        ({"method": lambda model: None}, "`method` returned a NoneType; it must return the model"),
        ({"batch": "4"}, "batch='4' must be a whole number"),
        ({"checkpointing": "yes"}, "checkpointing='yes' is neither True nor False"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' must be a floating-point type"),
        ({"dtype": torch.int64}, "dtype=torch.int64 must be a floating-point type"),
        ({"device": "tpu"}, "device='tpu' is none of cpu, cuda"),
        ({"optimizer": ["adamw"]}, r"optimizer=\['adamw'\] is none of"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(options, message):
    for function in (estimate, measure):
        with pytest.raises(ValueError, match=message):
            function(SMOLLM2, **options)


def test_what_has_no_formula_is_refused_by_name():
    with pytest.raises(ValueError, match="no formulas for 'gpt_neox'.*memory.measure needs none"):
        estimate(GPTNeoXConfig())
    with pytest.raises(ValueError, match="no formula for the activation 'relu'"):
        estimate(LlamaConfig(num_hidden_layers=1, hidden_act="relu"))

    def replaced(model):
        model.model.layers[0].self_attn.q_proj = torch.nn.Identity()
        return model

    with pytest.raises(ValueError, match="no formula for the Identity at q_proj"):
        estimate(LlamaConfig(num_hidden_layers=1), replaced)
    with pytest.raises(ValueError, match="tracker='theirs' is none of own, torch"):
        measure(SMOLLM2, tracker="theirs")


def test_nothing_is_allocated_by_a_prediction():
    big = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                      num_attention_heads=64, num_key_value_heads=8)  # fmt: skip
    memory = estimate(big, add_lora, dtype=torch.bfloat16)  # 70B: 130 GiB, if it were real
    assert memory.parts["parameters"] > 120 * 2**30
    with torch.device("meta"):
        trainable, _ = count_parameters(add_lora(AutoModelForCausalLM.from_config(big)))
    assert memory.parts["gradients"] == 4 * trainable


def test_lora_on_an_embedding_is_refused_in_one_sentence():
    """There is no formula for it; measuring needs none."""
    config = load_base("tiny-llama", device="cpu")[0].config

    def embedded(model):
        return add_lora(model, r=4, targets=("embed_tokens", "q_proj"))

    with pytest.raises(ValueError, match="no formula for LoRA on embeddings"):
        estimate(config, embedded, batch=2, seq=8)
    assert measure(config, embedded, batch=2, seq=8).total > 0
