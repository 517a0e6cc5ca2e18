"""How many objects several clicks name."""

from __future__ import annotations

import numpy as np
import pytest

from model.objects import objects_of

LEFT, RIGHT, BOTH = [0.0, 0, 40, 100], [40.0, 0, 80, 100], [0.0, 0, 80, 100]
CAP, BODY = [10.0, 0, 30, 20], [0.0, 20, 40, 100]


def objects(
    points: list[tuple[float, float]],
    answers: list[list[float] | None],
    candidates: list[list[float]],
    scores: list[float],
) -> list[list[int]]:
    return objects_of(
        np.array(points, np.float32).reshape(-1, 2),
        [None if answer is None else np.array(answer, np.float32) for answer in answers],
        np.array(candidates, np.float32).reshape(-1, 4),
        np.array(scores, np.float32),
    )


def test_no_points_are_no_objects() -> None:
    assert objects([], [], [], []) == []


@pytest.mark.parametrize(
    ("points", "answers", "candidates", "scores", "expected"),
    [
        ([(20, 50), (60, 50)], [LEFT, RIGHT], [LEFT, RIGHT, BOTH], [0.8, 0.7, 0.3], [[0], [1]]),
        ([(20, 50), (60, 50)], [None, None], [LEFT, RIGHT, BOTH], [0.2, 0.2, 0.9], [[0, 1]]),
        ([(20, 30), (20, 70)], [LEFT, LEFT], [LEFT], [0.8], [[0, 1]]),
        ([(20, 10), (20, 60)], [CAP, BODY], [CAP, BODY, LEFT], [0.3, 0.3, 0.8], [[0, 1]]),
        ([(20, 50), (60, 50)], [LEFT, None], [LEFT], [0.8], [[0], [1]]),
        ([(20, 50), (60, 50)], [LEFT, RIGHT], [], [], [[0], [1]]),
        ([(20, 50), (60, 50)], [BOTH, BOTH], [], [], [[0, 1]]),
        ([(20, 30), (60, 50), (20, 70)], [LEFT, RIGHT, LEFT], [LEFT, RIGHT], [0.8, 0.8], [[0, 2], [1]]),
    ],
    ids=[
        "two products",
        "one pack",
        "twice on one product",
        "cap and body",
        "a product and nothing",
        "two answers without candidates",
        "one answer without candidates",
        "three clicks",
    ],
)
def test_clicks_that_nothing_explains_together_are_objects_of_their_own(
    points: list[tuple[float, float]],
    answers: list[list[float] | None],
    candidates: list[list[float]],
    scores: list[float],
    expected: list[list[int]],
) -> None:
    assert objects(points, answers, candidates, scores) == expected
