"""The faults that a module can be given: one operator, number, condition or statement changed."""

import ast
import copy
import re
from collections.abc import Iterator
from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault: what stands in a module's text from `start` to `end` becomes `new`."""

    line: int
    start: int
    end: int
    old: str
    new: str


COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NAMES = {"any": "all", "max": "min", "amax": "amin", "zeros": "ones", "floor": "ceil"}
NAMES |= {f"{name}_like": f"{other}_like" for name, other in [("zeros", "ones")]}
NAMES |= {other: name for name, other in NAMES.items()}


def changes(node: ast.AST) -> Iterator[ast.AST | None]:
    """Yield what a node is changed to; None stands for a statement or a test that is taken away."""
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare) and len(new.ops) == 1:
        new.ops = [COMPARISONS[type(new.ops[0])]()]
        yield new
    elif isinstance(new, ast.BinOp) and type(new.op) in ARITHMETIC:
        new.op = ARITHMETIC[type(new.op)]()
        yield new
    elif isinstance(new, ast.BoolOp):
        new.op = ast.Or() if isinstance(new.op, ast.And) else ast.And()
        yield new
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, ast.Not | ast.USub):
        yield new.operand
    elif isinstance(new, ast.IfExp):
        new.body, new.orelse = new.orelse, new.body
        yield new
    elif isinstance(new, ast.Constant) and isinstance(new.value, bool):
        yield ast.Constant(not new.value)
    elif isinstance(new, ast.Constant) and isinstance(new.value, int | float):
        yield ast.Constant(new.value + 1)
    elif isinstance(new, ast.Call) and isinstance(new.func, ast.Attribute):
        if new.func.attr in NAMES:
            new.func.attr = NAMES[new.func.attr]
            yield new
        elif new.func.attr in ("detach", "clone", "clamp", "masked_fill", "where"):
            yield new.func.value if new.func.attr != "where" else new.args[1]
    elif (isinstance(new, ast.Expr) and isinstance(new.value, ast.Call)) or isinstance(
        new, ast.AugAssign
    ):
        yield ast.Pass()


def parts(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below that do work: no type, no message, no declaration."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "format_spec"):
            continue
        for child in value if isinstance(value, list) else [value]:
            is_left = isinstance(child, ast.JoinedStr | ast.Raise | ast.Import | ast.ImportFrom)
            is_alias = isinstance(node, ast.Module) and isinstance(child, ast.Assign)
            if isinstance(child, ast.AST) and not is_left and not is_alias:
                yield child
                yield from parts(child)


def python_mutants(text: str) -> list[Mutant]:
    """Return every fault that a module of Python can be given."""
    lines = [0]
    for line in text.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    content, found = text.encode(), []
    for node in parts(ast.parse(text)):
        tests = []
        # A comparison and a negation are turned round by themselves.
        if isinstance(node, ast.If | ast.While) and not isinstance(
            node.test, ast.Compare | ast.UnaryOp
        ):
            tests = [(node.test, ast.UnaryOp(ast.Not(), node.test))]
        for old, new in [*((node, new) for new in changes(node)), *tests]:
            start = lines[old.lineno - 1] + old.col_offset
            end = lines[old.end_lineno - 1] + old.end_col_offset
            written = ast.unparse(new) if isinstance(new, ast.Pass) else f"({ast.unparse(new)})"
            found.append(Mutant(old.lineno, start, end, content[start:end].decode(), written))
    return sorted(set(found))


# Between spaces, as the formatter writes operators: those of pointers and templates have none.
_CPP_OPERATORS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
_CPP_OPERATORS |= {"&&": "||", "||": "&&", "+": "-", "-": "+", "*": "/", "/": "*"}
_CPP_OPERATORS |= {"+=": "-=", "-=": "+=", "/=": "*=", "*=": "/=", "&": "|"}
_CPP_WORDS = {"true": "false", "false": "true", "max": "min", "min": "max"}
_CPP_WORDS |= {"maximum": "minimum", "clamp_min": "clamp_max", "isnan": "isinf"}
_CPP_CHANGES = re.compile(
    r"(?<= )(?P<operator>[<>=!]=|[-+*/]=|&&|\|\||[-+*/&<>])(?= )"
    r"|\b(?P<word>" + "|".join(_CPP_WORDS) + r")(?=[,;)<(])"
    r"|(?<![\w.])(?P<number>\d+(\.\d+)?f?)(?![\w.])"
    r"|^ +(?P<statement>[\w.\[\]>-]+(\([^()]*\))?( [-+*/]?= .*)?;)$",
    re.MULTILINE,
)
_CPP_LEFT_OUT = re.compile(
    r"//.*|^ *(#|static_assert|TORCH_CHECK|template|case).*|\"[^\"]*\"", re.M
)


def cpp_mutants(text: str) -> list[Mutant]:
    """Return faults that a module of C++ can be given; some of them do not compile."""
    skipped = [match.span() for match in _CPP_LEFT_OUT.finditer(text)]
    body, found = text.index("namespace {"), []
    for match in _CPP_CHANGES.finditer(text):
        kind = match.lastgroup or ""
        old, (start, end) = match[kind], match.span(kind)
        if start < body or any(first <= start < last for first, last in skipped):
            continue
        if kind == "number":
            new = f"({old} + 1)"
        else:
            new = {"operator": _CPP_OPERATORS, "word": _CPP_WORDS}.get(kind, {}).get(old, ";")
        place = [len(text[:at].encode()) for at in (start, end)]
        found.append(Mutant(text.count("\n", 0, start) + 1, *place, old, new))
    return found
