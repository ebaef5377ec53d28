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

from minipeft.assets.fetch import AssetError
from minipeft.assets.sources import fetch_base_model, quiet
from minipeft.refusals import require, shown
from minipeft.technique.asked import close

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
    # The caller's random states stay as they were: the CPU's is put back, and those of the GPUs,
    # which torch.manual_seed would seed too, are not touched.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model, tokenizer


def _pretrained(source, dtype, local):
    """A model and its tokenizer as files hold them; AssetError if they hold more or less."""
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
        raise AssetError(f"{source} is quantised already; load the plain model and quantise that.")
    known, rows = tokenizer.vocab_size, model.get_input_embeddings().num_embeddings
    if known > rows:
        raise AssetError(f"The tokenizer of {source} has {known} tokens, and {name} knows {rows}.")
    with torch.no_grad():  # does what comes after a token change what the model says there?
        ids = [torch.tensor([[rows // 2, rows // 2 - i]]) for i in (1, 2)]  # each (1, 2)
        one, other = (model(input_ids=pair).logits[:, 0] for pair in ids)
    if not one.isfinite().all():
        raise AssetError(
            f"{source} in {dtype} gives numbers that are not finite; its weights are damaged, or "
            "too large for that type."
        )
    if not close(one, other):
        raise AssetError(
            f"{source} is no causal language model: in {name} a token sees those after it."
        )
    return model, tokenizer


def _some(keys):
    keys = sorted(map(str, keys))
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"


def load_base(name="smollm2", device=None, dtype=torch.float32, seed=0):
    """Return (model, tokenizer), ready to use: on `device` (default: `pick_device()`), in eval
    mode, with a pad token.

    `name` is "smollm2" (SmolLM2-135M-Instruct), one of the random models "tiny" (= "tiny-llama"),
    "tiny-gpt2", "tiny-bloom", "tiny-qwen2", "tiny-gpt_neox" (weights drawn from `seed`), a folder
    that `save_pretrained` wrote, or the id of a causal model on the Hugging Face hub.
    A tokenizer without a pad token pads with its end token, which is harmless as long as padding
    is masked by position (claim 2). `dtype` is float16, bfloat16, float32 or float64 of torch.
    Code that a folder or the hub brings is never run, and pickled weights are not read.
    Raises AssetError in one sentence if the model cannot be had, ValueError for other bad input.
    """
    if not isinstance(name, str | os.PathLike):
        raise ValueError(f"name={shown(name)} is neither the name of a model nor a folder.")
    require(
        dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64),
        f"dtype={shown(dtype)} is none of torch.float16, bfloat16, float32 and float64.",
    )
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed={shown(seed)} is no whole number from 0 to 2**64 - 1.")
    device = pick_device() if device is None else _device(device)
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
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config.pad_token_id is None:  # else generate prints a warning
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.minipeft_tokenizer = tokenizer  # for soft prompts that start at a text
    return model.to(device=device, dtype=dtype).eval(), tokenizer


def _device(device):
    """The torch.device of that name, if it is here."""
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
    """A model from a folder or from the hub; every failure becomes one sentence."""
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
