"""Bad input to the techniques: one sentence, and the model and the folder as they were."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from soft import METHODS as SOFT
from soft import batch_of, traces, trainables, tuned

from minipeft import (
    add_adapters,
    add_lora,
    add_p_tuning,
    add_p_tuning_v2,
    add_prefix_tuning,
    add_prompt_tuning,
    disabled,
    fold_p_tuning,
    fold_p_tuning_v2,
    fold_prefix_tuning,
    load_adapter,
    load_base,
    lora_plus_groups,
    merge_lora,
    nearest_words,
    remove,
    save_adapter,
    unload_lora,
    unmerge_lora,
)

METHODS = SOFT | {"lora": add_lora, "adapters": lambda model, n=2: add_adapters(model, n)}
SOME = ["prompt", "lstm", "template", "prefix", "key_value", "hidden", "lora", "adapters"]
FEW = settings(max_examples=12, deadline=None, derandomize=True,
               suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip

SIZES = st.sampled_from([0, -1, 2.0, 1.5, True, "3", None, float("nan"), [2], (), b"1"])
WORDS = st.sampled_from(["", "LSTM", "nothing", None, 3, True, [], ["lstm"], b"lstm"])
NUMBERS = st.sampled_from([0, -1, -0.1, float("nan"), "1", None, [1], True, float("-inf")])
TARGETS = st.sampled_from(
    [(), "", "nothing", ["q_proj", "nothing"], None, 3, [3], "q_proj.", "lm_head", [None], {"a": 1}]
)
BAD = {  # every argument, and what it is not
    add_prompt_tuning: {"num_virtual_tokens": SIZES, "init": WORDS},
    add_p_tuning: {
        "num_virtual_tokens": SIZES,
        "encoder": WORDS.filter(lambda word: word != "lstm"),
        "encoder_hidden_size": SIZES.filter(lambda size: size is not None),
        "placeholder_id": st.sampled_from([-1.5, "7", [7], True, float("nan")]),
    },
    add_prefix_tuning: {
        "num_virtual_tokens": SIZES,
        "encoder_hidden_size": SIZES.filter(lambda size: size is not None),
    },
    add_p_tuning_v2: {"num_virtual_tokens": SIZES, "form": WORDS},
    add_adapters: {"bottleneck": SIZES, "placement": WORDS, "activation": WORDS},
    add_lora: {
        "r": SIZES,
        "alpha": NUMBERS,
        "dropout": NUMBERS.filter(lambda p: p != 0 or p is True) | st.sampled_from([1, 1.5]),
        "targets": TARGETS,
        "scaling": WORDS,
        "dora": st.sampled_from([None, 1, "yes", []]),
    },
}
ARGUMENTS = [(add, name) for add, arguments in BAD.items() for name in arguments]


@pytest.fixture(scope="module")
def plain():
    return load_base("tiny", device="cpu")[0]


def refused(call):
    """The one sentence (or two) with which a call is refused."""
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and len(text) > 20 and text[-1] in ".!?)", text
    return text


@pytest.mark.parametrize("add, argument", ARGUMENTS)
@given(data=st.data())
@FEW
def test_an_argument_that_is_none(plain, add, argument, data):
    before = traces(plain)
    value = data.draw(BAD[add][argument])
    options = {"projection": True} if argument == "encoder_hidden_size" else {}
    options = options if add is add_prefix_tuning else {}
    refused(lambda: add(plain, **{argument: value}, **options))
    assert traces(plain) == before


@pytest.mark.parametrize("first", SOME)
@pytest.mark.parametrize("second", SOME)
def test_two_methods_on_one_model(first, second):
    model = METHODS[first](load_base("tiny", device="cpu")[0])
    if first == second == "adapters":  # those may stand on each other
        return
    before = traces(model)
    text = refused(lambda: METHODS[second](model))
    assert "already" in text and traces(model) == before


@pytest.mark.parametrize("method", SOME)
def test_what_a_model_lacks_cannot_be_taken_off_folded_or_read(method):
    model = METHODS[method](load_base("tiny", device="cpu")[0])
    calls = [unmerge_lora]
    if method != "lora":
        calls += [merge_lora, unload_lora, lambda m: lora_plus_groups(m, 1e-3)]
    if method not in ("lstm", "template"):
        calls += [fold_p_tuning]
    calls += [fold_prefix_tuning] + ([] if method == "hidden" else [fold_p_tuning_v2])
    if method not in ("prompt", "lstm"):
        calls += [nearest_words]
    before = traces(model)
    for call in calls:
        refused(lambda call=call: call(model))
    assert traces(model) == before


TAKE_A_MODEL = [
    *BAD, merge_lora, unmerge_lora, unload_lora, fold_p_tuning, fold_prefix_tuning,
    fold_p_tuning_v2, nearest_words, remove,
    lambda model: disabled(model).__enter__(),
    lambda model: lora_plus_groups(model, 1e-3),
    lambda model: save_adapter(model, "nowhere"),
    lambda model: load_adapter(model, "nowhere"),
]  # fmt: skip


@pytest.mark.parametrize("call", TAKE_A_MODEL)
def test_what_is_no_model_is_said_to_be_none(call):
    """For example both that load_base returns, not only the first."""
    for value in (load_base("tiny", device="cpu"), "smollm2", None):
        assert "is not a model; give an nn.Module" in refused(lambda value=value: call(value))


@pytest.mark.parametrize("folder", [5, None, ["adapter"]])
def test_what_is_no_folder(plain, folder):
    tuned_one = add_lora(load_base("tiny", device="cpu")[0])
    for call in (lambda: save_adapter(tuned_one, folder), lambda: load_adapter(plain, folder)):
        assert refused(call) == f"folder={folder!r} is not a path; give a string or a Path."


@pytest.mark.parametrize("method", [m for m in SOFT if m != "template"])
@given(data=st.data())
@FEW
def test_inputs_that_do_not_go_together(method, data):
    model = tuned("tiny-llama", method, torch.float32)
    batch = batch_of(3, 3, 6, method=method)
    expected = model(**batch).logits
    ids, mask = batch["input_ids"], batch["attention_mask"]
    bad = data.draw(
        st.sampled_from(
            [
                {"input_ids": ids[:, :0], "attention_mask": mask[:, :0]},
                {"input_ids": ids[:0], "attention_mask": mask[:0]},
                {"input_ids": ids, "attention_mask": mask[:, :-1]},
                {"input_ids": ids, "attention_mask": mask[:, None, None]},
                {"input_ids": ids, "attention_mask": mask[:2]},
                {"input_ids": ids[0]},
                {"input_ids": ids, "labels": ids[:, :-1]},
                {"input_ids": ids, "labels": ids[:2]},
                {"input_ids": ids, "position_ids": torch.zeros_like(ids)},
                {"input_ids": ids, "position_ids": torch.arange(99)[None]},
                {"input_ids": ids, "inputs_embeds": torch.zeros(*ids.shape, 32)},
                {},
            ]
        )
    )
    refused(lambda: model(**bad))
    assert torch.equal(model(**batch).logits, expected)


# ---- folders -----------------------------------------------------------------------------------


def changed(value, data):
    """A JSON value of another kind or size."""
    kinds = [None, True, -1, 0, 3, 1.5, "x", "", [], [1], ["q_proj", 1], {}, {"a": 1}, float("nan")]
    return data.draw(st.sampled_from([kind for kind in kinds if repr(kind) != repr(value)]))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module", params=SOME)
def saved(request, tmp_path_factory):
    """(folder, logits): a good adapter of each kind, and what it makes a model say."""
    model = METHODS[request.param](load_base("tiny", device="cpu")[0])
    with torch.no_grad():
        for p in trainables(model).values():
            p.add_(torch.randn_like(p), alpha=0.3)
    folder = save_adapter(model, tmp_path_factory.mktemp("saved") / "adapter")
    ids = batch_of(4, 1, 7, method=request.param)["input_ids"]
    return folder, ids, model(ids).logits


def loads_right_or_is_refused(folder, ids, expected, plain):
    """Whatever is in the folder: the right logits, or one sentence and a model left alone."""
    files, before = contents(folder), traces(plain)
    try:
        model = load_adapter(load_base("tiny", device="cpu")[0], folder)
    except ValueError:
        refused(lambda: load_adapter(plain, folder))
        assert traces(plain) == before
        return None
    finally:
        assert contents(folder) == files, "reading writes nothing"
    return torch.allclose(model(ids).logits, expected, atol=1e-5)


@given(data=st.data())
@settings(FEW, max_examples=25)
def test_a_setting_of_another_kind(saved, plain, tmp_path, data):
    """A size, a list or a switch that is none is refused, or it concerns no number."""
    folder, ids, expected = saved
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    key = data.draw(st.sampled_from(sorted(config)))
    config[key] = changed(config[key], data)
    (copy / "adapter_config.json").write_text(json.dumps(config))
    same = loads_right_or_is_refused(copy, ids, expected, plain)
    if key not in ("lora_alpha", "use_rslora", "activation", "alpha_pattern"):  # valid, and other
        assert same is not False, (key, config[key])


@given(data=st.data())
@settings(FEW, max_examples=25)
def test_tensors_that_are_not_those_that_were_saved(saved, plain, tmp_path, data):
    folder, ids, expected = saved
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "adapter_model.safetensors"
    state = load_file(path)
    key = data.draw(st.sampled_from(sorted(state)))
    tensor = state[key]
    kind = data.draw(st.sampled_from(
        ["missing", "extra", "longer", "transposed", "scalar", "empty", "int", "nan", "inf", "half"]
    ))  # fmt: skip
    if kind == "missing":
        del state[key]
    elif kind == "extra":
        state[f"{key}.more"] = tensor.clone()
    else:
        state[key] = {
            "longer": lambda: torch.cat([tensor, tensor]),
            "transposed": lambda: tensor[None],
            "scalar": lambda: tensor.flatten()[0],
            "empty": lambda: tensor[:0],
            "int": lambda: tensor.long(),
            "nan": lambda: tensor * float("nan"),
            "inf": lambda: tensor + float("inf"),
            "half": lambda: tensor.double(),
        }[kind]().contiguous()
    save_file(state, path, metadata=metadata(folder))
    same = loads_right_or_is_refused(copy, ids, expected, plain)
    assert same if kind == "half" else same is None


def metadata(folder):
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return file.metadata()


@given(data=st.data())
@settings(FEW, max_examples=25)
def test_files_that_were_cut_or_written_over(saved, plain, tmp_path, data):
    folder, ids, expected = saved
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    copy = shutil.copytree(folder, tmp_path / "copy")
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    raw = bytearray((copy / name).read_bytes())
    kind = data.draw(st.sampled_from(["cut", "empty", "gone", "list", "noise", "folder"]))
    if kind == "cut":
        raw = raw[: data.draw(st.integers(0, len(raw) - 2))]
    elif kind == "noise":
        at = data.draw(st.integers(0, 60))
        raw[at : at + 8] = bytes(data.draw(st.lists(st.integers(128, 255), min_size=8, max_size=8)))
    elif kind in ("empty", "list"):
        raw = b"" if kind == "empty" else b"[1, 2]"
    (copy / name).unlink()
    if kind == "folder":
        (copy / name).mkdir()
        refused(lambda: load_adapter(plain, copy))
        return
    if kind != "gone":
        (copy / name).write_bytes(bytes(raw))
    assert loads_right_or_is_refused(copy, ids, expected, plain) is None


def test_names_in_a_folder_do_not_lead_out_of_it(saved, tmp_path):
    """A tensor or module named like a path is a name that the model does not have."""
    folder, _, _ = saved
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    state = load_file(copy / "adapter_model.safetensors")
    state["../../outside"] = torch.ones(2)
    save_file(state, copy / "adapter_model.safetensors", metadata=metadata(folder))
    refused(lambda: load_adapter(load_base("tiny", device="cpu")[0], copy))
    config["modules_to_save"] = ["../../outside"]
    (copy / "adapter_config.json").write_text(json.dumps(config))
    refused(lambda: load_adapter(load_base("tiny", device="cpu")[0], copy))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_a_link_stays_a_link_and_its_folder_is_written(saved, tmp_path):
    folder, ids, expected = saved
    real = shutil.copytree(folder, tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    again = load_adapter(load_base("tiny", device="cpu")[0], tmp_path / "link")
    assert torch.allclose(again(ids).logits, expected, atol=1e-5)
    with torch.no_grad():
        for p in trainables(again).values():
            p.mul_(2)
    save_adapter(again, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    third = load_adapter(load_base("tiny", device="cpu")[0], real)
    assert torch.allclose(third(ids).logits, again(ids).logits, atol=1e-5)
