"""What turns prompts into sampled responses."""

from fastrlhf.rollout.architectures import NotDrivenError
from fastrlhf.rollout.best_of_n import best_of_n_kl, best_of_n_scores, best_of_n_summary
from fastrlhf.rollout.engines import ENGINES, create_engine
from fastrlhf.rollout.native_engine import NativeEngine
from fastrlhf.rollout.scored_samples import ScoredSamples, read_samples, sample_and_score, winners
from fastrlhf.rollout.transformers_engine import TransformersEngine
from fastrlhf.rollout.types import Rollout, RolloutEngine, RolloutInterrupted, SamplingParams
from fastrlhf.rollout.vllm_engine import VLLMEngine

__all__ = [
    "ENGINES",
    "NativeEngine",
    "NotDrivenError",
    "Rollout",
    "RolloutEngine",
    "RolloutInterrupted",
    "SamplingParams",
    "ScoredSamples",
    "TransformersEngine",
    "VLLMEngine",
    "best_of_n_kl",
    "best_of_n_scores",
    "best_of_n_summary",
    "create_engine",
    "read_samples",
    "sample_and_score",
    "winners",
]
