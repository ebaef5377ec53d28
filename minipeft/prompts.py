"""Frame a prompt as the tokenizer wants it: BOS in front, or a chat through its template."""

import os
from collections.abc import Mapping

from minipeft.refusals import require, shown


def framed(tokenizer, prompt):
    """(ids of the special tokens, such as BOS, that come before the prompt; its own ids).

    Training and inference see the same prompt, because `encode`, `classify` and `complete` all
    frame it here. prompt: a text, or the messages of a chat, [{"role": ..., "content": ...}, ...],
    which the tokenizer's chat template renders up to where the answer begins.
    What the tokenizer puts before a text comes once, also where the text brings it already. A text
    that a chat template wrote has all that it needs. What the tokenizer puts behind, such as EOS or
    [SEP], is left out: the answer is yet to come.
    Raises ValueError for a prompt that is neither, and messages that cannot be rendered.
    """
    if not callable(tokenizer):
        raise ValueError(f"{shown(tokenizer)} is no tokenizer; load_base returns one.")
    chat = isinstance(prompt, list | tuple)
    if not chat and not isinstance(prompt, str):
        raise ValueError(
            f"{shown(prompt)} is no prompt; it must be text, or a list of messages with role and "
            "content."
        )
    text = _rendered(tokenizer, prompt) if chat else prompt
    before, ids = _split(tokenizer, text)
    if not ids:
        before, _ = _split(tokenizer, "a")  # around nothing, before and behind look the same
        return before, ids
    first = tokenizer.convert_ids_to_tokens(ids[0])
    typed = text.lstrip().startswith(first)  # as special tokens are, but not what is unknown
    brought = len(os.path.commonprefix([before, ids])) if typed else 0
    template = str(getattr(tokenizer, "chat_template", None))
    from_template = typed and ids[0] in tokenizer.added_tokens_decoder and first in template
    if brought or chat or from_template:
        return ids[:brought], ids[brought:]
    return before, ids


def _split(tokenizer, text):
    """(special tokens put before the text, the ids of the text itself)."""
    encoded = tokenizer(text, return_special_tokens_mask=True)
    ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    if 0 not in added:
        return [], []
    begin, end = added.index(0), len(added) - added[::-1].index(0)
    return ids[:begin], ids[begin:end]


def _rendered(tokenizer, messages):
    """The text of a chat, up to where the answer begins."""
    for message in messages or [None]:
        require(
            isinstance(message, Mapping)
            and all(isinstance(message.get(key), str) for key in ("role", "content")),
            f'{shown(message)} is no message; a chat is a list of {{"role": "user", "content": '
            '"..."} with a text each.',
        )
    template = getattr(tokenizer, "chat_template", None)
    require(template, "This tokenizer has no chat template; give the prompt as text.")
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template may refuse an order of roles
        reason = str(error).partition("\n")[0]
        raise ValueError(f"The chat template cannot render these messages: {reason}") from error
