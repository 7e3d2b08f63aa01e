"""When a response is finished."""

from __future__ import annotations

from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from fastrlhf.rollout.types import FinishReason, SamplingParams

BROKEN = "\ufffd"  # what a tokenizer decodes part of a character as
BYTES_OF_A_CHARACTER = 4  # at most, in UTF-8


def stop_tokens(tokenizer: PreTrainedTokenizerBase, sampling: SamplingParams) -> set[int]:
    """EOS, and those that were asked for."""
    eos = tokenizer.eos_token_id
    return {*sampling.stop_token_ids, *([] if eos is None else [eos])}


class Stop:
    """By EOS, a stop token, a stop string, or at the most tokens a response may have."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sampling: SamplingParams) -> None:
        self.tokenizer = tokenizer
        self.tokens = stop_tokens(tokenizer, sampling)
        self.strings = sampling.stop
        self.least = sampling.min_new_tokens
        # A token has at least a byte; one more on the left, for tokenizers that decode a first token in another way.
        self.tail = max((len(text.encode()) for text in self.strings), default=0) + 2

    def reason(self, tokens: list[int], limit: int) -> FinishReason | None:
        """Of a response that has just got its last token."""
        if len(tokens) >= self.least and (tokens[-1] in self.tokens or self._ends_with_string(tokens)):
            return "stop"
        return "length" if len(tokens) == limit else None

    def _ends_with_string(self, tokens: list[int]) -> bool:
        """Whether the last token brought a stop string to its end."""
        if not self.strings:
            return False
        # A tail that begins inside of a character has it broken, and with it all tokens of single bytes that follow it.
        for more in range(BYTES_OF_A_CHARACTER):
            tail = tokens[-self.tail - more :]
            text = self.tokenizer.decode(tail)
            if not text.startswith(BROKEN):
                break
        before = self.tokenizer.decode(tail[:-1])
        # Not len(before): a character of several bytes may have become whole.
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False)))
        return any(text.find(string, max(0, same - len(string) + 1)) >= 0 for string in self.strings)
