"""How varied responses are: a policy that collapses says the same in all of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def distinct_n(responses: Sequence[Sequence[Hashable]], n: int) -> float:
    """Different n-grams over all n-grams, in all responses together (Li et al. 2016, arXiv:1510.03055); 0 without any.

    responses: of token ids, or of words. No n-gram spans two responses. More responses have a lower share: compare
    batches of one size.
    """
    grams = [tuple(tokens[i : i + n]) for tokens in responses for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / max(1, len(grams))
