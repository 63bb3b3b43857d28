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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
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
CONDITIONAL = (ast.BoolOp, ast.IfExp)
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
    """Children called on one variable, within one list of statements, in the order of the calls.

    The first call may compute for the others; or, where there is a ``problem``, may not: then there
    is one name, of a call that shares its input with others and cannot be among them.
    """

    names: tuple[str, ...]
    problem: str


@dataclass(frozen=True)
class _Site:
    """``self.name(variable)``, in the statement of this index of its block."""

    name: str
    variable: str
    index: int


def call_runs(
    forward: Callable[..., Any],
    children: Collection[str],
    harmless: Collection[str],
    others: Iterable[FunctionType] = (),
) -> list[CallRun]:
    """The runs of ``forward`` over some of its ``children``.

    ``harmless`` are the names of those that write nothing, and whose results are new tensors;
    ``others`` are the other methods, which must not call what is in a run.

    Raises:
        OSError: its source cannot be read.
    """
    function = _parse(forward)
    if not function.args.args:
        return []
    reader = _Reader(function.args.args[0].arg, harmless)
    kept = set(_kept_names(function, reader))
    count = Counter(_calls(function))
    for other in others:
        try:
            count.update(_calls(_parse(other)))
        except OSError:  # a lambda, or made by a decorator; what it calls is among its names
            count.update(inspect.unwrap(other).__code__.co_names)
    runs: list[CallRun] = []
    for block in _blocks(function):
        sites: dict[tuple[str, int], list[_Site]] = {}
        assigned: Counter[str] = Counter()
        for index, statement in enumerate(block):
            for site in reader.sites(statement, index, children):
                sites.setdefault((site.variable, assigned[site.variable]), []).append(site)
            assigned.update(_targets(statement))  # from here on it is another input
        for found in sites.values():
            if len({site.name for site in found}) > 1:
                runs += _split(found, block, reader, count, kept)
    return list(dict.fromkeys(runs))


def _split(
    sites: list[_Site],
    block: Sequence[ast.stmt],
    reader: _Reader,
    count: Counter[str],
    kept: Collection[str],
) -> Iterator[CallRun]:
    """Runs that are as long as can be, from calls on one input."""
    for site in sites:
        if count[site.name] > 1:  # what one place leaves to be taken could be taken at another
            yield CallRun((site.name,), f"it is called in {count[site.name]} places of the source")
    run: list[_Site] = []
    cut = ""
    for site in (site for site in sites if count[site.name] == 1):
        statements = block[(run or [site])[0].index : site.index + 1]
        problem = _Statements(statements, site.variable, reader).problem()
        if run and site.variable in kept:  # of whose writers the source shows none
            problem = f"forward calls it on {site.variable}, which may be a tensor that self keeps"
        if problem:
            yield from _run_of(run, problem)
            run, cut = [], problem
        run.append(site)
    yield from _run_of(run, cut)


def _run_of(sites: list[_Site], problem: str) -> Iterator[CallRun]:
    """A run, or a call alone: ``problem`` is what is between it and its neighbour."""
    names = tuple(site.name for site in sites)
    if len(names) > 1 or (names and problem):
        yield CallRun(names, "" if len(names) > 1 else problem)


def _parse(forward: Callable[..., Any]) -> ast.FunctionDef:
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError) as error:
        raise OSError(f"the source of forward cannot be read ({error})") from error
    if not tree.body or not isinstance(tree.body[0], ast.FunctionDef):
        raise OSError("the source of forward is not a function definition")
    return tree.body[0]


def _calls(function: ast.FunctionDef) -> Iterator[str]:
    """The children that a method calls."""
    if function.args.args:
        reader = _Reader(function.args.args[0].arg, ())
        yield from filter(None, map(reader.child, ast.walk(function)))


def _blocks(function: ast.FunctionDef) -> Iterator[Sequence[ast.stmt]]:
    for node in ast.walk(function):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                yield block


def _kept_names(function: ast.FunctionDef, reader: _Reader) -> Iterator[str]:
    """Variables that may share memory with what the module keeps, as after ``h = self.state``."""
    names: set[str] = set()
    before = -1
    while len(names) > before:  # until an alias of an alias is found, too
        before = len(names)
        for node in ast.walk(function):
            match node:
                case ast.Assign(targets=targets, value=value):
                    pass
                case ast.AnnAssign(target=target, value=ast.expr() as value):
                    targets = [target]
                case ast.NamedExpr(target=target, value=value) | ast.For(target=target, iter=value):
                    targets = [target]
                case _:
                    continue
            if reader.shares(value, names):
                names |= {name for target in targets for name in _names(target)}
            if any(map(reader.is_state, targets)):
                names |= {name for name in _names(value) if reader.shares(value, {name})}
    yield from names - {reader.receiver}


def _names(node: ast.AST) -> set[str]:
    return {found.id for found in ast.walk(node) if isinstance(found, ast.Name)}


@dataclass(frozen=True)
class _Reader:
    """Knows ``self`` by its name, and which of its children are harmless."""

    receiver: str
    harmless: Collection[str]

    def child(self, node: ast.AST) -> str:
        """``"name"`` for a call ``self.name(...)``, else nothing."""
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name)):
                return name if owner == self.receiver else ""
        return ""

    def is_harmless(self, node: ast.AST) -> bool:
        return self.child(node) in self.harmless

    def is_state(self, node: ast.AST) -> bool:
        """Whether this is what the module keeps, or in it: ``self.state``, ``self.states[0]``."""
        match node:
            case ast.Attribute(value=ast.Name(id=owner), attr=attr):
                return owner == self.receiver and attr not in METADATA
            case ast.Attribute(value=value) | ast.Subscript(value=value) | ast.Starred(value=value):
                return self.is_state(value)
        return False

    def shares(self, node: ast.AST, names: Collection[str]) -> bool:
        """Whether a value may share memory with what the module keeps, or with these variables.

        Results of operators and calls are new, but those of methods that read, which may be views.
        """
        match node:
            case ast.Name(id=name):
                return name in names
            case ast.Call(func=ast.Attribute(value=owner, attr=attr)) if attr in READING_METHODS:
                return self.shares(owner, names)
            case ast.Attribute(attr=attr) if attr in METADATA:
                return False
            case ast.Attribute(value=value) | ast.Subscript(value=value) | ast.Starred(value=value):
                return self.is_state(node) or self.shares(value, names)
            case ast.IfExp(body=body, orelse=orelse):
                return self.shares(body, names) or self.shares(orelse, names)
            case ast.Tuple(elts=values) | ast.List(elts=values) | ast.BoolOp(values=values):
                return any(self.shares(value, names) for value in values)
        return False

    def sites(self, statement: ast.stmt, index: int, names: Collection[str]) -> Sequence[_Site]:
        """The calls of these children on a variable, in their order."""
        if not isinstance(statement, SIMPLE_STATEMENTS):  # its blocks are looked at themselves
            return ()
        found = []
        for node in ast.walk(statement):
            match node:
                case ast.Call(args=[ast.Name(id=variable)], keywords=[]):
                    if self.child(node) in names:
                        at = (node.lineno, node.col_offset)
                        found.append((at, _Site(self.child(node), variable, index)))
        return [site for _, site in sorted(found, key=lambda item: item[0])]


class _Statements:
    """The statements from one call to another, searched for whatever could write the input.

    The input may have aliases that the source does not show, so tensors from before are only given
    to what is known to write nothing. Results of the calls are new, and may go anywhere.
    """

    def __init__(self, statements: Sequence[ast.stmt], variable: str, reader: _Reader) -> None:
        self._statements = statements
        self._variable = variable
        self._reader = reader
        self._results: set[str] = set()

    def problem(self) -> str:
        """What could write the input before the last call, or nothing."""
        for statement in self._statements:
            problem = self._statement_problem(statement)
            if problem or not isinstance(statement, SIMPLE_STATEMENTS):
                return f"forward {problem} between the calls on {self._variable}"
            targets = _targets(statement)
            if statement.value is not None and not set(self._older_names(statement.value)):
                self._results |= targets
            else:
                self._results -= targets
        return ""

    def _statement_problem(self, statement: ast.stmt) -> str:
        if not isinstance(statement, SIMPLE_STATEMENTS):
            return f"has a statement of kind {type(statement).__name__}"
        looked_at: set[int] = set()
        for node in ast.walk(statement):  # comes to a node before what is in it
            match node:
                case ast.Attribute(value=ast.Name() as name, attr=attr) if attr in METADATA:
                    looked_at.add(id(name))
                case ast.Call(args=arguments) if self._reader.is_harmless(node):
                    looked_at |= {id(argument) for argument in arguments}
                case ast.Name(id=self._variable, ctx=ast.Load()) if id(node) not in looked_at:
                    return f"uses {self._variable}"
                case ast.Attribute(ctx=ast.Store()) | ast.Subscript(ctx=ast.Store()):
                    return f"assigns to {ast.unparse(node)}"
                case ast.Call() if problem := self._call_problem(node):
                    return problem
            if isinstance(node, CONDITIONAL) and any(map(self._reader.is_harmless, ast.walk(node))):
                return f"makes a call only if a condition holds ({ast.unparse(node)})"
            if isinstance(node, UNREADABLE):
                return f"has an expression of kind {type(node).__name__}"
        return ""

    def _call_problem(self, call: ast.Call) -> str:
        callee = ast.unparse(call.func)
        if callee.endswith("_") or any(k.arg in (None, "out", "inplace") for k in call.keywords):
            return f"calls {callee}, which may write a tensor"
        if isinstance(call.func, ast.Attribute) and call.func.attr in READING_METHODS | METADATA:
            return ""
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        older = [name for argument in given for name in self._older_names(argument)]
        return f"gives {older[0]} to {callee}, which may write it" if older else ""

    def _older_names(self, node: ast.AST) -> Iterator[str]:
        """Variables from before the run that a value may share memory with."""
        if self._reader.is_harmless(node):
            return
        match node:
            case ast.Attribute(attr=attr) if attr in METADATA:
                return
            case ast.Call(func=ast.Attribute(value=owner, attr=attr)) if attr in READING_METHODS:
                yield from self._older_names(owner)
            case ast.Name(id=name):
                if name not in (*self._results, *LIBRARIES, self._reader.receiver):
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
