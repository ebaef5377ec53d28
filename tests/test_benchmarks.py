"""The scripts behind the evidence: they run on a tiny model, and their results hold together."""

import csv
import importlib
import json
import math
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import minipeft

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))
RESULTS = FOLDER / "results" / "evidence.csv"


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Where there is a GPU, too, the scripts and their tiny models are on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def evidence():
    return importlib.import_module("evidence")


@pytest.fixture
def tasks():
    return importlib.import_module("tasks")


@pytest.fixture
def tiny(monkeypatch, tasks):
    """All tasks and scripts on a tiny model that is the same at every load."""

    def load_base(*_, **__):
        torch.manual_seed(0)
        return minipeft.load_base("tiny-llama", device="cpu")

    names = ["tasks.training", "tasks.distillation", "cost", "qlora"]
    for module in map(importlib.import_module, names):
        monkeypatch.setattr(module, "load_base", load_base)
    return load_base


# ---- the file ----------------------------------------------------------------------------------


def test_each_stored_run_is_whole_and_there_once(evidence, tasks):
    rows = rows_of(RESULTS)
    assert list(rows[0]) == evidence.COLUMNS
    runs = [(row["device"], evidence.run_of(row), row["valid_loss"] != "") for row in rows]
    assert len(set(runs)) == len(runs)  # a run may be made again for its validation loss
    for row, (_, run, _) in zip(rows, runs, strict=True):
        assert all(row[name] for name in ("date", "device", "threads", "torch", "transformers"))
        assert run.task in tasks.TASKS and isinstance(json.loads(row["details"]), dict)
        if row["answers"]:
            assert len(row["answers"]) == int(row["total"])
            assert row["answers"].count("1") == int(row["right"])


def test_each_stored_run_is_one_of_todays(evidence, tasks):
    """Method, steps and examples of every row are those of a setting: no row is an orphan."""
    for row in rows_of(RESULTS):
        run = evidence.run_of(row)
        known = {(s.method, s.steps, s.examples) for s in tasks.TASKS[run.task][0]}
        assert (run.method, run.steps, run.examples) in known, run


def test_what_another_device_did_is_not_done_here(monkeypatch):
    where = importlib.import_module("this_machine")
    mine = [row for row in rows_of(RESULTS) if row["device"] == "cpu"]
    assert where.rows_so_far(RESULTS) == mine != []
    monkeypatch.setattr(where, "pick_device", lambda: torch.device("mps"))
    assert where.rows_so_far(RESULTS) == []
    for script in FOLDER.rglob("*.py"):  # there is no other way to what is done
        assert script.name == "this_machine.py" or "csv.DictReader" not in script.read_text(), (
            script
        )


def test_the_losses_of_single_chinese_rows_fit_the_answers():
    lengths = {
        "own": minipeft.load_instructions("chinese")["test"]["answer"],
        "dialogue": minipeft.load_dialogues("chinese")["test"]["answer"],
    }
    for row in rows_of(RESULTS):
        if row["task"] == "chinese":
            details = json.loads(row["details"])
            for source, answers in lengths.items():
                assert len(details[f"{source}_losses"]) == len(answers)
                assert details[f"{source}_chars"] == sum(map(len, answers))


def test_the_same_recipe_gave_the_same_answers_in_two_tasks(evidence):
    """`reviews` and `transfer` train alike: on one kind of machine the answers agree."""
    names = {
        "LoRA": "LoRA r=8",
        "prefix-tuning": "prefix-tuning n=10 text",
        "all blocks": "last 30 blocks",
    }
    old = {
        (row["device"], row["method"], row["seed"], float(row["lr"])): row["answers"]
        for row in rows_of(RESULTS)
        if row["task"] == "reviews" and row["steps"] == "60"
    }
    compared = 0
    for row in rows_of(RESULTS):
        key = (row["device"], names.get(row["method"]), row["seed"], float(row["lr"]))
        if row["task"] == "transfer" and key in old:
            same = sum(a == b for a, b in zip(row["answers"], old[key], strict=True))
            assert same >= 0.97 * len(old[key])
            compared += 1
    assert compared


# ---- the plan ----------------------------------------------------------------------------------


def made(run, loss):
    """A row of the file as the runner sees it."""
    return {name: str(value) for name, value in run._asdict().items()} | {"valid_loss": str(loss)}


def search(evidence, setting, loss_at):
    """All runs that a setting asks for where the validation loss at a rate is loss_at(rate)."""
    rows = []
    while wanted := evidence.missing("task", setting, rows):
        rows += [made(run, loss_at(run.lr)) for run in wanted]
        assert len(rows) < 50
    return [evidence.run_of(row) for row in rows]


def test_the_best_rate_is_inside_of_the_rates_tried(evidence, tasks):
    setting = importlib.import_module("tasks.training").Setting("m", (1e-3, 3e-3), 60, 0, (0, 1, 2))
    for best in (1e-4, 1e-3, 3e-3, 3e-2):
        runs = search(evidence, setting, lambda lr, best=best: abs(math.log(lr / best)))
        tried = sorted(run.lr for run in runs if run.seed == 0)
        assert len(set(tried)) == len(tried)
        closest = min(tried, key=lambda lr: abs(math.log(lr / best)))
        assert tried[0] < closest < tried[-1]
        assert {run.lr for run in runs if run.seed in (1, 2)} == {closest}
        assert len(runs) == len(tried) + 2


def test_a_search_without_end_is_stopped_and_a_diverged_run_is_never_best(evidence):
    setting = importlib.import_module("tasks.training").Setting("m", (1e-3, 3e-3, 1e-2), 60, 0)
    runs = search(evidence, setting, lambda lr: -lr)  # the larger, the better, for ever
    assert len({run.lr for run in runs}) == evidence.MOST_RATES
    runs = search(evidence, setting, lambda lr: "nan" if lr > 2e-3 else 1.0)
    assert max(run.lr for run in runs if run.seed == 1) < 2e-3


def test_a_row_without_a_validation_loss_is_made_again_where_rates_are_searched(evidence):
    Setting = importlib.import_module("tasks.training").Setting
    setting = Setting("m", (1e-3, 3e-3, 1e-2), 60)
    old = [made(evidence.Run("task", "m", 3e-3, seed, 60, 0), "") for seed in (0, 1)]
    assert len(evidence.missing("task", setting, old)) == 3
    rows = old + [made(run, abs(run.lr - 3e-3)) for run in evidence.missing("task", setting, old)]
    assert [run.seed for run in evidence.missing("task", setting, rows)] == [1, 2]
    assert [run.seed for run in evidence.missing("task", Setting("m", (3e-3,), 60), old)] == [2]


def test_one_rate_is_not_searched_and_no_rate_is_run_once(evidence):
    Setting = importlib.import_module("tasks.training").Setting
    runs = search(evidence, Setting("m", (1e-3,), 60), lambda lr: "")
    assert runs == [evidence.Run("task", "m", 1e-3, seed, 60, 0) for seed in (0, 1, 2)]
    assert search(evidence, Setting("m"), lambda lr: "") == [evidence.Run("task", "m", 0, 0, 0, 0)]


def test_grades_and_addition_try_three_rates_and_five_seeds(tasks):
    for task in ("grades", "addition"):
        for setting in tasks.TASKS[task][0]:
            assert setting.method == "zero-shot" or len(setting.rates) >= 3
            assert len(setting.seeds) == 6  # one chooses the rate, five judge


def run_main(evidence, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["evidence.py", *words])
    with pytest.raises(SystemExit) as ended:
        evidence.main()
    return ended.value.code


class Here:
    """A pool that works in this process, so that the tiny model is there."""

    def __init__(self, workers, context, start, arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = importlib.import_module("concurrent.futures").Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def test_the_runner_makes_what_is_missing_and_nothing_twice(
    evidence, tasks, tiny, tmp_path, monkeypatch
):
    out = tmp_path / "evidence.csv"
    settings, run = tasks.TASKS["chinese"]
    chosen = [s._replace(steps=min(s.steps, 2), seeds=(0, 1)) for s in settings[:2]]
    monkeypatch.setitem(tasks.TASKS, "chinese", (chosen, run))
    monkeypatch.setattr(importlib.import_module("tasks.chinese"), "SAMPLES", 1)
    monkeypatch.setattr(evidence, "ProcessPoolExecutor", Here)
    words = ["--tasks", "chinese", "--out", str(out), "--workers", "2"]
    assert run_main(evidence, monkeypatch, *words, "--seconds", "-1") == 3 and not out.exists()
    assert run_main(evidence, monkeypatch, *words) == 0
    rows = rows_of(out)
    assert {(r["method"], r["seed"]) for r in rows} == {
        ("zero-shot", "0"), ("LoRA", "0"), ("LoRA", "1"),
    }  # fmt: skip
    assert run_main(evidence, monkeypatch, *words) == 0
    assert rows_of(out) == rows
    details = json.loads(rows[0]["details"])
    assert len(details["own_losses"]) == 22 and len(details["samples"]) == 2


def test_a_run_that_fails_is_told_about_and_the_others_go_on(
    evidence, tasks, tmp_path, monkeypatch, capsys
):
    Setting = importlib.import_module("tasks.training").Setting

    def run(method, lr, seed, steps, examples):
        if method == "bad":
            raise ValueError("this one cannot")
        return {"right": 1, "total": 2, "answers": "10"}

    settings = [Setting("bad", (1.0,), 1, 0, (0,)), Setting("good", (1.0,), 1, 0, (0,))]
    monkeypatch.setitem(tasks.TASKS, "fake", (settings, run))
    monkeypatch.setattr(evidence, "ProcessPoolExecutor", Here)
    out = tmp_path / "evidence.csv"
    code = run_main(evidence, monkeypatch, "--tasks", "fake", "--out", str(out))
    assert code == "1 runs failed" and "this one cannot" in capsys.readouterr().out
    assert [row["method"] for row in rows_of(out)] == ["good"]


def test_a_run_that_diverges_is_a_row_that_is_never_best(evidence, tasks, tmp_path, monkeypatch):
    Setting = importlib.import_module("tasks.training").Setting

    def run(method, lr, seed, steps, examples):
        if lr > 2e-2:
            raise FloatingPointError("the loss is nan")
        return {"valid_loss": f"{abs(math.log(lr / 1e-2)):.4f}"}

    monkeypatch.setitem(tasks.TASKS, "fake", ([Setting("m", (1e-2, 3e-2, 1e-1), 1)], run))
    monkeypatch.setattr(evidence, "ProcessPoolExecutor", Here)
    out = tmp_path / "evidence.csv"
    assert run_main(evidence, monkeypatch, "--tasks", "fake", "--out", str(out)) == 0
    rows = rows_of(out)
    assert [row["valid_loss"] for row in rows if row["lr"] == "0.1"] == ["inf"]
    assert "nan" in next(row["details"] for row in rows if row["lr"] == "0.1")
    assert {float(row["lr"]) for row in rows if row["seed"] != "0"} == {1e-2}
    assert min(float(row["lr"]) for row in rows) == 3e-3  # so the best one is inside


def test_no_run_begins_that_would_end_too_late(evidence, tasks, tmp_path, monkeypatch):
    Setting = importlib.import_module("tasks.training").Setting
    monkeypatch.setitem(tasks.TASKS, "fake", ([Setting("m", (1.0,), 1)], lambda *run: {}))
    monkeypatch.setattr(evidence, "ProcessPoolExecutor", Here)
    out = tmp_path / "evidence.csv"
    row = evidence.this_machine() | evidence.Run("fake", "old", 1.0, 0, 1, 0)._asdict()
    evidence.append_rows(out, evidence.COLUMNS, [row | {"seconds": "100"}])
    words = ["--tasks", "fake", "--out", str(out), "--seconds"]
    assert run_main(evidence, monkeypatch, *words, "90") == 3 and len(rows_of(out)) == 1
    assert run_main(evidence, monkeypatch, *words, "900") == 0 and len(rows_of(out)) == 4


def test_a_task_without_a_run_is_judged_by_the_others(evidence, tasks, tmp_path, monkeypatch):
    """Each run takes 100 s; in 250 s there is room for two, whatever their task is."""
    Setting = importlib.import_module("tasks.training").Setting
    clock = [0.0]

    def run(*_):
        clock[0] += 100
        return {}

    for task in ("fake", "other"):
        monkeypatch.setitem(tasks.TASKS, task, ([Setting("m", (1.0,), 1, 0, (0, 1))], run))
    monkeypatch.setattr(evidence, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(evidence, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    out = tmp_path / "evidence.csv"
    words = ["--tasks", "fake", "other", "--out", str(out), "--seconds", "250"]
    assert run_main(evidence, monkeypatch, *words) == 3
    assert [row["task"] for row in rows_of(out)] == ["fake"] * 2 and clock == [200]
    assert json.loads(rows_of(out)[0]["details"])["whole_seconds"] == 100
    clock[0] = 1000  # the next call knows how long they took, judging included
    assert run_main(evidence, monkeypatch, *words[:-1], "110") == 3 and len(rows_of(out)) == 2
    assert run_main(evidence, monkeypatch, *words) == 0 and len(rows_of(out)) == 4


def test_what_a_run_may_take(evidence):
    def run(task, steps):
        return evidence.Run(task, "m", 1.0, 0, steps, 0)

    finished = [(run("a", 60), 10.0), (run("a", 60), 20.0), (run("b", 60), 90.0)]
    assert evidence.may_take(run("a", 60), finished, [500.0]) == 20
    assert evidence.may_take(run("a", 120), finished, []) == 40
    assert evidence.may_take(run("a", 0), finished, []) == 20
    assert evidence.may_take(run("c", 60), finished, [50.0]) == 90
    assert evidence.may_take(run("c", 60), finished, [95.0]) == 95
    assert evidence.may_take(run("c", 60), [], []) == 0


def test_times_of_other_devices_and_other_workers_do_not_count(
    evidence, tasks, tmp_path, monkeypatch
):
    Setting = importlib.import_module("tasks.training").Setting
    monkeypatch.setitem(tasks.TASKS, "fake", ([Setting("m", (1.0,), 1)], lambda *run: {}))
    monkeypatch.setattr(evidence, "ProcessPoolExecutor", Here)
    out = tmp_path / "evidence.csv"
    row = evidence.this_machine() | evidence.Run("fake", "old", 1.0, 0, 1, 0)._asdict()
    others = [row | {"seconds": "100", "device": "card"}, row | {"seconds": "100", "threads": 99}]
    evidence.append_rows(out, evidence.COLUMNS, others)
    words = ["--tasks", "fake", "--out", str(out), "--seconds", "90"]
    assert run_main(evidence, monkeypatch, *words) == 0 and len(rows_of(out)) == 5


def test_list_names_every_task_and_what_can_be_next(evidence, tasks, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--list", "--out", str(tmp_path / "no.csv")])
    evidence.main()
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == set(tasks.TASKS)
    for task, (settings, run) in tasks.TASKS.items():
        first = sum(max(1, len(setting.rates)) for setting in settings)
        assert f" 0 runs made, {first:4} can be next" in lines[task] and callable(run)


def test_rows_with_other_columns_are_not_appended(tmp_path):
    where, path = importlib.import_module("this_machine"), tmp_path / "rows.csv"
    where.append_rows(path, ["a", "b"], [{"a": 1}])
    with pytest.raises(ValueError, match="other columns"):
        where.append_rows(path, ["b", "a"], [{"a": 1}])
    where.append_rows(path, ["a", "b"], [{"b": 2}])
    assert path.read_bytes() == b"a,b\r\n1,\r\n,2\r\n"


def test_rows_of_other_devices_are_not_replaced(tmp_path):
    where, path = importlib.import_module("this_machine"), tmp_path / "rows.csv"
    columns = ["device", "a"]
    where.replace_rows(path, columns, [{"device": "cpu", "a": "1"}])
    where.append_rows(path, columns, [{"device": "card", "a": "2"}])
    where.replace_rows(path, columns, [{"device": "cpu", "a": "3"}])
    rows = [{"device": "card", "a": "2"}, {"device": "cpu", "a": "3"}]
    assert rows_of(path) == rows and list(tmp_path.iterdir()) == [path]


def test_no_item_is_begun_that_might_end_too_late(monkeypatch):
    where, now = importlib.import_module("this_machine"), [100.0]
    monkeypatch.setattr(where.time, "monotonic", lambda: now[0])
    in_time, done = where.InTime(60), []
    for item in in_time([1, 20, 10, 10, 10]):
        now[0] += item
        done.append(item)
    assert done == [1, 20, 10, 10]  # 19 seconds are left, and the longest took 20
    assert list(in_time([1])) == []
    assert list(where.InTime(-1)([1])) == []


def test_an_unknown_task_or_method_is_refused(evidence, monkeypatch, capsys):
    assert run_main(evidence, monkeypatch, "--tasks", "no") == 2
    assert "there is no task no" in capsys.readouterr().err
    assert run_main(evidence, monkeypatch, "--tasks", "grades", "--methods", "no") == 2
    assert "there is no method 'no'" in capsys.readouterr().err


# ---- the tasks ---------------------------------------------------------------------------------

QUICK = {  # {task: method, training rows}
    "grades": ("LoRA+, all linear, r=8", 20),
    "addition": ("biases (added)", 20),
    "grades_prompts": ("start: class labels", 20),
    "transfer": ("P-tuning", 20),
    "bases": ("NF4", 20),
    "prompts": ("start: text", 20),
    "reviews": ("P-tuning n=10 mlp template", 20),
    "encoder_or_table": ("lstm_table", 20),
    "masking": ("off by one", 20),
    "subspaces": ("variant lora+ 4", 20),
}


@pytest.mark.parametrize("task", QUICK)
def test_a_task_trains_and_judges(task, tasks, tiny, monkeypatch):
    method, examples = QUICK[task]
    if task in ("reviews", "transfer"):  # the placeholder is the first id beyond the vocabulary
        reviews = importlib.import_module("tasks.reviews")
        monkeypatch.setattr(reviews, "HOLE_ID", len(tiny()[1]))
        add = reviews.METHODS[task][method]
        monkeypatch.setitem(
            reviews.METHODS[task], method,
            (*add[:2], lambda m: minipeft.add_p_tuning(m, 10, "mlp", None, reviews.HOLE_ID)),
        )  # fmt: skip
    if task.startswith("grades"):  # to its tokenizer, a space is a token of its own
        grades = importlib.import_module("tasks.grades")
        monkeypatch.setattr(grades, "GRADES", ("terrible", "bad", "okay", "good", "Yes"))
    if task == "subspaces":
        monkeypatch.setattr(
            importlib.import_module("tasks.subspaces"), "PROBE", "model.layers.0.self_attn.q_proj"
        )
    reviews, grades = (importlib.import_module(f"tasks.{name}") for name in ("reviews", "grades"))
    monkeypatch.setattr(reviews, "TESTS", 60)
    monkeypatch.setattr(reviews, "OTHER_TESTS", 16)
    few = {name: rows.select(range(60)) for name, rows in minipeft.load_grades().items()}
    monkeypatch.setattr(grades, "load_grades", lambda: few)
    row = tasks.TASKS[task][1](method, 1e-3, 0, 4, examples)
    assert row["trainable"] > 0 and float(row["train_loss"]) > 0 and float(row["valid_loss"]) > 0
    sizes = {
        "grades": 60, "addition": 500, "masking": 200, "transfer": 60, "reviews": 60,
        "subspaces": 300, "grades_prompts": 60, "bases": 60, "prompts": 60,
    }  # fmt: skip
    assert row.get("total") == sizes.get(task)
    if task == "grades":
        assert {"dialogue_loss", "text_loss"} == set(row["details"])
    if task == "transfer":
        assert len(row["details"]["tweets"]) == 16
        assert row["details"]["chat_loss"] > 0 and row["details"]["text_loss"] > 0


def test_every_method_of_the_comparison_can_be_added(tiny):
    methods = importlib.import_module("tasks.methods")
    for name, (rates, add) in methods.METHODS.items():
        k = [int(word) for word in name.split() if word.isdigit() and "block" in name]
        model, _ = tiny()
        if k or name == "all blocks":  # the tiny model has fewer blocks
            with pytest.raises(ValueError, match="not a whole number of blocks"):
                add(model)
            continue
        add(model)
        trained = any(p.requires_grad for p in model.parameters())
        assert trained and (bool(rates) or name == "zero-shot")


def test_no_two_methods_begin_as_the_same_model(tiny):
    """Two rows of a table that show one model would be no comparison, whatever their rates."""
    methods = importlib.import_module("tasks.methods")
    subspaces = importlib.import_module("tasks.subspaces").METHODS
    of_subspaces = {
        name: (rates, lambda model, add=add: add(model, 0), ratio)
        for name, (rates, ratio, add) in subspaces.items()
    }
    lists = [methods.METHODS, methods.LENGTH, methods.STARTS, methods.BASES, of_subspaces,
             methods.prompt_starts("Is it good?", (" no", " yes"))]  # fmt: skip
    for methods_of_list in lists:
        seen = {}
        for name, (_, add, *ratio) in methods_of_list.items():
            model, _ = tiny()
            torch.manual_seed(0)
            try:
                add(model)
            except ValueError:  # the tiny model has fewer blocks
                assert "block" in name
                continue
            groups = methods.groups_of(name, model, 1.0)
            ratio = ratio or [max(group["lr"] for group in groups) if groups else None]
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():  # a small step, the same for all: scalings show
                for p in model.parameters():
                    if p.requires_grad:
                        p += 0.05 * torch.randn(p.shape, generator=generator).to(p.dtype)
                logits = model(torch.arange(6)[None]).logits.float()
            for other, (before, of_other) in seen.items():
                assert of_other != ratio or not torch.allclose(logits, before), (name, other)
            seen[name] = logits, ratio


def test_added_biases_change_nothing_and_are_trained_alone(tiny):
    methods = importlib.import_module("tasks.methods")
    model, _ = tiny()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = model(ids).logits
        methods.biases(model)
        assert torch.equal(model(ids).logits, before)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    linear = sum(isinstance(m, torch.nn.Linear) for m in model.model.layers.modules())
    assert len(names) == linear and all(name.endswith("bias") for name in names)


def test_sums_are_right_and_no_pair_comes_twice():
    sums = importlib.import_module("tasks.addition").load_sums()
    assert {name: len(rows) for name, rows in sums.items()} == {
        "train": 20_000, "validation": 500, "test": 500,
    }  # fmt: skip
    seen = set()
    for rows in sums.values():
        for row in rows:
            a, _, b, _ = row["prompt"].split()
            assert int(row["answer"]) == int(a) + int(b) and len(a) == len(b) == 3
            seen.add(frozenset((a, b)))
    assert len(seen) == 21_000


def test_a_student_is_cut_and_trained_as_its_name_says(tasks, tiny, monkeypatch):
    distillation = importlib.import_module("tasks.distillation")
    layers = tiny()[0].config.num_hidden_layers
    monkeypatch.setitem(distillation.ROUTES, "route", [range(layers), range(layers - 1)])
    one = ("route", 1, distillation.ALL, 2.0, (1e-3,))
    monkeypatch.setitem(distillation.LISTS["distillation"], "test", one)
    splits = {name: rows.select(range(8)) for name, rows in minipeft.load_reviews().items()}
    monkeypatch.setattr(distillation, "splits_of", lambda task: splits)
    teacher, tokenizer = tiny()
    by_teacher = distillation.answers("distillation", teacher, tokenizer)
    monkeypatch.setattr(
        distillation, "teacher_of", lambda task: (teacher.eval(), tokenizer, by_teacher, "abc")
    )
    trained = []

    def fit(model, *arguments, **options):
        trained.append({n for n, p in model.named_parameters() if p.requires_grad})
        return {}

    monkeypatch.setattr(distillation, "fit", fit)
    row = distillation.run("distillation", "test", 1e-3, 0, 2, 0)
    stages = row["details"]["stages"]
    assert row["details"]["teacher"] == "abc"
    assert [stage["step"] for stage in stages] == [0, 1, 1, 2]
    assert [stage["layers"] for stage in stages] == [layers, layers, layers - 1, layers - 1]
    assert stages[0]["as_teacher"] == 8  # not cut yet, so it answers as its teacher
    for names, last in zip(trained, (layers - 1, layers - 2), strict=True):
        assert names and all(n.startswith((f"model.layers.{last}.", "model.norm")) for n in names)


def test_all_students_of_a_device_have_one_teacher(tiny, tmp_path, monkeypatch):
    """Also where two workers train one at once, and after the runner was started again."""
    distillation = importlib.import_module("tasks.distillation")
    monkeypatch.setattr(distillation, "TEACHERS", tmp_path)
    monkeypatch.setattr(distillation, "answers", lambda task, model, tokenizer: [])
    trained = []

    def train_teacher(task):
        """Each one is another; while the first is trained, a second worker is faster."""
        trained.append(task)
        own = len(trained)
        if own == 1:
            faster.append(weights_of_teacher())
        model, _ = tiny()
        torch.manual_seed(own)
        minipeft.add_lora(model)
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p)
        return model

    def weights_of_teacher():
        distillation.teacher_of.cache_clear()  # as in a new process
        teacher, *_, checksum = distillation.teacher_of("distillation")
        assert not any("lora" in name for name, _ in teacher.named_parameters())
        return torch.cat([p.flatten() for p in teacher.parameters()]), checksum

    monkeypatch.setattr(distillation, "train_teacher", train_teacher)
    monkeypatch.setattr(distillation.os, "getpid", lambda: len(trained))
    faster = []
    first, again = weights_of_teacher(), weights_of_teacher()
    assert len(trained) == 2
    for weights, checksum in (first, again):
        assert torch.equal(weights, faster[0][0]) and checksum == faster[0][1]
    base = torch.cat([p.flatten() for p in tiny()[0].parameters()])
    assert not torch.equal(first[0], base)
    assert [path.name for path in tmp_path.iterdir()] == ["distillation-cpu"]  # nothing is left
    distillation.teacher_of.cache_clear()


def test_a_loss_without_labels_does_not_depend_on_them(tiny):
    distillation = importlib.import_module("tasks.distillation")
    student, tokenizer = tiny()
    teacher, _ = tiny()
    with torch.no_grad():  # tuned: no longer what load_base gives
        teacher.model.norm.weight.mul_(2)
    batch = minipeft.Collator(0)([minipeft.encode(tokenizer, "Good?", " Yes")])
    other = batch | {"labels": torch.where(batch["labels"] == -100, -100, 7)}
    layers = student.config.num_hidden_layers
    for name, same in (("soft+hidden", True), ("soft", True), (distillation.ALL, False)):
        loss = distillation.loss_of(name, 2.0, teacher, layers)["loss_sum"]
        assert torch.equal(loss(student, batch), loss(student, other)) == same
    assert distillation.loss_of("labels", 2.0, teacher, layers) == {}


def test_a_subspace_moves_along_d_orthogonal_directions():
    subspaces = importlib.import_module("tasks.subspaces")
    torch.manual_seed(0)
    d, shape = 5, (6, 7)
    index = torch.randint(2 * d, (42,), dtype=torch.int32)
    theta = torch.randn(d, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64)
    dense = torch.zeros(42, d, dtype=torch.float64)  # P, as the paper writes it
    for row, place in enumerate(index.tolist()):
        dense[row, place % d] = 1.0 if place < d else -1.0
    moved = subspaces.Subspace(theta, index)(weight)
    torch.testing.assert_close(moved, weight + (dense @ theta).view(shape))
    gram = dense.T @ dense
    assert torch.equal(gram, torch.diag(gram.diagonal()))
    torch.autograd.gradcheck(lambda t: subspaces.Subspace(t, index)(weight), theta)


def test_a_subspace_leaves_the_model_as_it_is_at_first():
    subspaces = importlib.import_module("tasks.subspaces")
    model, _ = minipeft.load_base("tiny-llama", device="cpu")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = model(ids).logits
        subspaces.add_subspace(model, 11, seed=0)
        assert torch.equal(model(ids).logits, before)
    assert minipeft.count_parameters(model)[0] == 11
    model(ids, labels=ids).loss.backward()
    thetas = [p for p in model.parameters() if p.requires_grad]
    assert len(thetas) == 1 and bool(thetas[0].grad.any())


# ---- costs -------------------------------------------------------------------------------------


def test_a_time_begins_and_ends_when_the_device_is_idle(monkeypatch):
    where, told = importlib.import_module("this_machine"), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("wait"))
    assert where.seconds(lambda: told.append("work"), torch.device("cuda")) > 0
    assert told == ["wait", "work", "wait"]
    assert where.seconds(lambda: told.append("work"), torch.device("cpu")) > 0
    assert told[3:] == ["work"]


def test_ratios_are_of_times_taken_in_turns(monkeypatch):
    cost, times, done = importlib.import_module("cost"), iter([9.0, 9.0, 2.0, 6.0, 2.0, 6.0]), []

    def taken(work, device):
        work()
        return next(times)

    monkeypatch.setattr(cost, "seconds", taken)
    # Who begins changes: the first takes 2 and the second 6, then the other way round.
    ratio, first = cost.compare((lambda: done.append("a"), lambda: done.append("b")), 2)
    assert done == ["b", "a", "a", "b", "b", "a"]
    assert ratio == statistics.median([2 / 6, 6 / 2]) and first == 4.0


def test_where_rounds_are_long_few_are_enough(monkeypatch):
    cost, done = importlib.import_module("cost"), []
    for taken, rounds in ((0.1, 8), (0.9, 4), (9.0, 2)):  # no more pairs after 5 seconds
        monkeypatch.setattr(cost, "seconds", lambda work, device, taken=taken: work() or taken)
        cost.compare((lambda: done.append("a"), lambda: done.append("b")), 8)
        assert done == ["b", "a", *"abba" * (rounds // 2)]
        done.clear()


@pytest.fixture
def cost(tiny, tmp_path, monkeypatch):
    """cost.py on the tiny model: `cost.run(more words)` measures three methods."""
    cost, out = importlib.import_module("cost"), tmp_path / "cost.csv"
    methods = ["zero-shot", "LoRA, q and v, r=8", "P-tuning, n=20"]
    words = ["--methods", *methods, "--batches", "1", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(
        cost, "fresh", lambda add, seed: (lambda model: (add(model), None))(tiny()[0])
    )

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["cost.py", *words, *more])
        return status(cost.main)

    cost.out, cost.run, cost.three = out, run, methods
    return cost


def status(main):
    """The exit status of a script."""
    try:
        main()
    except SystemExit as ended:
        return ended.code
    return 0


def test_costs_are_measured_in_each_state_and_once(cost, tiny):
    out, methods = cost.out, cost.three
    assert cost.run("--seconds", "-1") == 3 and not out.exists()
    assert cost.run() == 0
    rows = rows_of(out)
    assert [(row["method"], row["state"]) for row in rows] == [
        ("zero-shot", "as trained"),
        (methods[1], "as trained"), (methods[1], "merged"),
        (methods[2], "as trained"), (methods[2], "folded"),
    ]  # fmt: skip
    trained = minipeft.count_parameters(minipeft.add_lora(tiny()[0]))[0]
    assert int(rows[1]["trainable"]) == trained and float(rows[1]["peak_gib"]) > 0
    assert 4 * trained < int(rows[1]["file_bytes"]) < 4 * trained + 20_000
    for name in ("trainable", "file_bytes"):  # merged and folded, it is the same adapter
        assert rows[1][name] == rows[2][name] and rows[3][name] == rows[4][name] != "0"
    assert all(float(row["read_1"]) > 0 and float(row["write_ms_1"]) > 0 for row in rows)
    assert cost.run() == 0 and rows_of(out) == rows  # nothing is left to do


def test_costs_of_models_that_were_not_frozen_are_measured_anew(cost):
    assert cost.run() == 0
    rows = rows_of(cost.out)
    assert {row["frozen"] for row in rows} == {"yes"}
    cost.out.unlink()
    where = importlib.import_module("this_machine")
    where.append_rows(cost.out, cost.COLUMNS, [row | {"frozen": "no"} for row in rows])
    assert cost.run() == 0 and len(rows_of(cost.out)) == 2 * len(rows)


def test_a_method_whose_cost_cannot_be_measured_does_not_stop_the_others(cost, monkeypatch):
    def fails(model):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(cost.ADD, cost.three[1], fails)
    assert "LoRA, q and v, r=8: out of memory" in cost.run()
    assert {row["method"] for row in rows_of(cost.out)} == {cost.three[0], cost.three[2]}


def test_each_stored_cost_is_one_of_todays_and_there_once():
    cost = importlib.import_module("cost")
    rows = rows_of(FOLDER / "results" / "cost.csv")
    assert list(rows[0]) == cost.COLUMNS
    assert {row["method"] for row in rows} <= {*cost.ADD, *cost.STUDENTS}
    keys = [tuple(row[k] for k in ("device", "method", "state", "frozen")) for row in rows]
    assert len(set(keys)) == len(keys) and {row["frozen"] for row in rows} <= {"yes", "no"}
    for row in rows:
        if row["frozen"] == "no":  # notebooks 10 and 13 read them by the first word
            assert row["device"] == "cpu"
    short = [row["method"].split(",")[0] for row in rows if row["frozen"] == "no"]
    assert len(set(short)) == len(short)


def test_train_and_the_trainer_of_transformers_do_the_same_work(tmp_path, monkeypatch):
    trains = importlib.import_module("train")
    monkeypatch.setattr(trains, "RESULTS", tmp_path / "benchmarks" / "results")
    (tmp_path / "benchmarks").mkdir()
    both = {"minipeft": trains.of_minipeft, "Trainer": trains.of_trainer}
    monkeypatch.setattr(trains, "contenders", lambda: both)

    def run(words):
        fixed = "train.py --base tiny-llama --steps 2 --seq 24 --targets 4".split()
        monkeypatch.setattr(sys, "argv", [*fixed, *words.split()])
        return status(trains.main)

    path = trains.RESULTS / "train-cpu.csv"
    assert run("--rounds 1 --seconds -1") == 3 and not path.exists()
    assert run("--rounds 1") == 0
    rows = rows_of(path)
    assert sorted((row["targets"], row["contender"]) for row in rows) == [
        ("24", "Trainer"), ("24", "minipeft"), ("4", "Trainer"), ("4", "minipeft"),
    ]  # fmt: skip
    for a, b in ((0, 1), (2, 3)):  # checked by the script, too
        assert float(rows[a]["mean_loss"]) == pytest.approx(float(rows[b]["mean_loss"]), abs=1e-3)
    peak = {(row["targets"], row["contender"]): int(row["peak_bytes"]) for row in rows}
    assert peak["4", "minipeft"] < peak["4", "Trainer"]  # logits at the targets only
    assert len({peak["4", "Trainer"], peak["24", "Trainer"]}) == 1
    assert run("--rounds 1") == 0 and rows_of(path) == rows  # nothing is left to do
    monkeypatch.setattr(trains, "contenders", lambda: both | {"third": trains.of_trainer})
    assert run("--rounds 1") == 0  # the round without the third does not count
    found = [(row["targets"], row["round"], row["contender"]) for row in rows_of(path)]
    assert len(set(found)) == len(found) == 4 + 6
    assert sorted(r for targets, r, _ in found if targets == "4") == [*"00111"]


def test_the_readme_says_what_train_measured():
    setting = {"base": "smollm2", "precision": "float32", "batch": "4", "steps": "2"}
    rows = [row for row in rows_of(FOLDER / "results" / "train-cpu.csv")
            if row.items() >= setting.items()]  # fmt: skip
    peak = {(row["targets"], row["contender"]): int(row["peak_bytes"]) for row in rows}
    few, all_of_them = (
        [peak[targets, "minipeft"] / peak[targets, other] for other in ("Trainer", "TRL")]
        for targets in ("16", "128")
    )
    readme = " ".join((FOLDER.parent / "docs/package.md").read_text(encoding="utf-8").split())
    assert f"{few[0]:.2f} of the peak memory of HF's `Trainer` and {few[1]:.2f} of that" in readme
    assert f"the peaks are {all_of_them[0]:.2f} and {all_of_them[1]:.2f}." in readme


def test_other_work_is_not_compared():
    trains = importlib.import_module("train")
    with pytest.raises(AssertionError, match="differ"):
        trains.refuse_unequal({"minipeft": 2.0, "Trainer": 2.1}, 1e-3, "loss", "float32")


def test_qlora_compares_the_bases_in_every_round(tiny, tmp_path, monkeypatch):
    qlora = importlib.import_module("qlora")
    monkeypatch.setattr(qlora, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["qlora.py", "--rounds", "2", "--seq", "32", "64"])
    qlora.main()
    rows = rows_of(tmp_path / "qlora-cpu.csv")
    turns = sorted((row["seq"], row["round"], row["base"]) for row in rows)
    assert turns == sorted((s, r, b) for s in ("32", "64") for r in "01" for b in qlora.BASES)
    assert all(float(row["seconds"]) > 0 for row in rows)
    stored = [r for path in (FOLDER / "results").glob("qlora-*.csv") for r in rows_of(path)]
    for row in rows + stored:
        assert int(row["estimate"]) == pytest.approx(int(row["train_peak"]), rel=0.02), row


def test_the_readme_says_what_qlora_measured():
    rounds = {}
    for row in rows_of(FOLDER / "results" / "qlora-cpu.csv"):
        rounds.setdefault((row["seq"], row["round"]), {})[row["base"]] = float(row["seconds"])
    ratios = {
        seq: statistics.median(r["nf4"] / r["float32"] for (s, _), r in rounds.items() if s == seq)
        for seq in ("64", "256")
    }
    readme = " ".join((FOLDER.parent / "docs/package.md").read_text(encoding="utf-8").split())
    wanted = (
        f"takes {ratios['64']:.2f} times as long as on float32 with 4 x 64 tokens, "
        f"and {ratios['256']:.2f} times with 4 x 256"
    )
    assert wanted in readme and len(rounds) == 2 * 12


# ---- the report --------------------------------------------------------------------------------


def stored_runs(folder, monkeypatch, task, rows):
    """The report on these runs: a module whose files lie in a folder."""
    report, evidence = importlib.import_module("report"), importlib.import_module("evidence")
    common = {"device": "card", "task": task, "steps": 1, "examples": 0, "details": "{}"}
    with open(folder / "evidence.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, evidence.COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(common | row for row in rows)
    monkeypatch.setattr(report, "FOLDER", folder)
    return report


def lines_of(text):
    """A table in Markdown as {name: cells}, in its order."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows[2:]}


def share(right, rows=100):
    return "1" * right + "0" * (rows - right)


def test_a_report_has_every_method_once_with_its_interval_and_group(tmp_path, monkeypatch, capsys):
    rows = [
        {"method": method, "lr": lr, "seed": seed, "valid_loss": loss, "answers": share(right),
         "trainable": 7}
        for method, lr, seed, loss, right in [
            ("LoRA, q and v, r=8", 1e-3, 0, 0.4, 99), ("LoRA, q and v, r=8", 3e-3, 0, 0.6, 99),
            ("LoRA, q and v, r=8", 1e-3, 1, 0.5, 80), ("LoRA, q and v, r=8", 1e-3, 2, 0.5, 82),
            ("norms", 1e-3, 0, 0.4, 81),
            ("norms", 1e-3, 1, 0.4, 81), ("norms", 1e-3, 2, 0.4, 81), ("zero-shot", 0.0, 0, 1.0, 9),
        ]
    ]  # fmt: skip
    report = stored_runs(tmp_path, monkeypatch, "grades", rows)
    cost = importlib.import_module("cost")
    with open(tmp_path / "cost.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, cost.COLUMNS, restval="")
        writer.writeheader()
        for state, ratio in (("as trained", "0.98"), ("merged", "9")):
            row = {"device": "card", "method": "LoRA, q and v, r=8", "state": state}
            writer.writerow(row | {"step_ratio": ratio})
    monkeypatch.setattr(sys, "argv", ["report.py", "grades", "--out", str(tmp_path)])
    report.main()
    text = (tmp_path / "grades.md").read_text()
    assert text in capsys.readouterr().out
    lines = lines_of(text)
    assert list(lines) == [
        "LoRA, q and v, r=8",
        "norms",
        "always the commonest answer",
        "zero-shot",
    ]
    lora = lines["LoRA, q and v, r=8"]  # without the seed that chose
    assert lora[2:4] == ["0.001", "0.98"] and lora[-1].startswith("81.0 (")
    assert lines["zero-shot"][-1] == "9.0, one run"
    labels = minipeft.load_grades()["test"]["label"][:100]
    assert lines["always the commonest answer"][-1] == f"{Counter(labels).most_common(1)[0][1]:.1f}"
    assert (tmp_path / "grades.png").stat().st_size > 10_000
    best = report.results_of("grades")
    scores = report.scores_of(best, report.measure_of(best))
    assert report.groups_of(scores) == [["LoRA, q and v, r=8", "norms"]]
    (axis,) = report.draw("grades", best, scores, report.RIGHT, 0.25).axes
    dotted = [line for line in axis.lines if line.get_linestyle() == ":"]
    assert [list(line.get_xdata()) for line in dotted] == [[25.0, 25.0]]


def test_a_report_leaves_out_students_whose_teacher_is_unknown(tmp_path, monkeypatch):
    rows = [
        {"method": "first 8: 5 trained, labels", "lr": 3e-4, "seed": 0, "answers": share(50)},
        {"method": "first 15: 5 trained, labels", "lr": 3e-4, "seed": 0, "valid_loss": 1.0,
         "answers": share(60), "details": '{"teacher": "a"}'},
    ]  # fmt: skip
    report = stored_runs(tmp_path, monkeypatch, "distillation", rows)
    assert list(report.results_of("distillation")) == ["first 15: 5 trained, labels"]
    report = stored_runs(tmp_path, monkeypatch, "distillation", rows[:1])
    assert list(report.results_of("distillation")) == ["first 8: 5 trained, labels"]


def test_no_interval_leaves_what_is_possible(tmp_path, monkeypatch):
    rows = [{"method": "norms", "lr": 1e-3, "seed": seed, "answers": share(right)}
            for seed, right in enumerate((97, 93))]  # fmt: skip
    report = stored_runs(tmp_path, monkeypatch, "grades", rows)
    figure, text = report.report("grades")
    assert lines_of(text)["norms"][-1].endswith(" to 100.0)")
    (bar,) = figure.axes[0].containers
    (ends,) = bar.lines[2][0].get_segments()  # the line from one end of the interval to the other
    assert ends[1][0] == 100 and 80 < ends[0][0] < 93


def test_methods_are_compared_at_the_seeds_that_all_of_them_have(tmp_path, monkeypatch):
    """One seed of "norms" diverged; its third is not the second of another."""
    rows = [
        {"method": method, "lr": 1e-3, "seed": seed, "answers": share(50 + 10 * seed)}
        for method in ("norms", "head") for seed in range(4) if (method, seed) != ("norms", 1)
    ]  # fmt: skip
    failed = {"method": "norms", "lr": 1e-3, "seed": 1, "valid_loss": "inf",
              "details": '{"diverged": "nan"}'}  # fmt: skip
    report = stored_runs(tmp_path, monkeypatch, "grades", [*rows, failed])
    seen = {}
    monkeypatch.setattr(report, "groups", lambda judged: seen.update(judged) or [])
    _, text = report.report("grades")
    assert torch.equal(seen["norms"], seen["head"]) and len(seen["head"]) == 3
    assert lines_of(text)["norms"][-1].endswith("; 1 of 4 diverged")
    assert "diverged" not in lines_of(text)["head"][-1]
    report = stored_runs(tmp_path, monkeypatch, "grades", [rows[0] | {"method": "head"}, failed])
    assert lines_of(report.report("grades")[1])["norms"][-1] == "1 of 1 diverged"


def test_the_report_has_a_line_for_each_number_of_examples(tmp_path, monkeypatch):
    rows = [
        {"method": "LoRA", "lr": lr, "seed": seed, "examples": size, "answers": share(50),
         "valid_loss": abs(lr - size)}
        for size in (100, 1000) for lr, seed in ((100, 0), (1000, 0), (size, 1))
    ]  # fmt: skip
    report = stored_runs(tmp_path, monkeypatch, "grades_examples", rows)
    lines = lines_of(report.report("grades_examples")[1])
    rates = {name: cells[1] for name, cells in lines.items() if name.startswith("LoRA")}
    assert rates == {"LoRA, 100 examples": "100", "LoRA, 1,000 examples": "1000"}


def test_a_task_without_answers_is_judged_by_its_loss(tmp_path, monkeypatch):
    rows = [{"method": "mlp", "lr": 1e-3, "seed": seed, "valid_loss": loss, "trainable": 5}
            for seed, loss in enumerate((0.25, 0.75))]  # fmt: skip
    rows.append({"method": "lstm", "lr": 1e-3, "seed": 0, "valid_loss": 0.25})
    report = stored_runs(tmp_path, monkeypatch, "encoder_or_table", rows)
    lines = lines_of(report.report("encoder_or_table")[1])
    assert list(lines) == ["lstm", "mlp"]  # the lower, the better
    assert lines["lstm"] == ["-", "0.001", "0.250, one run"]
    assert lines["mlp"] == ["5", "0.001", "0.500, 2 runs"]

    def details(*losses):
        one = {"own_losses": losses, "own_chars": 9, "dialogue_losses": [1.0], "dialogue_chars": 1}
        return json.dumps(one)

    rows = [{"method": "LoRA", "lr": 2e-3, "seed": seed, "details": details(3.0, 4.0 + seed)}
            for seed in (0, 2)]  # fmt: skip
    report = stored_runs(tmp_path, monkeypatch, "chinese", rows)
    assert lines_of(report.report("chinese")[1])["LoRA"][-1].startswith("0.900 (")
    report = stored_runs(tmp_path, monkeypatch, "chinese", [rows[0] | {"details": "{}"}])
    with pytest.raises(ValueError, match="neither answers nor losses"):
        report.report("chinese")


def test_every_task_has_a_report_or_a_sentence(tasks, monkeypatch, tmp_path):
    report = importlib.import_module("report")
    stored = {row["task"] for row in rows_of(RESULTS)}
    for task in tasks.TASKS:
        if task in stored:
            _, text = report.report(task)
            rows = [row for row in rows_of(RESULTS) if row["task"] == task]
            rows = [row for row in rows if '"teacher":' in row["details"]] or rows
            methods, names = {row["method"] for row in rows}, lines_of(text)
            assert all(any(name.startswith(method) for name in names) for method in methods)
        else:
            monkeypatch.setattr(sys, "argv", ["report.py", task, "--out", str(tmp_path)])
            with pytest.raises(SystemExit, match=f"There are no runs of '{task}' in "):
                report.main()
        report.plt.close("all")
    assert not any(tmp_path.iterdir())


def test_gain_against_forgetting_at_every_rate(tmp_path, monkeypatch, capsys):
    def run(method, lr, seed, loss, right, **details):
        answers = {"answers": share(right)} if right is not None else {}
        return {"method": method, "lr": lr, "seed": seed, "valid_loss": loss, "trainable": 1,
                "steps": 0 if method == "zero-shot" else 1, "details": json.dumps(details),
                } | answers  # fmt: skip

    rows = [
        run("zero-shot", 0, 0, 1.0, 20, dialogue_loss=2.0, text_loss=3.0),
        run("LoRA", 3e-3, 0, 0.5, 60, dialogue_loss=2.5, text_loss=3.25),
        run("LoRA", 1e-3, 0, 0.4, 50, dialogue_loss=2.25, text_loss=3.0),
        run("LoRA", 1e-3, 1, 0.4, 90, dialogue_loss=9.0, text_loss=9.0),
        run("norms", 1e-3, 0, 0.4, 30, chat_loss=2.0),  # a run from before plain text
        run("norms", 1e-1, 0, "inf", None, diverged="nan"),
    ]
    forgetting = importlib.import_module("forgetting")
    report = stored_runs(tmp_path, monkeypatch, "grades", rows)
    monkeypatch.setattr(forgetting, "FOLDER", report.FOLDER)
    words = ["forgetting.py", "grades", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    forgetting.main()
    text = (tmp_path / "grades-forgetting.md").read_text()
    assert text in capsys.readouterr().out and (tmp_path / "grades-forgetting.png").exists()
    assert [line.strip("| ").split(" | ") for line in text.splitlines()[2:]] == [
        ["LoRA", "0.001", "yes", "+30.0", "+0.250", "+0.000"],
        ["LoRA", "0.003", "", "+40.0", "+0.500", "+0.250"],
        ["norms", "0.001", "yes", "+10.0", "+0.000", "-"],
        ["norms", "0.1", "", "diverged", "-", "-"],
    ]
    points = forgetting.forgotten("grades")
    dialogues, plain = forgetting.draw("grades", points).axes[:2]
    places = [list(zip(*line.get_data(), strict=True)) for line in dialogues.lines]
    assert places == [
        [(0.25, pytest.approx(30)), (0.5, pytest.approx(40))],
        [(0, pytest.approx(10))],
    ]
    assert [len(line.get_xdata()) for line in plain.lines] == [2, 0]
    stored_runs(tmp_path, monkeypatch, "grades", rows[1:])
    with pytest.raises(SystemExit, match="No run of grades tells the loss of the untrained model"):
        forgetting.main()
    stored_runs(tmp_path, monkeypatch, "grades", rows[:1])
    with pytest.raises(SystemExit, match="No trained run of grades"):
        forgetting.main()
    monkeypatch.setattr(forgetting, "FOLDER", RESULTS.parent)
    assert {point["method"] for point in forgetting.forgotten("transfer")} >= {"LoRA", "all blocks"}


def readme_of_gpu_runs():
    return (FOLDER / "README.md").read_text(encoding="utf-8").split("## Runs that need a GPU")[1]


def test_the_commands_for_a_gpu_make_the_runs_of_every_task(tasks):
    lines = [line for line in readme_of_gpu_runs().splitlines() if "evidence.py --tasks" in line]
    named = [word for line in lines for word in line.split("--tasks")[1].split("--")[0].split()]
    assert sorted(named) == sorted(tasks.TASKS)
    assert all("--seconds 580" in line for line in lines)  # each command has ten minutes


def test_the_readme_says_which_notebooks_read_which_runs(tasks):
    read = {}
    notebooks = FOLDER.parent / "notebooks"
    for path in sorted(notebooks.rglob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        source = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        for line in source.splitlines():
            if "runs_of(" in line or "evidence(" in line:
                number = path.relative_to(notebooks).with_suffix("").as_posix().split("_")[0]
                for task in re.findall(r'(?<!\[)"(\w+)"', line):  # not run["examples"]
                    read.setdefault(task, set()).add(number)
    table = re.findall(r"^\| `(\w+)` \| (.+) \|$", readme_of_gpu_runs(), re.MULTILINE)
    assert {task: set(cell.split(", ")) for task, cell in table} == {
        task: numbers for task, numbers in read.items() if task in tasks.TASKS
    }


def test_the_report_says_what_can_be_merged(tiny):
    """merge_lora is asked, not the name; a method that is not listed gets no false entry."""
    report, methods = importlib.import_module("report"), importlib.import_module("tasks.methods")
    for name, (_, add) in methods.METHODS.items():
        if "block" in name:  # the tiny model has fewer
            continue
        model, _ = tiny()
        add(model)
        try:
            minipeft.merge_lora(model)
            merged = True
        except ValueError:
            merged = False
        assert (report.place_of(name)[1] == "yes") == merged, name
        assert report.place_of(name)[0] != "-" and report.style_of(name)
    assert report.place_of("subspace d=10") == report.place_of("NF4") == ("-", "-")
    assert report.style_of("NF4")


# ---- memory, coverage --------------------------------------------------------------------------


def test_memory_is_predicted_without_a_gpu(tmp_path, monkeypatch):
    memory = importlib.import_module("memory")
    monkeypatch.setattr(
        sys, "argv", ["memory.py", "--cases", "25", "28", "--out", str(tmp_path / "m.csv")]
    )
    memory.main()
    rows = rows_of(tmp_path / "m.csv")
    memory.main()  # nothing is left to do
    assert rows_of(tmp_path / "m.csv") == rows
    assert [row["model"] for row in rows] == ["smollm2", "bloom-1b4-zh"]
    for row in rows + rows_of(FOLDER / "results" / "memory.csv"):
        assert int(row["predicted"]) == pytest.approx(int(row["fake"]), rel=0.01), row
        if row["allocated"]:
            assert int(row["predicted"]) == pytest.approx(int(row["allocated"]), rel=0.01), row
        if row["allocated_accumulated"]:
            found = int(row["allocated_accumulated"])
            assert int(row["fake_accumulated"]) == pytest.approx(found, rel=0.01), row


def test_memory_says_what_failed_and_what_it_had_no_time_for(tmp_path, monkeypatch):
    memory, out = importlib.import_module("memory"), tmp_path / "m.csv"
    words = ["memory.py", "--cases", "1", "25", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*words, "--seconds", "-1"])
    assert status(memory.main) == 3 and not out.exists()
    predicted = memory.predicted

    def fails(config, method, options):
        if options["batch"] == 8:
            raise torch.OutOfMemoryError("too large")
        return predicted(config, method, options)

    monkeypatch.setattr(memory, "predicted", fails)
    monkeypatch.setattr(sys, "argv", words)
    assert "case 1, smollm2, lora: too large" in status(memory.main)
    assert [row["case"] for row in rows_of(out)] == ["25"]


def test_the_same_two_passes_are_made_on_fake_and_on_real_tensors(tiny):
    """On a GPU only the last line differs: there the allocator says what the peak is."""
    memory, settings = (importlib.import_module(n) for n in ("memory", "minipeft.memory.settings"))
    config = tiny()[0].config
    real = memory.accumulated(settings.build(config, None, torch.float32, "fused"), 2, 16)
    with memory.FakeTensorMode():
        fake = memory.accumulated(settings.build(config, None, torch.float32, "fused"), 2, 16)
    assert real == fake > memory.measure(config, batch=2, seq=16, optimizer="adamw-foreach").total


def test_the_table_of_the_study_notes_is_what_an_h100_said():
    """Three runs of Bloom that accumulate gradients: peaks of an H100's allocator, in GB."""
    h100 = {"full": 26.13, "prefix": 6.10, "prefix projected": 10.18}
    rows = [
        row for row in rows_of(FOLDER / "results" / "memory.csv")
        if row["model"] == "bloom-1b4-zh" and row["seq"] == "256"
        and (row["device"] == "cpu" or "H100" in row["device"])  # others have another workspace
    ]  # fmt: skip
    assert [row["method"] for row in rows if row["device"] == "cpu"] == list(h100)
    for row in rows:
        for name in ("fake_accumulated", "allocated_accumulated"):
            if row[name]:
                assert int(row[name]) / 1e9 == pytest.approx(h100[row["method"]], abs=0.006), row


def test_stored_coverage_is_what_compare_promises():
    rows = rows_of(FOLDER / "results" / "coverage.csv")
    assert {row["seeds"] for row in rows} == {"2", "3", "5"}
    for row in rows:
        if int(row["seeds"]) >= 3:
            assert 0.925 <= float(row["both_covers"]) <= 0.99, row
    spoilt = [float(row["rows_covers"]) for row in rows if row["luck"] == "0.3"]
    assert max(spoilt) < 0.9  # an interval over the rows alone


def test_coverage_simulates_what_it_says(monkeypatch):
    coverage = importlib.import_module("interval_coverage")
    generator = torch.Generator().manual_seed(0)
    x = coverage.difference(3, 50, 0.3, generator)
    assert x.shape == (3, 50) and set(x.unique().tolist()) <= {-1.0, 0.0, 1.0}
    halves = coverage.halves(x)
    assert halves["both"][1] >= halves["rows"][1] > 0


def test_idle_time_is_what_no_kernel_covers():
    waits = importlib.import_module("waits")
    busy = waits.joined([(5, 8), (0, 2), (1, 3), (10, 11)])
    assert busy == [(0, 3), (5, 8), (10, 11)]
    assert waits.gaps(busy) == [(3, 5), (8, 10)]
    assert waits.overlap(waits.gaps(busy), [(0, 4), (9, 20)]) == 2
    assert waits.overlap([(0, 10)], [(1, 2), (3, 5)]) == 3


def test_waits_stores_each_round_once_and_the_losses_agree(tmp_path, monkeypatch):
    waits = importlib.import_module("waits")
    compiled = {"train, compile", "train, compile, no buckets"}  # tests/training/test_compile.py
    made = waits.contenders
    monkeypatch.setattr(
        waits, "contenders", lambda *a: {n: c for n, c in made(*a).items() if n not in compiled}
    )
    out = tmp_path / "waits.csv"
    words = ["--base", "tiny", "--shapes", "2x16", "--precisions", "float32", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["waits.py", *words, "--mixed", "--out", str(out)])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seconds", "-1"])
    assert status(waits.main) == 3 and not out.exists()
    monkeypatch.setattr(sys, "argv", sys.argv[:-2])
    by_trainer, tried = waits.by_trainer, []

    def fails_once(*arguments):
        tried.append("Trainer")
        if len(tried) == 1:
            raise RuntimeError("not this time")
        return by_trainer(*arguments)

    monkeypatch.setattr(waits, "by_trainer", fails_once)
    assert "Trainer: not this time" in status(waits.main)
    assert sorted(row["contender"] for row in rows_of(out)) == ["train", "train, AdamW not fused"]
    assert status(waits.main) == 0  # what failed is tried again
    rows = rows_of(out)
    assert [row["lengths"] for row in rows] == ["mixed"] * 3
    losses = [float(row["mean_loss"]) for row in rows]
    assert max(losses) - min(losses) < 1e-3
    count = {row["contender"]: float(row["operators"]) for row in rows}
    assert count["train"] < count["train, AdamW not fused"]
    assert all(row["kernels"] == "" and float(row["host_backward"]) > 0 for row in rows)
    assert status(waits.main) == 0 and rows_of(out) == rows and len(tried) == 2
