"""A prompt is framed as its tokenizer frames it, less what comes behind; a chat by its template."""

import copy

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizerFast

from minipeft import encode, load_base
from minipeft.prompts import framed

_, TOKENIZER = load_base("tiny", device="cpu")
PAD, BOS, EOS = TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def framing(before=(), behind=(), tokenizer=TOKENIZER):
    """A tokenizer that, like Llama's or T5's, adds special tokens around what it is given."""
    tokenizer = copy.deepcopy(tokenizer)
    names = {i: tokenizer.convert_ids_to_tokens(i) for i in (*before, *behind)}
    parts = [*(names[i] for i in before), "$A", *(names[i] for i in behind)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join(parts), special_tokens=[(name, i) for i, name in names.items()]
    )
    return tokenizer


def test_what_comes_before_a_prompt_is_told_from_its_own_ids():
    tokenizer = framing([BOS], [EOS])
    for text in ("ab", "<bos>ab"):
        assert framed(tokenizer, text) == ([BOS], ids("ab"))
    assert framed(tokenizer, "") == ([BOS], []) and framed(TOKENIZER, "") == ([], [])
    with pytest.raises(ValueError, match="^None is not a tokenizer"):
        framed(None, "ab")
    with pytest.raises(ValueError, match="^3 is not a prompt"):
        framed(tokenizer, 3)


@pytest.mark.parametrize("behind", [(), (EOS,)])
@pytest.mark.parametrize("before", [(), (BOS,), (EOS,), (BOS, PAD)])
def test_special_tokens_frame_the_row_once(before, behind):
    tokenizer = framing(before, behind)
    row = encode(tokenizer, "ab", " c")
    assert row["input_ids"] == [*before, *ids("ab c"), EOS]
    assert row["labels"] == [-100] * (len(before) + 2) + [*ids(" c"), EOS]
    assert encode(tokenizer, "ab")["input_ids"] == [*before, *ids("ab")]
    short = encode(tokenizer, "abcdef", " c", max_length=len(before) + 4)
    assert short["input_ids"] == [*before, *ids("f c"), EOS], "BOS must survive the cut"
    if before:
        assert encode(tokenizer, "", "c")["input_ids"] == [*before, *ids("c"), EOS]


# Tokenizers of five kinds, each with what it puts before and behind a text


def unigram():
    """Like SentencePiece: a space is part of the word, and one is put before the text."""
    words = ["<unk>", "<s>", "</s>", *"▁abcdehlo,", "▁a", "▁hello", "hello", "a"]
    bare = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    bare.pre_tokenizer = pre_tokenizers.Metaspace()
    bare.decoder = decoders.Metaspace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return framing([1], [2], PreTrainedTokenizerFast(tokenizer_object=bare, **special))


def word_pieces():
    """Like BERT's: [CLS] text [SEP]."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "hello", "##a", "b"]
    bare = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
               "pad_token": "[PAD]", "eos_token": "[SEP]"}  # fmt: skip
    return framing([2], [3], PreTrainedTokenizerFast(tokenizer_object=bare, **special))


def one_special_token():
    """BOS, EOS and unknown are one token, and "a" is unknown."""
    bare = Tokenizer(models.WordLevel({"<end>": 0, "hello": 1, "b": 2}, unk_token="<end>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<end>")
    return framing([0], [], PreTrainedTokenizerFast(tokenizer_object=bare, **special))


KINDS = {  # name: (tokenizer, ids before a text, ids behind it)
    "bytes": (TOKENIZER, [], []),
    "bytes, BOS": (framing([BOS]), [BOS], []),
    "bytes, EOS": (framing([], [EOS]), [], [EOS]),
    "unigram": (unigram(), [1], [2]),
    "word pieces": (word_pieces(), [2], [3]),
    "one special token": (one_special_token(), [0], []),
    "Python, EOS": (ByT5Tokenizer(), [], [1]),
    "Python, both": (CanineTokenizer(), [0xE000], [0xE001]),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("text", ["a", "hello", "b a", " hello", "hello a b", "a hello", "z"])
def test_a_prompt_is_what_the_tokenizer_says_less_what_it_puts_behind(name, text):
    tokenizer, before, behind = KINDS[name]
    whole = tokenizer(text)["input_ids"]
    assert whole[: len(before)] == before and whole[len(whole) - len(behind) :] == behind
    prompt = whole[: len(whole) - len(behind)]
    assert encode(tokenizer, text)["input_ids"] == prompt
    answered = encode(tokenizer, text, "hello", add_eos=False)
    assert answered["input_ids"][: len(prompt)] == prompt
    assert answered["labels"] == [-100] * len(prompt) + answered["input_ids"][len(prompt) :]


@pytest.mark.parametrize("name", ["bytes, BOS", "unigram", "word pieces"])
def test_a_text_that_brings_what_goes_before_it_gets_no_second(name):
    tokenizer, before, behind = KINDS[name]
    typed = tokenizer.convert_ids_to_tokens(before)[0]
    text = f"{typed}hello"
    once = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert once[0] == before[0] and tokenizer(text)["input_ids"] == before + once + behind
    assert encode(tokenizer, text)["input_ids"] == once
    assert encode(tokenizer, typed)["input_ids"] == before
    if name != "word pieces":
        assert encode(tokenizer, "", "hello")["input_ids"][:1] == before
        assert encode(tokenizer, "b" * 40, max_length=3)["input_ids"][0] == before[0]


TEMPLATES = {
    "with BOS": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "without BOS": "{% for m in messages %}<eos>{{ m.role }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<eos>assistant: {% endif %}",
}
CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("behind", [[], [EOS]])
def test_a_chat_is_framed_by_its_template_alone(template, chat, behind):
    tokenizer = framing([BOS], behind)
    tokenizer.chat_template = TEMPLATES[template]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    expected = tokenizer.apply_chat_template(chat, **options)
    assert expected.count(BOS) == (template == "with BOS")
    text = tokenizer.apply_chat_template(chat, **options | {"tokenize": False})
    assert encode(tokenizer, chat)["input_ids"] == expected
    assert encode(tokenizer, text)["input_ids"] == expected
    row = encode(tokenizer, chat, "yes")
    assert row["input_ids"] == expected + ids("yes") + [EOS]
    short = encode(tokenizer, chat, "yes", max_length=8)
    assert short["input_ids"][0] == (BOS if template == "with BOS" else short["input_ids"][0])
    assert encode(tokenizer, "hi")["input_ids"] == [BOS, *ids("hi")], "no chat, so BOS comes first"


def test_messages_that_cannot_be_rendered():
    plain, picky = copy.deepcopy(TOKENIZER), copy.deepcopy(TOKENIZER)
    plain.chat_template = None
    picky.chat_template = "{{ raise_exception('Roles must\nalternate') }}"
    for tokenizer, chat, message in [
        (plain, CHATS[0], "no chat template"),
        (picky, CHATS[0], "cannot render these messages: Roles must$"),
        (picky, [], "None is not a message"),
        (picky, ["hi"], "'hi' is not a message"),
        (picky, [{"role": "user"}], "is not a message"),
        (picky, [{"role": "user", "content": ["x"]}], "is not a message"),
    ]:
        with pytest.raises(ValueError, match=message):
            encode(tokenizer, chat)
