"""Load a causal language model: SmolLM2, a tiny random model, a folder, or an id of the hub."""

import os
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from minipeft.assets.fetch import AssetError
from minipeft.assets.sources import fetch_base_model, quiet
from minipeft.refusals import require, shown
from minipeft.technique.asked import close

# Grouped-query attention: two key-value heads serve four query heads.
GQA: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
TINY: dict[str, Callable[..., PreTrainedConfig]] = {
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


def pick_device() -> torch.device:
    """The fastest available device: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def budget() -> str:
    """ "quick" on a CPU, "full" on an accelerator, unless MINIPEFT_BUDGET is set.

    Raises ValueError if MINIPEFT_BUDGET is neither quick nor full.
    """
    chosen = os.environ.get("MINIPEFT_BUDGET")
    require(
        not chosen or chosen in ("quick", "full"),
        f"MINIPEFT_BUDGET must be quick or full, but is {chosen!r}.",
    )
    return chosen or ("quick" if pick_device().type == "cpu" else "full")


def _byte_tokenizer():
    """A tokenizer with one token per byte, which encodes any text and needs no file.

    Two merges (" p" and " n") make the first tokens of " positive" and " negative" differ. There
    are separate pad, BOS and EOS tokens.
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
    """A model of two layers with random weights that depend only on the seed, and its tokenizer."""
    tokenizer = _byte_tokenizer()
    config = TINY[name](
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    # Do not change the caller's random states: fork_rng restores the CPU's, and those of the GPUs
    # are not seeded, as torch.manual_seed would.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model, tokenizer


def _pretrained(source, dtype, local):
    """A saved model and its tokenizer. Raises AssetError if its weights are not just those of the
    model, or it is not a causal language model."""
    with quiet():
        options = {"local_files_only": local, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
            **options,
        )
    name = type(model).__name__
    if found["missing_keys"]:
        raise AssetError(
            f"{source} lacks {_some(found['missing_keys'])}, so {name} would have random numbers "
            "there; give a causal language model, saved whole."
        )
    unread = [key for key in found["unexpected_keys"] if key.endswith("weight")]
    if unread:
        raise AssetError(
            f"{source} has {_some(unread)}, which {name} would leave out; give a causal language "
            "model as save_pretrained writes it."
        )
    if getattr(model, "is_quantized", False):
        raise AssetError(f"{source} is quantized already; load the plain model and quantize that.")
    known, rows = tokenizer.vocab_size, model.get_input_embeddings().num_embeddings
    if known > rows:
        raise AssetError(f"The tokenizer of {source} has {known} tokens, and {name} knows {rows}.")
    with torch.no_grad():  # does a later token change the logits of an earlier one?
        ids = [torch.tensor([[rows // 2, rows // 2 - i]]) for i in (1, 2)]  # each (1, 2)
        one, other = (model(input_ids=pair).logits[:, 0] for pair in ids)
    if not one.isfinite().all():
        raise AssetError(
            f"{source} in {dtype} gives numbers that are not finite; its weights are damaged, or "
            "too large for that type."
        )
    if not close(one, other):
        raise AssetError(
            f"{source} is not a causal language model: in {name} a token sees those after it."
        )
    return model, tokenizer


def _some(keys):
    keys = sorted(map(str, keys))
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"


def load_base(
    name: str | os.PathLike[str] = "smollm2",
    device: torch.device | str | int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load (model, tokenizer): in eval mode, with a pad token, on `device` or `pick_device()`.

    `name` is "smollm2" (SmolLM2-135M-Instruct), one of the random models "tiny" (= "tiny-llama"),
    "tiny-gpt2", "tiny-bloom", "tiny-qwen2", "tiny-gpt_neox" (weights drawn from `seed`), a folder
    written by `save_pretrained`, or the id of a causal model on the Hugging Face hub.
    If the tokenizer has no pad token, it pads with EOS, which is harmless as long as padding is
    masked by position (notebook 02). `dtype`: torch.float16, bfloat16, float32 or float64.
    Code in a folder or on the hub is never run, and pickled weights are not read.
    Raises AssetError if the model is not available or unusable, ValueError for other bad input.
    """
    require(
        isinstance(name, str | os.PathLike),
        f"name={shown(name)} is neither the name of a model nor a folder.",
    )
    require(
        dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64),
        f"dtype={shown(dtype)} is none of torch.float16, bfloat16, float32 and float64.",
    )
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed={shown(seed)} is not a whole number from 0 to 2**64 - 1.")
    device = pick_device() if device is None else _device(device)
    name = os.fspath(name)
    if name in TINY or name == "tiny":
        model, tokenizer = _tiny("tiny-llama" if name == "tiny" else name, seed)
    elif name == "smollm2":
        model, tokenizer = _pretrained(fetch_base_model(), dtype, local=True)
        # A saved adapter should name its base model, not a folder on this machine.
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
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config.pad_token_id is None:  # or generate prints a warning
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    vars(model)["minipeft_tokenizer"] = tokenizer  # for virtual tokens initialized from a text
    return model.to(device=device, dtype=dtype).eval(), tokenizer


def _device(device):
    """The torch.device of that name. Raises ValueError if it is not available."""
    try:
        if isinstance(device, bool):
            raise TypeError("True and False name no device")
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            f"device={shown(device)} cannot be used here ({_first_line(error)}); leave it out to "
            f"take {pick_device()}."
        ) from error


def _named(name, dtype):
    """A model from a folder or the hub. Raises AssetError for every failure."""
    folder = Path(os.path.expanduser(name))
    if name and os.path.isdir(folder):
        if not (folder / "config.json").is_file():
            raise AssetError(
                f"The folder {name} holds no model: it has no config.json; give a folder that "
                "save_pretrained wrote."
            )
        try:
            return _pretrained(folder, dtype, local=True)
        except AssetError:
            raise
        except Exception as error:
            raise AssetError(
                f"The folder {name} holds no causal language model that transformers can load "
                f"({_first_line(error)})."
            ) from error
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name[0] in f".{string.whitespace}":
        raise AssetError(f"There is no folder {name!r}, and it is no name of a model on the hub.")
    try:
        return _pretrained(name, dtype, local=False)
    except AssetError:
        raise
    except Exception as error:
        raise AssetError(
            f"{name!r} is neither smollm2, tiny, {', '.join(TINY)} nor a folder, and the Hugging "
            f"Face hub did not give a causal model of that name ({_first_line(error)}); check the "
            "spelling and the network."
        ) from error


def _first_line(error):
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
