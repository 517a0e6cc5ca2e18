"""What annotators submit becomes a better detector for their project: its photos, versions, threshold and page."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learners import IMAGE, SIZE_WH, shelves, small_disk, write_tuned

from backend.errors import CommandError, SettingsError
from backend.learning.collect import facings_of
from backend.learning.forgetting import FIRST_SHELF, MOST_FORGOTTEN, SHELF_WH, forget_less, rendered_ap
from backend.learning.learning import new_since_the_last_version
from backend.learning.store import Figures, KnownPhoto, Progress, ProjectStore, State, Version, learned_settings
from backend.learning.training import Trained, fine_tune, keys_kept_aside, roll_back, split
from backend.settings import Settings
from backend.transports.project_page import project_page
from model.checkpoints import BUNDLED_WEIGHTS, read_facts, read_weights
from model.renderer.shelves import render_shelf
from model.training.samples import LabelledPhoto

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def few_shelves(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rendered shelf tells here what was forgotten."""
    monkeypatch.setattr("backend.learning.forgetting.SHELVES", 1)


def known_photo(number: int, **changes: Any) -> KnownPhoto:
    facts: dict[str, Any] = {
        "key": f"{number}.image",
        "annotation": f"{number} now",
        "file": f"{number}.jpg",
        "size_wh": SIZE_WH,
        "boxes_xyxy": np.float32([[1, 2, 30, 40], [50, 2, 80, 40]]),
        "submitted_at": f"2026-11-{number % 28 + 1:02}T10:00:00Z",
    }
    return KnownPhoto(**{**facts, **changes})


def figures(corrections: float) -> Figures:
    return Figures(corrections=corrections, ap=0.4, ap50=0.8, score_threshold=0.45)


def version(number: int, *, before: float = 60.0, after: float = 50.0) -> Version:
    return Version(
        number=number,
        parent="facings-nano",
        weights=f"project-3-v{number}.safetensors",
        sha256=hashlib.sha256(b"weights").hexdigest(),
        learned=16,
        kept_aside=4,
        learned_from=f"digest {number}",
        minutes=8.0,
        before=figures(before),
        after=figures(after),
        is_promoted=after < before,
        made_at="2026-11-27T10:00:00+00:00",
    )


@pytest.fixture
def store(tmp_path: Path) -> ProjectStore:
    found = ProjectStore.of(tmp_path, "3.1795244969")
    assert found is not None
    return found


# Which photos are kept aside


@pytest.mark.parametrize("count", [5, 8, 20, 100])
def test_a_fifth_is_kept_aside_and_four_at_least(count: int) -> None:
    aside = keys_kept_aside([f"{number}.image" for number in range(count)])
    assert len(aside) == max(4, count / 5)


def test_a_photo_that_was_learned_from_is_never_measured_on_when_others_come(store: ProjectStore) -> None:
    learned: set[str] = set()
    for count in range(5, 60):
        parts = split([known_photo(number) for number in range(count)], store)
        learned |= {photo.key for photo in parts.learned}
        assert not learned & {photo.key for photo in parts.kept_aside}


def test_too_few_photos_are_refused_with_their_number(store: ProjectStore) -> None:
    with pytest.raises(CommandError, match="expected at least 5 submitted photos with boxes, got 4"):
        split([known_photo(number) for number in range(4)], store)


# The project's folder


def test_what_is_kept_comes_back(store: ProjectStore, tmp_path: Path) -> None:
    photo = known_photo(1, missed=1, false=2, to_drag=3)
    store.write_photos([photo, known_photo(0)])
    (tmp_path / "new.safetensors").write_bytes(b"weights")
    store.add(version(1), tmp_path / "new.safetensors")
    store.change(serving=1, score_threshold=0.4)
    again = ProjectStore.find(tmp_path, 3)
    assert again is not None
    assert again.key == "3.1795244969"
    assert again.state() == State(serving=1, score_threshold=0.4)
    assert again.versions() == [version(1)]
    assert again.weights(version(1)).read_bytes() == b"weights"
    assert again.is_whole(1)
    again.weights(version(1)).write_bytes(b"weigh")
    assert not again.is_whole(1)
    assert not again.is_whole(2)
    first, second = again.photos()
    assert (first.key, second.corrections) == ("0.image", 6)
    assert np.array_equal(second.boxes_xyxy, photo.boxes_xyxy)


def test_photos_that_are_no_longer_listed_are_deleted(store: ProjectStore) -> None:
    for number in range(2):
        store.photo_path(f"{number}.jpg").parent.mkdir(parents=True, exist_ok=True)
        store.photo_path(f"{number}.jpg").touch()
    store.write_photos([known_photo(1)])
    assert [path.name for path in store.photo_path("").iterdir()] == ["1.jpg"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"number": 1}'])
def test_damaged_files_count_as_missing(store: ProjectStore, content: str) -> None:
    for name in ("state.json", "photos.json", "versions/1/version.json"):
        (store.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (store.folder / name).write_text(content)
    assert (store.photos(), store.versions()) == ([], [])
    assert store.state() == State()


def test_one_process_at_a_time_changes_a_project(store: ProjectStore) -> None:
    with store.locked():
        assert store.is_locked()
        with pytest.raises(CommandError, match="project 3: a training of it goes on already"), store.locked():
            pass
    assert not store.is_locked()


def test_the_newest_project_with_an_id_is_found(tmp_path: Path) -> None:
    for key in ("3.100", "3.200", "33.300"):
        found = ProjectStore.of(tmp_path, key)
        assert found is not None
        found.change(serving=None)
    newest = ProjectStore.find(tmp_path, 3)
    assert newest is not None
    assert newest.key == "3.200"
    assert ProjectStore.find(tmp_path, 4) is None
    assert ProjectStore.of(tmp_path, "../../etc") is None


def test_another_version_serves_after_a_rollback(store: ProjectStore, tmp_path: Path) -> None:
    (tmp_path / "new.safetensors").write_bytes(b"weights")
    for number in (1, 2):
        store.add(version(number), tmp_path / "new.safetensors")
    roll_back(store, 1)
    assert store.state().serving == 1
    settings = Settings(state_dir=str(tmp_path), label_studio_url="http://ls", label_studio_api_key="key")
    learned = learned_settings(settings, store.key)
    assert (learned.detector, learned.score_threshold) == (str(store.weights(version(1))), 0.45)
    assert learned_settings(replace(settings, score_threshold=0.9), store.key).score_threshold == 0.9
    roll_back(store, None)
    assert learned_settings(settings, store.key) == settings
    with pytest.raises(CommandError, match=r"expected one of its versions \(1, 2\), got 7"):
        roll_back(store, 7)


# Annotations


def rectangle(**value: Any) -> dict[str, Any]:
    return {
        "type": "rectanglelabels", "from_name": IMAGE.boxes.from_name, "to_name": IMAGE.image_name,
        "value": {"x": 10, "y": 10, "width": 10, "height": 20, "rotation": 0, **value},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("region", "boxes"),
    [
        (rectangle(), [[64, 48, 128, 144]]),
        (rectangle(x=-5), [[0, 48, 32, 144]]),
        (rectangle(rotation=90), [[0, 48, 64, 112]]),
        (rectangle(width=0), []),
        (rectangle(width=1e-9), []),
        (rectangle(x=float("nan")), []),
        (rectangle(x="10"), []),
        (rectangle(x=200), []),
        ({**rectangle(), "value": None}, []),
        ({**rectangle(), "from_name": "prompt"}, []),
        ({**rectangle(), "to_name": "other"}, []),
        ({"type": "polygonlabels", "from_name": IMAGE.boxes.from_name, "value": {"points": [[1, 1]]}}, []),
        ("no region", []),
    ],
    ids=["a box", "over the edge", "rotated", "empty", "a slip", "NaN", "text", "outside", "no value", "a prompt",
         "another image", "a polygon", "nonsense"],
)  # fmt: skip
def test_of_an_annotation_the_boxes_count_and_the_rest_is_passed_over(region: Any, boxes: list[list[float]]) -> None:
    found = facings_of([region, rectangle(x=50, y=50)], IMAGE, SIZE_WH)
    assert found.tolist() == pytest.approx(np.array([*boxes, [320, 240, 384, 336]]))


def test_new_photos_count_also_when_older_ones_are_left_out_for_them(store: ProjectStore, tmp_path: Path) -> None:
    before, after = [known_photo(number) for number in range(7)], [known_photo(number) for number in range(2, 9)]
    assert new_since_the_last_version(store, before) == 7
    (tmp_path / "new.safetensors").write_bytes(b"weights")
    store.add(replace(version(1), learned=3, kept_aside=4), tmp_path / "new.safetensors")
    store.change(learned=tuple(photo.key for photo in before[:3]), kept_aside=tuple(photo.key for photo in before[3:]))
    assert new_since_the_last_version(store, before) == 0
    assert new_since_the_last_version(store, after) == 2


# Training


def trained(folder: Path, corrections: list[float], *, run: Path | None = None) -> tuple[Trained, list[float]]:
    """A short training whose checkpoints are measured as these figures say, one after the other, the last one again and
    again; and the figures that were asked for."""
    learned = [LabelledPhoto(path=path, boxes_xyxy=shelf.boxes_xyxy) for path, shelf in shelves(folder, [5])]
    measured: list[float] = []

    def measure(_: Path) -> Figures:
        measured.append(corrections[min(len(measured), len(corrections) - 1)])
        return figures(measured[-1])

    found = fine_tune(
        run or folder / "run",
        learned,
        BUNDLED_WEIGHTS,
        measure,
        origin=BUNDLED_WEIGHTS,
        max_pixels=10**8,
        minutes=0.1,
        device="cpu",
        show=lambda _: None,
        report=lambda _: None,
    )
    return found, measured


@pytest.mark.parametrize(
    ("corrections", "is_better"),
    [([60, 50, 55], True), ([60, 59, 58.5], False), ([60, 70, 80], False)],
    ids=["better, though not at the end", "better by less than the margin", "worse"],
)
def test_the_best_weights_are_kept_and_serve_only_if_they_are_better(
    tmp_path: Path, corrections: list[float], is_better: bool
) -> None:
    found, measured = trained(tmp_path, corrections)
    assert len(measured) >= 2
    assert (found.before.corrections, found.after.corrections) == (measured[0], min(measured))
    assert found.is_better == is_better
    assert found.weights.is_file()


def test_weights_that_were_moved_back_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[Path, Path]] = []

    def forget_less(learned: Path, start: Path, *, origin: Path, device: str) -> float:
        moved.append((start, origin))
        return 0.3

    monkeypatch.setattr("backend.learning.training.forget_less", forget_less)
    found, measured = trained(tmp_path, [60, 50, 55])
    assert moved == [(BUNDLED_WEIGHTS, BUNDLED_WEIGHTS)]
    assert found.after.corrections == measured[-1] == 55


@pytest.mark.parametrize(("noise", "is_moved"), [(0.0, False), (4.0, True)], ids=["the same", "much forgotten"])
def test_weights_that_forgot_rendered_shelves_are_moved_back_until_little_is_forgotten(
    tmp_path: Path, noise: float, is_moved: bool
) -> None:
    learned = write_tuned(tmp_path / "learned.safetensors", noise=noise)
    before, facts = read_weights(learned), read_facts(learned)
    assert forget_less(learned, BUNDLED_WEIGHTS, origin=learned, device="cpu") == 0, "no worse than the first ones"
    share = forget_less(learned, BUNDLED_WEIGHTS, origin=BUNDLED_WEIGHTS, device="cpu")
    after, start = read_weights(learned), read_weights(BUNDLED_WEIGHTS)
    assert (share > 0) == is_moved
    assert read_facts(learned) == facts
    for name, tensor in after.items():
        assert torch.allclose(tensor.float(), torch.lerp(before[name].float(), start[name].float(), share), atol=1e-2)
    shelf = render_shelf(FIRST_SHELF, SHELF_WH)
    own, first = (rendered_ap(weights, [shelf], device="cpu") for weights in (learned, BUNDLED_WEIGHTS))
    assert own >= first - MOST_FORGOTTEN


@pytest.mark.parametrize(
    "megabytes", [8, 20, 40], ids=["the weights to begin with", "those after some steps", "what a run goes on from"]
)
def test_a_disk_that_gets_full_ends_a_training_and_one_with_room_goes_on(tmp_path: Path, megabytes: int) -> None:
    with small_disk(tmp_path / "disk", kilobytes=megabytes << 10) as disk:
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            trained(tmp_path, [60, 50], run=disk / "run")
        assert not list(disk.rglob("*.partial"))
        shutil.copytree(disk / "run", tmp_path / "run")
    found, _ = trained(tmp_path, [60, 50])
    assert found.is_better


# The page


def test_the_page_shows_what_was_corrected_and_the_versions(store: ProjectStore, tmp_path: Path) -> None:
    corrected = [known_photo(number, missed=1, false=0, to_drag=0) for number in range(12)]
    store.write_photos([*corrected, known_photo(20)])
    (tmp_path / "new.safetensors").write_bytes(b"weights")
    store.add(version(1), tmp_path / "new.safetensors")
    store.add(version(2, before=50, after=55), tmp_path / "new.safetensors")
    store.change(serving=1)
    page = project_page(store, learn_every=10, engine_version="<b>")
    assert "50 corrections per 100 facings" in " ".join(page.split())
    assert page.count("<circle") == 12
    assert "60.0 → 50.0" in page
    assert "no better, kept aside" in page
    assert "&lt;b&gt;" in page
    assert "Nothing is trained now. A training begins after every 10 submitted photos" in page
    with store.locked():
        store.report(Progress(stage="learning", photos=8, minutes_left=3.2))
        assert "A training goes on: learning from 8 photos, about 3 min left." in project_page(
            store, learn_every=0, engine_version="x"
        )


def test_the_page_of_a_project_without_photos_says_so(store: ProjectStore) -> None:
    page = project_page(store, learn_every=0, engine_version="x")
    assert "0 photos were submitted" in page
    assert "None yet" in page


# Settings


def test_a_state_dir_needs_a_label_studio() -> None:
    with pytest.raises(SettingsError, match="STATE_DIR: expected LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY"):
        Settings(state_dir="/srv/facings")
