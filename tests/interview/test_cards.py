"""The decks, read back by Anki itself, and the printed cards."""

import html
import re
import sys
from pathlib import Path

import pytest
from anki.collection import Collection, ImportAnkiPackageRequest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from make_cards import DECKS, as_html, make_anki, make_print

from minipeft.interview.bank import LANGUAGES, load_bank

RAW = re.compile(r"\[\[|\*\*|(?<!\\)\$|`|\ufffc|\{\{")


@pytest.fixture(scope="module")
def decks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decks")
    make_anki(folder)
    return folder


def imported(collection, path):
    request = ImportAnkiPackageRequest(package_path=str(path))
    return collection.import_anki_package(request)


@pytest.mark.parametrize("language", LANGUAGES)
def test_anki_reads_every_card_with_both_sides_and_no_raw_markup(language, decks, tmp_path):
    collection = Collection(str(tmp_path / "c.anki2"))
    try:
        imported(collection, decks / f"minipeft-{language}.apkg")
        cards = [collection.get_card(number) for number in collection.find_cards("")]
        rows = load_bank(language)
        assert len(cards) == len(rows) > 0
        assert {collection.decks.name(card.did) for card in cards} == {DECKS[language][1]}
        for card in cards:
            question, answer = card.question(), card.answer()
            for side in (question, answer.partition("<hr id=answer>")[2]):
                plain = re.sub(
                    r"<style>.*?</style>|<code.*?</code>|\\\(.*?\\\)", "", side, flags=re.S
                )
                text = html.unescape(re.sub(r"<[^>]+>", "", plain))
                assert len(text.split()) > 2 or re.search("[\u4e00-\u9fff]{6}", text)
                assert not RAW.search(text)
        pictures = set(re.findall(r'src="([^"]+)"', " ".join(card.answer() for card in cards)))
        assert all(collection.media.have(picture) for picture in pictures)
    finally:
        collection.close()


def test_an_update_keeps_what_a_learner_has_learned(decks, tmp_path):
    collection = Collection(str(tmp_path / "c.anki2"))
    try:
        imported(collection, decks / "minipeft-en.apkg")
        before = set(collection.find_notes(""))
        card = collection.get_card(collection.find_cards("")[0])
        card.reps, card.ivl, card.type, card.queue = 5, 30, 2, 2
        collection.update_card(card)
        again = tmp_path / "again"
        again.mkdir()
        make_anki(again)
        imported(collection, again / "minipeft-en.apkg")
        assert set(collection.find_notes("")) == before
        kept = collection.get_card(card.id)
        assert (kept.reps, kept.ivl) == (5, 30)
    finally:
        collection.close()


def test_code_and_formulas_are_converted_once():
    shown = as_html("the `$x$` of $W_0 + BA$ and **bold**", lambda latex: f"<m>{latex}</m>")
    assert shown == "<p>the <code>$x$</code> of <m>W_0 + BA</m> and <strong>bold</strong></p>"


def test_printed_cards_need_no_network_and_turn_with_the_paper(tmp_path):
    make_print(tmp_path)
    for language in LANGUAGES:
        page = (tmp_path / f"cards-{language}.html").read_text(encoding="utf-8")
        assert not re.search(r"https?://(?!www\.w3\.org)", page)
        sheets = page.split('<div class="sheet">')[1:]
        fronts, backs = (re.split('<div class="card">', sheet)[1:] for sheet in sheets[:2])
        row = load_bank(language)[0]
        words = re.findall(r"[A-Za-z]{5,}|[\u4e00-\u9fff]{2,}", row["short"])[:3]
        assert all(word in backs[1] for word in words) and len(fronts) == len(backs) == 8
