"""Which child modules a ``forward`` calls on one and the same input, read from its source.

Names such as ``q_proj`` and ``k_proj`` do not say it: cross attention calls them on different
tensors. And only the source says that nothing writes the tensor between two calls:
``Tensor._version`` does not exist in inference mode, and ``torch.compile`` cannot compare it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# Tensor methods that write nothing, whatever they are given: mostly sizes and dtypes.
READING_METHODS = {
    *("bfloat16", "chunk", "contiguous", "flatten", "float", "half", "movedim", "permute"),
    *("reshape", "split", "squeeze", "to", "transpose", "type_as", "unbind", "unflatten"),
    *("unsqueeze", "view"),
}
METADATA = {"device", "dim", "dtype", "ndim", "numel", "shape", "size", "stride"}
LIBRARIES = ("torch", "F", "nn")  # names that are no tensors
SIMPLE_STATEMENTS = (ast.Assign, ast.AnnAssign, ast.Expr, ast.Return)
UNREADABLE = (
    ast.Await,
    ast.DictComp,
    ast.GeneratorExp,
    ast.Lambda,
    ast.ListComp,
    ast.NamedExpr,
    ast.SetComp,
    ast.Yield,
    ast.YieldFrom,
)


@dataclass(frozen=True)
class CallRun:
    """Children called on one variable, within one list of statements.

    ``names`` are in the order of the calls; ``problem`` says why the first call may not compute
    for the others, and is empty if it may.
    """

    names: tuple[str, ...]
    problem: str


@dataclass(frozen=True)
class _Site:
    """``self.name(variable)``, in the statement of this index of its block."""

    name: str
    variable: str
    index: int
    call: ast.Call


def call_runs(forward: Callable[..., Any], children: Collection[str]) -> list[CallRun]:
    """The runs of ``forward`` that call two or more of ``children``.

    Raises:
        OSError: its source cannot be read.
    """
    function = _parse(forward)
    if not function.args.args:
        return []
    receiver = function.args.args[0].arg
    count = Counter(_callees(function, receiver, children))
    runs = []
    for block in _blocks(function):
        sites: dict[tuple[str, int], list[_Site]] = {}
        assigned: Counter[str] = Counter()
        for index, statement in enumerate(block):
            for site in _sites(statement, index, receiver, children):
                sites.setdefault((site.variable, assigned[site.variable]), []).append(site)
            assigned.update(_targets(statement))  # from here on it is another input
        for found in sites.values():
            names = tuple(dict.fromkeys(site.name for site in found))
            if len(names) > 1:
                often = next((name for name in names if count[name] > 1), None)
                problem = _Run(block, found, receiver).problem()
                if often:
                    problem = f"forward calls {often} in {count[often]} places"
                runs.append(CallRun(names, problem))
    return runs


def _parse(forward: Callable[..., Any]) -> ast.FunctionDef:
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError) as error:
        raise OSError(f"the source of forward cannot be read ({error})") from error
    if not tree.body or not isinstance(tree.body[0], ast.FunctionDef):
        raise OSError("the source of forward is not a function definition")
    return tree.body[0]


def _blocks(function: ast.FunctionDef) -> Iterator[Sequence[ast.stmt]]:
    for node in ast.walk(function):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                yield block


def _callees(tree: ast.AST, receiver: str, children: Collection[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        name = _child_called(node, receiver)
        if name in children:
            yield name


def _sites(
    statement: ast.stmt, index: int, receiver: str, children: Collection[str]
) -> Iterator[_Site]:
    if not isinstance(statement, SIMPLE_STATEMENTS):  # the blocks within are looked at themselves
        return
    found = []
    for node in ast.walk(statement):
        name = _child_called(node, receiver)
        if name in children and isinstance(node, ast.Call) and not node.keywords:
            match node.args:
                case [ast.Name(id=variable)]:
                    found.append(_Site(name, variable, index, node))
    yield from sorted(found, key=lambda site: (site.call.lineno, site.call.col_offset))


def _child_called(node: ast.AST, receiver: str) -> str:
    """``"name"`` for a call ``self.name(...)``, else nothing."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name)):
            return name if owner == receiver else ""
    return ""


class _Run:
    """The statements from the first call to the last, searched for whatever could write the input.

    The input may have aliases that the source does not show, so tensors from before the run are
    only given to what is known to write nothing. Results of the run are new, and may go anywhere.
    """

    def __init__(self, block: Sequence[ast.stmt], sites: list[_Site], receiver: str) -> None:
        indices = [site.index for site in sites]
        self._statements = block[min(indices) : max(indices) + 1]
        self._variable = sites[0].variable
        self._calls = [site.call for site in sites]
        self._receiver = receiver
        self._results: set[str] = set()

    def problem(self) -> str:
        """What could write the input before the last call, or nothing."""
        for statement in self._statements:
            if not isinstance(statement, SIMPLE_STATEMENTS):
                kind = type(statement).__name__
                return f"forward has a statement of kind {kind} between the calls"
            problem = self._expression_problem(statement)
            if problem:
                return f"forward {problem} between the calls"
            targets = _targets(statement)
            if statement.value is not None and not set(self._older_names(statement.value)):
                self._results |= targets
            else:
                self._results -= targets
        return ""

    def _expression_problem(self, statement: ast.stmt) -> str:
        harmless = {id(call.args[0]) for call in self._calls}
        for node in ast.walk(statement):
            match node:
                case ast.Attribute(value=ast.Name() as name, attr=attr) if attr in METADATA:
                    harmless.add(id(name))  # the walk comes to a node before what is in it
                case ast.Name(id=self._variable, ctx=ast.Load()) if id(node) not in harmless:
                    return f"uses {self._variable}"
                case ast.Attribute(ctx=ast.Store()) | ast.Subscript(ctx=ast.Store()):
                    return f"assigns to {ast.unparse(node)}"
                case ast.Call() if problem := self._call_problem(node):
                    return problem
            if isinstance(node, UNREADABLE):
                return f"has an expression of kind {type(node).__name__}"
        return ""

    def _call_problem(self, call: ast.Call) -> str:
        if any(call is own for own in self._calls):
            return ""
        callee = ast.unparse(call.func)
        if callee.endswith("_") or any(k.arg in (None, "out", "inplace") for k in call.keywords):
            return f"calls {callee}, which may write a tensor,"
        if isinstance(call.func, ast.Attribute) and call.func.attr in READING_METHODS | METADATA:
            return ""
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        older = [name for argument in given for name in self._older_names(argument)]
        return f"gives {older[0]} to {callee}, which may write it," if older else ""

    def _older_names(self, node: ast.AST) -> Iterator[str]:
        """Variables from before the run that a value may share memory with."""
        if any(node is call for call in self._calls):
            return
        match node:
            case ast.Attribute(attr=attr) if attr in METADATA:
                return
            case ast.Call(func=ast.Attribute(value=owner, attr=attr)) if attr in READING_METHODS:
                yield from self._older_names(owner)
            case ast.Name(id=name):
                if name not in (*self._results, *LIBRARIES, self._receiver):
                    yield name
            case _:
                for child in ast.iter_child_nodes(node):
                    yield from self._older_names(child)


def _targets(statement: ast.stmt) -> set[str]:
    return {
        node.id
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
