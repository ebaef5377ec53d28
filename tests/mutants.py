"""Small changes to an answer, one at a time, as slips of the pen would make them."""

import ast
import copy

_COMPARE = {
    ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt], ast.Gt: [ast.GtE, ast.Lt], ast.GtE: [ast.Gt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn], ast.NotIn: [ast.In],
}  # fmt: skip
_ARITHMETIC = {
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult, ast.FloorDiv],
    ast.FloorDiv: [ast.Div], ast.Pow: [ast.Mult], ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd],
    ast.MatMult: [ast.Mult],
}  # fmt: skip
# Calls that change nothing but where, how or whether a tensor is stored or tracked.
_QUIET = {"detach", "clone", "contiguous", "float", "bool", "long", "int", "to", "item", "copy"}


def _replacements(node):
    """What could stand in the place of one expression: (what changes, the new expression)."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for other in _COMPARE.get(type(node.ops[0]), []):
            yield "comparison", ast.Compare(node.left, [other()], node.comparators)
    elif isinstance(node, ast.BinOp):
        for other in _ARITHMETIC.get(type(node.op), []):
            yield "operator", ast.BinOp(node.left, other(), node.right)
        yield "left operand alone", node.left
        yield "right operand alone", node.right
    elif isinstance(node, ast.UnaryOp):
        yield "without its sign", node.operand
    elif isinstance(node, ast.BoolOp):
        for i in range(len(node.values)):
            rest = node.values[:i] + node.values[i + 1 :]
            yield "one condition less", rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
    elif isinstance(node, ast.IfExp):
        yield "always the first", node.body
        yield "always the second", node.orelse
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "the other truth", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield "one more", ast.Constant(node.value + 1)
        yield "one less", ast.Constant(node.value - 1)
    elif isinstance(node, ast.Slice):
        if node.lower:
            yield "no lower bound", ast.Slice(None, node.upper, node.step)
        if node.upper:
            yield "no upper bound", ast.Slice(node.lower, None, node.step)
    elif isinstance(node, ast.Call):
        for i in range(len(node.keywords)):
            rest = node.keywords[:i] + node.keywords[i + 1 :]
            yield f"without {node.keywords[i].arg}", ast.Call(node.func, node.args, rest)
        if isinstance(node.func, ast.Attribute) and (node.func.attr in _QUIET or not node.args):
            yield f"without .{node.func.attr}()", node.func.value
        if len(node.args) > 1:
            swapped = [node.args[1], node.args[0], *node.args[2:]]
            yield "arguments swapped", ast.Call(node.func, swapped, node.keywords)
    elif isinstance(node, ast.Attribute) and node.attr in ("T", "mT"):
        yield "not transposed", node.value


def _statements(body):
    """What could stand in the place of a block: (what changes, the new block)."""
    for i, line in enumerate(body):
        rest = body[:i] + body[i + 1 :]
        if isinstance(line, (ast.Assign, ast.AugAssign, ast.Expr, ast.Raise, ast.Assert)):
            if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)):
                yield "a statement missing", rest or [ast.Pass()]
        elif isinstance(line, ast.With):
            yield "without `with`", [*body[:i], *line.body, *body[i + 1 :]]
        elif isinstance(line, ast.If):
            yield "condition always true", [*body[:i], *line.body, *body[i + 1 :]]
            yield "condition never true", [*body[:i], *line.orelse, *body[i + 1 :]] or [ast.Pass()]
        elif isinstance(line, ast.Return) and line.value is not None:
            if i == len(body) - 1 and isinstance(line.value, ast.Tuple):
                turned = ast.Tuple(line.value.elts[::-1], ast.Load())
                yield "results in another order", [*body[:i], ast.Return(turned)]


def mutants(source):
    """[(what was changed and where, the source with this one change), ...]"""
    tree = ast.parse(source)
    made, seen = [], {ast.unparse(tree)}
    for number, node in enumerate(ast.walk(tree)):
        changes = [(None, None, told, new) for told, new in _replacements(node)]
        for field in ("body", "orelse"):
            block = getattr(node, field, None)
            if isinstance(block, list) and not isinstance(node, ast.Module):
                changes += [(number, field, told, new) for told, new in _statements(block)]
        for where, field, told, new in changes:
            spoilt = copy.deepcopy(tree)
            target = next(x for i, x in enumerate(ast.walk(spoilt)) if i == number)
            if where is None:
                _put(spoilt, target, copy.deepcopy(new))
            else:
                setattr(target, field, copy.deepcopy(new))
            try:
                text = ast.unparse(ast.fix_missing_locations(spoilt))
                compile(text, "<mutant>", "exec")
            except (SyntaxError, ValueError):
                continue
            if text not in seen:
                seen.add(text)
                line = getattr(node, "lineno", 0)
                made.append((f"line {line}, {told}", text))
    return made


def _put(tree, old, new):
    """Put one node of a tree in the place of another."""
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, field, new)
                return
            if isinstance(value, list) and any(each is old for each in value):
                setattr(parent, field, [new if each is old else each for each in value])
                return
