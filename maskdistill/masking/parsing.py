"""Maskers from text: reads what a masker's repr writes, and runs nothing."""

from __future__ import annotations

import ast
import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

from maskdistill.masking import geometry, guided, ratios, rectangles, uniform
from maskdistill.masking.base import Masker, Mixture

# Every masker, ratio and schedule that these files define; a network cannot be written as text.
_NAMES: dict[str, Callable[..., Any]] = {"Mixture": Mixture} | {
    kind.__name__: kind
    for module in (uniform, rectangles, guided, geometry, ratios)
    for kind in vars(module).values()
    if isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == module.__name__
    if not inspect.isabstract(kind) and kind is not guided.LearnedMasker
}
_METHODS = (
    "exactly", "sometimes", "rolled", "in_units", "shared", "same_in_views", "complementary_views",
    "total",
)  # fmt: skip
_LONGEST = 4096
"""Characters; deeper nesting than fits in this would exhaust the parser's stack."""


def parse_masker(text: str) -> Masker:
    """Build a masker from its repr.

    >>> parse_masker("BlockMasker(0.4).sometimes(0.5) | RandomMasker(ratio=0.1)")
    BlockMasker(0.4).sometimes(0.5) | RandomMasker(0.1)

    Only the library's maskers, ratios and schedules, the operators ``| & - ~``, the methods that
    make maskers, and literals are read; nothing is evaluated.

    Args:
        text: an expression of at most 4096 characters.

    Raises:
        ValueError: the text is no such expression, or a masker refuses its arguments.
    """
    if not isinstance(text, str):
        raise ValueError(f"a masker's text must be a string; got {text!r}.")
    if len(text) > _LONGEST:
        raise ValueError(f"a masker's text may have {_LONGEST} characters; got {len(text)}.")
    try:
        masker = _read(ast.parse(text.strip(), mode="eval").body, text)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"cannot read the masker {text!r}: {error}. Write it as in Python, for example "
            "RandomMasker(0.3)."
        ) from None
    if not isinstance(masker, Masker):
        raise ValueError(
            f"{text!r} is not a masker but {masker!r}. Write for example RandomMasker(0.3)."
        )
    return masker


def parse_cell(text: str) -> Masker | tuple[Masker | None, ...]:
    """Build what a cell of a policy takes from its text: a masker's repr, or a list of them.

    >>> parse_cell("RandomMasker(0.3)")
    RandomMasker(0.3)
    >>> parse_cell("[RandomMasker(0.3), None]")
    (RandomMasker(0.3), None)

    Raises:
        ValueError: text that is neither; says what could not be read.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return parse_masker(text)  # which says what is wrong
    if not isinstance(tree, (ast.List, ast.Tuple)):
        return parse_masker(text)
    entries = [ast.unparse(entry) for entry in tree.elts]
    return tuple(None if entry == "None" else parse_masker(entry) for entry in entries)


def _read(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.Name(id=name) if name in _NAMES:
            raise ValueError(f"{name} wants its arguments: write for example {name}(0.3).")
        case ast.Name(id="inf"):
            return math.inf
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return tuple(_read(item, text) for item in items)
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {
                _masker(key, text): _read(value, text)
                for key, value in zip(keys, values, strict=True)
                if key is not None
            }
        case ast.UnaryOp(op=ast.USub(), operand=operand) if isinstance(operand, ast.Constant):
            value = _read(operand, text)
            if isinstance(value, (int, float)):
                return -value
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return ~_masker(operand, text)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _masker(left, text) | _masker(right, text)
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            return _masker(left, text) & _masker(right, text)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _masker(left, text) - _masker(right, text)
        case ast.Call(func=function, args=args, keywords=keywords):
            positional = [_read(arg, text) for arg in args]
            named = {k.arg: _read(k.value, text) for k in keywords if k.arg is not None}
            if len(named) == len(keywords):
                return _call(_function(function, text), positional, named)
    raise ValueError(
        f"cannot read {ast.unparse(node)!r} in the masker {text!r}: only maskers "
        f"({', '.join(_NAMES)}), | & - ~, the methods {', '.join(_METHODS)}, and literals are "
        "allowed."
    )


def _masker(node: ast.expr, text: str) -> Masker:
    value = _read(node, text)
    if not isinstance(value, Masker):
        raise ValueError(f"in {text!r}, {ast.unparse(node)!r} is not a masker.")
    return value


def _function(node: ast.expr, text: str) -> Callable[..., Any]:
    match node:
        case (
            ast.Name(id=name)
            | ast.Attribute(value=ast.Name(id="md" | "maskdistill" | "masking"), attr=name)
            | ast.Attribute(
                value=ast.Attribute(value=ast.Name(id="md" | "maskdistill"), attr="masking"),
                attr=name,
            )
        ) if name in _NAMES:
            return _NAMES[name]
        case ast.Name(id=name):
            close = difflib.get_close_matches(name, _NAMES, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"unknown masker {name!r}.{hint} Known: {', '.join(_NAMES)}.")
        case ast.Attribute(value=owner, attr=name) if name in _METHODS:
            method: Callable[..., Any] = getattr(_masker(owner, text), name)
            return method
    raise ValueError(
        f"cannot call {ast.unparse(node)!r} in the masker {text!r}: only maskers and their "
        f"methods {', '.join(_METHODS)} can be called."
    )


def _call(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    try:
        return function(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"{function.__name__}: {error}.") from None
