"""What a reward function may say beside its scores."""

from __future__ import annotations

from collections.abc import Iterable


class DetailedScores(list[float]):
    """Scores, one a completion, that come with details. A reward function of yours may return one, too.

    parts: by name, numbers to be logged beside the scores, one a completion: each objective's, or `disagreement`, how
        far the members of an ensemble are from each other, which `kl_controller="uncertainty"` follows.
    steps: for each completion its steps, each as (how many characters there are up to its end, its reward). They are
        no part of the scores: PPO puts them at the tokens where the steps end.
    """

    def __init__(
        self,
        scores: Iterable[float],
        parts: dict[str, list[float]] | None = None,
        steps: list[list[tuple[int, float]]] | None = None,
    ) -> None:
        super().__init__(scores)
        self.parts = parts or {}
        self.steps = steps
