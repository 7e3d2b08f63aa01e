"""Data: from a hub id, folder or file to the token columns the trainers read."""

from fastrlhf.data.load import load_data
from fastrlhf.data.pairs import PairReport, PairRules, prepare_pairs, prepare_preferences
from fastrlhf.data.prepare import prepare_prompts, prepare_sft, prompt_texts

__all__ = [
    "PairReport",
    "PairRules",
    "load_data",
    "prepare_pairs",
    "prepare_preferences",
    "prepare_prompts",
    "prepare_sft",
    "prompt_texts",
]
