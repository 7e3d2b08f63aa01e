"""The log-probs that the policy's KL is measured to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastrlhf.batching import ScoredBatch
from fastrlhf.rollout import Rollout
from fastrlhf.trainers.offload import on_device
from fastrlhf.trainers.ppo.actor_critic import ActorCritic
from fastrlhf.trainers.ppo.config import PPOConfig
from fastrlhf.trainers.ppo.frozen_layers import LowerStates
from fastrlhf.trainers.sharding import whole_weights
from fastrlhf.trainers.token_scorer import TokenScorer


class Reference:
    """A frozen model, or without one the policy with its adapters off.

    scorer: the policy. ref_model: a causal language model, taken over and frozen, or None. With `args.offload_models`
        it is on the device only while it computes. lower_states: of the layers that it shares with the policy.
    """

    def __init__(
        self, scorer: ActorCritic, ref_model: nn.Module | None, args: PPOConfig, lower_states: LowerStates
    ) -> None:
        self.policy, self.args, self.lower_states = scorer, args, lower_states
        self.scorer: TokenScorer | None = None
        if ref_model is not None:
            ref_model = ref_model.eval().requires_grad_(False)
            self.scorer = TokenScorer(ref_model, args.lm_head, padding_free=args.padding_free)
            if not args.offload_models:
                self.scorer.to(args.device)

    @torch.no_grad()
    def log_probs(self, rollout: Rollout, batches: list[ScoredBatch], accelerator: Accelerator) -> Tensor:
        """[B, T], of every response token; 0 where a response has none."""
        results = torch.zeros(rollout.mask.shape, device=self.args.device)
        with self._scorer(accelerator) as score, accelerator.autocast():
            for batch in batches:
                with self.lower_states(batch):
                    log_probs, _ = score(
                        batch.input_ids, batch.positions, batch.tokens, self.args.temperature, packing=batch.packing
                    )
                batch.put(results, log_probs)
        return results

    @contextmanager
    def _scorer(self, accelerator: Accelerator) -> Iterator[Callable[..., tuple[Tensor, Tensor]]]:
        """TokenScorer's forward."""
        if self.scorer is None:
            # peft turns requires_grad off and on.
            with whole_weights(self.policy, accelerator), self.policy.model.disable_adapter():
                yield partial(TokenScorer.forward, self.policy)
            return
        with on_device(self.scorer, self.args.device, self.args.offload_models):
            yield self.scorer
