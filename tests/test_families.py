"""Families of different kinds against every method: each works, or is refused on adding.

`python tests/families.py` tries all that transformers has; here stand those that differ most.
"""

import families
import pytest

WORK = {"works"}
EVERY = {"works", "refused"}
EXPECTED = {  # {family: {method: what it must be}}; the others may work or be refused
    "llama": dict.fromkeys(families.METHODS, WORK),
    "gpt2": dict.fromkeys(families.METHODS, WORK),
    "gpt_neox": dict.fromkeys(families.METHODS, WORK),
    "bloom": {"prompt": WORK, "prefix": WORK, "hidden": WORK, "lora": WORK, "houlsby": WORK},
    "opt": {"prompt": WORK, "prefix": WORK, "hidden": WORK, "lora": WORK, "houlsby": WORK},
    "bert": {"prompt": WORK, "prefix": WORK, "lora": WORK, "houlsby": WORK},
    "mixtral": {"prompt": WORK, "prefix": WORK, "lora": WORK, "houlsby": {"refused"}},  # experts
    "mamba": {"prompt": {"refused"}, "prefix": {"refused"}, "lora": WORK},  # no attention
}


@pytest.mark.parametrize("family", EXPECTED)
def test_a_family_works_or_is_refused(family):
    rows = families.rows_of("causal", family, None)
    results = {row[3]: (row[4], row[5]) for row in rows}
    assert results.keys() == families.METHODS.keys(), results
    for method, (result, sentence) in results.items():
        assert result in EXPECTED[family].get(method, EVERY), f"{method}: {result}: {sentence}"


@pytest.mark.parametrize("family", ["llama", "bert", "distilbert"])
def test_a_classifier_works(family):
    for row in families.rows_of("classifier", family, None):
        assert row[4] == "works", row
