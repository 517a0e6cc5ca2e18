"""What the learned proposals say about a prompt."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from model.proposer import averaged_with_proposal, prior_box

UNIT, LABEL, NEIGHBOUR = [0, 0, 40, 120], [2, 60, 38, 100], [40, 0, 80, 120]
PROPOSALS = np.array([UNIT, LABEL, NEIGHBOUR], np.float32)
SCORES = np.array([0.5, 0.6, 0.9], np.float32)


def prior(*points: tuple[float, float]) -> npt.NDArray[np.float32] | None:
    return prior_box(PROPOSALS, SCORES, np.array(points, np.float32))


@pytest.mark.parametrize(("click", "meant"), [((20, 60), UNIT), ((20, 82), LABEL), ((60, 60), NEIGHBOUR)])
def test_a_click_means_the_proposal_in_whose_middle_it_is(click: tuple[float, float], meant: list[float]) -> None:
    assert np.array_equal(prior(click), meant)  # type: ignore[arg-type]


def test_several_clicks_mean_the_most_confident_proposal_that_holds_them_all() -> None:
    assert np.array_equal(prior((20, 70), (20, 90)), LABEL)  # type: ignore[arg-type]
    assert np.array_equal(prior((20, 70), (20, 10)), UNIT)  # type: ignore[arg-type]


@pytest.mark.parametrize("clicks", [[(200, 200)], [(20, 60), (60, 60)]], ids=["beside all", "in two proposals"])
def test_clicks_that_no_proposal_holds_have_no_prior(clicks: list[tuple[float, float]]) -> None:
    assert prior(*clicks) is None


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
