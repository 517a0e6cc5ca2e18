"""The command line: help, options, expected failures in one line, and exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from conftest import Studio
from fakes import FakeEngine
from PIL import Image
from typer.testing import CliRunner

import model
from backend import service
from backend.bulk.service import BulkService
from backend.errors import CommandError, OptionError
from backend.label_studio.retry import Unavailable
from backend.settings import Settings
from model import EngineOptions, Lane, Sam2Engine, version_of
from model.training.options import TrainOptions
from model.types import CheckpointError, Detections, Photo
from scripts import bulk_commands, cli, model_commands, options
from scripts.console import track
from scripts.demo.demo import LABEL_CONFIG

ROOT = Path(__file__).parents[1]
STUDIO = ("--url", "http://127.0.0.1:9", "--api-key", "k")  # nothing listens there
COMMANDS = (
    *("serve", "demo", "preannotate", "watch", "worker", "redis-predict", "redis-send", "redis-recv"),
    *("sagemaker", "evaluate", "train", "pretrain", "export", "benchmark"),
)
PROJECT_COMMANDS = ("project preannotate", "project tighten", "project export")


@pytest.fixture(autouse=True)
def memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process does more than train."""
    monkeypatch.setattr("model.training.heap.keep_freed_memory", lambda: None)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit status of the command line, run in this process."""
    monkeypatch.setattr(sys, "argv", ["facings", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_command_lists_its_subcommands(arguments: list[str]) -> None:
    printed = CliRunner().invoke(cli.app, arguments).output
    assert all(f"\n  {name} " in printed for name in (*COMMANDS, "project"))


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_project_command_lists_its_subcommands(arguments: list[str]) -> None:
    printed = CliRunner().invoke(cli.app, ["project", *arguments]).output
    assert all(f"\n  {name.split()[1]} " in printed for name in PROJECT_COMMANDS)


@pytest.mark.parametrize("name", [*COMMANDS, *PROJECT_COMMANDS])
def test_each_subcommand_shows_examples_of_itself(name: str) -> None:
    result = CliRunner().invoke(cli.app, [*name.split(), "--help"])
    assert result.exit_code == 0
    _, _, examples = result.output.partition("Examples:")
    assert f"\n    facings {name}" in examples


@pytest.mark.parametrize("name", [*COMMANDS, *PROJECT_COMMANDS])
def test_examples_use_only_options_that_exist(name: str) -> None:
    command: Any = typer.main.get_command(cli.app)
    for word in name.split():
        command = command.commands[word]
    known = {option for parameter in command.params for option in parameter.opts}
    lines = [line.split() for line in (command.help or "").splitlines() if line.strip().startswith("facings")]
    assert {word for words in lines for word in words if word.startswith("--")} <= known


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from scripts.cli import app\n"
        "for name in sys.argv[1:]: CliRunner().invoke(app, [*name.split(), '--help'])\n"
        "print(*({'torch', 'numpy', 'flask', 'model', 'sam2'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *COMMANDS, *PROJECT_COMMANDS]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == ""


def test_a_dry_run_of_files_loads_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").touch()
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from scripts.cli import app\n"
        "print(CliRunner().invoke(app, ['preannotate', *sys.argv[1:], '--dry-run']).output)\n"
        "print(*({'torch', 'model', 'sam2'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "1.jpg"), "--out", str(tmp_path / "boxes.json")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == f"would box 1 photos into {tmp_path / 'boxes.json'}"


def test_the_names_of_the_package_model_come_without_torchvision() -> None:
    code = "import sys, model; print('torchvision' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "False"


def test_a_learning_curve_of_more_photos_than_a_half_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    image = {"id": 1, "file_name": "a.png", "width": 64, "height": 48}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 20, 30]}
    (tmp_path / "truth.json").write_text(json.dumps({"images": [image], "annotations": [box]}))
    truth = ["--photos", str(tmp_path), "--truth", str(tmp_path / "truth.json")]
    assert run(monkeypatch, "evaluate", *truth, "--learning-curve", "--submitted", "1") == 2
    assert "--submitted: expected at most 0, half of the photos, got 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["preannotate", "{tmp}/none", "--out", "{tmp}/b.json"], "none': expected a photo or a folder"),
        (
            ["train", "--out", "{tmp}", "--truth", "{tmp}/a.json"],
            "--truth: expected --photos with it",
        ),
        (["train", "--out", "{tmp}", "--dev-truth", "{tmp}/a.json"], "--dev-truth: expected --dev-photos with it"),
        (["train", "--out", "{tmp}", "--few-photos"], "--few-photos: expected --photos and --truth with it"),
        (["train", "--out", "{tmp}", "--photos", "{tmp}"], "--photos: expected --truth with it"),
        (["train", "--out", "{tmp}", "--label", "x"], "--label: expected a folder of label files"),
        (["train", "--out", "{tmp}", "--truth", "{tmp}/a.json", "--photos", "{tmp}"], "a.json': cannot be read"),
        (["train", "--out", "{tmp}", "--truth", "{tmp}/empty.json", "--photos", "{tmp}"], "expected COCO"),
        (["train", "--out", "{tmp}", "--from", "{tmp}/none.safetensors"], "no file at '{tmp}/none.safetensors'"),
        (["preannotate", "{tmp}", "--out", "{tmp}/b.json"], "found none"),
        (["preannotate", "{tmp}"], "--out: expected a file"),
        (["preannotate", "{tmp}", "--out", "{tmp}"], "--out '{tmp}': expected a file"),
        (["preannotate", "{tmp}", "--out", "{tmp}/b.json", "--report", "{tmp}/b.json"], "expected different paths"),
        (["preannotate", "{tmp}", "--out", "{tmp}/b.json", "--draw", "{tmp}/drawn"], "--draw"),
        (["preannotate", "{tmp}", "--out", "{tmp}/b.json", "--format", "voc"], "--format: expected coco"),
        (["preannotate", "{tmp}", "--out", "{tmp}/no/b.json"], "existing folder"),
        (["project", "preannotate", "3"], "--url or LABEL_STUDIO_URL"),
        (["project", "preannotate", "3", "--url", "http://127.0.0.1:9"], "--api-key or LABEL_STUDIO_API_KEY"),
        (["project", "preannotate", "3", *STUDIO, "--ids", "x"], "got 'x'"),
        (["project", "preannotate", "3", *STUDIO, "--ids", "5", "--view", "2"], "expected --ids or --view, got both"),
        (["project", "preannotate", "3", *STUDIO, "--shard", "9/8"], "from 1/8 to 8/8, got '9/8'"),
        (["project", "preannotate", "3", *STUDIO, "--shard", "2"], "from 1/8 to 8/8, got '2'"),
        (["project", "preannotate", "3", *STUDIO, "--actors", "2"], "expected --ray, too"),
        (["project", "preannotate", "3", *STUDIO, "--report", "{tmp}/no/r.json"], "--report"),
        (["project", "preannotate", "3", *STUDIO, "--retry-budget", "0"], "Label Studio at http://127.0.0.1:9"),
        (["project", "tighten", "3", *STUDIO, "--from", "drafts"], "--from: expected predictions"),
        (["project", "export", "3", *STUDIO], "--out: expected a file"),
        (["project", "export", "3", *STUDIO, "--out", "{tmp}/b.json", "--format", "voc"], "--format: expected coco"),
        (["evaluate", "--photos", "{tmp}", "--truth", "{tmp}/none.json"], "No such file or directory"),
        (["evaluate", "--photos", "{tmp}", "--truth", "{tmp}/empty.json"], "expected COCO"),
        (
            ["pretrain", "--trunk-weights", "{tmp}/none.pth", "--device", "cpu", "--out", "{tmp}/a"],
            "none.pth': cannot be read",
        ),
        (["pretrain", "--device", "gpu"], "device: expected"),
        (["pretrain", "--device", "cpu", "--photos", "{tmp}"], "--photos: expected --truth with it"),
        (["pretrain", "--device", "cpu", "--unlabelled", "{tmp}"], "expected photos (.apng"),
        (["export", "--out", "{tmp}/no/such"], "No such file or directory: '{tmp}/no/such'"),
        (["export", "--out", "{tmp}", "--precision", "int8"], "expected fp32 or fp16, got 'int8'"),
        (["export", "--out", "{tmp}", "--checkpoint", "none.pt"], "no file at 'none.pt'"),
        (["benchmark", "--section", "colours"], "got 'colours'"),
        (["benchmark", "--device", "gpu"], "DEVICE: expected"),
        (["benchmark", "--checkpoint", "none.pt", "--section", "sizes"], "none.pt"),
    ],
)
def test_expected_failures_are_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "empty.json").write_text("")
    for variable in ("LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    assert run(monkeypatch, *(argument.format(tmp=tmp_path) for argument in arguments)) in (1, 2, 4)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("facings: ")
    assert message.format(tmp=tmp_path) in printed.err
    assert printed.err.count("\n") == 1


def test_a_score_threshold_is_the_engines_and_so_part_of_its_version() -> None:
    assert options.engine_options("facings-nano", "cpu", 0.25).score_threshold == 0.25


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CheckpointError("no weights"), 1),
        (CommandError("no port"), 1),
        (OptionError("--ids: expected numbers"), 2),
        (Unavailable("Label Studio at http://a.example: no answer"), 4),
    ],
)
def test_errors_are_one_line_without_a_traceback_and_the_status_tells_their_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, status: int
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert run(monkeypatch) == status
    assert capsys.readouterr().err == f"facings: {error}\n"


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_wrong_option_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "evaluate", "--photo", "x") == 2
    assert "Traceback" not in capsys.readouterr().err


class CornerEngine(FakeEngine):
    """One box in the corner of any photo."""

    def preannotate(
        self,
        photo: Photo,
        *,
        score_threshold: float | None = None,
        lane: Lane = "bulk",
        deadline: float | None = None,
    ) -> Detections:
        return Detections(boxes_xyxy=np.array([[0, 0, 4, 4]], np.float32), scores=np.array([0.9], np.float32))


@pytest.fixture
def corner_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def opened_service(_: Settings) -> Iterator[BulkService]:
        yield BulkService.open(Settings(), engine=CornerEngine())

    for module in (bulk_commands, model_commands):
        monkeypatch.setattr(module, "open_bulk_service", opened_service)


@pytest.mark.parametrize(("is_broken", "status"), [(False, 0), (True, 3)])
@pytest.mark.usefixtures("corner_engine")
def test_preannotate_writes_boxes_and_its_status_tells_of_failed_photos(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_broken: bool, status: int
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    if is_broken:
        (tmp_path / "b.png").write_bytes(b"")
    out, report = tmp_path / "boxes.json", tmp_path / "report.json"
    assert run(monkeypatch, "preannotate", str(tmp_path), "--out", str(out), "--report", str(report)) == status
    written = json.loads(out.read_text())
    assert [image["file_name"] for image in written["images"]] == ["a.png"]
    assert [row["bbox"] for row in written["annotations"]] == [[0, 0, 4, 4]]
    assert len(json.loads(report.read_text())["failures"]) == is_broken


@pytest.mark.usefixtures("corner_engine")
def test_files_and_folders_go_together_and_a_limit_takes_the_first_photos(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("one.png", "store/a.png", "store/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), name[-5:-4].encode()[0] * 0x010101).save(tmp_path / name)
    out = tmp_path / "boxes.json"
    places = [str(tmp_path / "one.png"), str(tmp_path / "store")]
    assert run(monkeypatch, "preannotate", *places, "--out", str(out), "--limit", "2") == 0
    assert [image["file_name"] for image in json.loads(out.read_text())["images"]] == ["one.png", "store/a.png"]


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("expected no network to be built")

    for module in (model, model.engine, service):
        monkeypatch.setattr(module, "Sam2Engine", refuse)
    monkeypatch.setattr(model.loading, "Network", refuse)


@pytest.mark.usefixtures("no_engine")
def test_a_dry_run_of_photos_builds_no_network_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").touch()
    assert run(monkeypatch, "preannotate", str(tmp_path), "--out", str(tmp_path / "boxes.json"), "--dry-run") == 0
    assert capsys.readouterr().out == f"would box 1 photos into {tmp_path}/boxes.json\nleft out 1: 1 .txt\n"
    assert not (tmp_path / "boxes.json").exists()


@pytest.mark.usefixtures("no_engine")
def test_a_dry_run_of_a_project_builds_no_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], studio: Studio
) -> None:
    number = studio.client.create_project("dry", LABEL_CONFIG.read_text())
    studio.client.import_tasks(number, [{"image": "/data/none.jpg"}] * 2)
    access = ["--url", studio.url, "--api-key", studio.account.token]
    options = ["--checkpoint", "facings-nano", "--device", "cpu", "--dry-run"]
    assert run(monkeypatch, "project", "preannotate", str(number), *access, *options) == 0
    version = version_of(EngineOptions(checkpoint="facings-nano", device="cpu"))
    assert capsys.readouterr().out == f"would add predictions of {version} on 2 tasks of project {number} ('dry')\n"


@pytest.mark.parametrize(
    "engine_options",
    [
        EngineOptions(checkpoint="facings-nano", device="cpu"),
        EngineOptions(checkpoint="facings-nano", device="cpu", score_threshold=0.25, proposals="grid"),
    ],
)
def test_the_version_of_a_dry_run_is_that_of_the_engine(engine_options: EngineOptions) -> None:
    with closing(Sam2Engine(engine_options)) as engine:
        engine.wait_ready()
        assert version_of(engine_options) == engine.version


@pytest.mark.usefixtures("corner_engine")
def test_evaluate_ends_with_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}],
        "annotations": [{"id": 1, "image_id": 1, "bbox": [0, 0, 4, 4]}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    assert run(monkeypatch, "evaluate", "--photos", str(tmp_path), "--truth", str(tmp_path / "coco.json")) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["ap"] == 1
    assert "evaluate: 1/1" in printed.err


@pytest.mark.parametrize("items", [[], [1], [1, 2, 3]])
def test_progress_passes_everything_through_and_stays_off_standard_output(
    capsys: pytest.CaptureFixture[str], items: list[int]
) -> None:
    assert list(track(items, total=len(items), label="things")) == items
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"things: {len(items)}/{len(items)}" in printed.err


@pytest.mark.parametrize(
    ("arguments", "rate", "learns_encoder"),
    [([], 5e-4, True), (["--few-photos"], 2e-3, False), (["--few-photos", "--learning-rate", "1e-3"], 1e-3, False)],
)
def test_a_few_photos_teach_the_detector_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], rate: float, learns_encoder: bool
) -> None:
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    image = {"id": 1, "file_name": "a.png", "width": 40, "height": 20}
    content = {"images": [image], "annotations": [{"image_id": 1, "bbox": [1, 1, 9, 9]}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    asked: list[TrainOptions] = []
    monkeypatch.setattr("scripts.train.train", lambda options, score: asked.append(options))
    photos = ["--photos", str(tmp_path), "--truth", str(tmp_path / "a.json")]
    assert run(monkeypatch, "train", "--out", str(tmp_path / "run"), *photos, *arguments) == 0
    (options,) = asked
    assert (options.learning_rate, options.learn_encoder) == (rate, learns_encoder)
    assert (options.start_share > 0) != learns_encoder
