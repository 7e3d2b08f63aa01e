"""Preferences from language models: a judge's, and those of a model that criticises and revises itself."""

from fastrlhf.feedback.constitutional import Constitutional, Revision
from fastrlhf.feedback.judge import LMJudge, Opinion
from fastrlhf.feedback.pair_judge import Judgement, PairJudge
from fastrlhf.feedback.principles import Principle, load_principles

__all__ = [
    "Constitutional",
    "Judgement",
    "LMJudge",
    "Opinion",
    "PairJudge",
    "Principle",
    "Revision",
    "load_principles",
]
