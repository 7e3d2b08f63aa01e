"""What goes into a rollout and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SamplingParams:
    """How responses are sampled: from softmax(logits / temperature), unfiltered, as the loss assumes.

    max_new_tokens: most tokens of a response. temperature: greater than 0. batch_size: most prompts decoded at a time.
    """

    max_new_tokens: int
    temperature: float = 1.0
    batch_size: int = 64


@dataclass
class Rollout:
    """Sampled responses, in the order of their prompts.

    prompts, responses: token ids; a response ends with its EOS, if it came to one.
    finished: whether each response ended with EOS.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    finished: list[bool]

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def lengths(self) -> Tensor:
        """Tokens in each response [B], EOS included."""
        return torch.tensor([len(response) for response in self.responses])

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The responses as text, without special tokens, so that prompt + text is the text of both.

        Decoded behind their prompts: tokenizers of the SentencePiece kind drop the space before a text's first word.
        """
        texts = []
        for prompt, response in zip(self.prompts, self.responses, strict=True):
            before = tokenizer.decode(prompt, skip_special_tokens=True)
            whole = tokenizer.decode([*prompt, *response], skip_special_tokens=True)
            whole_fits = whole.startswith(before)
            texts.append(whole[len(before) :] if whole_fits else tokenizer.decode(response, skip_special_tokens=True))
        return texts

    @property
    def mask(self) -> Tensor:
        """[B, T], 1 at the tokens of each response, in fp32."""
        lengths = self.lengths
        return (torch.arange(int(lengths.max())) < lengths[:, None]).float()
