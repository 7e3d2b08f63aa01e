"""Puts our functions in the place of a framework's, wherever they are bound, and takes them away again.

A module `fastrlhf.compat.<framework>` says what there is to do:

PACKAGE, DISTRIBUTION: its import name, and the distribution's name where that is another.
VERSIONS: the versions that it knows, as a specifier.
REPLACEMENTS: {place of definition: ours}, such as "trl.trainer.utils.selective_log_softmax"; methods as
    "package.module.Class.method". One of ours has one place: by itself it tells what to restore.
    A function whose results have another dtype than the framework's has a keyword argument exact_dtype, a class an
    attribute of that name: True gives them in the framework's dtype.
OPTIONAL: {place: the versions that have it}, for those that not all of them have.
MORE_ACCURATE: {place: in what}.
register(), unregister(): what else is to be done after binding and after unbinding, for registries.

Nothing but the standard library is imported before it is needed: FASTRLHF_PATCH brings this file into every process.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from inspect import signature
from types import ModuleType
from typing import Any

# {framework: what one imports}
FRAMEWORKS = {
    "trl": "trl",
    "verl": "verl",
    "openrlhf": "openrlhf",
    "nemo_rl": "nemo_rl",
    "torchrl": "torchrl",
    "torchtune": "torchtune",
    "liger": "liger_kernel",
}
_active: dict[str, Patch] = {}
_lock = threading.RLock()


class PatchError(RuntimeError):
    """A framework is not as expected; nothing of it was changed."""


class Patch:
    """What `patch` has bound. A context manager: at its end the framework is as it was.

    framework, version: whose functions are replaced.
    exact_dtype: whether results have the framework's dtype.
    bound: {place of definition: every place where it was bound}, a place being "module.name", "module.Class.name" or
        "module.name[key]" for a dictionary.
    """

    def __init__(self, framework: str, version: str, exact_dtype: bool, more_accurate: dict[str, str]):
        self.framework, self.version, self.exact_dtype = framework, version, exact_dtype
        self.bound: dict[str, list[str]] = {}
        self.more_accurate = more_accurate
        self._originals: dict[str, Any] = {}  # by place
        self._ours: dict[str, Any] = {}
        self._were_ours: set[str] = set()  # places where somebody had ours before
        self._users = 0
        self._unregister: Callable[[], None] = lambda: None

    def restore(self) -> None:
        """Binds the framework's own functions again, in modules imported since as well."""
        with _lock:
            if _active.get(self.framework) is not self:
                return
            swaps = {id(ours): (place, ours, self._originals[place]) for place, ours in self._ours.items()}
            for where, _, bind in list(_slots(FRAMEWORKS[self.framework], swaps)):
                if where not in self._were_ours:
                    bind()
            del _active[self.framework]
            self._unregister()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_) -> None:
        """Of several uses of one patch, the last one to end restores."""
        self._users -= 1
        if self._users <= 0:
            self.restore()

    def __repr__(self) -> str:
        places = sum(map(len, self.bound.values()))
        return f"<Patch of {self.framework} {self.version}: {len(self.bound)} names in {places} places>"


def patch(framework: str, *, exact_dtype: bool = False) -> Patch:
    """Has a framework compute with our ops: binds our functions wherever it has its own.

    framework: one of FRAMEWORKS; it must be installed, in a version that its module here knows.
    exact_dtype: results in the framework's dtype where ours would be in fp32 (`patch_report` says where).
    Returns what was bound where; `restore` undoes it, and so does the end of a `with` block. Called again, it returns
    the same Patch. Raises ValueError for an unknown framework or another exact_dtype than before, PatchError where
    version or names are not as expected, and then nothing is changed.

    Bound are the names in the modules that define them (hence in all that are imported later), in every loaded module
    that has imported them by value, in the framework's classes, and in its dictionaries. Out of reach are objects that
    keep a function of their own accord: a closure, functools.partial, a subclass of a replaced class.
    """
    if framework not in FRAMEWORKS:
        raise ValueError(f"framework: got {framework!r}, wanted one of {', '.join(map(repr, FRAMEWORKS))}")
    with _lock:
        if framework not in _active:
            _bind(framework, bool(exact_dtype))
        found = _active[framework]
        if found.exact_dtype != bool(exact_dtype):
            raise ValueError(
                f"exact_dtype: got {exact_dtype}, wanted {found.exact_dtype}, with which {framework} is patched "
                "already; restore() that first"
            )
        found._users += 1
        return found


def original(place: str) -> Any:
    """The framework's own object at a place of definition, patched or not."""
    for found in _active.values():
        if place in found._originals:
            return found._originals[place]
    owner, name = _owner(place)
    return getattr(owner, name)


def patch_report() -> None:
    """Prints what is patched, where, and in what ours is more accurate than the framework."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    for found in _active.values():
        dtypes = ", results in its dtypes (exact_dtype)" if found.exact_dtype else ""
        prefix = f"{FRAMEWORKS[found.framework]}."
        table = Table(title=f"{found.framework} {found.version}{dtypes}", title_justify="left")
        for column in ("replaced", "bound in", "more accurate"):
            table.add_column(column, overflow="fold")
        for place, places in found.bound.items():
            short = (where.removeprefix(prefix) for where in places)
            table.add_row(place.removeprefix(prefix), "\n".join(short), found.more_accurate.get(place, ""))
        console.print(table)
    if not _active:
        console.print("fastrlhf has patched nothing.")


def _bind(framework: str, exact_dtype: bool) -> None:
    ours = importlib.import_module(f"fastrlhf.compat.{framework}")
    try:
        version = metadata.version(getattr(ours, "DISTRIBUTION", ours.PACKAGE))
    except metadata.PackageNotFoundError:
        raise PatchError(f"{framework}: not installed") from None
    places = _expected(ours, version)
    found, missing = _look(places)
    if framework in _active:  # FASTRLHF_PATCH has patched it when it was imported just now
        return
    if missing or not _matches(ours.VERSIONS, version):
        wrong = "some names are missing" if _matches(ours.VERSIONS, version) else f"wanted {ours.VERSIONS}"
        raise PatchError(
            f"{framework} {version}: {wrong}; nothing was changed. Found: {', '.join(found) or 'nothing'}. "
            f"Missing: {', '.join(f'{place} ({why})' for place, why in missing.items()) or 'nothing'}."
        )
    more_accurate = getattr(ours, "MORE_ACCURATE", {})
    made = Patch(
        framework, version, exact_dtype, {place: more_accurate[place] for place in places & more_accurate.keys()}
    )
    made._originals = found
    for place in found:
        function = ours.REPLACEMENTS[place]
        made._ours[place] = _exact(function) if exact_dtype else function
    own = {id(x): (place, x, x) for place, x in made._ours.items()}
    made._were_ours = {where for where, _, _ in _slots(ours.PACKAGE, own)}
    swaps = {id(x): (place, x, made._ours[place]) for place, x in found.items()}
    for where, place, bind in list(_slots(ours.PACKAGE, swaps)):
        bind()
        made.bound.setdefault(place, []).append(where)
    _active[framework] = made
    made._unregister = getattr(ours, "unregister", made._unregister)
    try:
        getattr(ours, "register", lambda: None)()
    except BaseException:
        made.restore()
        raise


def _expected(ours: ModuleType, version: str) -> set[str]:
    """The places that this version should have."""
    optional = getattr(ours, "OPTIONAL", {})
    return {place for place in ours.REPLACEMENTS if place not in optional or _matches(optional[place], version)}


def _matches(specifier: str, version: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def _look(places: set[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """({place: what is there}, {place: why there is nothing})."""
    found, missing = {}, {}
    for place in sorted(places):
        try:
            owner, name = _owner(place)
            value = vars(owner)[name]
            found[place] = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        except KeyError:
            missing[place] = f"{owner.__name__} has no {name}"
        except Exception as error:  # whatever the framework raises when it is imported
            missing[place] = " ".join(str(error).split())
    return found, missing


def _owner(place: str) -> tuple[Any, str]:
    """The module or class that has the place, imported, and the name in it."""
    parts = place.split(".")
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            owner = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name or length == 1:  # it is there, but something that it imports is not
                raise
            continue
        for part in parts[length:-1]:
            owner = getattr(owner, part)
        return owner, parts[-1]
    raise ImportError(f"{place}: wanted package.module.name")


def _exact(ours: Any) -> Any:
    """With results in the framework's dtype; itself where they always are."""
    if not (hasattr(ours, "exact_dtype") if isinstance(ours, type) else "exact_dtype" in signature(ours).parameters):
        return ours
    if isinstance(ours, type):
        return type(
            ours.__name__, (ours,), {"exact_dtype": True, "__module__": ours.__module__, "__doc__": ours.__doc__}
        )
    return functools.wraps(ours)(lambda *args, **kwargs: ours(*args, exact_dtype=True, **kwargs))


def _slots(package: str, swaps: dict[int, tuple[str, Any, Any]]) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(where, place of definition, bind) for everything that holds an object of `swaps`, {id: (place, it, new one)}."""

    def swap(value: Any) -> tuple[str, Any] | None:
        wrapper = type(value) if type(value) in (staticmethod, classmethod) else None
        inner = value.__func__ if wrapper else value
        if id(inner) not in swaps:
            return None
        place, _, new = swaps[id(inner)]
        return place, wrapper(new) if wrapper else new

    for module_name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or module_name.split(".")[0] == "fastrlhf":
            continue
        inside = module_name.split(".")[0] == package
        for name, value in list(vars(module).items()):
            where = f"{module_name}.{name}"
            if change := swap(value):
                yield where, change[0], functools.partial(vars(module).__setitem__, name, change[1])
            elif not inside:
                continue
            elif isinstance(value, type) and value.__module__ == module_name:
                for attribute, member in list(vars(value).items()):
                    if change := swap(member):
                        bind = functools.partial(setattr, value, attribute, change[1])
                        yield f"{where}.{attribute}", change[0], bind
            elif isinstance(value, dict) and name != "__builtins__":
                for key, member in list(value.items()):
                    if change := swap(member):
                        yield f"{where}[{key!r}]", change[0], functools.partial(value.__setitem__, key, change[1])
