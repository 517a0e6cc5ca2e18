"""What the learned proposals say about a prompt."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from model.proposer import averaged_with_proposal, prior_box

UNIT, LABEL, NEIGHBOUR = [0, 0, 40, 120], [2, 60, 38, 100], [40, 0, 80, 120]
PROPOSALS = np.array([UNIT, LABEL, NEIGHBOUR], np.float32)
SCORES = np.array([0.5, 0.6, 0.9], np.float32)


def prior(
    points: list[tuple[float, float]], labels: list[bool], box: list[float] | None = None
) -> npt.NDArray[np.float32] | None:
    points_xy = np.array(points, np.float32).reshape(-1, 2)
    box_xyxy = None if box is None else np.array(box, np.float32)
    return prior_box(PROPOSALS, SCORES, points_xy, np.array(labels, bool), box_xyxy)


@pytest.mark.parametrize("click", [[], [(60.0, 60.0)]])
def test_an_annotators_box_stands_as_it_is_also_with_a_click(click: list[tuple[float, float]]) -> None:
    box = [1.0, 2.0, 39.0, 110.0]
    assert np.array_equal(prior(click, [True] * len(click), box), box)  # type: ignore[arg-type]


@pytest.mark.parametrize(("click", "meant"), [((20, 60), UNIT), ((20, 82), LABEL), ((60, 60), NEIGHBOUR)])
def test_a_click_means_the_proposal_in_whose_middle_it_is(click: tuple[float, float], meant: list[float]) -> None:
    assert np.array_equal(prior([click], [True]), meant)  # type: ignore[arg-type]


def test_of_an_annotators_box_a_background_point_leaves_the_proposal_without_it() -> None:
    both = [0.0, 0.0, 80.0, 120.0]
    assert np.array_equal(prior([(60, 60)], [False], both), UNIT)  # type: ignore[arg-type]
    assert np.array_equal(prior([(200, 60)], [False], both), both)  # type: ignore[arg-type]


def test_a_click_where_nothing_is_proposed_has_no_prior() -> None:
    assert prior([(200, 200)], [True]) is None


def test_a_background_point_rules_out_what_holds_it() -> None:
    assert prior([(20, 82), (20, 70)], [True, False]) is None
    assert np.array_equal(prior([(20, 82), (20, 10)], [True, False]), LABEL)  # type: ignore[arg-type]


def test_a_decoders_box_is_averaged_with_the_proposal_that_agrees() -> None:
    box = np.array([4, 0, 44, 120], np.float32)
    averaged = averaged_with_proposal(box, PROPOSALS, SCORES)
    assert 0 < averaged[0] < 4
    assert 40 < averaged[2] < 44
    assert averaged[1:4:2].tolist() == pytest.approx([0, 120])


@pytest.mark.parametrize("proposals", [PROPOSALS, PROPOSALS[:0]])
def test_a_decoders_box_that_no_proposal_agrees_with_stays(proposals: npt.NDArray[np.float32]) -> None:
    box = np.array([300, 300, 340, 420], np.float32)
    assert np.array_equal(averaged_with_proposal(box, proposals, SCORES[: len(proposals)]), box)
