"""The files of a run: what is saved comes back, what is foreign is refused."""

import random

import numpy
import pytest
import torch

from minipeft import Collator, History, encode, load_base, train
from minipeft.resume import (
    discard_all_but,
    fingerprint,
    newest,
    random_states,
    read_state,
    set_random_states,
)


def draw(generator=None):
    return (random.random(), numpy.random.rand(), torch.rand(1).item()) + (
        (torch.rand(1, generator=generator).item(),) if generator else ()
    )


def test_random_states_come_back_through_json():
    import json

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


def test_left_over_scratch_and_older_checkpoints_go(tmp_path):
    for name in ("step-000002", "step-000004", ".step-000006-abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text('{"place": 1}')
    kept = newest(tmp_path)
    assert kept.name == "step-000004" and read_state(kept) == {"place": 1}
    discard_all_but(kept, tmp_path)
    assert list(tmp_path.iterdir()) == [kept]
    assert newest(tmp_path / "nowhere") is None


def test_history_comes_back_from_json():
    history = History([1.5, 1.25], [0.0, 1e-3], [2.0, float("inf")], [2], [1.125])
    assert History.from_json(history.to_json()) == history and history.best_step == 2
