from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from backend.bulk.jobs import BROKEN_PHOTOS_STATUS
from backend.errors import CommandError, OptionError
from backend.label_studio.project import Unavailable
from model.types import CheckpointError, Detections, Photo
from scripts import bulk_commands, cli, model_commands, options
from scripts.console import track

ROOT = Path(__file__).parents[1]
COMMANDS = ("serve", "demo", "preannotate", "tighten", "evaluate", "train", "export", "benchmark")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit status of the command line, run in this process."""
    monkeypatch.setattr(sys, "argv", ["facings", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_command_lists_its_subcommands() -> None:
    shown = CliRunner().invoke(cli.app, ["--help"]).output
    assert all(f"\n  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_subcommand_shows_examples_of_itself(name: str) -> None:
    result = CliRunner().invoke(cli.app, [name, "--help"])
    assert result.exit_code == 0
    _, _, examples = result.output.partition("Examples:")
    assert f"\n    facings {name}" in examples


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_use_only_options_that_exist(name: str) -> None:
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    lines = [line.split() for line in (command.help or "").splitlines() if line.strip().startswith("facings")]
    assert {word for words in lines for word in words if word.startswith("--")} <= known


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from scripts.cli import app\n"
        "for name in sys.argv[1:]: CliRunner().invoke(app, [name, '--help'])\n"
        "print(*({'torch', 'numpy', 'flask', 'model', 'sam2'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *COMMANDS]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["preannotate", "--photos", "{tmp}/none", "--out", "{tmp}/b.json"], "none': expected a folder"),
        (
            ["train", "--out", "{tmp}", "--truth", "{tmp}/a.json"],
            "--truth: expected --photos with it",
        ),
        (["train", "--out", "{tmp}", "--dev-truth", "{tmp}/a.json"], "--dev-truth: expected --dev-photos with it"),
        (["train", "--out", "{tmp}", "--photos", "{tmp}"], "--photos: expected --truth with it"),
        (["train", "--out", "{tmp}", "--truth", "{tmp}/a.json", "--photos", "{tmp}"], "a.json': cannot be read"),
        (["train", "--out", "{tmp}", "--truth", "{tmp}/empty.json", "--photos", "{tmp}"], "expected COCO"),
        (["train", "--out", "{tmp}", "--from", "{tmp}/none.safetensors"], "none.safetensors': cannot be read"),
        (["preannotate", "--photos", "{tmp}", "--out", "{tmp}/b.json"], "found none"),
        (["preannotate"], "either --photos or --project"),
        (["preannotate", "--photos", "{tmp}", "--out", "{tmp}/b.json", "--view", "3"], "--view: does not go with"),
        (["preannotate", "--project", "3", "--draw", "{tmp}"], "--draw: does not go with --project"),
        (["preannotate", "--project", "3", "--out", "{tmp}/b.json", "--format", "voc"], "--format: expected coco"),
        (["preannotate", "--project", "3"], "--url or LABEL_STUDIO_URL"),
        (["preannotate", "--project", "3", "--url", "http://127.0.0.1:9"], "--api-key or LABEL_STUDIO_API_KEY"),
        (["preannotate", "--project", "3", "--url", "http://a.example", "--api-key", "k", "--ids", "x"], "got 'x'"),
        (["preannotate", "--project", "3", "--report", "{tmp}/no/r.json"], "--report"),
        (["preannotate", "--photos", "{tmp}", "--out", "{tmp}/no/b.json"], "existing folder"),
        (["evaluate", "--photos", "{tmp}", "--truth", "{tmp}/none.json"], "No such file or directory"),
        (["evaluate", "--photos", "{tmp}", "--truth", "{tmp}/empty.json"], "expected COCO"),
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
    told: str,
) -> None:
    (tmp_path / "empty.json").write_text("")
    for variable in ("LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    assert run(monkeypatch, *(argument.format(tmp=tmp_path) for argument in arguments)) in (1, 2)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("facings: ")
    assert told.format(tmp=tmp_path) in shown.err
    assert shown.err.count("\n") == 1


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
def test_errors_are_told_without_a_traceback_and_the_status_tells_their_kind(
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


class CornerEngine:
    """One box in the corner of any photo."""

    name, version, score_threshold = "corner", "corner-1", 0.5

    def preannotate(self, photo: Photo, *, score_threshold: float | None = None, lane: str = "bulk") -> Detections:
        return Detections(boxes_xyxy=np.array([[0, 0, 4, 4]], np.float32), scores=np.array([0.9], np.float32))


@pytest.fixture
def corner_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def opened(_: object) -> Iterator[CornerEngine]:
        yield CornerEngine()

    for module in (bulk_commands, model_commands):
        monkeypatch.setattr(module, "open_engine", opened)
        monkeypatch.setattr(module, "engine_options", lambda *_: None)


@pytest.mark.parametrize(("broken", "status"), [(False, 0), (True, BROKEN_PHOTOS_STATUS)])
@pytest.mark.usefixtures("corner_engine")
def test_preannotate_writes_boxes_and_its_status_tells_of_broken_photos(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: bool, status: int
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    if broken:
        (tmp_path / "b.png").write_bytes(b"")
    out = tmp_path / "boxes.json"
    assert run(monkeypatch, "preannotate", "--photos", str(tmp_path), "--out", str(out)) == status
    assert [(row["file_name"], row["bbox"]) for row in json.loads(out.read_text())] == [("a.png", [0, 0, 4, 4])]


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
    shown = capsys.readouterr()
    assert json.loads(shown.out.splitlines()[-1])["ap"] == 1
    assert "evaluate: 1/1" in shown.err


@pytest.mark.parametrize("items", [[], [1], [1, 2, 3]])
def test_progress_passes_everything_through_and_stays_off_standard_output(
    capsys: pytest.CaptureFixture[str], items: list[int]
) -> None:
    assert list(track(items, total=len(items), label="things")) == items
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"things: {len(items)}/{len(items)}" in shown.err
