"""What turns prompts into sampled responses."""

from fastrlhf.rollout.transformers_engine import TransformersEngine
from fastrlhf.rollout.types import Rollout, SamplingParams

__all__ = ["Rollout", "SamplingParams", "TransformersEngine"]
