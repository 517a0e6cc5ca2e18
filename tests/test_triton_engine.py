"""`facings export --triton`, and an engine whose encoder is on a server of Triton's protocol.

The server is that of tests/triton_server.py; no Triton was there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import pytest
from fakes import first_boxes
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from backend.reporting import to_client_error
from model import Engine, EngineOptions, NotReady, Photo, Prompt, Sam2Engine, version_of
from model.checkpoints import BUNDLED
from model.encoder import ENCODER_INPUT, FEATURE_OUTPUTS, HEAD_OUTPUTS, ExportCard
from model.renderer.shelves import render_shelf
from model.triton_encoder import find_model
from scripts.demo.processes import LOOPBACK, Server, free_port

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Nano:
    """What `facings export --triton` has written and printed."""

    encoder: Path
    models: Path
    printed: str

    @property
    def name(self) -> str:
        return str(json.loads(self.printed.splitlines()[-1])["triton"])


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Nano:
    folder = tmp_path_factory.mktemp("nano")
    command = [sys.executable, "-m", "scripts.cli", "export", "--checkpoint", BUNDLED, "--precision", "fp32"]
    command += ["--out", str(folder / "exported"), "--triton", str(folder / "models"), "--most-tiles", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return Nano(encoder=folder / "exported" / "encoder.onnx", models=folder / "models", printed=done.stdout)


def test_the_command_writes_a_repository_whose_configuration_is_that_of_the_onnx_file(nano: Nano) -> None:
    path = nano.models / nano.name / "config.pbtxt"
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    session = onnxruntime.InferenceSession(path.parent / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    described = [(one.name, one.data_type, [*one.dims]) for one in (*config.input, *config.output)]
    values = [*session.get_inputs(), *session.get_outputs()]
    assert described == [(value.name, model_config_pb2.TYPE_FP32, value.shape[1:]) for value in values]
    assert {value.type for value in values} == {"tensor(float)"}
    assert {value.shape[0] for value in values} == {"tiles"}
    assert [value.name for value in values] == [ENCODER_INPUT, *FEATURE_OUTPUTS, *HEAD_OUTPUTS]
    assert (config.name, config.platform, config.max_batch_size) == (nano.name, "onnxruntime_onnx", 3)
    assert config.HasField("dynamic_batching")
    card = ExportCard.read(onnx_ir.load(nano.encoder).metadata_props, nano.encoder)
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    assert {f"facings_{name}": value for name, value in card.strings().items()}.items() <= parameters.items()
    assert nano.name == f"{card.checkpoint}-encoder"


def test_the_command_prints_the_files_and_the_address(nano: Nano) -> None:
    assert f"ENCODER=triton://host:8001/{nano.name}\n" in nano.printed
    assert f":8001/{nano.name} facings serve\n" in (ROOT / "docs" / "triton.md").read_text()
    assert str(nano.models / nano.name / "config.pbtxt") in nano.printed
    assert str(nano.models / nano.name / "1" / "model.onnx") in nano.printed


def engine_with(encoder: str) -> Engine:
    engine = Sam2Engine(EngineOptions(checkpoint=BUNDLED, device="cpu", encoder=encoder, cache_bytes=0))
    engine.wait_ready(120)
    return engine


def serving(nano: Nano, port: int) -> Server:
    """The server as a process of its own, which can be killed."""
    command = [sys.executable, str(ROOT / "tests" / "triton_server.py"), str(nano.models), str(port)]
    log = nano.models.parent / "server.log"
    server = Server("triton", command, environ=os.environ, cwd=ROOT, log=log)
    server.wait_until(lambda: is_ready(f"triton://{LOOPBACK}:{port}/{nano.name}"), timeout_s=120, what="ready")
    return server


def is_ready(address: str) -> bool:
    try:
        return find_model(address).most_tiles > 0
    except NotReady:
        return False


def test_boxes_and_clicks_are_those_of_the_file_and_a_server_that_was_killed_is_used_again_when_it_is_back(
    nano: Nano,
) -> None:
    photo, port = Photo(pixels=render_shelf(21, (1600, 1200)).photo_rgb), free_port()
    address = f"triton://{LOOPBACK}:{port}/{nano.name}"
    local = engine_with(str(nano.encoder))
    wanted = local.preannotate(photo, score_threshold=0.5)
    clicks = [
        Prompt(points_xy=box.reshape(2, 2).mean(0)[None], is_foreground=np.array([True]))
        for box in wanted.boxes_xyxy[:10]
    ]
    wanted_clicks = first_boxes(local.refine(photo, clicks))
    local.close()
    assert len(wanted) > 50

    with serving(nano, port):
        remote = engine_with(address)
        got = remote.preannotate(photo, score_threshold=0.5)
        assert np.allclose(got.boxes_xyxy, wanted.boxes_xyxy, atol=0.1)
        assert np.allclose(first_boxes(remote.refine(photo, clicks)), wanted_clicks, atol=0.1)
        assert remote.version != local.version
        assert remote.version == version_of(EngineOptions(checkpoint=BUNDLED, device="cpu", encoder=address))

    for call in (lambda: remote.preannotate(photo), lambda: remote.refine(photo, clicks)):
        with pytest.raises(NotReady, match="is away: ") as caught:
            call()
        failure = to_client_error(caught.value)
        assert (failure.kind, failure.retryable) == ("not_ready", True)
    assert remote.state == "ready"

    with serving(nano, port):
        again = remote.preannotate(photo, score_threshold=0.5)
        assert np.allclose(again.boxes_xyxy, wanted.boxes_xyxy, atol=0.1)
    remote.close()


def test_an_engine_without_its_server_fails_with_the_reason() -> None:
    address = f"triton://{LOOPBACK}:{free_port()}/model"
    engine = Sam2Engine(EngineOptions(checkpoint=BUNDLED, device="cpu", encoder=address))
    with pytest.raises(NotReady, match=f"encoder '{address}' is away: "):
        engine.wait_ready(120)
    assert engine.state == "failed"
    engine.close()


def test_the_command_names_the_extra_that_it_lacks(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['tritonclient'] = None\n"
        "sys.argv = ['facings', 'export', '--out', sys.argv[1], '--triton', sys.argv[1] + '/models']\n"
        "from scripts.cli import main; main()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "--triton: expected the extra triton, got none: install facings[triton]" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
