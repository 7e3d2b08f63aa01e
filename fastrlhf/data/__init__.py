"""Data: from a hub id, folder or file to the token columns the trainers read."""

from fastrlhf.data.load import load_data
from fastrlhf.data.prepare import prepare_preferences, prepare_prompts, prepare_sft

__all__ = ["load_data", "prepare_preferences", "prepare_prompts", "prepare_sft"]
