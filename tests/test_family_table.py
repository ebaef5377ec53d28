"""The table of families: it is whole, and a dozen different kinds of family still agree with it."""

import csv

import families
import pytest

DOZEN = {
    "llama": "rotary positions, grouped queries",
    "gpt2": "learned positions, Conv1D",
    "bloom": "ALiBi, no position_ids",
    "opt": "learned positions that begin at 2",
    "xglm": "scaled embeddings, float32",
    "codegen": "a fused query-key-value projection in its own order",
    "mistral": "a window",
    "gemma2": "layers with and without a window",
    "mixtral": "experts",
    "deepseek_v3": "keys and values of different widths",
    "jamba": "Mamba layers",
    "roberta": "an encoder as a decoder",
}


pytestmark = pytest.mark.skipif(
    not families.TABLE.exists(), reason="python tests/families.py has not written families.csv yet"
)


@pytest.fixture(scope="module")
def table():
    with open(families.TABLE, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "kind, family",
    [("causal", family) for family in DOZEN]
    + [("classifier", family) for family in ("llama", "bert", "distilbert")],
)
def test_a_family_does_what_the_table_says(table, kind, family):
    said = {
        row["method"]: row["result"]
        for row in table
        if (row["kind"], row["family"]) == (kind, family)
    }
    found = {method: result for _, _, _, method, result, _ in families.rows_of(kind, family)}
    assert found == said


EXPECTED = {  # {family: {method: what it must be}}; the others may work or be refused
    "llama": dict.fromkeys(families.METHODS, "works"),
    "gpt2": dict.fromkeys(families.METHODS, "works"),
    "gpt_neox": dict.fromkeys(families.METHODS, "works"),
    "bloom": dict.fromkeys(("prompt", "prefix", "hidden", "lora", "houlsby"), "works"),
    "opt": dict.fromkeys(("prompt", "prefix", "hidden", "lora", "houlsby"), "works"),
    "bert": dict.fromkeys(("prompt", "prefix", "lora", "houlsby"), "works"),
    "mixtral": {"lora": "works", "houlsby": "refused"},  # experts have no one output projection
    "mixtral, no window": {"prompt": "works", "prefix": "works"},
    "mistral": {"prefix": "refused", "lora": "works"},  # a window would lose sight of a prefix
    "mistral, no window": {"prompt": "works", "prefix": "works", "houlsby": "works"},
    "mamba": {"prompt": "refused", "prefix": "refused", "lora": "works"},  # no attention
}


@pytest.mark.parametrize("family", EXPECTED)
def test_what_is_known_of_a_family_stands_in_the_table(table, family):
    found = {
        r["method"]: r["result"] for r in table if r["family"] == family if r["kind"] == "causal"
    }
    assert found | EXPECTED[family] == found


def test_every_family_of_transformers_has_its_rows(table):
    present = {(row["kind"], row["family"]) for row in table}
    missing = [family for family in families.CAUSAL if ("causal", family) not in present]
    assert not missing, (
        f"transformers has brought {', '.join(missing)}; run  python tests/families.py"
    )


def test_no_method_fails_on_any_family(table):
    """Whatever is not refused on adding works."""
    assert {row["result"] for row in table} == {"works", "refused", "not built"}
    for kind, methods in (
        ("causal", families.METHODS),
        ("classifier", families.OF_CLASSIFIERS),
    ):
        for family in {row["family"] for row in table if row["kind"] == kind}:
            rows = [r for r in table if (r["kind"], r["family"]) == (kind, family)]
            if [row["method"] for row in rows] != ["all"]:
                assert [row["method"] for row in rows] == list(methods), family


def test_a_refusal_or_a_family_that_is_not_built_has_a_sentence(table):
    assert all(row["sentence"] for row in table if row["result"] != "works")


def test_the_readme_gives_its_counts(table):
    readme = (families.TABLE.parents[1] / "docs/package.md").read_text(encoding="utf-8")
    for kind, title in (("causal", "causal language models"), ("classifier", "classifiers")):
        rows = [r for r in table if r["kind"] == kind and r["result"] != "not built"]
        built = {r["family"].partition(",")[0] for r in rows}
        (line,) = (x for x in readme.splitlines() if x.startswith(f"| {title} |"))
        counts = [sum(r["result"] == result for r in rows) for result in ("works", "refused")]
        assert [cell.strip() for cell in line.split("|")[3:6]] == [f"{n:,}" for n in counts] + ["0"]
        assert line.split("|")[2].split()[0].strip(",") == str(len(built))
    lora = {r["result"] for r in table if (r["kind"], r["method"]) == ("causal", "lora")}
    assert lora == {"works"}
    window = sum("would not see them" in r["sentence"] for r in table if r["result"] == "refused")
    assert f"would lose sight of them ({window})" in readme
    unbuilt = [r for r in table if (r["kind"], r["result"]) == ("causal", "not built")]
    assert len(unbuilt) == 10 and "Ten causal families could not be built" in readme
