"""The package stays a table of contents: short files, and imports that run one way."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "minipeft"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name not in ("__init__.py", "__main__.py")
}
EACH = pytest.mark.parametrize("name", MODULES)
TECHNIQUES = {
    "prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2", "adapters", "lora",
    "lora_variants", "distillation",
}  # fmt: skip
SHARED = {"freezing", "virtual_tokens", "batching", "targets", "refusals"}  # and technique/
# These know techniques.
HIGHER = {"adapter_files", "assets", "evaluation", "interview", "memory", "training"}
LINES = dict.fromkeys(TECHNIQUES - {"distillation"}, 159) | {"virtual_tokens": 229}


def imports(name):
    """The modules of minipeft that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        assert not getattr(node, "level", 0), "imports are absolute"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minipeft"):
            path = node.module.removeprefix("minipeft").strip(".")
            whole = [".".join(filter(None, (path, alias.name))) for alias in node.names]
            found |= {one if one in MODULES else path for one in whole}
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names if alias.name.startswith("minipeft")]
            found |= {one.removeprefix("minipeft.") for one in named}
    return found


@EACH
def test_no_file_is_long(name):
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= LINES.get(name, 260)


def test_the_training_loop_can_be_read_at_one_sitting():
    tree = ast.parse(MODULES["training.loop"].read_text(encoding="utf-8"))
    (train,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train")
    docstring = train.body[0]
    lines = train.end_lineno - train.lineno + 1
    assert lines - (docstring.end_lineno - docstring.lineno + 1) < 80


@EACH
def test_imports_run_down(name):
    """A technique knows what all share, and no other technique; what all share knows none."""
    folder, found = name.split(".")[0], {module.split(".")[0] for module in imports(name)}
    if name in TECHNIQUES:
        allowed = SHARED | {"technique"} | ({"lora_variants"} if name == "lora" else set())
        assert found <= allowed
    elif folder not in HIGHER:
        assert not found & (TECHNIQUES | HIGHER)


def test_no_import_goes_round_in_a_circle():
    graph = {name: imports(name) & MODULES.keys() for name in MODULES}
    assert list(TopologicalSorter(graph).static_order())


@EACH
def test_tests_lie_as_the_package_does(name):
    *folder, stem = name.split(".")
    tests = PACKAGE.parent / "tests"
    assert (tests / folder[0]).is_dir() if folder else (tests / f"test_{stem}.py").is_file()


def public_functions(body):
    """Functions without an underscore, and constructors, of a module and its public classes."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body)
        if isinstance(node, ast.FunctionDef):
            if not node.name.startswith("_") or node.name == "__init__":
                yield node


@EACH
def test_what_is_public_has_type_hints(name):
    """mypy, in `make check`, says whether they are right."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for function in public_functions(tree.body):
        own = function.args
        named = [*own.posonlyargs, *own.args, *own.kwonlyargs, own.vararg, own.kwarg]
        bare = [a.arg for a in named if a and not a.annotation and a.arg not in ("self", "cls")]
        hinted = function.returns is not None or function.name == "__init__"
        assert not bare and hinted, (function.name, bare)
