"""Every family of language models that transformers has, against every method of minipeft.

    python tests/families.py                    all of them, written to tests/families.csv
    python tests/families.py llama prefix lora  these families and methods only, printed

A family is a model_type of transformers: its configuration is made tiny, its weights are random and
large enough that nothing in the model is without effect. For each method there is one result:

    works      on the tiny model everything that `works` below asks for holds
    refused    add_* raised a ValueError, and the model was bit for bit what it was before
    FAILS      neither; the sentence says what was wrong
    not built  a tiny model cannot be built here, or it cannot read a text alone

What the plain model cannot do itself (left padding, generate, gradient checkpointing) is not asked
of the tuned one; the sentence then names it.
"""

import argparse
import copy
import csv
import inspect
import multiprocessing
import os
import tempfile
import warnings
import zlib
from collections import Counter
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy, pad  # noqa: E402
from transformers import (  # noqa: E402
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.models.auto import modeling_auto  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from minipeft import (  # noqa: E402
    add_adapters,
    add_lora,
    add_p_tuning,
    add_p_tuning_v2,
    add_prefix_tuning,
    add_prompt_tuning,
    fold_p_tuning,
    fold_p_tuning_v2,
    fold_prefix_tuning,
    load_adapter,
    merge_lora,
    save_adapter,
    unload_lora,
)

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

TABLE = Path(__file__).with_name("families.csv")
CAUSAL = list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# ---- tiny models --------------------------------------------------------------------------------

VOCAB, LAYERS, WINDOW, WIDE = 96, 4, 4, 24
SIZES = {  # of what a configuration may name so; a window is WINDOW wide, or WIDE
    VOCAB: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    LAYERS: """num_hidden_layers n_layer n_layers num_layers num_blocks decoder_layers
        encoder_layers num_decoder_layers num_encoder_layers
        num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads
        swa_num_attention_heads linear_num_value_heads linear_num_heads index_n_heads
        num_query_groups num_experts num_local_experts n_routed_experts moe_num_experts""",
    32: """hidden_size n_embd d_model embedding_dim emb_dim embedding_size input_embedding_size
        output_embedding_size word_embed_proj_dim lru_width dim_model_base pronunciation_embed_dim
        shape_embed_dim dim""",
    48: """intermediate_size ffn_dim ffn_hidden_size expert_ffn_hidden_size dim_ff dff d_inner
        decoder_ffn_dim encoder_ffn_dim feed_forward_size intermediate_size_mlp hidden_dim
        dense_intermediate_size n_inner""",
    24: """moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        shared_intermediate_size moe_shared_expert_intermediate_size
        prefix_dense_intermediate_size""",
    16: """head_dim swa_head_dim v_head_dim q_lora_rank kv_lora_rank linear_key_head_dim
        linear_value_head_dim linear_head_dim index_head_dim state_size ssm_state_size
        mamba_d_state mamba_dt_rank time_step_rank""",
    8: """dim_head d_head attention_head_dim attention_head_size kv_channels qk_nope_head_dim
        qk_rope_head_dim rotary_dim hidden_size_per_layer_input laurel_rank adapter_rank
        o_lora_rank hc_lowrank router_hidden_size gated_norm_rank d_rel""",
    2: """num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads
        num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts""",
    1: """n_group topk_group n_groups mamba_n_groups mamba_ngroups num_expert_group
        first_k_dense_replace num_dense_layers""",
    128: """max_position_embeddings n_positions n_ctx max_seq_len context_length
        max_target_positions max_source_positions model_max_length rel_extent
        original_max_position_embeddings position_bias_max_distance""",
}
SIZE = {name: size for size, names in SIZES.items() for name in names.split()}
WINDOWS = """sliding_window attention_window_size local_attention attention_chunk_size window_size
    sliding_window_size keep_window_size local_attention_window_len index_topk""".split()
CHUNKS = "mamba_chunk_size chunk_size".split()  # of the arithmetic, not of what is seen
DROPOUTS = ("dropout", "dropout_prob", "_pdrop", "dropout_p", "drop_rate", "layerdrop", "_noise")
LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 2, "ple_layer_ids": [1], "ngram_vocab_size_base": 50,
    "heads_per_ngram": 2, "ple_embed_dim": 16, "split_ngram_parts": 1,
    "make_ngram_vocab_size_divisible_by": 8,
}  # fmt: skip
DOTS3 = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 16,
}  # fmt: skip
OTHERWISE = {  # what a family needs beside the sizes
    "bailing_hybrid": {"layer_types": [LINEAR, LINEAR, LINEAR, FULL]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
        "rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 1e4}, FULL: None},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2,
                            "hidden_size": 32}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"text_config": DOTS3,
                   "vision_config": {"pyramid_num_routed": [-1, -1, 2, 4], "adapter_in_dim": 32,
                                     "adapter_out_dim": 32},
                   "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32}},
    "dots3_note_text": DOTS3,
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_hidden_layers": 5, "num_kv_shared_layers": 2,
                     "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL],
                     "activation_sparsity_pattern": [0.0] * 5, "intermediate_size": [48] * 5},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": MAMBA | {"layer_types": [LINEAR, FULL, LINEAR, FULL]},
    "helium": {"num_key_value_heads": 4, "head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": [LINEAR, LINEAR, LINEAR, FULL]},
    "lfm2_moe": {"layer_types": ["conv", FULL, "conv", FULL]},
    "longcat_flash": {"zero_expert_num": 2, "num_layers": 2},
    "ministral": {"head_dim": 16},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"attn_layers": ["local", "lsh", "local", "lsh"], "axial_pos_shape": [8, 16],
                 "axial_pos_embds_dim": [16, 16], "local_attn_chunk_length": 4,
                 "lsh_attn_chunk_length": 4},
    "roc_bert": {"shape_vocab_size": 20, "pronunciation_vocab_size": 20},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "ffn_round_up_to_multiple_of": 8,
              "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1,
              "attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 2},
    "zamba2": {"num_hidden_layers": 5, "mamba_headdim": 8, "n_mamba_heads": 8,
               "layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid", LINEAR]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
VARIANTS = {  # rows beside that of the family: the same, set up as many checkpoints are
    "mistral, no window": {"sliding_window": None},
    "mixtral, no window": {"sliding_window": None},
    "phi3, no window": {"sliding_window": None},
    "starcoder2, no window": {"sliding_window": None},
    "falcon, alibi": {"alibi": True},
}
SINGLE = (
    "inkling2_text",
    "prophetnet",
    "xglm",
    "xlnet",
)  # they mix float32 in and cannot compute in float64
NOT_BUILT = {
    "gemma3n": "It looks at images, and needs the package timm.",
    "gemma4_assistant": "It drafts for another model, whose keys and values it needs.",
    "gemma4_unified_assistant": "It drafts for another model, whose keys and values it needs.",
    "musicgen": "It makes music: its configuration is of three models, text, audio and decoder.",
    "musicgen_melody": "It makes music: its configuration is of three models.",
}


def small(default, chosen, window):
    """Arguments of a configuration: those of `default`, shrunk, and `chosen` instead."""
    chosen, given = dict(chosen), {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            inner = small(value, chosen.pop(name, {}), window)
            if name != "text_config":
                inner = {k: v for k, v in inner.items() if not k.endswith("token_id")}
            given[name] = inner
    for name, value in default.to_dict().items():
        if isinstance(value, list | tuple | dict) or value is None or name in given:
            continue
        if name in SIZE:
            given[name] = SIZE[name]
        elif name in WINDOWS:
            given[name] = window
        elif name in CHUNKS:
            given[name] = WINDOW
        elif name.endswith(DROPOUTS) and isinstance(value, float):
            given[name] = 0.0
        elif name == "is_decoder":
            given[name] = True
    if "qk_nope_head_dim" in given and "head_dim" in given:
        given["head_dim"] = 8
    if "kv_lora_rank" in given and "num_key_value_heads" in given:
        given["num_key_value_heads"] = 4
    return given | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | chosen


def built(family, kind="causal", window=WINDOW):
    """A tiny model of the family with random weights, in eval mode."""
    name, _, _ = family.partition(",")
    chosen = OTHERWISE.get(name, {}) | VARIANTS.get(family, {})
    if kind == "classifier":
        chosen = chosen | {"num_labels": 3}
    make = CONFIG_MAPPING[name]
    try:
        default = make()
    except Exception:
        default = make(**chosen)
    given = small(default, chosen, window)
    if kind == "classifier":
        given.pop("is_decoder", None)
    config = make(**given)
    auto = {"causal": AutoModelForCausalLM, "classifier": AutoModelForSequenceClassification}[kind]
    with torch.device("meta"):
        if sum(p.numel() for p in auto.from_config(config).parameters()) > 5e6:
            raise MemoryError("the smallest configuration found is not small")
    seed(family)
    dtype = torch.float32 if name in SINGLE else torch.float64
    # Experts one by one, since the grouped product of torch knows no float64.
    model = auto.from_config(config, dtype=dtype, experts_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.normal_(std=p.shape[-1] ** -0.5)
            else:
                p.add_(torch.randn_like(p), alpha=0.1)
    for name in ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id"):
        if hasattr(getattr(model, "generation_config", None), name):
            setattr(model.generation_config, name, None)
    return model.eval()


def seed(*words):
    torch.manual_seed(zlib.crc32("/".join(words).encode()))


# ---- texts, and what a model makes of them ------------------------------------------------------

N = 3  # virtual tokens
WORDS = [11, 12, 13]  # what they are compared with
PLACEHOLDER = 1000  # beyond the vocabulary
STEPS, BEAMS = 4, 3


class Words:
    """The least that a tokenizer must do: a text is its ids, written out."""

    all_special_ids, added_tokens_decoder = [0, 1, 2], {}

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [int(word) for word in text.split()]}

    def __len__(self):
        return VOCAB


def a_text(length, number=0, rows=1):
    """Token ids (rows, length), none of them special or one of WORDS."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(14, VOCAB, (rows, length), generator=generator)


class Broken(Exception):
    """A check that did not hold, in a few words."""


def same(what, found, expected, tolerance):
    if found.shape != expected.shape:
        raise Broken(f"{what}: {tuple(found.shape)} instead of {tuple(expected.shape)}")
    error = float((found - expected).norm() / (expected.norm() + 1e-30))
    if not error <= tolerance:  # NaN is not
        raise Broken(f"{what}: off by {error:.1g} of its size")


def holds(promise, *args):
    """Does a check hold of the plain model? If it cannot even run, it does not."""
    try:
        promise(*args)
        return True
    except Exception:
        return False


def takes(model, name):
    return name in inspect.signature(model.forward).parameters


def logits_of(model, ids, **inputs):
    return model(input_ids=ids, **inputs).logits


def side_by_side(texts, side):
    """Texts (rows, seq) of several lengths as one batch, padded with 0.

    Returns ids and mask (all rows, longest), and for each text its (rows, positions) there.
    """
    width, before = max(text.shape[1] for text in texts), 0
    ids, mask, places = [], [], []
    for text in texts:
        rows, length = text.shape
        room = (width - length, 0) if side == "left" else (0, width - length)
        ids.append(pad(text, room))
        mask.append(pad(torch.ones_like(text), room))
        positions = slice(width - length, width) if side == "left" else slice(0, length)
        places.append((slice(before, before + rows), positions))
        before += rows
    return torch.cat(ids), torch.cat(mask), places


def check_padding(model, texts, side, first, tolerance, each=True):
    """Each row of a padded batch gets what it gets without padding.

    first: number of the first position if position_ids are given, None if they are not.
    each: one output for each token; otherwise one for each row.
    """
    ids, mask, places = side_by_side(texts, side)
    inputs = {"attention_mask": mask}
    if first is not None:
        inputs["position_ids"] = first + (mask.cumsum(1) - 1).clamp(min=0)
    together = logits_of(model, ids, **inputs)
    for text, place in zip(texts, places, strict=True):
        found = together[place] if each else together[place[0]]
        same(f"padding on the {side}", found, logits_of(model, text), tolerance)


def step_by_step(model, ids, beams):
    """Beam search by hand, without padding and cache, from ids (rows, seq).

    Returns the best continuations (rows, STEPS), and the logits (rows, STEPS, vocab) of the first
    beam.
    """
    texts, scores, each = ids[:, None], torch.zeros(len(ids), 1), []  # (rows, 1, seq), (rows, 1)
    some = torch.arange(len(ids))[:, None]
    for _ in range(STEPS):
        flat = texts.flatten(0, 1)  # (rows * beams, seq)
        mask = torch.ones_like(flat)
        logits = logits_of(model, flat, attention_mask=mask, use_cache=False)[:, -1]
        logits = logits.unflatten(0, texts.shape[:2])  # (rows, beams, vocab)
        each.append(logits[:, 0])
        scores, best = (scores[..., None] + logits.log_softmax(-1)).flatten(1).topk(beams)
        parents, tokens = best // logits.shape[-1], best % logits.shape[-1]  # (rows, beams)
        texts = torch.cat([texts[some, parents], tokens[..., None]], 2)  # (rows, beams, seq + 1)
    return texts[:, 0, ids.shape[1] :], torch.stack(each, 1)


def check_generate(model, texts, beams, tolerance):
    """generate, left-padded and with its cache, does what each row does by itself."""
    ids, mask, places = side_by_side(texts, "left")
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=STEPS, num_beams=beams, do_sample=False,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    tokens = found.sequences[:, ids.shape[1] :]
    for text, (rows, _) in zip(texts, places, strict=True):
        expected, logits = step_by_step(model, text, beams)
        if beams == 1:  # the same token may come of other logits
            each = torch.stack([step[rows] for step in found.logits], 1)
            same("generate greedily", each, logits, tolerance)
        if not tokens[rows].equal(expected):
            raise Broken(f"generate with {beams} beams: {tokens[rows]} instead of {expected}")


def check_loss(model, inputs, tolerance):
    """The loss is the cross-entropy of the labels, by hand; returns that one."""
    output = model(**inputs)
    logits, labels = output.logits, inputs["labels"]
    if labels.dim() == 2:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    by_hand = cross_entropy(logits, labels)
    same("loss", output.loss, by_hand, tolerance)
    return by_hand


def twin(model):
    """A copy. A family that keeps states of its last forward can only be copied without graph."""
    for module in model.modules():
        for name, value in vars(module).items():
            if torch.is_tensor(value) and not value.is_leaf:
                vars(module)[name] = value.detach()
    return copy.deepcopy(model)


def trainables(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model, inputs):
    """{name: gradient of the loss}, zeros where there is none."""
    model.zero_grad()
    output = model(**{k: v for k, v in inputs.items() if k != "labels"})
    labels = inputs["labels"]
    logits = output.logits
    if labels.dim() == 2:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    cross_entropy(logits, labels).backward()
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in trainables(model).items()
    }
    model.zero_grad()
    return found


def check_checkpointing(model, inputs, tolerance):
    """Gradients under gradient checkpointing are those without."""
    model.train()
    try:
        expected = gradients(model, inputs)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        found = gradients(model, inputs)
        for name in expected:
            same(f"checkpointing, {name}", found[name], expected[name], tolerance)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def block_hooks(model, stack, hook):
    return [b.register_forward_hook(lambda *x, i=i: hook(i, x[-1])) for i, b in enumerate(stack)]


def stack_of(model):
    """The list of blocks: of the lists whose modules all run once for a text, the largest."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    counts = Counter()
    modules = {id(m): m for stack in lists for m in stack}
    handles = [
        m.register_forward_hook(lambda m, *_: counts.update([id(m)])) for m in modules.values()
    ]
    with torch.no_grad():
        model(input_ids=a_text(6))
    for handle in handles:
        handle.remove()
    once = [stack for stack in lists if all(counts[id(m)] == 1 for m in stack)]
    size = lambda stack: sum(p.numel() for p in stack.parameters())  # noqa: E731
    return max(once, key=size, default=None)


class Plain:
    """What the plain model of a family can do; the tuned one is asked for no more."""

    def __init__(self, model, kind):
        self.model, self.kind, self.cannot = model, kind, []
        single = model.dtype == torch.float32
        self.tolerance = 1e-3 if single else 1e-4  # of models that compute partly in float32
        self.exact = 1e-5 if single else 1e-12  # the same sums, perhaps in another order
        self.texts = [a_text(9, 1), a_text(5, 2)]
        many = [a_text(9, 10, 16), a_text(5, 11, 16)]  # what holds of one may do so by chance
        ids, mask, _ = side_by_side([a_text(9, 3), a_text(7, 4)], "right")
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        if kind == "classifier":
            labels = torch.tensor([2, 0])
        self.batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        each = kind == "causal"
        firsts = [None, 0, 1] if takes(model, "position_ids") else [None]
        with torch.no_grad():
            self.firsts = {}  # side: how positions are to be given so that padding does nothing
            for side in ("right", "left"):
                self.firsts[side] = [
                    first
                    for first in firsts
                    if holds(check_padding, model, many, side, first, self.tolerance, each)
                ]
                if not self.firsts[side]:
                    self.cannot.append(f"padding on the {side}")
            if kind == "causal":
                self.generates = next(
                    (
                        texts
                        for texts, trial in ((self.texts, many), (self.texts[:1], many[:1]))
                        if holds(check_generate, model, trial, 1, self.tolerance)
                    ),
                    [],
                )
                if len(self.generates) == 1 and self.firsts["left"]:
                    self.cannot.append("generate from padded rows")
                elif not self.generates:
                    self.cannot.append("generate")
                trial = many[: len(self.generates)]
                self.beams = holds(check_generate, model, trial, BEAMS, self.tolerance)
                if self.generates and not self.beams:
                    self.cannot.append("generate with beams")
        self.loss = holds(check_loss, model, self.batch, self.tolerance)
        if not self.loss:
            self.cannot.append("its own loss")
        frozen = twin(model)  # with frozen embeddings, as under every method
        for module in frozen.modules():
            if isinstance(module, nn.Embedding):
                module.requires_grad_(False)
        self.checkpoints = holds(check_checkpointing, frozen, self.batch, self.tolerance)
        if not self.checkpoints:
            self.cannot.append("gradient checkpointing")
        self.stack = stack_of(model)
        self.targets, self.read = self._linear_layers()

    def _linear_layers(self):
        """Names of the linear layers of the blocks that a text runs through, and of those that do
        more than their kind, or whose weight the model only reads.

        Those with a weight that another module has too stay out.
        """
        model, called = self.model, set()
        layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        inside = {m for s in model.modules() if isinstance(s, nn.ModuleList) for m in s.modules()}
        owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        layers = {n: m for n, m in layers.items() if m in inside and owners[id(m.weight)] == 1}
        handles = [m.register_forward_hook(lambda m, *_: called.add(m)) for m in layers.values()]
        found = gradients(model, self.batch)
        for handle in handles:
            handle.remove()
        used = [n for n in layers if found[f"{n}.weight"].norm() > 0]
        plain = [
            n
            for n in used
            if layers[n] in called
            and type(layers[n]).forward in (nn.Linear.forward, Conv1D.forward)
        ]
        return plain, [n for n in used if n not in plain]


# ---- methods ------------------------------------------------------------------------------------

TEXT = {"text": " ".join(map(str, WORDS)), "tokenizer": Words()}
METHODS = {
    "prompt": lambda m, p: add_prompt_tuning(m, None, "text", **TEXT),
    "lstm": lambda m, p: add_p_tuning(m, N, "lstm", 8),
    "mlp": lambda m, p: add_p_tuning(m, N, "mlp", 8),
    "template": lambda m, p: add_p_tuning(m, N, "mlp", 8, PLACEHOLDER),
    "prefix": lambda m, p: add_prefix_tuning(m, None, **TEXT),
    "projected": lambda m, p: add_prefix_tuning(m, N, True, 8),
    "key_value": lambda m, p: add_p_tuning_v2(m, N),
    "hidden": lambda m, p: add_p_tuning_v2(m, N, "hidden"),
    "lora": lambda m, p: add_lora(m, r=2, alpha=2, targets=p.targets or p.read),
    "dora": lambda m, p: add_lora(m, r=2, alpha=2, targets=p.targets or p.read, dora=True),
    "houlsby": lambda m, p: add_adapters(m, 4, "houlsby"),
    "pfeiffer": lambda m, p: add_adapters(m, 4, "pfeiffer"),
}
OF_CLASSIFIERS = ("key_value", "lora", "dora", "houlsby", "pfeiffer")
IN_FRONT = ("prompt", "lstm", "mlp", "template")
IN_EACH_LAYER = ("prefix", "projected", "key_value", "hidden")
FAR = ("prompt", "lstm", "mlp", *IN_EACH_LAYER)  # a template is seen as far as words are
FOLD = {
    "lstm": fold_p_tuning, "mlp": fold_p_tuning, "template": fold_p_tuning,
    "projected": fold_prefix_tuning, "hidden": fold_p_tuning_v2,
}  # fmt: skip


def snapshot(model):
    """All that a refusal must leave as it was."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        [(name, id(m), type(m), m.training, sorted(vars(m)), [len(vars(m)[h]) for h in hooks])
         for name, m in model.named_modules()],
        [(name, id(p), p.requires_grad, p.grad is None, p.dtype) for name, p in
         model.named_parameters(remove_duplicate=False)],
        model.config.to_dict(),
        getattr(model, "generation_config", None) and model.generation_config.to_dict(),
    )  # fmt: skip


def values(model):
    return {k: v.clone() for k, v in [*model.named_parameters(), *model.named_buffers()]}


def outcome(plain, family, method):
    """(result, sentence) of a method on a family."""
    model = twin(plain.model)
    before, numbers = snapshot(model), values(model)
    seed(family, method)
    try:
        METHODS[method](model, plain)
    except ValueError as error:
        after = values(model)
        changed = [k for k in numbers if k not in after or not numbers[k].equal(after[k])]
        if snapshot(model) != before or changed or len(after) != len(numbers):
            return "FAILS", f"refused, but the model is changed: {error}"
        return "refused", " ".join(str(error).split())
    except Exception as error:
        return "FAILS", f"adding: {type(error).__name__}: {error}"
    check = "?"
    try:
        for check in CHECKS:
            CHECKS[check](plain, model, method, family)
    except Broken as error:
        return "FAILS", f"{check}: {error}"
    except Exception as error:
        return "FAILS", f"{check}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "works", "; ".join(f"the plain model cannot: {x}" for x in plain.cannot)


def row_of(text, method):
    """A text (1, seq) as the method wants it: a template has placeholders before and in it."""
    if method != "template":
        return text
    hole = text.new_full((1, N), PLACEHOLDER)
    return torch.cat([hole[:, :1], text[:, :1], hole[:, 1:], text[:, 1:]], 1)


def typed(text, method):
    """The same with WORDS where the virtual tokens are, and which positions are the text's."""
    if method != "template":
        return torch.cat([torch.tensor([WORDS]), text], 1), slice(N, None)
    row = row_of(text, method)
    return row.masked_scatter(row == PLACEHOLDER, torch.tensor(WORDS)), slice(None)


@torch.no_grad()
def definition(plain, model, method, family):
    """Untrained, the model does what its definition says.

    Virtual tokens that hold what the plain model makes of WORDS do what the words do; LoRA and
    adapters do nothing.
    """
    if method not in (*IN_FRONT, *IN_EACH_LAYER):
        found, expected = (logits_of(m, **plain_inputs(plain)) for m in (model, plain.model))
        same("untrained", found, expected, plain.exact)
        return
    if plain.kind == "classifier":
        return  # in an encoder the words would see the text
    text = a_text(9, 5)
    words, real = typed(text, method)
    if method not in ("prompt", "prefix"):  # those two were added with the text
        model = twin(model)
        if method != "hidden" and method in FOLD:
            FOLD[method](model)
        (table,) = trainables(model).values()
        table.copy_(of_words(plain, method, words).view_as(table))
    found = logits_of(model, row_of(text, method))
    same("typed words", found, logits_of(plain.model, words)[:, real], plain.tolerance)


def plain_inputs(plain):
    return {"ids": plain.batch["input_ids"], "attention_mask": plain.batch["attention_mask"]}


def of_words(plain, method, words):
    """What the plain model makes of WORDS: vectors, keys and values (n, ...), or states."""
    model, ids = plain.model, torch.tensor([WORDS])
    if method in IN_FRONT:
        return model.get_input_embeddings()(ids)[0]  # (n, hidden)
    if method == "hidden":
        states = {}
        handles = [
            block.register_forward_pre_hook(
                lambda _, args, kwargs, i=i: states.update(
                    {i: (args[0] if args else kwargs["hidden_states"])[0, :N]}
                ),
                with_kwargs=True,
            )
            for i, block in enumerate(plain.stack)
        ]
        model(input_ids=words)
        for handle in handles:
            handle.remove()
        return torch.stack([states[i] for i in range(len(states))])  # (layers, n, hidden)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    parts = [t[0].transpose(0, 1).flatten(1) for x in cache.layers for t in (x.keys, x.values)]
    return torch.cat(parts, 1)  # (n, layers * 2 * kv_heads * head_dim)


def trained(plain, model, method, family):
    """As if it had been trained: from here on every trainable is large enough to matter."""
    base = {name for name, _ in plain.model.named_parameters()}
    loose = [n for n in trainables(model) if n in base]
    if plain.kind == "classifier":
        inside = plain.model.base_model_prefix + "."
        loose = [name for name in loose if name.startswith(inside)]
        if not any(name in base for name in trainables(model)):
            raise Broken("the head is frozen")
    if loose:
        raise Broken(f"{loose[0]} is not frozen")
    seed(family, method, "trained")
    with torch.no_grad():
        for p in trainables(model).values():
            p.add_(torch.randn_like(p), alpha=0.3)


@torch.no_grad()
def folded(plain, model, method, family):
    """Folding changes nothing."""
    if method in FOLD:
        other = FOLD[method](twin(model))
        row = row_of(a_text(9, 5), method)
        tolerance = plain.tolerance if method == "hidden" else plain.exact
        same("folded", logits_of(other, row), logits_of(model, row), tolerance)


@torch.no_grad()
def padded(plain, model, method, family):
    """Padding on either side changes nothing for a real token."""
    rows = [row_of(row, method) for row in plain.texts]
    virtual = method in (*IN_FRONT, *IN_EACH_LAYER)
    for side, firsts in plain.firsts.items():
        # Virtual tokens promise to count the positions where nobody else does.
        for first in {None, *firsts[:1]} if virtual and firsts else firsts[:1]:
            check_padding(model, rows, side, first, plain.tolerance, plain.kind == "causal")


def reaching(plain, model, method, family, length=24):
    """A token far away sees every virtual token, in each layer itself."""
    if method not in FAR:
        return
    model = twin(model)
    if method in FOLD and method != "hidden":
        FOLD[method](model)
    if plain.kind == "classifier":
        table = model.virtual_tokens.weight
    else:
        (table,) = trainables(model).values()
    row = row_of(a_text(length, 6), method)
    if method in IN_FRONT:
        out = {0: logits_of(model, row)}
    else:
        stack = stack_of(model)
        out = {}
        handles = block_hooks(
            model, stack, lambda i, o: out.update({i: o[0] if isinstance(o, tuple) else o})
        )
        logits_of(model, row)
        for handle in handles:
            handle.remove()
    shape = (len(out), N, -1) if method == "hidden" else (N, len(out), -1)
    for i, states in out.items():
        last = states[:, -1].flatten()
        weights = torch.linspace(1, 2, len(last)).to(last)
        (g,) = torch.autograd.grad(weights @ last, table, retain_graph=True)
        if method in IN_FRONT:
            seen = g.norm(dim=1)
        else:
            g = g.view(shape)
            seen = (g[i] if method == "hidden" else g[:, i]).norm(dim=-1)
        if not (seen > 0).all():
            raise Broken(
                f"the last of {length} tokens does not see virtual token {int(seen.argmin())}"
                + ("" if method in IN_FRONT else f" in layer {i}")
            )


def reaching_widely(plain, model, method, family):
    """The same where windows are wider, so that nothing was fitted to the width of this one."""
    if method not in FAR or plain.wide is None:
        return
    model = twin(plain.wide)
    seed(family, method)
    try:
        METHODS[method](model, plain)
    except ValueError as error:
        raise Broken(f"with a window of {WIDE} it is refused: {error}") from error
    try:
        reaching(plain, model, method, family, 112)
    except Broken as error:
        raise Broken(f"with a window of {WIDE} {error}") from error


def learning(plain, model, method, family):
    """The loss is the cross-entropy; gradients reach all trainables, and nothing else."""
    inputs = dict(plain.batch)
    if method == "template":
        rows = [row_of(r, method) for r in (a_text(9, 3), a_text(7, 4))]
        ids, mask, _ = side_by_side(rows, "right")
        labels = ids.masked_fill((mask == 0) | (ids == PLACEHOLDER), -100)
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if plain.loss:
        check_loss(model, inputs, plain.tolerance)
    found = gradients(model, inputs)
    for name, g in found.items():
        if not g.isfinite().all() or not g.norm() > 0:
            raise Broken(f"the gradient of {name} has the norm {float(g.norm())}")
    if plain.checkpoints:
        check_checkpointing(model, inputs, plain.tolerance)


@torch.no_grad()
def generating(plain, model, method, family):
    """generate, greedily and with beams, does what the model does step by step."""
    if plain.kind == "classifier" or not plain.generates:
        return
    rows = [row_of(row, method) for row in plain.generates]
    check_generate(model, rows, 1, plain.tolerance)
    if plain.beams:
        check_generate(model, rows, BEAMS, plain.tolerance)


@torch.no_grad()
def saved(plain, model, method, family):
    """What is saved and loaded on a fresh base is the same adapter."""
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder) / "adapter")
        other = load_adapter(twin(plain.model), Path(folder) / "adapter")
    row = row_of(a_text(9, 5), method)
    tolerance = plain.tolerance if method == "hidden" else plain.exact  # saved as keys and values
    same("loaded", logits_of(other, row), logits_of(model, row), tolerance)
    if method not in FOLD:  # those are saved folded
        for name, p in trainables(model).items():
            q = trainables(other).get(name)
            if method in ("prefix", "key_value") and q is None:
                (q,) = (q for n, q in trainables(other).items() if n.startswith("virtual_tokens"))
            if q is None or not p.equal(q):
                raise Broken(f"{name} is not what was saved")


@torch.no_grad()
def copied(plain, model, method, family):
    """A copy computes the same, and stands alone."""
    row = row_of(a_text(9, 5), method)
    before, other = logits_of(model, row), twin(model)
    same("copy", logits_of(other, row), before, 0)
    for p in trainables(other).values():
        p.add_(torch.randn_like(p))
    if logits_of(other, row).equal(before) or not logits_of(model, row).equal(before):
        raise Broken("a copy and its original hang together")


@torch.no_grad()
def merged(plain, model, method, family):
    """Merged LoRA computes the same; what unload leaves is a plain model again."""
    if method not in ("lora", "dora"):
        return
    other = merge_lora(twin(model))
    inputs = plain_inputs(plain)
    expected = logits_of(model, **inputs)
    same("merged", logits_of(other, **inputs), expected, plain.tolerance)
    same("unloaded", logits_of(unload_lora(other), **inputs), expected, plain.tolerance)


def read_weights(plain, model, method, family):
    """LoRA on a layer with ways of its own: it is refused, or it has an effect, as merged."""
    if method != "lora" or not plain.read:
        return
    for name in plain.read:
        other = twin(plain.model)
        try:
            add_lora(other, r=2, targets=[name])
        except ValueError:
            continue
        with torch.no_grad():
            for p in trainables(other).values():
                p.add_(torch.randn_like(p))
        if not all(g.norm() > 0 for g in gradients(other, plain.batch).values()):
            raise Broken(f"LoRA on {name} has no effect, and is not refused")
        with torch.no_grad():
            expected = logits_of(other, **plain_inputs(plain))
            found = logits_of(merge_lora(other), **plain_inputs(plain))
        same(f"LoRA on {name}, merged", found, expected, plain.tolerance)


CHECKS = {
    "definition": definition, "trained": trained, "folded": folded, "padded": padded,
    "reaching": reaching, "wide window": reaching_widely, "learning": learning,
    "generating": generating, "saved": saved, "copied": copied, "merged": merged,
    "read weights": read_weights,
}  # fmt: skip


# ---- the table ----------------------------------------------------------------------------------


def rows_of(kind, family, methods=None):
    """The rows of one family, a tuple for each method: kind, family, class, method, result, why."""
    name = family.partition(",")[0]
    if name in NOT_BUILT and kind == "causal":
        return [(kind, family, "", "all", "not built", NOT_BUILT[name])]
    try:
        model = built(family, kind)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        return [(kind, family, "", "all", "not built", f"{type(error).__name__}: {why}")]
    try:
        with torch.no_grad():
            ids, mask, _ = side_by_side([a_text(9), a_text(7)], "right")
            for logits in logits_of(model, ids), logits_of(model, ids, attention_mask=mask):
                if not logits.isfinite().all():
                    raise ArithmeticError("its logits are not finite")
        plain = Plain(model, kind)
        plain.wide = None
        if model.config.to_dict() != built(family, kind, WIDE).config.to_dict():
            plain.wide = built(family, kind, WIDE)
    except Exception as error:
        why = f"The plain model does not run: {type(error).__name__}: {error}"
        why = " ".join(why.split())[:250]
        return [(kind, family, type(model).__name__, "all", "not built", why)]
    return [
        (kind, family, type(model).__name__, method, *outcome(plain, family, method))
        for method in methods or (METHODS if kind == "causal" else OF_CLASSIFIERS)
    ]


def _rows_of(arguments):
    return rows_of(*arguments)


CLASSIFIERS = """albert bert camembert deberta deberta-v2 distilbert electra ernie mpnet
    megatron-bert modernbert nystromformer rembert roberta roberta-prelayernorm roformer squeezebert
    xlm-roberta gpt2 gpt_neox llama mistral opt qwen2 qwen3""".split()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="families and methods; all by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--to", type=Path, help="another file for the table")
    options = parser.parse_args()
    methods = [name for name in options.names if name in METHODS] or None
    every = [("causal", f) for f in CAUSAL + list(VARIANTS)]
    every += [("classifier", f) for f in CLASSIFIERS]
    families = [name for name in options.names if name not in METHODS]
    if families:
        unknown = set(families) - {f for _, f in every}
        if unknown:
            parser.error(f"no family or method is called {', '.join(sorted(unknown))}")
        every = [(kind, f) for kind, f in every if f in families]
    work = [(kind, f, methods) for kind, f in every]
    rows = []
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=20) as pool:
        for part in pool.imap(_rows_of, work):
            rows += part
            for row in part:
                if options.names or row[4] == "FAILS":
                    print(*row[:2], *row[3:], sep=" | ", flush=True)
    if not options.names or options.to:
        with open(options.to or TABLE, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("kind", "family", "class", "method", "result", "sentence"))
            writer.writerows(rows)
    for kind in ("causal", "classifier"):
        of_kind = [row for row in rows if row[0] == kind]
        number = len({row[1] for row in of_kind if row[3] != "all"})
        print(kind, f"{number} families built:", dict(Counter(row[4] for row in of_kind)))


if __name__ == "__main__":
    main()
