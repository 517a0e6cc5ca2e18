"""What accepted boxes in a row tell about a click beside them."""

from __future__ import annotations

import numpy as np
import pytest

from model.neighbours import row_box

LEFT, RIGHT, BELOW = [0.0, 100, 40, 200], [80.0, 104, 120, 204], [40.0, 210, 80, 310]


def row(*accepted: list[float], x: float = 60, y: float = 152) -> tuple[list[float], float] | None:
    found = row_box(np.array(accepted, np.float32).reshape(-1, 4), np.array([x, y], np.float32))
    return None if found is None else (found[0].tolist(), found[1])


def test_without_accepted_boxes_there_is_no_row() -> None:
    assert row() is None


@pytest.mark.parametrize("accepted", [BELOW, [300.0, 100, 340, 200], [50.0, 100, 70, 200]])
def test_a_box_below_far_away_or_under_the_click_is_no_neighbour(accepted: list[float]) -> None:
    assert row(accepted) is None


def test_between_two_neighbours_a_box_has_their_mean_size_and_place_with_the_click_in_its_middle() -> None:
    found = row(LEFT, RIGHT, BELOW)
    assert found is not None
    assert found[0] == pytest.approx([40, 102, 80, 202], abs=0.5)
    assert found[1] == pytest.approx(1.0)


def test_the_nearer_a_neighbour_the_more_it_is_believed() -> None:
    believed = [row(LEFT, x=x) for x in (50, 70, 120, 199)]
    shares = [share for one in believed if one is not None for share in [one[1]]]
    assert len(shares) == 4
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.1
