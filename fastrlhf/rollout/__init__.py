"""What turns prompts into sampled responses."""

from fastrlhf.rollout.architectures import NotDrivenError
from fastrlhf.rollout.engines import ENGINES, create_engine
from fastrlhf.rollout.native_engine import NativeEngine
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
    "TransformersEngine",
    "VLLMEngine",
    "create_engine",
]
