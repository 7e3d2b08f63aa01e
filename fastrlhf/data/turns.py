"""Where the assistant's turns of a conversation end, in tokens."""

from __future__ import annotations

import re
from bisect import bisect_left

from fastrlhf.data.cells import Message, Text
from fastrlhf.data.encode import Encoder, Rendered

# A turn of a transcript as in hh-rlhf, up to the next speaker or the end.
TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):(.*?)(?=\n\n(?:Human|Assistant):|\Z)", re.DOTALL)


def parse_transcript(text: str) -> list[dict[str, str]]:
    """The messages of a transcript whose turns begin with "\\n\\nHuman:" and "\\n\\nAssistant:", as in hh-rlhf.

    Roles are "user" and "assistant"; contents lose the white space around them. What stands before the first mark is no
    turn. A text without marks gives no messages.
    """
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in TRANSCRIPT_TURN.findall(text)]


def waiting_turns(prompt: Text) -> Text:
    """The messages of a transcript as in hh-rlhf that ends where the assistant is to speak; another prompt as it is."""
    if isinstance(prompt, str) and prompt.lstrip().startswith("Human:") and prompt.rstrip().endswith("\n\nAssistant:"):
        return parse_transcript(prompt)[:-1]
    return prompt


def turn_ends(encoder: Encoder, text: Rendered, messages: list[Message] | None, ids: list[int], row: int) -> list[int]:
    """Indices in `ids` of the last token of each assistant turn; the last turn's is the last of all, the EOS.

    text, ids: from the encoder. messages: those that `text` was rendered from, or None for plain text. In a
    conversation by a chat template, a turn's last token is the template's end mark; in a transcript as in hh-rlhf, the
    one with its last letter. A plain text is one turn.
    """
    ends = _transcript_ends(text.whole) if messages is None else encoder.turn_ends(messages, row)
    if len(ends) < 2:
        return [len(ids) - 1]
    places = encoder.token_ends(text, ids)
    return [*(bisect_left(places, end) for end in ends[:-1]), len(ids) - 1]


def _transcript_ends(text: str) -> list[int]:
    """How many characters there are up to the end of each assistant turn."""
    turns = [match for match in TRANSCRIPT_TURN.finditer(text) if match.group(1) == "Assistant"]
    return [match.start() + len(match.group().rstrip()) for match in turns]
