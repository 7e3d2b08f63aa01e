"""Functions of installed packages, taken out of their source files.

Most peers cannot be imported beside this library: verl and OpenRLHF import ray, deepspeed and flash-attn and pin other
versions of transformers, and TRL's PPO steps stand in the middle of a method. What is timed is their own text all the
same: it is parsed where pip has put it, and only the definitions or statements asked for are compiled.
"""

from __future__ import annotations
import __future__

import ast
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

_count = itertools.count()
# Where `make test` installs the frameworks that fastrlhf.compat replaces functions of, apart from the environment.
PEERS = Path(sys.prefix) / "peers"


class NotThere(Exception):
    """A package, a file or a name in it is missing; the message says which."""


@contextmanager
def peers_on_path(first: bool = False) -> Iterator[None]:
    """What is in PEERS can be imported in here, `first` before the environment's; what has been imported stays."""
    sys.path.insert(0 if first else len(sys.path), str(PEERS))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(PEERS))


def folder(package: str) -> Path:
    """Where the package is, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise NotThere("not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def definitions(path: Path, names: dict[str, bool], context: dict[str, Any]) -> dict[str, Any]:
    """The functions, classes and constants of a file named by the keys, run in `context`.

    A name's value says whether its decorators are kept. Annotations are not evaluated.
    """
    found = [node for node in _tree(path).body if _name(node) in names]
    missing = set(names) - {_name(node) for node in found}
    if missing:
        raise NotThere(f"no {', '.join(sorted(missing))} in {path.name}")
    for node in found:
        if not names[_name(node)] and not isinstance(node, ast.Assign):
            node.decorator_list = []
    return _run(found, path, context)


def method(path: Path, owner: str, name: str) -> ast.FunctionDef:
    """The syntax tree of a method."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for child in node.body:
                if _name(child) == name:
                    return child
    raise NotThere(f"no {owner}.{name} in {path.name}")


def function(path: Path, source: ast.FunctionDef, context: dict[str, Any]) -> Any:
    """A method as a plain function."""
    source.decorator_list = []
    return _run([source], path, context)[source.name]


def steps(
    path: Path, source: ast.FunctionDef, first: str, last: str | None, parameters: list[str], context: dict[str, Any]
) -> Any:
    """A function of the statements from the one that assigns `first` to the last one beside it that assigns `last`.

    Without `last` they go on to the end of the block. The function takes `parameters` and returns its local variables.
    """
    for node in ast.walk(source):
        block = getattr(node, "body", None)
        names = [_name(statement) for statement in block] if isinstance(block, list) else []
        if first in names and (last is None or last in names):
            end = len(names) if last is None else len(names) - names[::-1].index(last)
            return _steps(path, block[names.index(first) : end], parameters, context)
    raise NotThere(f"no steps from {first} to {last or 'the end'} in {source.name} of {path.name}")


def _steps(path: Path, statements: list[ast.stmt], parameters: list[str], context: dict[str, Any]) -> Any:
    head = ast.parse(f"def steps({', '.join(parameters)}):\n    return locals()").body[0]
    head.body = [*statements, *head.body]
    return _run([ast.fix_missing_locations(head)], path, context)["steps"]


def _tree(path: Path) -> ast.Module:
    if not path.is_file():
        raise NotThere(f"no file {path.name} in it")
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _run(nodes: list[ast.stmt], path: Path, context: dict[str, Any]) -> dict[str, Any]:
    # In a module of its own, because torch.compile looks the globals of a function up by the name of its module.
    module = ModuleType(f"{__name__}.{path.parent.name}_{path.stem}_{next(_count)}")
    sys.modules[module.__name__] = module
    module.__dict__.update(context)
    flags = __future__.annotations.compiler_flag
    exec(compile(ast.Module(nodes, []), str(path), "exec", flags=flags, dont_inherit=True), module.__dict__)
    return module.__dict__


def _name(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return getattr(node, "name", None)
