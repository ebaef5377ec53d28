"""The scripts behind the long runs: they run on a tiny model, and their results hold together."""

import csv
import importlib
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import minipeft

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

FILES = {  # {file: (script, what makes a row unique)}
    "long-runs.csv": ("long_runs", ("method", "setting", "lr", "seed", "step")),
    "distil.csv": (
        "distil",
        ("route", "trained_blocks", "loss", "lr", "seed", "steps", "step", "layers"),
    ),
    "choosing.csv": ("choosing", ("part", "method", "lr", "seed", "examples")),
    "chinese.csv": ("chinese", ("method", "seed")),
    "lora-family.csv": ("lora_family", ("kind", "setting", "lr", "seed", "steps")),
}


@pytest.fixture
def tiny(monkeypatch):
    """A function: the script of that name, on a tiny model that is the same at every load."""

    def load(name):
        module = importlib.import_module(name)

        def load_base(*_, **__):
            torch.manual_seed(0)
            return minipeft.load_base("tiny-llama", device="cpu")

        for one in (
            module,
            importlib.import_module("long_runs"),
        ):  # choosing.py calls its `prepare`
            monkeypatch.setattr(one, "load_base", load_base)
        return module

    return load


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", FILES)
def test_each_result_is_whole(name):
    script, key = FILES[name]
    path = FOLDER / "results" / name
    rows = rows_of(path)
    columns = getattr(importlib.import_module(script), "COLUMNS", None)
    assert rows and (columns is None or list(rows[0]) == columns)
    seen = [tuple(row[k] for k in ("device", *key)) for row in rows]
    assert len(set(seen)) == len(seen)
    for row in rows:
        assert row["torch"] and row["transformers"] and row["device"] and row["threads"]
        for answers, right, total in (
            ("answers", "right", "total"),
            *((f"{kind}_answers", kind, f"{kind}_total") for kind in ("amazon", "tweets")),
        ):
            if row.get(answers):
                assert len(row[answers]) == int(row[total])
                assert row[answers].count("1") == int(row[right])


def test_what_another_device_did_is_not_done_here(monkeypatch):
    where = importlib.import_module("this_machine")
    for name in FILES:
        path = FOLDER / "results" / name
        monkeypatch.setattr(where, "pick_device", lambda: torch.device("cpu"))
        assert where.rows_so_far(path) == [r for r in rows_of(path) if r["device"] == "cpu"] != []
        monkeypatch.setattr(where, "pick_device", lambda: torch.device("mps"))
        assert where.rows_so_far(path) == []
    for script in FOLDER.glob("*.py"):  # there is no other way to what is done
        assert script.name == "this_machine.py" or "csv.DictReader" not in script.read_text(), (
            script
        )


def test_a_time_begins_and_ends_when_the_device_is_idle(monkeypatch):
    where, told = importlib.import_module("this_machine"), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("wait"))
    assert where.seconds(lambda: told.append("work"), torch.device("cuda")) > 0
    assert told == ["wait", "work", "wait"]
    assert where.seconds(lambda: told.append("work"), torch.device("cpu")) > 0
    assert told[3:] == ["work"]


def test_ratios_are_of_times_taken_so(tiny, monkeypatch):
    choosing, distil, times = tiny("choosing"), tiny("distil"), iter([9.0, 9.0] + [2.0, 6.0] * 50)

    def taken(work, device):
        work()
        return next(times)

    for module in (choosing, distil):
        monkeypatch.setattr(module, "seconds", taken)
    monkeypatch.setattr(choosing, "pick_device", lambda: torch.device("cpu"))
    done = []
    # Who begins changes: the first takes 2 and the second 6, then the other way round.
    assert choosing.medians((lambda: done.append("a"), lambda: done.append("b")), 1) == "0.333"
    assert done == ["b", "a", "a", "b"]
    teacher, tokenizer = distil.load_base()
    assert distil.ratios(teacher, teacher, tokenizer, ["Good?"], 1) == [1 / 3, 1 / 3]


def test_a_step_of_another_device_brings_its_batch_there(tiny):
    choosing = tiny("choosing")
    model, tokenizer = choosing.load_base()
    rows = minipeft.load_reviews()["train"].select(range(2))
    model, seen = minipeft.add_lora(model).to("meta"), set()

    def forward(use_cache, **batch):
        seen.update(tensor.device.type for tensor in batch.values())
        return SimpleNamespace(loss=sum(p.sum() for p in model.parameters() if p.requires_grad))

    model.forward = forward
    choosing.stepper(model, tokenizer, str, rows)()
    assert seen == {"meta"}


def test_the_losses_of_single_chinese_rows_make_up_the_mean():
    for row in rows_of(FOLDER / "results" / "chinese.csv"):
        for source in ("own", "dialogue"):
            losses = [float(loss) for loss in row[f"{source}_losses"].split()]
            assert len(losses) == int(row[f"{source}_rows"])
            mean = sum(losses) / int(row[f"{source}_chars"])
            assert mean == pytest.approx(float(row[f"{source}_loss_per_char"]), abs=2e-3)


def test_the_same_recipe_gave_the_same_answers_in_two_files():
    """choosing.py and long_runs.py train alike: on one kind of machine the answers agree."""
    names = {"LoRA": "r=8", "prefix-tuning": "n=10 text", "all blocks": "all 30 blocks"}
    old = {
        (row["setting"], row["seed"], row["lr"]): row
        for row in rows_of(FOLDER / "results" / "long-runs.csv")
        if row["answers"] and row["step"] == "60"
    }
    compared = 0
    for row in rows_of(FOLDER / "results" / "choosing.csv"):
        twin = old.get((names.get(row["method"]), row["seed"], row["lr"]))
        if row["part"] == "methods" and twin and row["answers"] and row["device"] == twin["device"]:
            same = sum(a == b for a, b in zip(row["answers"], twin["answers"], strict=True))
            assert same >= 0.97 * len(row["answers"])
            compared += 1
    assert compared


def test_choosing_measures_each_run_once(tiny, tmp_path, monkeypatch):
    choosing = tiny("choosing")
    monkeypatch.setattr(choosing, "STEPS", 2)
    monkeypatch.setattr(
        choosing, "METHODS", {k: choosing.METHODS[k] for k in ("zero-shot", "LoRA", "adapters")}
    )
    out = tmp_path / "choosing.csv"
    words = ["choosing.py", "--seeds", "0", "1", "--tests", "6", "--other-tests", "4"]
    monkeypatch.setattr(
        sys, "argv", [*words, "--examples", "10", "--rounds", "1", "--out", str(out)]
    )
    choosing.main()
    rows = rows_of(out)
    kinds = [(row["part"], row["method"], row["seed"]) for row in rows]
    assert kinds.count(("methods", "adapters", "0")) == 2  # two rates, and one of them is judged
    judged = [row for row in rows if row["part"] == "methods" and row["answers"]]
    assert [(row["method"], row["seed"]) for row in judged] == [
        ("zero-shot", "0"), ("LoRA", "0"), ("adapters", "0"), ("LoRA", "1"), ("adapters", "1"),
    ]  # fmt: skip
    tried = [row for row in rows if row["method"] == "adapters" and row["seed"] == "0"]
    best = min(tried[:2], key=lambda row: float(row["valid_loss"]))
    assert best["answers"] and judged[-1]["lr"] == best["lr"]
    assert all(len(row["tweets_answers"]) == 4 and float(row["chat_loss"]) > 0 for row in judged)
    costs = {row["method"]: row for row in rows if row["part"] == "cost"}
    trained = sum(
        p.numel()
        for p in minipeft.add_lora(choosing.load_base()[0]).parameters()
        if p.requires_grad
    )
    assert int(costs["LoRA"]["trainable"]) == trained
    assert 4 * trained < int(costs["LoRA"]["file_bytes"]) < 4 * trained + 20_000
    assert float(costs["LoRA"]["peak_gib"]) > 0 and float(costs["zero-shot"]["read_ratio"]) > 0
    few = [row for row in rows if row["part"] == "examples"]
    assert {(row["method"], row["examples"]) for row in few} == {("LoRA", "10")}
    choosing.main()  # nothing is left to do
    assert rows_of(out) == rows


def test_qlora_compares_both_bases_in_every_round(tiny, tmp_path, monkeypatch):
    qlora = tiny("qlora")
    monkeypatch.setattr(qlora, "RESULTS", tmp_path)
    monkeypatch.setattr(qlora, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(sys, "argv", ["qlora.py", "--rounds", "2", "--seq", "16", "32"])
    qlora.main()
    rows = rows_of(tmp_path / "qlora-cpu.csv")
    turns = sorted((row["seq"], row["round"], row["base"]) for row in rows)
    assert turns == sorted((s, r, b) for s in ("16", "32") for r in "01" for b in qlora.BASES)
    assert all(float(row["seconds"]) > 0 for row in rows)
    for row in rows + rows_of(FOLDER / "results" / "qlora-cpu.csv"):
        assert int(row["estimate"]) == pytest.approx(int(row["train_peak"]), rel=0.02), row


def test_the_readme_says_what_qlora_measured():
    rounds = {}
    for row in rows_of(FOLDER / "results" / "qlora-cpu.csv"):
        rounds.setdefault((row["seq"], row["round"]), {})[row["base"]] = float(row["seconds"])
    ratios = {
        seq: statistics.median(r["nf4"] / r["float32"] for (s, _), r in rounds.items() if s == seq)
        for seq in ("64", "256")
    }
    readme = " ".join((FOLDER.parent / "README.md").read_text(encoding="utf-8").split())
    wanted = (
        f"takes {ratios['64']:.2f} times as long as on float32 with 4 x 64 tokens, "
        f"and {ratios['256']:.2f} times with 4 x 256"
    )
    assert wanted in readme and len(rounds) == 2 * 12


def test_distil_trains_the_last_blocks_alone(tiny, tmp_path, monkeypatch):
    distil = tiny("distil")
    layers = distil.load_base()[0].config.num_hidden_layers
    monkeypatch.setattr(distil, "ROUTES", {"first 15": [range(layers), range(layers - 1)]})
    moved = []  # by each training: the names of what it changed

    def watched(model, *arguments, **options):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        history = minipeft.train(model, *arguments, **options)
        moved.append({n for n, p in model.named_parameters() if not torch.equal(p, before[n])})
        return history

    monkeypatch.setattr(distil, "train", watched)
    reviews, (teacher, tokenizer) = minipeft.load_reviews(), distil.load_base()
    texts = [
        minipeft.encode(tokenizer, r["prompt"], r["answer"])
        for r in reviews["train"].select(range(40))
    ]
    rows = distil.run(
        "first 15", 1, distil.ALL, 1e-3, 0, 2, teacher, tokenizer, texts,
        reviews["test"].select(range(8)), 1,
    )  # fmt: skip
    assert [row["step"] for row in rows] == [0, 1, 1, 2]
    assert [row["layers"] for row in rows] == [layers, layers, layers - 1, layers - 1]
    for names, last in zip(moved, (layers - 1, layers - 2), strict=True):
        assert names and all(n.startswith((f"model.layers.{last}.", "model.norm")) for n in names)
    assert all(row["bytes"] == 4 * row["parameters"] for row in rows)


def test_distil_has_a_loss_without_labels_and_a_student_without_a_tuned_teacher(tiny, monkeypatch):
    distil = tiny("distil")
    student, _ = distil.load_base()
    teacher, tokenizer = distil.load_base()
    with torch.no_grad():  # tuned: no longer what load_base gives
        teacher.model.norm.weight.mul_(2)
    batch = minipeft.Collator(0)([minipeft.encode(tokenizer, "Good?", " Yes")])
    other = batch | {"labels": torch.where(batch["labels"] == -100, -100, 7)}
    layers = student.config.num_hidden_layers
    for name, same in (("soft+hidden", True), (distil.ALL, False)):  # do the labels count?
        loss = distil.loss_of(name, teacher, layers)["loss_sum"]
        assert torch.equal(loss(student, batch), loss(student, other)) == same
    monkeypatch.setattr(distil, "ROUTES", {n: [range(layers)] for n in ("first 15", "untuned")})
    test = minipeft.load_reviews()["test"].select(range(6))
    texts = [minipeft.encode(tokenizer, r["prompt"], r["answer"]) for r in test] * 5
    cut = []
    monkeypatch.setattr(
        distil,
        "student_from_layers",
        lambda model, keep: cut.append(model) or minipeft.student_from_layers(model, keep),
    )
    for route in distil.ROUTES:
        distil.run(route, 1, "labels", 1e-3, 0, 1, teacher, tokenizer, texts, test, 1)
    assert cut[0] is teacher and cut[1] is not teacher
    assert torch.equal(cut[1].model.norm.weight, student.model.norm.weight)


def test_chinese_rows_and_samples(tiny, tmp_path, monkeypatch):
    chinese = tiny("chinese")
    monkeypatch.setattr(chinese, "STEPS", 1)
    monkeypatch.setattr(chinese, "SAMPLES", 1)
    row, samples = chinese.run("LoRA", 0)
    assert row["own_rows"] == 22 and row["dialogue_rows"] == 51 and len(samples) == 2
    assert row["own_chars"] == sum(
        len(one["answer"]) for one in minipeft.load_instructions("chinese")["test"]
    )


def test_a_subspace_moves_along_d_orthogonal_directions():
    family = importlib.import_module("lora_family")
    torch.manual_seed(0)
    d, shape = 5, (6, 7)
    index = torch.randint(2 * d, (42,), dtype=torch.int32)
    theta = torch.randn(d, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64)
    dense = torch.zeros(42, d, dtype=torch.float64)  # P, as the paper writes it
    for row, place in enumerate(index.tolist()):
        dense[row, place % d] = 1.0 if place < d else -1.0
    moved = family.Subspace(theta, index)(weight)
    torch.testing.assert_close(moved, weight + (dense @ theta).view(shape))
    gram = dense.T @ dense
    assert torch.equal(gram, torch.diag(gram.diagonal()))
    torch.autograd.gradcheck(lambda t: family.Subspace(t, index)(weight), theta)


def test_a_subspace_leaves_the_model_as_it_is_at_first():
    family = importlib.import_module("lora_family")
    model, _ = minipeft.load_base("tiny-llama", device="cpu")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = model(ids).logits
        family.add_subspace(model, 11, seed=0)
        assert torch.equal(model(ids).logits, before)
    assert minipeft.count_parameters(model)[0] == 11
    model(ids, labels=ids).loss.backward()
    thetas = [p for p in model.parameters() if p.requires_grad]
    assert len(thetas) == 1 and bool(thetas[0].grad.any())
