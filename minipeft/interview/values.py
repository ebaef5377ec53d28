"""The numbers in the answers: computed, or read from where they were measured."""

import ast
import csv
import functools
import json
import math
import operator
import re
from pathlib import Path

from minipeft.refusals import require, shown

REPOSITORY = Path(__file__).resolve().parents[2]
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.USub: operator.neg,
}  # fmt: skip
FUNCTIONS = {"exp": math.exp, "log": math.log, "log2": math.log2, "sqrt": math.sqrt,
             "ceil": math.ceil, "floor": math.floor, "min": min, "max": max,
             "abs": abs, "round": round}  # fmt: skip


def values_of(sources: dict) -> dict[str, float]:
    """{name: number} for {name: source}, where a source is one of

    {"formula": "14 * billion / 2**30"}       arithmetic; earlier names of the same dict may appear
    {"cell": "04_memory_math.ipynb", "find": r"full +([0-9.]+)"}
                                              the saved output of a notebook, matched exactly once
    {"file": "benchmarks/results/memory.csv", "where": {"case": "full"}, "column": "gib"}
                                              one row of a table of results
    {"estimate": {"model": "Llama 2 7B", "method": "lora", "seq": 2048}}
                                              the peak of a training step in GiB, by shapes.py

    Raises ValueError if a source is none of these, or does not lead to exactly one number.
    """
    found: dict[str, float] = {}
    for name, source in sources.items():
        if "formula" in source:
            found[name] = arithmetic(source["formula"], found)
        elif "cell" in source:
            found[name] = _from_cell(source["cell"], source["find"])
        elif "file" in source:
            found[name] = _from_file(source["file"], source["where"], source["column"])
        elif "estimate" in source:
            found[name] = _estimated(json.dumps(source["estimate"]))
        else:
            raise ValueError(f"{name} has no source: {shown(source)}.")
    return found


def arithmetic(formula: str, names: dict[str, float]) -> float:
    """The value of an arithmetic expression: numbers, + - * / // % **, names, and log, sqrt, ...

    Raises ValueError if the expression holds anything else.
    """

    def value(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return node.value
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.operand))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in FUNCTIONS:
            return FUNCTIONS[node.func.id](*map(value, node.args))
        raise ValueError(f"{formula!r} is not arithmetic with the names {sorted(names)}.")

    return value(ast.parse(formula, mode="eval").body)


@functools.lru_cache
def _estimated(arguments):
    from minipeft.interview.estimates import estimate_gib  # torch only where it is needed

    return estimate_gib(**json.loads(arguments))


@functools.lru_cache
def _outputs(notebook):
    path = REPOSITORY / "notebooks" / notebook
    require(path.is_file(), f"There is no notebook {notebook} in {path.parents[0]}.")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(output["text"]) for cell in cells for output in cell.get("outputs", [])
             if output["output_type"] == "stream"]  # fmt: skip
    return "\n".join(texts)


def _from_cell(notebook, pattern):
    found = re.findall(pattern, _outputs(notebook))
    require(len(found) == 1, f"{pattern!r} is in the outputs of {notebook} {len(found)} times.")
    return float(found[0].replace(",", ""))


@functools.lru_cache
def _table(file):
    with open(REPOSITORY / file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _from_file(file, where, column):
    rows = [row for row in _table(file) if all(row[key] == value for key, value in where.items())]
    require(len(rows) == 1, f"{len(rows)} rows of {file} have {shown(where)}.")
    return float(rows[0][column])
