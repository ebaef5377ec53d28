"""P-tuning's encoders against the plain tables they start as, and in front against in a template.

Five ways to train 10 virtual tokens on the same batches: 32 steps of 8 out of 1,000 reviews, judged
by the loss on 64 validation reviews before, half-way and at the end (`valid_curve`).

  lstm, mlp   the encoder, in front of the text
  lstm_table, mlp_table
              the vectors that this encoder gives before any step, as a plain table: it begins as
              the same function, and only the parametrization differs
  template    the MLP encoder at the same start, with the tokens spread over a template
"""

from minipeft import evaluate, load_reviews
from minipeft.p_tuning import add_p_tuning, fold_p_tuning
from tasks.reviews import HOLE, HOLE_ID, in_template
from tasks.training import Setting, batches_of, fit, fresh

STEPS, TOKENS, EXAMPLES = 32, 10, 1000
RATES = {
    "lstm": (0.0003, 0.001, 0.003, 0.01, 0.03),
    "lstm_table": (0.01, 0.03, 0.1, 0.3, 1.0),
    "mlp": (0.0003, 0.001, 0.003),
    "mlp_table": (0.01, 0.03, 0.1),
    "template": (0.0003, 0.001, 0.003),
}
SETTINGS = [Setting(form, rates, STEPS, EXAMPLES) for form, rates in RATES.items()]


def run(form, lr, seed, steps, examples):
    """Train and judge once. Returns {column: value}."""
    template = form == "template"

    def ready(model):
        kind = "lstm" if form.startswith("lstm") else "mlp"
        add_p_tuning(model, TOKENS, kind, placeholder_id=HOLE_ID if template else None)
        if form.endswith("table"):
            fold_p_tuning(model)

    model, tokenizer = fresh(ready, seed)
    fill = str
    if template:
        tokenizer.add_tokens([HOLE], special_tokens=True)
        fill = in_template
    rows = load_reviews()
    splits = [rows["train"].select(range(examples)), rows["validation"].select(range(64))]
    training, judged = (r.map(lambda row: {"prompt": fill(row["prompt"])}) for r in splits)
    judged = batches_of(tokenizer, judged, 16)
    losses, halves = {0: evaluate(model, judged)}, max(1, steps // 2)
    row = fit(model, tokenizer, training, lr=lr, seed=seed, steps=steps, warmup=min(4, steps - 1),
              every=1, eval_batches=judged, eval_every=halves, evaluations=losses)  # fmt: skip
    row["valid_loss"] = f"{losses[steps]:.4f}"
    row["details"] = {"valid_curve": {str(step): round(loss, 4) for step, loss in losses.items()}}
    return row
