"""What an install without extras can do: run by `nox -s core`, in an environment of its own."""

import importlib.util
import tempfile

import torch

import minipeft
from minipeft import (
    Batches,
    Collator,
    add_lora,
    complete,
    disabled,
    encode,
    load_adapter,
    load_base,
    load_instructions,
    remove,
    save_adapter,
    train,
)
from minipeft.memory import estimate

for name in ("datasets", "peft", "matplotlib", "jupyterlab", "nbgrader", "pytest", "gguf"):
    assert importlib.util.find_spec(name) is None, f"{name} should not be installed here"

rows = load_instructions("english")["train"] + load_instructions("chinese")["train"]
model, tokenizer = load_base("tiny", device="cpu")
before = complete(model, tokenizer, [rows[0]["prompt"]], max_new_tokens=4)
encoded = [encode(tokenizer, row["prompt"], row["answer"]) for row in rows[:32]]
batches = Batches(encoded, Collator(tokenizer.pad_token_id), 4)
history = train(add_lora(model), batches, max_steps=20, lr=1e-2, progress=False)
assert history.train_loss[-1] < history.train_loss[0]
with tempfile.TemporaryDirectory() as folder:
    save_adapter(model, folder)
    again = load_adapter(load_base("tiny", device="cpu")[0], folder)
ids = torch.tensor([encoded[0]["input_ids"]])
assert torch.equal(model.eval()(ids).logits, again.eval()(ids).logits)
with disabled(model):
    assert complete(model, tokenizer, [rows[0]["prompt"]], max_new_tokens=4) == before
assert estimate(model.config, add_lora, batch=2, seq=32).total > 0
remove(model)
try:
    load_base()
except minipeft.AssetError as error:
    assert ".[course]" in str(error), error
print(f"{minipeft.__file__}: trained, saved, loaded; {len(rows)} instructions read")
