"""The course's own instructions: form, language, splits, and every answer code can work out."""

import ast
import json
import operator
import random
import re
import unicodedata
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from minipeft.assets import AssetError, datasets, fetch, fetch_base_model, load_instructions

DATA = Path(__file__).resolve().parents[2] / "data"
FILES = {"english": "instructions_en.jsonl", "chinese": "instructions_zh.jsonl"}
ROWS = {
    language: [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]
    for language, name in FILES.items()
}
EVERY = [(language, row) for language, rows in ROWS.items() for row in rows]
HAN = re.compile(r"[\u4e00-\u9fff]")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
languages = pytest.mark.parametrize("language", FILES)


def _of(category, language=None):
    rows = [row for lang, row in EVERY if row["category"] == category and language in (None, lang)]
    assert len(rows) >= 8
    return rows


def _asked(row):
    return f"{row['instruction']}\n{row['input']}"


def _quoted(text):
    return re.findall(r'"([^"]+)"|“([^”]+)”', text)


def _words(text):
    return [first or second for first, second in _quoted(text)]


# ---- form ------------------------------------------------------------------------------------


@languages
def test_a_line_is_an_object_with_four_clean_texts(language):
    text = (DATA / FILES[language]).read_text("utf-8")
    assert text.endswith("}\n") and "\\u" not in text and "\ufeff" not in text
    assert len(ROWS[language]) == {"english": 160, "chinese": 240}[language]
    for line, row in zip(text.splitlines(), ROWS[language], strict=True):
        assert list(row) == ["instruction", "input", "output", "category"]
        assert line == json.dumps(row, ensure_ascii=False)
        for value in row.values():
            assert isinstance(value, str) and value == " ".join(value.split()), value
            assert unicodedata.is_normalized("NFC", value), value
        assert row["instruction"] and row["output"] and re.fullmatch("[a-z_]+", row["category"])


@languages
def test_rows_differ_by_more_than_a_number(language):
    rows = ROWS[language]
    key = [re.sub(r"\W", "", _asked(row)).casefold() for row in rows]
    assert len(set(key)) == len(rows)
    without_numbers = Counter(re.sub(r"\d", "", text) for text in key)
    assert without_numbers.most_common(1)[0][1] <= 2
    assert Counter(row["instruction"] for row in rows).most_common(1)[0][1] <= 8
    assert 0.3 < sum(bool(row["input"]) for row in rows) / len(rows) < 0.4


def test_answers_are_short():
    words = [len(row["output"].split()) for row in ROWS["english"]]
    assert max(words) <= 40 and sum(n >= 3 for n in words) / len(words) > 0.9
    characters = [len(row["output"]) for row in ROWS["chinese"]]
    assert max(characters) <= 60 and sum(n >= 5 for n in characters) / len(characters) > 0.9


def test_chinese_is_simplified_and_its_marks_are_full_width():
    for row in ROWS["chinese"]:
        for text in (row["instruction"], row["input"], row["output"]):
            text.encode("gb2312")  # has no traditional forms: raises for one
            near_han = r"[\u4e00-\u9fff][,;:!?()\"'.]|[,;:!?()\"'][\u4e00-\u9fff]"
            assert not re.search(near_han, text), text
            assert not re.search(r"[\u4e00-\u9fff] | [\u4e00-\u9fff]", text), text
            for left, right in ("“”", "（）", "《》"):
                assert text.count(left) == text.count(right), text
    with pytest.raises(UnicodeEncodeError):
        "學習".encode("gb2312")
    letters = re.sub(r"[\W\d_]", "", "".join(r["output"] for r in ROWS["chinese"]))
    assert len(HAN.findall(letters)) / len(letters) > 0.9
    for row in ROWS["chinese"]:
        if row["category"] not in ("translate", "sort", "extract", "arithmetic", "unit"):
            share = len(HAN.findall(row["output"])) / len(row["output"])
            assert share > 0.5, row["output"]


def test_english_is_plain_but_for_the_chinese_to_translate():
    for row in ROWS["english"]:
        text = _asked(row) + row["output"]
        if row["category"] == "translate":
            assert HAN.search(text)
        else:
            assert set(text) - {"×", "÷"} <= set(map(chr, range(10, 127))), text
        assert row["output"].count('"') % 2 == 0 and "  " not in text


@languages
def test_an_answer_is_a_sentence_or_just_what_was_asked_for(language):
    for row in ROWS[language]:
        last = row["output"][-1]
        if row["category"] in ("sort", "extract"):
            assert last not in ".?!。？！", row
        else:
            translated = row["category"] == "translate" and not HAN.search(row["output"])
            assert last in (".?" if language == "english" or translated else "。？”"), row
        assert row["instruction"][-1] in '.?!:"。？！：', row


# ---- right answers ----------------------------------------------------------------------------

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv}  # fmt: skip
# What the words of a question ask for, the first that occurs.
ASKED = [
    ("Work out 90 - 34", "-"), ("27 + 15", "+"), ("Multiply", "×"), ("Divide", "÷"),
    ("in 9 boxes", "×"), ("spends", "-"), ("leaves at", "-"), ("equally", "÷"), ("area", "×"),
    ("half", "÷"), ("Add", "++"), ("younger", "-"),
    ("乘以", "×"), ("除以", "÷"), ("减去", "-"), ("36加27", "+"), ("每盒", "×"), ("还剩", "-"),
    ("面积", "×"), ("平均分", "÷"), ("大几岁", "-"), ("每小时", "×"), ("15+25×2", "+×"),
    ("打八折", "×"), ("开始", "-"), ("平均数", "++÷"),
]  # fmt: skip
SPOKEN = {"half": "2", "八折": "0.8"}


def _value(text):
    """Work out numbers, + - × ÷ and brackets exactly; anything else is refused."""

    def walk(node):
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        assert isinstance(node, ast.Constant)
        return Fraction(str(node.value))

    for sign, ours in {"×": "*", "÷": "/", "（": "(", "）": ")"}.items():
        text = text.replace(sign, ours)
    return walk(ast.parse(text.strip(), mode="eval").body)


def _arithmetic(row):
    asked, said = _asked(row), row["output"]
    equation, left, right = re.match(r"([\d.+\-×÷（） ]+)", said)[0], *said.split("=")[:2]
    result, rest = re.match(r" ?(\d+)(?:\.?$|。$|, |，)(.*)", right).groups()
    known = NUMBER.findall(asked) + [number for word, number in SPOKEN.items() if word in asked]
    signs = next(signs for word, signs in ASKED if word in asked)
    return (
        equation == left
        and _value(left) == int(result)
        and not Counter(NUMBER.findall(left)) - Counter(known)
        and re.sub(r"[\d. （）]", "", left) == signs
        and NUMBER.findall(rest) in ([], [result])
    )


UNITS = {
    "kilometres": ("m", 1000), "metres": ("m", 1), "centimetres": ("m", "1/100"),
    "hours": ("s", 3600), "minutes": ("s", 60), "seconds": ("s", 1), "days": ("s", 86400),
    "weeks": ("s", 604800), "kilograms": ("g", 1000), "grams": ("g", 1), "litres": ("l", 1),
    "millilitres": ("l", "1/1000"), "years": ("month", 12), "months": ("month", 1),
    "千米": ("m", 1000), "米": ("m", 1), "厘米": ("m", "1/100"), "小时": ("s", 3600),
    "分钟": ("s", 60), "个星期": ("s", 604800), "天": ("s", 86400), "吨": ("g", 1000000),
    "千克": ("g", 1000), "克": ("g", 1), "斤": ("g", 500), "升": ("l", 1),
    "毫升": ("l", "1/1000"), "元": ("jiao", 10), "角": ("jiao", 1), "年": ("month", 12),
    "个月": ("month", 1),
}  # fmt: skip


def _unit(row):
    form = r"([\d.]+) ?([a-z]+|\D+?)(?: are |等于)([\d.]+) ?([a-z]+|\D+?)[.。]"
    have, unit, get, other = re.fullmatch(form, row["output"]).groups()
    (kind, size), (other_kind, other_size) = UNITS[unit], UNITS[other]
    return (
        kind == other_kind
        and Fraction(have) * Fraction(size) == Fraction(get) * Fraction(other_size)
        and NUMBER.findall(_asked(row)) == [have]
        and re.search(rf"{have} ?{unit}", row["instruction"])
        and other in row["instruction"].replace(unit, "", 1)
    )


WEEK = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
YEAR = "January February March April May June July August September October November December"
NUMERALS = "一 二 三 四 五 六 七 八 九 十 十一 十二".split()
ORDERS = [  # words of the instruction, key, from the end?
    ("numbers from smallest", int, False), ("largest first", int, True),
    ("alphabetically", str, False), ("A to Z", str, False), ("shortest to longest", len, False),
    ("order of the week", WEEK.index, False), ("order of the year", YEAR.split().index, False),
    ("latest to earliest", int, True), ("数从小到大", Fraction, False),
    ("数从大到小", Fraction, True), ("按字数从少到多", len, False), ("年份从早到晚", int, False),
    ("从星期一开始", lambda day: "一二三四五六日".index(day[-1]), False),
    ("先后排列这些月份", lambda month: NUMERALS.index(month[:-1]), False),
    ("按字母顺序", str, False), ("价格从低到高", lambda price: int(price.rstrip("元")), False),
    ("按春夏秋冬", lambda season: "春夏秋冬".index(season[0]), False),
]  # fmt: skip


def _sort(row):
    comma = "、" if HAN.search(row["instruction"]) else ", "
    key, backwards = next((k, back) for words, k, back in ORDERS if words in row["instruction"])
    given, said = row["input"].split(comma), row["output"].split(comma)
    right = sorted(given, key=key, reverse=backwards)
    return said == right and given != right and len(set(map(key, given))) == len(given) >= 3


COUNTS = {
    "How many words are in": lambda text: len(text.split()),
    "Count the items": lambda text: len(text.split(", ")),
    'letter "a" occur': lambda text: text.count("a"),
    "How many letters": len,
    "numbers are even": lambda text: sum(int(n) % 2 == 0 for n in text.split(", ")),
    "How many vowels": lambda text: sum(letter in "aeiou" for letter in text),
    "Count the sentences": lambda text: text.count("."),
    'begin with the letter "s"': lambda text: sum(w[0] == "s" for w in text.split(", ")),
    "多少个汉字": lambda text: len(HAN.findall(text)),
    "几样东西": lambda text: len(text.split("、")),
    "“人”字": lambda text: text.count("人"),
    "几个字母": len,
    "几个奇数": lambda text: sum(int(n) % 2 for n in text.split("、")),
    "几个句子": lambda text: text.count("。"),
    "几个是两个字的": lambda text: sum(len(word) == 2 for word in text.split("、")),
    "几个“x”": lambda text: text.count("x"),
    "几个大于50": lambda text: sum(int(n) > 50 for n in text.split("、")),
    "几位数字": lambda text: sum(letter.isdigit() for letter in text),
}


def _count(row):
    count = next(count for words, count in COUNTS.items() if words in row["instruction"])
    said = NUMBER.findall(row["output"].replace("大于50", ""))
    return said == [str(count(row["input"]))]


def _extract(row):
    return row["input"].count(row["output"]) == 1 and len(row["output"]) < len(row["input"])


def _odd_one_out(row):
    items = re.split(r", |、", re.split(r": |：", row["instruction"])[1].rstrip(".?。？"))
    odd = _words(row["output"])[0]
    odd = odd if odd in items else odd.lower()
    if "even" in row["output"] or "偶数" in row["output"]:
        return [n for n in items if int(n) % 2] == [odd] and len(items) == 4
    return items.count(odd) == 1 and len(items) == 4


def _opposite(row):
    (asked,), (word, other) = _words(row["instruction"]), _words(row["output"])
    return asked == word != other


CHECKS = {"arithmetic": _arithmetic, "unit": _unit, "sort": _sort, "count": _count,
          "extract": _extract, "odd_one_out": _odd_one_out, "opposite": _opposite}  # fmt: skip


@pytest.mark.parametrize("category", CHECKS)
def test_answers_that_code_can_work_out(category):
    for row in _of(category, "english") + _of(category, "chinese"):
        assert CHECKS[category](row), row


def _harm(row):
    """The same row with a wrong answer of the right form."""
    said = row["output"]
    comma = ", " if ", " in said else "、"
    if row["category"] == "sort":
        said = comma.join(reversed(said.split(comma)))
    elif row["category"] in ("extract", "odd_one_out", "opposite"):
        word = (_words(said) or [said])[0]
        said = said.replace(word, word + "x", 1)
    else:
        place = list(NUMBER.finditer(said.replace("大于50", "")))[-1]
        said = said[: place.start()] + str(float(place[0]) + 1).removesuffix(".0")
        said += row["output"][place.end() :]
    return {**row, "output": said}


@pytest.mark.parametrize("category", CHECKS)
def test_the_checks_see_a_wrong_answer(category):
    for row in _of(category):
        assert not CHECKS[category](_harm(row)), row


def test_no_word_is_asked_twice():
    for language in FILES:
        words = [word for row in _of("opposite", language) for word in _words(row["output"])]
        assert len(set(words)) == len(words)
        words = [word for row in _of("translate", language) for word in _words(row["output"])]
        assert len(set(words)) == len(words)


def test_the_forms_that_the_data_card_promises():
    for row in _of("sentiment"):
        assert re.match("(Positive|Negative|Neutral): |(正面|负面|中性)：", row["output"])
    for language, (plus, minus, zero) in {
        "english": ("Positive", "Negative", "Neutral"), "chinese": ("正面", "负面", "中性"),
    }.items():  # fmt: skip
        labels = Counter(re.split("[:：]", r["output"])[0] for r in _of("sentiment", language))
        assert labels[plus] == labels[minus] > labels[zero] >= 2
    for row in _of("unanswerable"):
        start = {
            (False, False): "I cannot know that, because ", (False, True): "The text does not say ",
            (True, False): "我无法知道，因为", (True, True): "文中没有",
        }[bool(HAN.search(row["instruction"])), bool(row["input"])]  # fmt: skip
        assert row["output"].startswith(start)
    for row in _of("summary"):
        assert len(re.findall("[.。]", row["output"])) == 1 < len(re.findall("[.。]", row["input"]))
        assert len(row["output"]) < len(row["input"])
    for row in _of("polite"):
        assert row["output"] != row["input"]
        assert re.search(
            "please|mind|afraid|may I|请|麻烦|谢|不好意思|您|对不起|抱歉|吗", row["output"]
        )
    for row in _of("translate", "chinese"):
        if row["input"]:
            assert bool(HAN.search(row["input"])) != bool(HAN.search(row["output"]))
        else:
            assert _words(row["instruction"])[0] == _words(row["output"])[0]
    for row in _of("term", "chinese") + _of("fact"):
        assert not row["input"]


def test_proverbs_idioms_and_measure_words_fit_their_gap():
    for row in _of("proverb", "english"):
        saying = _words(row["instruction"])[0]
        if saying.endswith(" ..."):
            assert row["output"].startswith(saying.removesuffix("...")) and row["output"][-1] == "."
        else:
            assert row["output"].startswith("It means: ") and saying not in row["output"]
    for row in _of("idiom", "chinese"):
        idiom = _words(row["instruction"])[0]
        if "（）" in idiom:
            character, whole = _words(row["output"])
            assert idiom.replace("（）", character) == whole and len(character) == 1
        else:
            assert len(idiom) == 4 and idiom not in row["output"]
    nouns = []
    for row in _of("measure_word", "chinese"):
        noun = _words(row["instruction"])[0].removeprefix("一（）")
        measure = _words(row["output"])[-1]
        assert row["output"].endswith(f"一{measure}{noun}。") and len(measure) == 1
        nouns += [noun, measure]
    assert len(set(nouns)) == len(nouns)


# ---- load_instructions ------------------------------------------------------------------------


def _card():
    return (DATA / "README.md").read_text("utf-8").split("## Instructions")[1]


@languages
def test_the_prompt_has_the_form_of_the_data_card(language):
    cue, space = {"english": ("Answer:", " "), "chinese": ("回答：", "")}[language]
    assert f"| `{language}` | `{{instruction}}\\n{{input}}\\n{cue}` |" in _card()
    expected = {}
    for row in ROWS[language]:
        middle = f"{row['input']}\n" if row["input"] else ""
        prompt = f"{row['instruction']}\n{middle}{cue}"
        expected[prompt] = (space + row["output"], row["category"])
    loaded = load_instructions(language)
    assert list(loaded) == ["train", "validation", "test"]
    found = {}
    for part in loaded.values():
        assert part.column_names == ["prompt", "answer", "category"]
        for row in part:
            assert row["prompt"] not in found  # so the splits are disjoint
            found[row["prompt"]] = (row["answer"], row["category"])
    assert found == expected


@languages
def test_every_split_has_its_share_of_every_category(language):
    parts = load_instructions(language)
    rows = Counter(row["category"] for row in ROWS[language])
    for name, share in {"train": 0.8, "validation": 0.1, "test": 0.1}.items():
        found = Counter(parts[name]["category"])
        assert set(found) == set(rows)
        for category, count in rows.items():
            assert abs(found[category] - share * count) <= 1, (name, category)
        mixed = parts[name]["category"]
        assert list(mixed) != sorted(mixed)  # not category by category


@languages
def test_the_splits_do_not_depend_on_chance_or_the_order_of_the_file(
    language, tmp_path, monkeypatch
):
    before = load_instructions(language)
    random.seed(1)
    again = load_instructions(language)
    assert all(before[name].to_dict() == again[name].to_dict() for name in before)
    lines = (DATA / FILES[language]).read_text("utf-8").splitlines(keepends=True)
    (tmp_path / FILES[language]).write_text("".join(reversed(lines)), "utf-8")
    monkeypatch.setattr(datasets, "INSTRUCTION_FOLDER", tmp_path)
    for name, part in load_instructions(language).items():
        assert set(part["prompt"]) == set(before[name]["prompt"])


def test_the_data_card_counts_right():
    counts = {lang: Counter(row["category"] for row in rows) for lang, rows in ROWS.items()}
    table = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \|", _card(), re.MULTILINE)
    assert {c: (int(en), int(zh)) for c, en, zh in table} == {
        c: (counts["english"][c], counts["chinese"][c]) for c in set().union(*counts.values())
    }
    sizes = [len(part) for language in FILES for part in load_instructions(language).values()]
    card = " ".join(_card().split())
    assert "English {} / {} / {} rows, Chinese {} / {} / {}.".format(*sizes) in card
    for language, name in FILES.items():
        assert f"`{name}` ({len(ROWS[language])} rows)" in card


def test_the_data_card_measures_the_tokens_right():
    from transformers import AutoTokenizer

    from minipeft import encode

    tokenizer = AutoTokenizer.from_pretrained(fetch_base_model())
    longest, per_character = [], []
    for language in FILES:
        rows = [row for part in load_instructions(language).values() for row in part]
        encoded = [encode(tokenizer, row["prompt"], row["answer"]) for row in rows]
        longest.append(max(len(row["input_ids"]) for row in encoded))
        tokens = sum(len(tokenizer(row["answer"])["input_ids"]) for row in rows)
        per_character.append(tokens / sum(len(row["answer"]) for row in rows))
    card = " ".join(_card().split())
    assert "has {} tokens of SmolLM2 in English and {} in Chinese.".format(*longest) in card
    wanted = "{:.2f} tokens per character in English and {:.2f} in Chinese".format(*per_character)
    assert wanted in card


def test_found_from_any_folder_without_cache_or_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch.subprocess, "run", None)
    from minipeft import load_instructions as exported

    assert exported is load_instructions
    assert len(exported()["train"]) == len(load_instructions("english")["train"]) > 100
    assert not (tmp_path / "cache").exists()


def test_without_the_repository_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "INSTRUCTION_FOLDER", tmp_path)
    for language in FILES:
        with pytest.raises(AssetError, match="come with the repository") as caught:
            load_instructions(language)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_languages_are_refused():
    for language in ("german", "zh", None):
        with pytest.raises(ValueError, match="choose one of") as caught:
            load_instructions(language)
        assert "chinese" in str(caught.value) and repr(language) in str(caught.value)
