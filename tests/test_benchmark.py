"""`facings benchmark`: each section measures, prints and reports."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor

from backend.errors import CommandError
from backend.label_studio.label_config import parse_label_config
from backend.label_studio.prompts import prompts_from_context
from model import DeviceError, EngineOptions
from model.checkpoints import find_checkpoint
from model.stages import UNOBSERVED, Observer
from model.tiling import Tile
from model.types import Detections, Photo, Prompt
from scripts.measure import benchmark as command
from scripts.measure import clicks_beside_training, timing
from scripts.measure import engine as benchmark_engine
from scripts.measure import floor as benchmark_floor
from scripts.measure import parity as benchmark_parity
from scripts.measure import server as benchmark_http
from scripts.measure import upstream as benchmark_upstream


class SleepyEngine:
    """Counts what it is asked for; a photo takes a little longer than a click."""

    version = "sleepy-1"

    def __init__(self, observer: Observer = UNOBSERVED) -> None:
        self.observer = observer
        self.photos: Counter[str] = Counter()
        self.clicked: list[str] = []

    def preannotate(self, photo: Photo) -> Detections:
        self.photos[photo.digest] += 1
        time.sleep(0.02)
        self.observer.stage("encode", 0.02)
        return Detections(boxes_xyxy=np.array([[0, 0, 9, 9]]), scores=np.ones(1))

    def refine(self, photo: Photo, prompts: list[Prompt]) -> Detections:
        self.clicked.append(photo.digest)
        self.observer.stage("decode", 0.01)
        return Detections(boxes_xyxy=np.zeros((len(prompts), 4)), scores=np.ones(len(prompts)))


@pytest.fixture
def plain_shelf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Photos of noise: rendering a shelf takes a second."""

    class Noise:
        photo_rgb = np.random.default_rng(0).integers(0, 255, (1224, 1632, 3), np.uint8)

    monkeypatch.setattr(timing, "render_shelf", lambda seed, size_wh: Noise)
    monkeypatch.setattr(benchmark_engine, "SECONDS_BETWEEN_CLICKS", 0.001)
    monkeypatch.setattr(benchmark_engine, "IDLE_CLICKS", 5)


@pytest.mark.parametrize(
    ("seconds", "median_s", "p95_s"), [([2.0], 2, 2), ([1.0, 3.0], 2, 2.9), (list(range(101)), 50, 95)]
)
def test_timing_is_median_and_95th_percentile(seconds: list[float], median_s: float, p95_s: float) -> None:
    measured = timing.timing(seconds)
    assert (measured.median_s, measured.p95_s, measured.calls) == pytest.approx((median_s, p95_s, len(seconds)))


@pytest.mark.usefixtures("plain_shelf")
def test_photos_have_the_size_asked_for_and_none_comes_twice() -> None:
    photos = list(itertools.islice(timing.shelf_photos(0.5, seed=0), 4))
    assert len({photo.digest for photo in photos}) == 4
    width, height = photos[0].size_wh
    assert width * height == pytest.approx(0.5e6, rel=0.01)


@pytest.mark.usefixtures("plain_shelf")
def test_known_clicks_are_on_photos_seen_before_and_new_ones_are_not() -> None:
    stages = benchmark_engine.Stages()
    engine = SleepyEngine(observer=stages)
    observed = benchmark_engine.ObservedEngine(engine=engine, stages=stages)
    (result,) = benchmark_engine.measure_sizes(observed, megapixels=[0.1], repeat=2)
    assert (result.preannotate.calls, result.click_new.calls, result.click_known.calls) == (2, 2, 2)
    known, new = engine.clicked[0::2], engine.clicked[1::2]
    assert set(known) <= set(engine.photos)
    assert not set(new) & set(engine.photos)
    assert result.facings == 1
    assert list(result.stages_s) == ["read", "tile", "encode", "propose", "decode", "merge"]
    assert result.stages_s["read"] > 0
    assert result.stages_s["encode"] == 0.02
    assert result.stages_s["decode"] == 0, "clicks are not part of pre-annotation"


@pytest.mark.usefixtures("plain_shelf")
def test_what_a_stage_queued_on_a_gpu_counts_there_and_no_other_measured_call_waits_for_it() -> None:
    stages = benchmark_engine.Stages()
    engine = SleepyEngine(observer=stages)
    waited_for: list[str] = []

    def finish() -> None:
        waited_for.append(list(engine.photos)[-1])
        time.sleep(0.05)

    observed = benchmark_engine.ObservedEngine(engine=engine, stages=stages, finish=finish)
    result = benchmark_engine.measure_size(observed, 0.1, repeat=2)
    assert result.stages_s["encode"] >= 0.02 + 0.05
    assert result.preannotate.calls == 2
    assert len(set(waited_for)) == 3, "in each round, the warm-up too"
    timed = set(engine.photos) - set(waited_for)
    assert timed == set(engine.clicked[0::2])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(DeviceError, match="'cuda' was asked for; torch sees 0 GPUs"):
        command.benchmark(
            EngineOptions(device="cuda"), [command.Section.generator], repeat=1, requests=1, megapixels=[2]
        )


def test_sizes_reach_the_sections_that_measure_several_and_what_memory_does_not_hold_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclass(frozen=True)
    class Measured:
        megapixels: float

        @property
        def double(self) -> float:
            return 2 * self.megapixels

    def measured(*_: object, megapixels: Sequence[float], **__: object) -> Iterator[Measured]:
        for size in megapixels:
            if size > 10:
                raise torch.OutOfMemoryError("tried to allocate 13 GiB")
            yield Measured(size)

    for module, name in (
        (benchmark_upstream, "upstream"),
        (benchmark_upstream, "generator"),
        (benchmark_parity, "parity"),
    ):
        monkeypatch.setattr(module, f"measure_{name}", measured)
    printed: list[Measured] = []
    silent = {section: (measure, printed.append) for section, (measure, _) in command.SECTIONS.items()}
    monkeypatch.setattr(command, "SECTIONS", silent)
    sections = [command.Section.upstream, command.Section.generator, command.Section.parity]
    command.benchmark(EngineOptions(device="cpu"), sections, repeat=1, requests=1, megapixels=[3, 5, 16])
    *lines, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert all(report[section] == [{"megapixels": size, "double": 2 * size} for size in (3, 5)] for section in sections)
    assert [result.megapixels for result in printed] == [3, 5] * 3
    assert lines.count("  out of memory after 2 sizes: tried to allocate 13 GiB") == 3


def test_every_section_is_measured_and_printed_by_something() -> None:
    assert {*command.ENGINE_SECTIONS, *command.SECTIONS} == {*command.Section}


@pytest.mark.usefixtures("plain_shelf")
def test_sections_that_ask_the_engine_share_one_and_the_report_has_its_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[SleepyEngine] = []

    @contextmanager
    def sleepy(_: EngineOptions) -> Iterator[benchmark_engine.ObservedEngine]:
        stages = benchmark_engine.Stages()
        opened.append(SleepyEngine(observer=stages))
        yield benchmark_engine.ObservedEngine(engine=opened[-1], stages=stages)

    monkeypatch.setattr(benchmark_engine, "observed_engine", sleepy)
    sections = [command.Section.lanes, command.Section.sizes]
    command.benchmark(EngineOptions(device="cpu"), sections, repeat=1, requests=1, megapixels=[0.1])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(opened) == 1
    assert list(report) == ["cpus", "machine", "version", "sizes", "lanes", "peak_memory"]
    assert report["version"] == "sleepy-1"
    assert list(report["sizes"][0]) == [field.name for field in fields(benchmark_engine.SizeResult)]
    assert report["lanes"]["p95_ratio"] == report["lanes"]["busy"]["p95_s"] / report["lanes"]["idle"]["p95_s"]


@pytest.mark.usefixtures("plain_shelf")
def test_clicks_go_on_for_as_long_as_the_bulk_work_runs() -> None:
    engine = SleepyEngine()
    result = benchmark_engine.measure_engine_lanes(engine, photos=3)
    assert result.idle.calls == 5
    assert result.busy.calls > 5
    assert result.bulk_s >= 3 * 0.02
    assert len(engine.photos) == 1 + 3
    assert len(set(engine.clicked)) == 1


@pytest.mark.usefixtures("plain_shelf")
def test_clicks_go_on_beside_a_real_training() -> None:
    result = clicks_beside_training.measure_clicks_beside_training(SleepyEngine(), "cpu", minutes=0.05)
    assert (result.idle.calls, result.bulk) == (5, "a training")
    assert result.bulk_s >= 3
    assert result.busy.calls > 5


@pytest.mark.usefixtures("plain_shelf")
def test_a_training_that_fails_is_no_measurement() -> None:
    with pytest.raises(CommandError, match="exit status 0, got 1"):
        clicks_beside_training.measure_clicks_beside_training(SleepyEngine(), "nothing", minutes=0.05)


@pytest.mark.usefixtures("plain_shelf")
def test_a_failure_of_the_bulk_work_is_not_lost() -> None:
    def bulk() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        benchmark_engine.measure_lanes(lambda: None, bulk, name="a failure")


def test_growth_compares_the_end_with_the_first_sample_of_full_caches() -> None:
    curve = [(0, 100.0), (100, 300.0), (200, 400.0), (300, 390.0), (400, 420.0)]
    assert benchmark_http.MemoryResult(curve=curve, unexpected={}).growth == pytest.approx(1.05)


def test_a_round_of_requests_holds_every_kind_as_often_as_planned() -> None:
    assert Counter(benchmark_http._mixed_kinds()) == benchmark_http.MIX


@pytest.mark.parametrize("region", [benchmark_http.keypoint(50, 50), benchmark_http.rectangle(10, 20)])
def test_the_prompts_sent_are_ones_that_the_backend_understands(region: dict[str, Any]) -> None:
    config = parse_label_config(benchmark_http.LABEL_CONFIG)
    assert len(prompts_from_context({"result": [region]}, config)) == 1


@pytest.mark.usefixtures("plain_shelf")
def test_the_photo_server_gives_ever_different_photos_and_a_damaged_one() -> None:
    with benchmark_http.photo_server(0.05) as address:
        first, again, other, damaged = (
            requests.get(f"{address}/{name}.jpg", timeout=5).content for name in ("1", "1", "2", "damaged")
        )
    assert first == again != other
    assert first.startswith(b"\xff\xd8")
    assert not damaged.startswith(b"\xff\xd8")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # in sam2
def test_upstreams_generator_and_both_ways_of_the_engine_answer_in_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four points, a photo of one tile and random weights: that all four run, warmed up, not how fast."""
    asked: list[str] = []
    for method in ("set_image", "predict"):
        called = getattr(SAM2ImagePredictor, method)
        monkeypatch.setattr(
            SAM2ImagePredictor,
            method,
            lambda *args, name=method, call=called, **named: asked.append(name) or call(*args, **named),
        )
    (result,) = benchmark_upstream.measure_generator(
        "cpu", repeat=1, config=benchmark_upstream.UPSTREAM_CONFIG, megapixels=[0.25], points_per_side=2
    )
    timings = (result.upstream, result.upstream_bf16, result.grid, result.detector)
    assert all(measured.calls == 1 and measured.median_s > 0 for measured in timings)
    assert result.masks == 6, "half of twelve"
    assert result.boxes > 0
    assert result.megapixels == 0.25
    assert list(result.peak_mb) == ["upstream", "upstream_bf16", "grid", "detector"]
    assert all(0 <= peak < 8000 for peak in result.peak_mb.values())
    assert result.peak_mb["upstream"] > 10
    warm_up, timed = ["set_image", "predict"], ["set_image"]  # the generator passes by the public predict
    assert asked == [*warm_up, *warm_up, *timed, *timed]


@pytest.mark.skipif(not benchmark_upstream.RESET_PEAK.exists(), reason="the kernel counts the peak on Linux only")
def test_the_memory_of_a_call_is_the_most_that_it_took_at_once_beyond_what_was_there() -> None:
    kept = np.ones(50 << 20, np.uint8)
    with benchmark_upstream._peak_beyond_mb(torch.device("cpu")) as peaks:
        for _ in range(2):
            taken = np.ones(200 << 20, np.uint8)
            del taken
    assert peaks == [pytest.approx(200, rel=0.1)]
    assert kept.any()


def test_where_no_memory_is_counted_none_is_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmark_upstream, "RESET_PEAK", tmp_path / "none")
    with benchmark_upstream._peak_beyond_mb(torch.device("cpu")) as peaks:
        pass
    assert peaks == []


def test_the_printed_table_of_the_generator_has_size_speed_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    second = timing.timing([1.0])
    benchmark_upstream.print_generator(
        benchmark_upstream.GeneratorResult(
            config="any.yaml",
            megapixels=4.0,
            masks=6,
            boxes=7,
            upstream=timing.timing([3.0]),
            upstream_bf16=second,
            grid=second,
            detector=second,
            peak_mb={"upstream": 900.4, "upstream_bf16": 700, "grid": 500, "detector": 300},
        )
    )
    title, *rows = capsys.readouterr().out.splitlines()
    assert "a photo of 4 MP, 6 masks" in title
    assert ["3.0 times as fast" in row for row in rows] == [False, True, True, True]
    assert re.findall(r"at most (\d+) MB", "\n".join(rows)) == ["900", "700", "500", "300"]


@pytest.mark.parametrize(
    ("boxes", "wanted", "lines"),
    [
        ([], [], []),
        ([[0, 0, 10, 10]], [[0, 0, 0, 0]], []),
        ([[0, 0, 10, 10], [0, 0, 30, 60]], [[0, 0, 10, 20], [0, 0, 30, 60]], [(0, 1, 0.5), (48, 1, 1.0), (0, 2, 0.75)]),
    ],
    ids=["nothing", "upstream found nothing", "a half and a whole"],
)
def test_likeness_is_given_by_size_in_the_networks_input_and_of_all_sizes_last(
    boxes: list[list[float]], wanted: list[list[float]], lines: list[tuple[int, int, float]]
) -> None:
    shape = np.array(boxes, np.float32).reshape(-1, 4), np.array(wanted, np.float32).reshape(-1, 4)
    tile = Tile(left=0, top=0, side=512, size=1024, level=0)
    found = benchmark_parity.likeness(*shape, tile)
    assert [(one.least_px, one.count, one.median) for one in found] == lines


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # in sam2
def test_boxes_are_compared_with_upstreams_on_photos_of_each_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark_parity, "FACINGS_PX", (80.0,))
    monkeypatch.setattr(benchmark_parity, "BOXES", 12)
    options = EngineOptions(checkpoint="facings-nano", device="cpu")
    smaller, larger = benchmark_parity.measure_parity(options, megapixels=[0.5, 2])
    for result in (smaller, larger):
        assert result.full_resolution[-1].count == 12
        assert result.full_resolution[-1].share_099 >= 0.99
        assert all(result.precisions[name][-1].median >= 0.99 for name in ("bfloat16", "float16"))
    assert smaller.fast[-1].median < larger.fast[-1].median, "upstream's pixels are smaller then"
    assert larger.fast[-1].median >= 0.98
    benchmark_parity.print_parity(larger)
    assert "square photos of 2 MP" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "config"),
    [
        (EngineOptions(), "configs/sam2.1/sam2.1_hiera_t.yaml"),
        (EngineOptions(checkpoint="facings-nano"), "configs/sam2.1/sam2.1_hiera_t.yaml"),
        (EngineOptions(checkpoint="sam2.1_hiera_large"), "configs/sam2.1/sam2.1_hiera_l.yaml"),
        (
            EngineOptions(checkpoint="own.pt", checkpoint_config="configs/sam2.1/sam2.1_hiera_s.yaml"),
            "configs/sam2.1/sam2.1_hiera_s.yaml",
        ),
        (EngineOptions(checkpoint="own.pt", checkpoint_config="own.yaml"), "configs/sam2.1/sam2.1_hiera_t.yaml"),
    ],
)
def test_upstream_runs_the_network_of_the_checkpoint_where_it_is_one_of_metas(
    options: EngineOptions, config: str
) -> None:
    assert benchmark_upstream.compared_config(options) == config


def test_random_weights_stand_for_metas_checkpoints_only() -> None:
    with (
        pytest.raises(CommandError, match=r"sam2.1_hiera_tiny.*'facings-nano'"),
        timing.without_weights(EngineOptions(checkpoint="facings-nano")),
    ):
        pass
    with timing.without_weights(EngineOptions(checkpoint="sam2.1_hiera_tiny", max_detections=7)) as options:
        assert find_checkpoint(options.checkpoint, config=options.checkpoint_config, has_gpu=False).config
        assert options.max_detections == 7


def test_the_floor_of_the_bundled_checkpoint_is_below_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_floor, "MATRIX", 512)
    monkeypatch.setattr(benchmark_floor, "COPIED_BYTES", 1 << 24)
    result = benchmark_floor.measure_floor(EngineOptions(checkpoint="facings-nano", device="cpu"), repeat=1)
    encode, one, many = result.pieces
    assert encode.flops > many.flops > 10 * one.flops > 0
    assert all(piece.floor_s > 0 and piece.measured_s > 0 for piece in result.pieces)
