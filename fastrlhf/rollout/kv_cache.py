"""Which pages of the KV cache belong to whom."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fastrlhf.functional.decoding import PAGE


def pages_for(positions: int) -> int:
    return -(-positions // PAGE)


class PageAllocator:
    """Hands out pages of a cache of `count`, counts who holds each, and takes it back from the last."""

    def __init__(self, count: int) -> None:
        self.free = list(range(count - 1, -1, -1))
        self.holders = [0] * count

    def take(self, count: int) -> list[int]:
        pages = [self.free.pop() for _ in range(count)]
        self.hold(pages)
        return pages

    def hold(self, pages: list[int]) -> None:
        for page in pages:
            self.holders[page] += 1

    def release(self, pages: list[int]) -> None:
        for page in pages:
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self.free.append(page)


@dataclass
class Prefix:
    """A prompt that several responses begin with; it is computed once.

    waiting: how many responses still have to start from it. pages: once it is computed, those with its keys and values.
    last: [H], what stands before the final norm at its last token.
    """

    prompt: list[int]
    waiting: int = 0
    pages: list[int] = field(default_factory=list)
    last: Tensor | None = None
