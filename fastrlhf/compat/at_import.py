"""FASTRLHF_PATCH=trl,verl in the environment: every Python process patches these frameworks when it imports them.

The installation has a file fastrlhf.pth, which Python reads at its start; with the variable set, it calls `install`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from importlib.machinery import ModuleSpec

from fastrlhf.compat._patch import FRAMEWORKS, patch

VARIABLE = "FASTRLHF_PATCH"


def install() -> None:
    """Has the frameworks of FASTRLHF_PATCH patched as soon as they are imported, or now if they are already.

    Imports none of them. To be called where the installation's .pth file is not read (python -S), such as by Ray's
    worker_process_setup_hook. Raises ValueError for names that are not in FRAMEWORKS, once the others are seen to.
    """
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    wanted = {FRAMEWORKS[name]: name for name in names if name in FRAMEWORKS}
    if wanted and not any(isinstance(finder, _Finder) and finder.wanted == wanted for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(wanted))
    for package in wanted.keys() & sys.modules.keys():
        patch(wanted[package])
    unknown = [name for name in names if name not in FRAMEWORKS]
    if unknown:
        raise ValueError(f"{VARIABLE}: got {', '.join(unknown)}, wanted some of {', '.join(FRAMEWORKS)}")


class _Finder:
    """Finds packages as the other finders do, and patches them when their __init__ has run."""

    def __init__(self, wanted: dict[str, str]):
        self.wanted = wanted
        self._searching = threading.local()

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name not in self.wanted or getattr(self._searching, "now", False):
            return None
        self._searching.now = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching.now = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            execute = spec.loader.exec_module

            def execute_and_patch(module) -> None:
                execute(module)
                patch(self.wanted[name])

            spec.loader.exec_module = execute_and_patch
        return spec
