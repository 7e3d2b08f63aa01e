"""From text to token ids: one place decides on BOS, EOS, chat templates and where the completion begins.

The rules, the same for all three trainers so that a reward model scores the very tokens the policy wrote:
    Plain text gets what the tokenizer puts in front (BOS), once; conversations get what their template writes.
    A finished text ends with EOS, once. What a chat template writes after its last EOS (a newline) is dropped, because
    generation stops at EOS and never gets there.
    A prompt's tokens are those of the prompt alone, as the policy meets it. Where the tokenizer would merge letters
    across the border, the completion is tokenised by itself.
    The pad token plays no part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fastrlhf.data.cells import Message, Text, join


@dataclass
class Rendered:
    """A text before tokenisation: `whole` begins with `prompt`. A `chat` has its special tokens written out."""

    prompt: str
    whole: str
    chat: bool


class Encoder:
    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer is None:
            raise ValueError("no tokenizer given: pass processing_class=AutoTokenizer.from_pretrained(...)")
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no EOS token, without which a model never learns to stop: set tokenizer.eos_token"
            )
        self.tokenizer = tokenizer
        self.eos = tokenizer.eos_token_id
        self.front = self._front()

    def _front(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text."""
        bare, dressed = self._ids(["a"])[0], self.tokenizer("a", verbose=False)["input_ids"]
        for start in range(len(dressed) - len(bare) + 1):
            if dressed[start : start + len(bare)] == bare:
                return dressed[:start]
        return []

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        options = {"add_special_tokens": False, "padding": False, "truncation": False, "verbose": False}
        return self.tokenizer(texts, **options)["input_ids"]

    def _opened(self, ids: list[int], chat: bool) -> list[int]:
        return ids if chat or ids[: len(self.front)] == self.front else self.front + ids

    def _ended(self, ids: list[int], chat: bool) -> list[int]:
        if chat and self.eos in ids:
            end = len(ids) - ids[::-1].index(self.eos)
            if not self.tokenizer.decode(ids[end:]).strip():
                ids = ids[:end]
        return ids if ids and ids[-1] == self.eos else [*ids, self.eos]

    def prompts(self, prompts: list[Text], rows: list[int], lead: str = "") -> list[list[int]]:
        """Tokens of prompts that wait for a response: no EOS, and for conversations the assistant's header.

        lead: the beginning of all responses, where they are given one.
        """
        chats = [not isinstance(prompt, str) for prompt in prompts]
        texts = [
            (self._apply(prompt, row, add_generation_prompt=True) if chat else prompt) + lead
            for prompt, chat, row in zip(prompts, chats, rows, strict=True)
        ]
        return [self._opened(ids, chat) for ids, chat in zip(self._ids(texts), chats, strict=True)]

    def texts(self, texts: list[Rendered]) -> list[tuple[list[int], int]]:
        """Tokens of finished texts, and how many of them are the prompt."""
        prompts, wholes = self._ids([text.prompt for text in texts]), self._ids([text.whole for text in texts])
        encoded = []
        for text, prompt, whole in zip(texts, prompts, wholes, strict=True):
            if whole[: len(prompt)] != prompt:
                whole = prompt + self._ids([text.whole[len(text.prompt) :]])[0]
            opened = self._opened(whole, text.chat)
            encoded.append((self._ended(opened, text.chat), len(prompt) + len(opened) - len(whole)))
        return encoded

    def token_ends(self, text: Rendered, ids: list[int]) -> list[int]:
        """How many characters of the text there are up to the end of each of its tokens `ids`, which `texts` made."""
        if not self.tokenizer.is_fast:
            raise ValueError("the tokenizer does not say which letters a token stands for; a fast tokenizer is wanted")
        prompt, (whole, ends) = self._ids([text.prompt])[0], self._with_ends(text.whole)
        if whole[: len(prompt)] != prompt:
            (prompt, ends), (rest, ends_of_rest) = (
                self._with_ends(part) for part in (text.prompt, text.whole[len(text.prompt) :])
            )
            whole, ends = prompt + rest, ends + [len(text.prompt) + end for end in ends_of_rest]
        front = len(self._opened(whole, text.chat)) - len(whole)
        return ([0] * front + ends + [len(text.whole)])[: len(ids)]

    def _with_ends(self, text: str) -> tuple[list[int], list[int]]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]

    def render(self, prompt: Text, completion: Text, row: int) -> Rendered:
        """Prompt and completion as one text. A string beside messages counts as one message of its side."""
        if isinstance(prompt, str) and isinstance(completion, str):
            return Rendered(prompt, prompt + completion, chat=False)
        messages, turns = join(prompt, completion)
        return self.render_chat(messages, turns, row)

    def render_chat(self, messages: list[Message], turns: int, row: int) -> Rendered:
        """A conversation whose first `turns` messages are the prompt (0: all of it is the completion)."""
        whole = self._apply(messages, row)
        if turns == 0:
            return Rendered("", whole, chat=True)
        for header in (True, False):  # some templates write a header for generation that is not in the finished turn
            prompt = self._apply(messages[:turns], row, add_generation_prompt=header)
            if whole.startswith(prompt):
                return Rendered(prompt, whole, chat=True)
        raise ValueError(
            f"row {row}: the tokenizer's chat template writes the first {turns} messages otherwise when more follow, "
            "so it cannot be told where the completion begins. Use a template that marks assistant turns with "
            "{% generation %}, or give prompt and completion as strings."
        )

    def marks_assistant_turns(self) -> bool:
        """Whether the chat template says which tokens the assistant wrote."""
        template = self._template()
        return self.tokenizer.is_fast and re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None

    def marked(self, messages: list[Message], row: int) -> tuple[list[int], list[int]]:
        """Tokens of a finished conversation, and 1 for each token the assistant wrote (see `marks_assistant_turns`)."""
        out = self._apply(messages, row, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = self._ended(out["input_ids"], chat=True), out["assistant_masks"]
        return ids, [*mask, int(messages[-1]["role"] == "assistant")][: len(ids)]

    def turn_ends(self, messages: list[Message], row: int) -> list[int]:
        """How many characters of a rendered conversation there are up to the end mark of each assistant turn."""
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return [len(self._apply(messages[: i + 1], row).rstrip()) for i in turns]

    def _apply(self, messages: list[Message], row: int, tokenize: bool = False, **options: bool) -> str | dict:
        self._template()
        if tokenize:
            options["tokenizer_kwargs"] = {"verbose": False}
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=tokenize, **options)
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"row {row}: the tokenizer's chat template does not take these messages: {error}"
            ) from error

    def _template(self) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "the data holds conversations, but the tokenizer has no chat template: set tokenizer.chat_template, "
                "take the tokenizer of an instruction-tuned model, or give the texts as strings"
            )
        return self.tokenizer.get_chat_template()
