"""The files of a run: what is saved comes back, what is foreign is refused."""

import json
import random
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from minipeft import Collator, History, add_lora, encode, load_base, train
from minipeft.freezing import trainable_parameters
from minipeft.quantization import quantize_base
from minipeft.training.checkpoint import discard_all_but, newest, read_state
from minipeft.training.random_states import random_states, set_random_states
from minipeft.training.resume import fingerprint


def draw(generator=None):
    return (random.random(), numpy.random.rand(), torch.rand(1).item()) + (
        (torch.rand(1, generator=generator).item(),) if generator else ()
    )


def test_random_states_come_back_through_json():
    class Loader:
        generator = torch.Generator().manual_seed(3)

    states = json.loads(json.dumps(random_states(Loader)))
    first = draw(Loader.generator)
    assert draw(Loader.generator) != first
    set_random_states(states, Loader)
    assert draw(Loader.generator) == first


def test_the_fingerprint_tells_bases_and_roles_apart():
    model, _ = load_base("tiny", device="cpu", seed=0)
    same, _ = load_base("tiny", device="cpu", seed=0)
    assert fingerprint(model) == fingerprint(same)
    same.model.norm.requires_grad_(False)
    assert fingerprint(model) != fingerprint(same)
    model.requires_grad_(False)
    other, _ = load_base("tiny", device="cpu", seed=1)
    assert fingerprint(model) != fingerprint(other.requires_grad_(False))


@pytest.fixture
def run(tmp_path):
    def start(seed=0, **changed):
        model, tokenizer = load_base("tiny", device="cpu", seed=seed)
        rows = [encode(tokenizer, "Is it?", answer) for answer in (" Yes", " No", " Perhaps so")]
        batches = [Collator(tokenizer.pad_token_id)([row]) for row in rows]
        settings = {"max_steps": 6, "lr": 1e-3, "save_every": 2, "progress": False} | changed
        return train(model, batches, checkpoint_dir=tmp_path / "run", **settings), model

    return start


def test_a_finished_run_returns_at_once_with_its_curve_and_weights(run, tmp_path):
    history, model = run()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-000006"]
    again, model_again = run()
    assert again.train_loss == history.train_loss and len(again.train_loss) == 6
    for a, b in zip(model.parameters(), model_again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_call_is_refused_and_told_what_differs(run):
    run()
    with pytest.raises(ValueError, match=r"had lr=0.001, this call has lr=0.002"):
        run(lr=2e-3)
    with pytest.raises(ValueError, match="resume=False, which deletes the old checkpoints"):
        run(max_steps=8)
    history, _ = run(lr=2e-3, resume=False)
    assert len(history.train_loss) == 6


def test_older_checkpoints_and_scratch_of_killed_runs_go(run, tmp_path):
    run()
    root = tmp_path / "run"
    for name in ("step-000002", "step-999999", "step-1000000", ".step-000008-minipeft-abc"):
        shutil.copytree(root / "step-000006", root / name)
    kept = newest(root)
    assert kept.name == "step-1000000"  # as a number it is the highest, as a text it is not
    assert read_state(kept)["history"]["train_loss"]
    discard_all_but(kept, root)
    assert list(root.iterdir()) == [kept]
    assert newest(tmp_path / "nowhere") is None


def not_ours(root):
    """Puts what only looks like a checkpoint or scratch into the folder; {path: its text}."""
    root.mkdir(exist_ok=True)
    elsewhere = root.parent / "elsewhere"
    texts = {
        "step-notes/mine.txt": "notes",
        "step-2": "a file",
        "step-000123": "a file of that name",
        "step-000124/mine.txt": "a folder without a state",
        "step-000125/state.json": '{"epoch": 3}',
        "step-000125/model.safetensors": "theirs",
        "step-000125/optimizer.safetensors": "theirs",
        ".step-000004-abc/mine.txt": "hidden, but not scratch of ours",
        ".step-mine/mine.txt": "hidden",
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    if not elsewhere.exists():
        elsewhere.mkdir()
        for name in ("state.json", "model.safetensors", "optimizer.safetensors"):
            (elsewhere / name).write_text("{}")
    for name in ("step-000126", ".step-000005-minipeft-abc"):
        (root / name).symlink_to(elsewhere)
    paths = [root / name for name in texts]
    return {path: path.read_bytes() for path in [*paths, *elsewhere.iterdir()]}


@pytest.mark.parametrize("resume", [True, False])
def test_what_is_not_ours_is_left_alone(run, tmp_path, resume):
    root = tmp_path / "run"
    texts = not_ours(root)
    history, _ = run(resume=resume)
    again, _ = run(resume=resume)
    assert again == history and newest(root).name == "step-000006"
    assert {path: path.read_bytes() for path in texts} == texts
    assert all((root / n).is_symlink() for n in ("step-000126", ".step-000005-minipeft-abc"))


def test_a_name_in_the_way_is_said_before_the_training(run, tmp_path):
    root = tmp_path / "run"
    for make in (Path.mkdir, Path.touch, lambda path: path.symlink_to(tmp_path)):
        root.mkdir()
        make(root / "step-000004")
        for resume in (True, False):
            with pytest.raises(ValueError, match="step-000004 is not a checkpoint of this run and"):
                run(resume=resume)
        assert [path.name for path in root.iterdir()] == ["step-000004"]
        run(save_every=3)  # it is in nobody's way now
        shutil.rmtree(root)
    root.touch()
    with pytest.raises(ValueError, match="checkpoint_dir=.*run is a file"):
        run()


def test_what_was_put_into_a_checkpoint_is_not_removed_with_it(run, tmp_path):
    run()
    folder = tmp_path / "run" / "step-000006"
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="step-000006 is damaged or holds more than a checkpoint"):
        run(resume=False)
    assert len(run()[0].train_loss) == 6  # it can still be gone on from
    shutil.copytree(folder, folder.with_name("step-000004"))
    discard_all_but(folder, folder.parent)
    assert (folder.parent / "step-000004" / "notes.txt").exists()


def rewrite(name, change):
    """Change the tensors of a file of the checkpoint."""

    def damage(folder):
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return damage


def restate(change):
    """Change state.json; `change` returns what is to stand there."""

    def damage(folder):
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(change(state) or state))

    return damage


def cut(name):
    def damage(folder):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])

    return damage


def without(state, *keys):
    for key in keys[:-1]:
        state = state[key]
    state.pop(keys[-1])


NORM, MOMENT = "model.norm.weight", "exp_avg.model.norm.weight"
WIDER = torch.zeros(5)
DAMAGE = {
    "truncated weights": (cut("model.safetensors"), "model.safetensors cannot be read"),
    "truncated moments": (cut("optimizer.safetensors"), "optimizer.safetensors cannot be read"),
    "truncated best": (cut("best.safetensors"), "best.safetensors cannot be read"),
    "truncated state": (cut("state.json"), "state.json cannot be read"),
    "empty state": (lambda f: (f / "state.json").write_text(""), "state.json cannot be read"),
    "bytes": (lambda f: (f / "state.json").write_bytes(b"\xff\xfe"), "state.json cannot be read"),
    "a list": (lambda f: (f / "state.json").write_text("[1]"), "state.json is not an object with"),
    "no place": (
        restate(lambda s: without(s, "place")),
        "state.json is not an object with history",
    ),
    "a place of text": (restate(lambda s: s.update(place="x")), "state.json is not an object with"),
    "no index": (restate(lambda s: without(s, "place", "index")), "does not hold what it should"),
    "below 0": (restate(lambda s: s["place"].update(index=-1)), "does not hold what it should"),
    "no states": (restate(lambda s: without(s, "random", "python")), "does not hold what it"),
    "odd states": (restate(lambda s: s["random"]["tensors"].update(torch="zz")), "does not hold"),
    "short states": (restate(lambda s: s["random"]["tensors"].update(torch="00")), "does not hold"),
    "a lost loss": (restate(lambda s: without(s, "history", "lr")), "does not hold what it should"),
    "a short list": (restate(lambda s: s["history"].update(lr=[1.0])), "have .6, 1, 6, 3, 3. ent"),
    "a foreign list": (restate(lambda s: s["history"].update(x=[])), "does not hold what it sho"),
    "no weight": (rewrite("model.safetensors", lambda t: t.pop(NORM)), "norm.weight is missing fr"),
    "one more": (rewrite("model.safetensors", lambda t: t.update(x=WIDER)), "x is not expected in"),
    "shape": (rewrite("model.safetensors", lambda t: t.update({NORM: WIDER})), r"but the model"),
    "type": (rewrite("model.safetensors", lambda t: t.update({NORM: t[NORM].half()})), "float16"),
    "nan": (rewrite("model.safetensors", lambda t: t[NORM].fill_(torch.nan)), "holds NaN"),
    "no moment": (rewrite("optimizer.safetensors", lambda t: t.pop(MOMENT)), "exp_avg.model.norm"),
    "moment": (rewrite("optimizer.safetensors", lambda t: t.update({MOMENT: WIDER})), "exp_avg"),
    "nan moment": (rewrite("optimizer.safetensors", lambda t: t[MOMENT].fill_(torch.nan)), "NaN"),
    "best": (rewrite("best.safetensors", lambda t: t.pop(NORM)), "missing from best.safetensors"),
    "no best": (lambda f: (f / "best.safetensors").unlink(), "best.safetensors cannot be read"),
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint whose best weights are not its last ones."""
    root = tmp_path_factory.mktemp("written") / "run"
    history = overfit(small(), root)
    assert history.best_step == 2 and newest(root).name == "step-000006"
    return root


def small():
    return load_base("tiny", device="cpu", seed=0)[0]


def overfit(model, root):
    batches = [
        {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, -100, last]])}
        for last in (8, 9)
    ]
    return train(
        model, batches[:1], max_steps=6, lr=3e-2, eval_batches=batches[1:], eval_every=2,
        checkpoint_dir=root, save_every=2, progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_gets_one_sentence(written, tmp_path, name):
    damage, words = DAMAGE[name]
    root = tmp_path / "run"
    shutil.copytree(written, root)
    damage(root / "step-000006")
    files = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    model = small()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=words) as caught:
        overfit(model, root)
    assert "The checkpoint" in str(caught.value) and "Move it away to begin" in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == files


def test_a_checkpoint_of_a_machine_with_more_gpus_is_resumed(written, tmp_path, monkeypatch):
    root, told = tmp_path / "run", []
    shutil.copytree(written, root)
    state = random_states()["tensors"]["torch"]
    more = {"cuda:0": state, "cuda:3": state, "mps": state}
    restate(lambda s: s["random"]["tensors"].update(more))(root / "step-000006")
    # On a machine with one GPU; torch itself would raise at the fourth.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, name: told.append(name))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert len(overfit(small(), root).train_loss) == 6
    assert told == ["cuda:0"]


def test_a_cpu_run_wakes_no_gpu(monkeypatch):
    def wake():
        raise AssertionError("CUDA was set up for nothing")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", wake)
    set_random_states(random_states())


def in_4_bits(seed, directory):
    model = quantize_base(load_base("tiny", device="cpu", seed=seed)[0])
    torch.manual_seed(0)
    add_lora(model)
    batches = [{"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 8]])}]
    options = {"max_steps": 2, "lr": 1e-2, "progress": False, "checkpoint_dir": directory}
    return train(model, batches, **options), model


def test_a_4_bit_base_is_not_written_but_told_apart(tmp_path):
    history, model = in_4_bits(0, tmp_path)
    kept = load_file(tmp_path / "step-000002" / "model.safetensors")
    assert kept.keys() == dict(trainable_parameters(model)).keys()
    again, same = in_4_bits(0, tmp_path)
    assert again == history
    assert all(torch.equal(t, same.state_dict()[n]) for n, t in model.state_dict().items())
    codes = next(b for n, b in model.named_buffers() if n.endswith(".codes"))
    before = fingerprint(model)
    codes[3] ^= 255  # all else is equal
    assert fingerprint(model) != before
    with pytest.raises(ValueError, match="model fingerprint"):
        in_4_bits(1, tmp_path)


class Normed(torch.nn.Module):
    """What batch norm counts changes in training, though nothing of it is trained."""

    def __init__(self):
        super().__init__()
        self.inner = load_base("tiny", device="cpu")[0]
        self.norm = torch.nn.BatchNorm1d(32, affine=False)

    def forward(self, input_ids, labels=None, **options):
        x = self.inner.get_input_embeddings()(input_ids)
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        options.pop("logits_to_keep")
        return self.inner(inputs_embeds=x, **options)


def test_buffers_that_training_changes_come_back(tmp_path):
    batches = [{"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 8]])}]
    options = {"max_steps": 3, "lr": 1e-2, "progress": False, "checkpoint_dir": tmp_path}
    model, again = Normed(), Normed()
    train(model, batches, **options)
    train(again, batches, **options)
    assert again.norm.running_mean.abs().sum() > 0 and again.norm.num_batches_tracked == 3
    assert torch.equal(again.norm.running_mean, model.norm.running_mean)


def test_history_comes_back_from_json():
    history = History([1.5, 1.25], [0.0, 1e-3], [2.0, float("inf")], [2], [1.125])
    assert History.from_json(history.to_json()) == history and history.best_step == 2
