"""fastrlhf: the PPO engine of RLHF at the speed of the hardware."""

import importlib

__version__ = "0.1.0"

# Public name -> the module that holds it, imported when the name is first used: whoever wants the kernels does not pay
# for transformers.
_WHERE = {
    "SFTTrainer": "fastrlhf.trainers",
    "SFTConfig": "fastrlhf.trainers",
    "RewardTrainer": "fastrlhf.trainers",
    "RewardConfig": "fastrlhf.trainers",
    "ProcessRewardTrainer": "fastrlhf.trainers",
    "ProcessRewardConfig": "fastrlhf.trainers",
    "PPOTrainer": "fastrlhf.trainers",
    "PPOConfig": "fastrlhf.trainers",
    "DPOTrainer": "fastrlhf.trainers",
    "DPOConfig": "fastrlhf.trainers",
    "backend_table": "fastrlhf.backends",
    "patch": "fastrlhf.compat",
    "patch_report": "fastrlhf.compat",
}
_SUBMODULES = ("compat", "functional", "reference", "rewards", "rollout", "trainers")

__all__ = ["__version__", *_WHERE, *_SUBMODULES]


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"fastrlhf.{name}")
    raise AttributeError(f"module 'fastrlhf' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
