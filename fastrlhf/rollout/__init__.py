"""What turns prompts into sampled responses."""

from fastrlhf.rollout.architectures import NotDrivenError
from fastrlhf.rollout.native_engine import NativeEngine
from fastrlhf.rollout.transformers_engine import TransformersEngine
from fastrlhf.rollout.types import Rollout, RolloutEngine, RolloutInterrupted, SamplingParams

__all__ = [
    "NativeEngine",
    "NotDrivenError",
    "Rollout",
    "RolloutEngine",
    "RolloutInterrupted",
    "SamplingParams",
    "TransformersEngine",
]
