"""The slow functions of other frameworks, computed by our ops: a module per framework, under its names and conventions.

`fastrlhf.patch("trl")` binds them in the framework itself. Every module lists what it replaces, and where it is more
accurate than the framework; the page "Use fastrlhf inside ..." (README.md beside this file) shows them all.
"""

from fastrlhf.compat._patch import FRAMEWORKS, Patch, PatchError, original, patch, patch_report

__all__ = ["FRAMEWORKS", "Patch", "PatchError", "original", "patch", "patch_report"]
