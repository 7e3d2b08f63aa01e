"""Random numbers that a run goes on with as if it had never been stopped."""

from __future__ import annotations

import hashlib


def number(*what: object) -> int:
    """A number below 2^63 that hangs on nothing but what it is for."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, what)).encode()).digest()[:8], "little") >> 1
