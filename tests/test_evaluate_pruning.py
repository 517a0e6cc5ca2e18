"""What it costs to leave out points of the grid, measured with the bundled checkpoint on rendered shelves."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model import EngineOptions
from model.detect import PointGrid
from model.network import Network
from model.renderer.shelves import render_shelf
from scripts import cli
from scripts.labels import Truth
from scripts.measure import pruning as command

POINTS_PER_SIDE = 8
OPTIONS = EngineOptions(checkpoint="facings-nano", device="cpu")


@pytest.fixture
def small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "GRID", PointGrid(points_per_side=POINTS_PER_SIDE, min_score=0.6, min_stability=0.7))


def shelf_in(folder: Path, seed: int) -> Truth:
    """A photo of 400 × 300 pixels, which is one tile."""
    shelf = render_shelf(seed, (400, 300), facing_px=40)
    Image.fromarray(shelf.photo_rgb).save(folder / f"{seed}.png")
    nothing = np.zeros((0, 4))
    boxes = shelf.boxes_xyxy.astype(np.float64)
    return Truth(image_id=seed, file_name=f"{seed}.png", size_wh=(400, 300), boxes_xyxy=boxes, crowds_xyxy=nothing)


@pytest.mark.usefixtures("small_grid")
def test_every_point_of_every_photo_is_answered_once_and_each_way_leaves_out_what_it_would(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    truths = [shelf_in(tmp_path, seed) for seed in (1, 2)]
    decoded: Counter[tuple[float, ...]] = Counter()
    decode = Network.decode

    def counted(self, prompts, *, multimask):
        decoded.update(tuple(prompt.points_xy[0].tolist()) for prompt in prompts)
        return decode(self, prompts, multimask=multimask)

    monkeypatch.setattr(Network, "decode", counted)
    result = command.measure_pruning(OPTIONS, tmp_path, truths)
    assert len(decoded) == POINTS_PER_SIDE**2
    assert set(decoded.values()) == {len(truths)}, "nothing twice, and nothing of another photo"
    every, *pruned = result.rows
    assert (every.sure_score, every.points) == (None, len(truths) * POINTS_PER_SIDE**2)
    assert (result.photos, result.facings) == (2, sum(len(truth.boxes_xyxy) for truth in truths))
    points = [every.points, *(row.points for row in pruned)]
    assert points == sorted(points, reverse=True), "less sure masks hide more"
    assert points[-1] < points[0]
    assert every.boxes >= pruned[-1].boxes > 0
    assert every.recall_50 > 0.2
    assert 0 < every.ar300 < 1


@pytest.mark.usefixtures("small_grid")
def test_the_last_line_is_json_also_where_no_facing_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    coco = {"images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}], "annotations": []}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    given = ["--photos", str(tmp_path), "--coco", str(tmp_path / "coco.json"), "--checkpoint", "facings-nano"]
    assert run(monkeypatch, *given, "--pruning") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=pytest.fail)
    assert (told["photos"], told["facings"], told["min_score"]) == (1, 0, 0.6)
    assert told["rows"][0]["recall_50"] is None
    assert len(told["rows"]) == len(command.SURE)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--prompts"], 2, "--prompts: does not go with --pruning"),
        (["--score-threshold", "0.5"], 2, "--score-threshold: does not go with --pruning"),
        (["--device", "cuda:99"], 1, "'cuda:99' was asked for"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    status: int,
    message: str,
) -> None:
    truth = shelf_in(tmp_path, 1)
    coco = {"images": [{"id": 1, "file_name": truth.file_name, "width": 400, "height": 300}], "annotations": []}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    given = ["--photos", str(tmp_path), "--coco", str(tmp_path / "coco.json"), "--pruning", *options]
    assert run(monkeypatch, *given) == status
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """Exit status of `facings evaluate`."""
    monkeypatch.setattr("sys.argv", ["facings", "evaluate", *options])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0
