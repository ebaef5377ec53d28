"""Intervals against textbook arithmetic and simulation; what is read of the stored runs."""

import csv
import math
import warnings

import pytest
import torch
from scipy import stats

from minipeft.evidence import answers_of, at_best_rate, compare, groups, runs_of

COLUMNS = """date device threads torch transformers task method lr seed steps examples batch
trainable seconds train_loss valid_loss right total answers curve details""".split()


def stored(path, *rows):
    """A file of runs; what a row leaves out is empty."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for row in rows:
            usual = {"device": "cpu", "task": "t", "method": "m", "lr": "0.1", "seed": "0"}
            writer.writerow(usual | row)
    return path


def draw(seeds, rows, of_seed, of_row, generator, shift=0.0):
    """Answers of two methods that share what makes a row hard: two tensors (seeds, rows)."""
    hard = of_row * torch.randn(rows, generator=generator)
    both = []
    for better in (shift, 0.0):
        own = 0.5 * torch.randn(rows, generator=generator)
        run = of_seed * torch.randn(seeds, 1, generator=generator)
        chance = torch.sigmoid(1.0 + better + hard + own + run)
        both.append((torch.rand(seeds, rows, generator=generator) < chance).double())
    return both


# ---- compare -----------------------------------------------------------------------------------


def test_without_noise_of_rows_it_is_students_interval_over_the_seeds():
    of_seed = torch.tensor([0.1, 0.4, 0.2, 0.5], dtype=torch.float64)
    scores = of_seed[:, None].expand(4, 50)  # (seeds, rows)
    low, high = stats.t.interval(0.95, 3, of_seed.mean(), stats.sem(of_seed))
    found = compare(scores)
    assert found.mean == pytest.approx(0.3)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.p == pytest.approx(stats.ttest_1samp(of_seed, 0.0).pvalue)


def test_without_noise_of_seeds_it_is_students_paired_interval_over_the_rows():
    torch.manual_seed(0)
    ours, theirs = torch.rand(2, 80, dtype=torch.float64)
    low, high = stats.t.interval(0.95, 79, (ours - theirs).mean(), stats.sem(ours - theirs))
    found = compare(ours.expand(3, 80), theirs[None])  # one untrained model, three equal runs
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)


def test_the_variance_of_the_mean_is_estimated_without_bias():
    """Of scores a[s] + b[r] + e[s, r] the mean has the variance that the three parts give it.

    Where a or b is nearly 0, taking the larger part makes the interval too long, never too short.
    """
    generator = torch.Generator().manual_seed(0)
    seeds, rows, means, squares = 4, 30, [], []
    for _ in range(1500):
        a = 0.3 * torch.randn(seeds, 1, generator=generator, dtype=torch.float64)
        b = torch.randn(1, rows, generator=generator, dtype=torch.float64)
        x = a + b + 0.5 * torch.randn(seeds, rows, generator=generator, dtype=torch.float64)
        found = compare(x)
        means.append(found.mean)
        freedom = _freedom(x)
        squares.append(((found.high - found.mean) / stats.t.ppf(0.975, freedom)) ** 2)
    exact = 0.3**2 / seeds + 1 / rows + 0.5**2 / (seeds * rows)
    assert torch.tensor(means).var().item() == pytest.approx(exact, rel=0.1)
    assert sum(squares) / len(squares) == pytest.approx(exact, rel=0.05)


def _freedom(x):
    """Satterthwaite's degrees of freedom, written with NumPy's sums as textbooks have them."""
    x = x.numpy()
    seeds, rows = x.shape
    of_seeds = rows * x.mean(1).var(ddof=1)
    of_rows = seeds * x.mean(0).var(ddof=1)
    total = (seeds * rows - 1) * x.var(ddof=1)
    rest = total - (seeds - 1) * of_seeds - (rows - 1) * of_rows
    rest /= (seeds - 1) * (rows - 1)
    top = max(of_seeds + of_rows - rest, of_seeds, of_rows)
    parts = (of_seeds, seeds - 1), (of_rows, rows - 1), (rest, (seeds - 1) * (rows - 1))
    return top**2 / sum(ms**2 / df for ms, df in parts)


@pytest.mark.parametrize(("seeds", "of_seed"), [(3, 0.0), (5, 0.0), (3, 0.3), (5, 0.3)])
def test_it_covers_the_truth_about_as_often_as_it_says(seeds, of_seed):
    """Equal methods differ by nothing on average; interval_coverage.py simulates more."""
    generator, covered, trials = torch.Generator().manual_seed(1), 0, 400
    for _ in range(trials):
        found = compare(*draw(seeds, 300, of_seed, 1.5, generator))
        covered += found.low <= 0 <= found.high
    assert 0.92 <= covered / trials <= 0.99


def test_it_is_never_shorter_than_the_interval_over_the_rows_alone():
    generator = torch.Generator().manual_seed(2)
    for _ in range(100):
        ours, theirs = draw(3, 300, 0.3, 1.5, generator)
        change, found = (ours - theirs).mean(0), compare(ours, theirs)
        assert found.high - found.mean >= 1.95 * change.std() / math.sqrt(300)


def test_a_higher_level_is_wider_and_the_sign_turns_with_the_order():
    generator = torch.Generator().manual_seed(3)
    ours, theirs = draw(3, 200, 0.2, 1.0, generator, shift=1.0)
    found, wide = compare(ours, theirs), compare(ours, theirs, level=0.99)
    assert wide.low < found.low < found.mean < found.high < wide.high
    turned = compare(theirs, ours)
    assert (turned.mean, turned.low, turned.p) == pytest.approx((-found.mean, -found.high, found.p))


def test_scores_that_never_vary_leave_the_room_of_the_rule_of_three():
    """With 3/rows of the rows different, none of them is seen with a chance of 5 %."""
    found = compare(torch.zeros(5, 500))
    assert (found.mean, found.p) == (0.0, 1.0)
    assert (1 - found.high) ** 500 == pytest.approx(0.05, rel=0.02)
    assert compare(torch.ones(2, 500), torch.zeros(2, 500)).p == 0.0


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (5,), (2, 3, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="two of each at least"):
        compare(torch.ones(shape))


@pytest.mark.parametrize("shape", [(3, 5), (2, 1), (5,), (2, 4)])
def test_another_shape_on_the_other_side_is_refused(shape):
    with pytest.raises(ValueError, match="theirs must be a number"):
        compare(torch.ones(2, 5), torch.ones(shape))


# ---- groups ------------------------------------------------------------------------------------


def steady(*shares, rows=1000, seeds=3):
    """{name: (seeds, rows)}: the first `share` of the rows is right, in every seed."""
    return {
        f"{share}": (torch.arange(rows) < share * rows).double().expand(seeds, rows)
        for share in shares
    }


def test_methods_far_apart_are_groups_of_one_and_equal_ones_are_one_group():
    assert groups(steady(0.3, 0.9, 0.6)) == [["0.9"], ["0.6"], ["0.3"]]
    assert groups({"a": torch.ones(2, 9), "b": torch.ones(2, 9)}) == [["a", "b"]]
    assert groups({"a": torch.ones(2, 9)}) == [["a"]]


def test_a_method_between_two_groups_is_in_both():
    # 0.005 is 5 rows of 1,000 that only one side has right: t = 2.2; 0.010 is t = 3.2.
    found = groups(steady(0.5, 0.505, 0.51))
    assert found == [["0.51", "0.505"], ["0.505", "0.5"]]
    p = compare(steady(0.51)["0.51"], steady(0.5)["0.5"]).p
    assert p < 0.05 / 3 < compare(steady(0.505)["0.505"], steady(0.5)["0.5"]).p  # Holm's first step


def test_equal_methods_are_rarely_parted():
    """Holm: with no true difference, at most one in twenty sets of five shows any."""
    generator, parted, trials = torch.Generator().manual_seed(4), 0, 100
    for _ in range(trials):
        hard = torch.randn(200, generator=generator)
        some = {}
        for name in "abcde":
            chance = torch.sigmoid(hard + 0.3 * torch.randn(5, 1, generator=generator))
            some[name] = (torch.rand(5, 200, generator=generator) < chance).double()
        parted += len(groups(some)) > 1
    assert parted <= 12  # 5 expected; more than 12 has a chance of one in a thousand


# ---- the file ----------------------------------------------------------------------------------


def test_runs_are_read_as_what_they_are(tmp_path):
    path = stored(
        tmp_path / "runs.csv",
        {"answers": "101", "curve": "10:2.5 20:1.25", "details": '{"loss": 3.5}', "right": "2",
         "valid_loss": "0.5", "steps": "20"},
        {"task": "other"},
    )  # fmt: skip
    (run,) = runs_of(path, "t")
    assert run["answers"].tolist() == [1.0, 0.0, 1.0] and run["curve"] == {10: 2.5, 20: 1.25}
    assert run["loss"] == 3.5 and run["steps"] == 20 and run["seconds"] is None


def test_runs_come_by_seed_in_whatever_order_workers_ended(tmp_path):
    rows = [{"seed": seed, "method": method} for seed in "201" for method in "ba"]
    runs = runs_of(stored(tmp_path / "runs.csv", *rows), "t")
    assert [(run["seed"], run["method"]) for run in runs] == [
        (seed, method) for seed in range(3) for method in "ba"
    ]


def test_runs_of_two_devices_never_come_together(tmp_path):
    path = stored(tmp_path / "runs.csv", {"seed": "0"}, {"seed": "1"}, {"device": "gpu"})
    assert [run["device"] for run in runs_of(path, "t")] == ["cpu", "cpu"]
    assert [run["device"] for run in runs_of(path, "t", "gpu")] == ["gpu"]
    with pytest.raises(ValueError, match="There are no runs of 'none' in"):
        runs_of(path, "none")
    with pytest.raises(ValueError, match="on 'tpu'"):
        runs_of(path, "t", "tpu")


def test_students_of_two_teachers_never_come_together(tmp_path):
    path = stored(
        tmp_path / "runs.csv",
        *({"seed": str(seed), "details": f'{{"teacher": "{teacher}"}}'}
          for seed, teacher in enumerate("abb")),
        {"task": "one", "details": '{"teacher": "a"}'}, {"task": "one", "seed": "1"},
    )  # fmt: skip
    with pytest.warns(UserWarning, match="1 runs of t had another teacher and are left out"):
        assert [run["seed"] for run in runs_of(path, "t")] == [1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = runs_of(path, "one")
    assert len(runs) == 2  # older rows do not tell
    with pytest.raises(ValueError, match=r"have the teachers \['None', 'a'\]; give those of one"):
        at_best_rate(runs)


def test_the_best_rate_is_that_of_the_first_seeds_lowest_validation_loss(tmp_path):
    path = stored(
        tmp_path / "runs.csv",
        {"lr": "0.1", "valid_loss": "nan", "answers": "11"},
        {"lr": "0.2", "valid_loss": "0.4", "answers": "10"},
        {"lr": "0.3", "valid_loss": "0.5", "answers": "00"},
        {"lr": "0.2", "seed": "2", "valid_loss": "0.9", "answers": "01"},
        {"lr": "0.2", "seed": "1", "valid_loss": "0.9", "answers": "11"},
        {"method": "one rate", "lr": "1", "answers": "10"},
    )
    best = at_best_rate(runs_of(path, "t"))
    assert [run["seed"] for run in best["m"]] == [0, 1, 2]
    assert answers_of(best["m"]).tolist() == [[1, 0], [1, 1], [0, 1]]
    assert len(best["one rate"]) == 1


def test_fresh_leaves_out_the_seed_that_chose(tmp_path):
    path = stored(
        tmp_path / "runs.csv",
        {"lr": "0.1", "valid_loss": "0.5"}, {"lr": "0.2", "valid_loss": "0.4"},
        {"lr": "0.2", "seed": "1"}, {"method": "one rate"}, {"method": "one rate", "seed": "1"},
    )  # fmt: skip
    best = at_best_rate(runs_of(path, "t"), fresh=True)
    assert {name: [run["seed"] for run in runs] for name, runs in best.items()} == {
        "m": [1], "one rate": [0, 1],
    }  # fmt: skip


def test_runs_of_other_numbers_of_examples_are_not_seeds_of_one_method(tmp_path):
    path = stored(tmp_path / "runs.csv", {"examples": "10"}, {"examples": "100", "seed": "1"})
    with pytest.raises(ValueError, match=r"have \[10, 100\] examples"):
        at_best_rate(runs_of(path, "t"))


def test_of_a_run_made_twice_the_newer_counts(tmp_path):
    path = stored(tmp_path / "runs.csv", {"answers": "00"}, {"answers": "11", "valid_loss": "1"})
    (run,) = runs_of(path, "t")
    assert run["answers"].tolist() == [1, 1]


def test_a_run_that_diverged_has_no_answers_to_compare(tmp_path):
    path = stored(tmp_path / "runs.csv", {"answers": "10"}, {"seed": "1", "valid_loss": "inf"})
    with pytest.raises(ValueError, match=r"have \[2, 0\] answers"):
        answers_of(runs_of(path, "t"))


def test_a_method_without_validation_losses_and_with_two_rates_is_refused(tmp_path):
    path = stored(tmp_path / "runs.csv", {"lr": "0.1"}, {"lr": "0.2"})
    with pytest.raises(ValueError, match="its rate is unknown"):
        at_best_rate(runs_of(path, "t"))
