"""Turn a prompt into token ids: BOS before a text, and the chat template for messages.

batching.py puts prompt and answer together and masks the labels of the prompt.
"""

import os
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from minipeft.refusals import require, shown

Prompt = str | Sequence[Mapping[str, str]]  # a text, or the messages of a chat


def framed(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[list[int], list[int]]:
    """Return (ids of the special tokens before the prompt, such as BOS; ids of the prompt).

    `encode`, `classify` and `complete` all call it, so training and inference see the same prompt.
    prompt: a text, or the messages of a chat, [{"role": ..., "content": ...}, ...], which are
    rendered with the tokenizer's chat template and its generation prompt.
    A text that already begins with the special tokens, or was rendered by a chat template, does not
    get them twice. Special tokens that the tokenizer appends, such as EOS or [SEP], are left out,
    because the answer comes next.
    Raises ValueError for any other prompt, and for messages that cannot be rendered.
    """
    if not callable(tokenizer):
        raise ValueError(f"{shown(tokenizer)} is not a tokenizer; load_base returns one.")
    chat = isinstance(prompt, list | tuple)
    if not chat and not isinstance(prompt, str):
        raise ValueError(
            f"{shown(prompt)} is not a prompt; it must be text or a list of messages with role and "
            "content."
        )
    text = prompt if isinstance(prompt, str) else _rendered(tokenizer, prompt)
    before, ids = _split(tokenizer, text)
    if not ids:
        before, _ = _split(tokenizer, "a")  # an empty text does not tell prefix from suffix
        return before, ids
    first = tokenizer.convert_ids_to_tokens(ids[:1])[0]
    literal = text.lstrip().startswith(first)  # true for special tokens, false for an unknown one
    doubled = len(os.path.commonprefix([before, ids])) if literal else 0
    template = str(getattr(tokenizer, "chat_template", None))
    from_template = literal and ids[0] in tokenizer.added_tokens_decoder and first in template
    if doubled or chat or from_template:
        return ids[:doubled], ids[doubled:]
    return before, ids


def _split(tokenizer, text):
    """(special tokens that the tokenizer puts before the text, ids of the text itself)."""
    encoded = tokenizer(text, return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    if 0 not in special:
        return [], []
    begin, end = special.index(0), len(special) - special[::-1].index(0)
    return ids[:begin], ids[begin:end]


def _rendered(tokenizer, messages):
    """The text of a chat, up to the beginning of the answer."""
    for message in messages or [None]:
        require(
            isinstance(message, Mapping)
            and all(isinstance(message.get(key), str) for key in ("role", "content")),
            f'{shown(message)} is not a message; a chat is a list of {{"role": "user", "content": '
            '"..."} with a text each.',
        )
    template = getattr(tokenizer, "chat_template", None)
    require(template, "This tokenizer has no chat template; give the prompt as text.")
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template may reject an order of roles
        reason = str(error).partition("\n")[0]
        raise ValueError(f"The chat template cannot render these messages: {reason}") from error
