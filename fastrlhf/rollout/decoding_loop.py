"""Continuous batching: responses leave the batch when they are finished, and waiting prompts take their place."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastrlhf import functional as F
from fastrlhf.functional.decoding import PAGE
from fastrlhf.rollout.decoder import Decoder
from fastrlhf.rollout.kv_cache import PageAllocator, Prefix, pages_for
from fastrlhf.rollout.step_graphs import StepGraphs
from fastrlhf.rollout.stopping import Stop
from fastrlhf.rollout.types import FinishReason, SamplingParams

MOST_PREFILL = 2048  # tokens of prompts that start in one step, unless one prompt has more


@dataclass
class Request:
    """One response in the making. index: its place in the rollout. limit: most tokens it may get."""

    index: int
    prefix: Prefix
    seed: int
    sequence: int
    limit: int
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    states: list[tuple[int, int]] = field(default_factory=list)  # step and row that each token was sampled from
    finish_reason: FinishReason | None = None
    slot: int = -1  # its row of the page table
    pages: list[int] = field(default_factory=list)
    computes_prefix: bool = False

    def add(self, token: int, log_prob: float, state: tuple[int, int] | None) -> None:
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        if state is not None:
            self.states.append(state)

    @property
    def pages_needed(self) -> int:
        # The last token is never an input.
        return pages_for(len(self.prefix.prompt) + max(self.limit - 1, 0))


class DecodingLoop:
    """From requests to responses. A step takes a token of each running response and the prompts of new ones.

    pages: how many the cache has for responses; on CUDA there is one more. states: a list that gets what each step
        sampled from, [rows, H] before the final norm; None keeps nothing.
    """

    def __init__(
        self,
        decoder: Decoder,
        requests: list[Request],
        sampling: SamplingParams,
        stop: Stop,
        pages: int,
        states: list[Tensor] | None = None,
    ) -> None:
        self.decoder, self.sampling, self.stop, self.states = decoder, sampling, stop, states
        self.allocator = PageAllocator(pages)
        # Longest prompts first, equal ones together: what starts together is then of similar length, and no more than
        # one prompt is kept for responses that still wait.
        self.waiting = deque(sorted(requests, key=lambda r: (-len(r.prefix.prompt), r.prefix.prompt, r.index)))
        self.running: list[Request] = []
        slots = min(sampling.batch_size, len(requests))
        self.free_slots = list(range(slots - 1, -1, -1))
        # A row more, for the padding of graphs: it writes to a page that is nobody's.
        width = max(r.pages_needed for r in requests)
        self.pages = torch.zeros(slots + 1, width, dtype=torch.int32, device=decoder.device)
        self.pages[slots] = pages
        self.graphs = StepGraphs(decoder, self.pages) if decoder.device.type == "cuda" else None

    def run(self) -> None:
        """To the end; responses whose finish_reason is set are complete at any time."""
        while self.waiting or self.running:
            new = self._admit()
            if not new and not self.running:
                raise RuntimeError("a waiting prompt does not fit into an empty KV cache")  # the engine sees to it
            x = self._forward(new)
            rows = [*self.running, *new]
            tokens, log_probs = self._sample(x, rows)
            if self.states is not None:
                self.states.append(x.clone())  # the memory may be a graph's
            for row, (request, token, log_prob) in enumerate(zip(rows, tokens, log_probs, strict=True)):
                request.add(token, log_prob, None if self.states is None else (len(self.states) - 1, row))
                reason = self.stop.reason(request.tokens, request.limit)
                if reason is not None:
                    request.finish_reason = reason
                    self.allocator.release(request.pages)
                    self.free_slots.append(request.slot)
            self.running = [request for request in rows if request.finish_reason is None]

    def _admit(self) -> list[Request]:
        """Requests that start now, with their pages."""
        new: list[Request] = []
        budget = MOST_PREFILL
        while self.waiting and self.free_slots:
            request = self.waiting[0]
            prefix = request.prefix
            computes = not prefix.pages
            shared = [] if computes else prefix.pages[: len(prefix.prompt) // PAGE]
            own = request.pages_needed - len(shared)
            if own > len(self.allocator.free) or (computes and new and len(prefix.prompt) > budget):
                break
            self.waiting.popleft()
            prefix.waiting -= 1
            self.allocator.hold(shared)
            request.pages = [*shared, *self.allocator.take(own)]
            if computes:
                budget -= len(prefix.prompt)
                request.computes_prefix = True
                # Others may start from it after this response has gone.
                prefix.pages = request.pages[: pages_for(len(prefix.prompt))]
                self.allocator.hold(prefix.pages)
            request.slot = self.free_slots.pop()
            self.pages[request.slot, : len(request.pages)] = torch.tensor(
                request.pages, dtype=torch.int32, device=self.pages.device
            )
            new.append(request)
        return new

    def _forward(self, new: list[Request]) -> Tensor:
        """What the next tokens of the running and the new requests come from [rows, H]."""
        computing = [request for request in new if request.computes_prefix]
        tokens = [request.tokens[-1] for request in self.running]
        slots = [request.slot for request in self.running]
        positions = [len(request.prefix.prompt) + len(request.tokens) - 1 for request in self.running]
        last = list(range(len(self.running)))
        for request in computing:
            prompt = request.prefix.prompt
            tokens += prompt
            slots += [request.slot] * len(prompt)
            positions += range(len(prompt))
            last.append(len(tokens) - 1)
        x = None
        if tokens and not computing and self.graphs is not None:
            x = self.graphs(tokens, slots, positions)
        elif tokens:
            device = self.decoder.device
            x = self.decoder(*(torch.tensor(rows, device=device) for rows in (tokens, slots, positions)), self.pages)
            x = x[torch.tensor(last, device=device)] if computing else x
        for row, request in enumerate(computing, start=len(self.running)):
            request.prefix.last = x[row]
        self._share(new)
        if len(computing) == len(new):
            return x
        running = [] if x is None else [x[: len(self.running)]]
        return torch.cat([*running, torch.stack([request.prefix.last for request in new])])

    def _share(self, new: list[Request]) -> None:
        """After the prompts have been computed: what of their pages a response will write to must be its own."""
        for request in new:
            prefix, whole = request.prefix, len(request.prefix.prompt) // PAGE
            if not request.computes_prefix and whole < min(len(prefix.pages), len(request.pages)):
                self.decoder.copy_page(prefix.pages[whole], request.pages[whole])
        for prefix in {id(request.prefix): request.prefix for request in new}.values():
            if prefix.waiting == 0:
                self.allocator.release(prefix.pages)
                prefix.pages = []

    def _sample(self, x: Tensor, rows: list[Request]) -> tuple[list[int], list[float]]:
        sampling, device = self.sampling, x.device
        logits = self.decoder.logits(x)
        keys = {
            "seed": torch.tensor([request.seed for request in rows], device=device),
            "sequence": torch.tensor([request.sequence for request in rows], device=device),
            "position": torch.tensor([len(request.tokens) for request in rows], device=device),
        }
        options = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        tokens, log_probs = F.sample_tokens(logits, **keys, **options)
        early = [row for row, request in enumerate(rows) if len(request.tokens) < sampling.min_new_tokens]
        if early and self.stop.tokens:
            at = torch.tensor(early, device=device)
            allowed = logits[at].index_fill(
                1, torch.tensor([t for t in sorted(self.stop.tokens) if t < logits.shape[1]], device=device), -torch.inf
            )
            keys = {name: value[at] for name, value in keys.items()}
            tokens[at] = F.sample_tokens(allowed, **keys, **options)[0]
            log_probs[at] = F.token_log_probs(logits[at], tokens[at], temperature=sampling.temperature or 1.0)
        return tokens.tolist(), log_probs.tolist()
