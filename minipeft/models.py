"""Load a causal language model: the course's own, a random tiny one, a folder or a hub id."""

import os
import re
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

# Grouped-query attention: two key-value heads serve four query heads.
GQA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
TINY = {
    "tiny-llama": lambda **k: LlamaConfig(**GQA, tie_word_embeddings=True, **k),
    "tiny-qwen2": lambda **k: Qwen2Config(**GQA, tie_word_embeddings=False, **k),
    "tiny-gpt2": lambda **k: GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=512,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **k),
    "tiny-bloom": lambda **k: BloomConfig(
        hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0, **k),
    "tiny-gpt_neox": lambda **k: GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, hidden_dropout=0.0, attention_dropout=0.0, **k),
}  # fmt: skip


def pick_device():
    """The fastest device that torch finds here: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def budget():
    """ "quick" on a CPU, "full" on an accelerator; MINIPEFT_BUDGET overrides."""
    chosen = os.environ.get("MINIPEFT_BUDGET")
    if chosen and chosen not in ("quick", "full"):
        raise ValueError(f"MINIPEFT_BUDGET must be quick or full, but is {chosen!r}.")
    return chosen or ("quick" if pick_device().type == "cpu" else "full")


def _byte_tokenizer():
    """One token per byte, so any text can be encoded, in any language; no file is needed.

    Two merges (a space joined to p, and to n) let " positive" and " negative" begin differently.
    Pad, beginning and end have tokens of their own.
    """
    words = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġp", "Ġn"]
    vocabulary = {word: i for i, word in enumerate(words)}
    bytes_ = Tokenizer(BPE(vocabulary, [("Ġ", "p"), ("Ġ", "n")]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _tiny(name, seed):
    """A model of two layers with random weights, the same for the same seed."""
    tokenizer = _byte_tokenizer()
    config = TINY[name](
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    return model, tokenizer


def _pretrained(source, dtype, local):
    from minipeft.assets import _quiet  # late, so that `python -m minipeft.assets` stays silent

    with _quiet():
        options = {"local_files_only": local}
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        # Never a pickle.
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            **options,
        )
    return model, tokenizer


def load_base(name="smollm2", device=None, dtype=torch.float32, seed=0):
    """Return (model, tokenizer), ready to use: on `device` (default: `pick_device()`), in eval
    mode, with a pad token.

    `name` is "smollm2" (SmolLM2-135M-Instruct), one of the random models "tiny" (= "tiny-llama"),
    "tiny-gpt2", "tiny-bloom", "tiny-qwen2", "tiny-gpt_neox" (weights drawn from `seed`), a folder
    that `save_pretrained` wrote, or the id of a causal model on the Hugging Face hub.
    A tokenizer without a pad token pads with its end token, which is harmless as long as padding
    is masked by position (claim 2). Raises AssetError in one sentence if the model cannot be had.
    """
    from minipeft.assets import AssetError, fetch_base_model

    name = os.fspath(name)
    if name in TINY or name == "tiny":
        model, tokenizer = _tiny("tiny-llama" if name == "tiny" else name, seed)
    elif name == "smollm2":
        model, tokenizer = _pretrained(fetch_base_model(), dtype, local=True)
        # An adapter saved here should name its base, not a folder of this machine.
        model.config._name_or_path = tokenizer.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    else:
        model, tokenizer = _named(name, dtype)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise AssetError(
                f"The tokenizer of {name} has neither a pad nor an end token, and the course needs "
                "an end token to train on; choose another model."
            )
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config.pad_token_id is None:  # else generate prints a warning
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.minipeft_tokenizer = tokenizer  # for soft prompts that start at a text
    return model.to(device=device or pick_device(), dtype=dtype).eval(), tokenizer


def _named(name, dtype):
    """A model from a folder or from the hub; every failure becomes one sentence."""
    from minipeft.assets import AssetError

    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise AssetError(
                f"The folder {name} holds no model: it has no config.json; give a folder that "
                "save_pretrained wrote."
            )
        try:
            return _pretrained(folder, dtype, local=True)
        except Exception as error:
            raise AssetError(
                f"The folder {name} holds no causal language model that transformers can load "
                f"({_first_line(error)})."
            ) from error
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name[0] in f".{string.whitespace}":
        raise AssetError(f"There is no folder {name!r}, and it is no name of a model on the hub.")
    try:
        return _pretrained(name, dtype, local=False)
    except Exception as error:
        raise AssetError(
            f"{name!r} is neither smollm2, tiny, {', '.join(TINY)} nor a folder, and the Hugging "
            f"Face hub did not give a causal model of that name ({_first_line(error)}); check the "
            "spelling and the network."
        ) from error


def _first_line(error):
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
