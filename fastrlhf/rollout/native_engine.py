"""Rollouts by a decoding loop of our own: continuous batching over a paged KV cache."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastrlhf.rollout.architectures import NotDrivenError
from fastrlhf.rollout.decoder import Decoder
from fastrlhf.rollout.decoding_loop import DecodingLoop, Request
from fastrlhf.rollout.kv_cache import Prefix, pages_for
from fastrlhf.rollout.stopping import Stop
from fastrlhf.rollout.types import Rollout, RolloutInterrupted, SamplingParams, check_prompts, new_seed


class NativeEngine:
    """Samples responses from a causal language model of transformers with kernels and a decoding loop of fastrlhf.

    Finished responses leave the batch and waiting prompts take their place; equal prompts are computed once. On CPU,
    what a response is does not depend on the batch it was in, to the bit. `generate` reads the model's weights each
    time, so it always samples from the model as it is.

    model: Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3, GPT-2 or GPT-NeoX, with or without LoRA adapters of peft.
    tokenizer: its eos_token ends a response.
    dtype: of the weights and the KV cache in decoding; the model's own when None.
    kv_cache_bytes: most memory of the KV cache; then fewer responses than `sampling.batch_size` may run at a time. When
        None, a batch that needs more than is free is an error.
    Raises NotDrivenError, a ValueError, for a model it has no decoder for.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype | None = None,
        kv_cache_bytes: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.kv_cache_bytes = kv_cache_bytes
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if base is not model and model.active_peft_config.is_prompt_learning:
            raise NotDrivenError(model, "its adapter is a learned prompt, not a change of its linear layers")
        dtype = dtype or next(base.parameters()).dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise NotDrivenError(base, f"its weights are {dtype}")
        self.decoder = Decoder(base, dtype)
        self.decoder.check()

    def update_weights(self) -> None:
        """Nothing: `generate` reads the weights itself."""

    def release_weights(self) -> None:
        """Gives back the memory of the copy of the weights that it decodes with, until `generate` makes another."""
        self.decoder.release_weights()

    def kv_bytes(self, prompts: list[list[int]], sampling: SamplingParams) -> int:
        """Bytes of KV cache that `generate` allocates at most for these prompts, without `kv_cache_bytes`."""
        limits = [self._limit(prompt, sampling) for prompt in prompts for _ in range(sampling.n)]
        lengths = [len(prompt) for prompt in prompts for _ in range(sampling.n)]
        needs = sorted(pages_for(n + max(limit - 1, 0)) for n, limit in zip(lengths, limits, strict=True))
        # One more: the half-filled last page of a prompt of which some responses run and some still wait.
        return (sum(needs[-sampling.batch_size :]) + 1) * self.decoder.page_bytes()

    def _limit(self, prompt: list[int], sampling: SamplingParams) -> int:
        context = self.decoder.spec.context
        return sampling.max_new_tokens if context is None else min(sampling.max_new_tokens, context - len(prompt))

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingParams,
        *,
        seeds: list[int] | None = None,
        hidden: bool = False,
    ) -> Rollout:
        """As `RolloutEngine.generate`. hidden: give the last hidden states too.

        A response that would outgrow the model's context ends there, for "length". Raises MemoryError, with the
        numbers, if the KV cache does not fit. Ctrl-C raises RolloutInterrupted with what was finished.
        """
        check_prompts(prompts, sampling, seeds, self.decoder.vocabulary, self.decoder.spec.context)
        requests = self._requests(prompts, sampling, seeds)
        running = [request for request in requests if request.limit > 0]
        states: list[Tensor] | None = [] if hidden else None
        if running:
            pages = self._pages(prompts, sampling, running)
            self.decoder.update()
            longest = max(len(r.prefix.prompt) + r.limit for r in running)
            stop = Stop(self.tokenizer, sampling)
            try:
                self.decoder.allocate(pages + (self.decoder.device.type == "cuda"), longest)
                DecodingLoop(self.decoder, running, sampling, stop, pages, states).run()
            except KeyboardInterrupt as interrupt:
                done = [request for request in requests if request.finish_reason is not None]
                raise RolloutInterrupted(self._rollout(done, states), [r.index for r in done]) from interrupt
            finally:
                self.decoder.free()
        return self._rollout(requests, states)

    def _requests(self, prompts: list[list[int]], sampling: SamplingParams, seeds: list[int] | None) -> list[Request]:
        prefixes: dict[tuple[int, ...], Prefix] = {}
        requests = []
        seed = (new_seed() if sampling.seed is None else sampling.seed) if seeds is None else None
        for i, prompt in enumerate(prompts):
            prefix = prefixes.setdefault(tuple(prompt), Prefix(list(prompt)))
            for copy in range(sampling.n):
                index = i * sampling.n + copy
                number = (seed, index) if seeds is None else (seeds[i], copy)
                request = Request(index, prefix, *number, self._limit(prompt, sampling))
                if request.limit == 0:
                    request.finish_reason = "length"
                else:
                    prefix.waiting += 1
                requests.append(request)
        return requests

    def _pages(self, prompts: list[list[int]], sampling: SamplingParams, running: list[Request]) -> int:
        """How many the cache is to have."""
        size, wanted = self.decoder.page_bytes(), self.kv_bytes(prompts, sampling)
        if self.kv_cache_bytes is not None:
            pages, most = min(wanted, self.kv_cache_bytes) // size, max(r.pages_needed for r in running) + 1
            if pages < most:
                raise MemoryError(
                    f"kv_cache_bytes={self.kv_cache_bytes} holds {pages} pages of {size} bytes; one prompt with its "
                    f"response needs {most}. Raise it to {most * size}, or lower max_new_tokens="
                    f"{sampling.max_new_tokens}"
                )
            return pages
        device = self.decoder.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        if wanted > free:
            raise MemoryError(
                f"the KV cache of {sampling.batch_size} responses at a time with max_new_tokens="
                f"{sampling.max_new_tokens} takes {wanted / 2**30:.2f} GiB, of {free / 2**30:.2f} GiB that are free. "
                "Lower batch_size or max_new_tokens, or give the engine kv_cache_bytes, so that fewer run at a time"
            )
        return wanted // size

    def _rollout(self, requests: list[Request], states: list[Tensor] | None) -> Rollout:
        log_probs = torch.tensor(
            [x for r in requests for x in r.log_probs], dtype=torch.float32, device=self.decoder.device
        )
        hidden = None
        if states is not None:
            starts = [0]
            for x in states:
                starts.append(starts[-1] + len(x))
            rows = [starts[step] + row for r in requests for step, row in r.states]
            size = self.decoder.spec.hidden_size
            every = torch.cat(states) if states else torch.empty(0, size, device=self.decoder.device)
            hidden = self.decoder.final_norm(every[torch.tensor(rows, dtype=torch.long, device=every.device)])
        return Rollout(
            [r.prefix.prompt for r in requests],
            [r.tokens for r in requests],
            [r.finish_reason or "length" for r in requests],
            log_probs,
            hidden,
        )
