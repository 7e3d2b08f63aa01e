"""distinct-n of responses."""

import pytest

from fastrlhf.rollout.diversity import distinct_n


@pytest.mark.parametrize(
    ("responses", "n", "wanted"),
    [
        ([[1, 2, 1, 2], [1, 2]], 1, 2 / 6),
        ([[1, 2, 1, 2], [1, 2]], 2, 2 / 4),  # 12, 21, 12 and 12; none of 2 and 1 over the border
        ([[1, 2, 1, 2], [1, 2]], 3, 2 / 2),
        ([[1], []], 2, 0.0),
        ([], 1, 0.0),
        ([["a", "b", "a", "b"], ["a", "b"]], 2, 2 / 4),
    ],
)
def test_by_hand(responses, n, wanted):
    assert distinct_n(responses, n) == pytest.approx(wanted)
