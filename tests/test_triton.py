"""A small encoder on a server of Triton's protocol: the repository that is written, and the client.

The server is that of tests/triton_server.py; no Triton was there.
"""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
import torch
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper
from triton_server import TritonServer
from tritonclient.grpc import model_config_pb2

from backend.reporting import to_client_error
from model import EncoderError, EngineError, NotReady
from model import triton_encoder as triton
from model.checkpoints import BUNDLED_CONFIG, Checkpoint
from model.encoder import ENCODER_INPUT, Encoded, ExportCard, output_shapes
from model.triton_encoder import TritonEncoder, find_model, write_model
from model.types import CheckpointError, ExportError
from scripts.demo.processes import free_port

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SIZE, WIDTH = 64, 8
SHAPES = output_shapes(SIZE, WIDTH, has_head=True)
CHECKPOINT = Checkpoint(name="small", config=BUNDLED_CONFIG, weights=Path("small.safetensors"), digest="5" * 64)
CARD = ExportCard(
    part="encoder",
    checkpoint=CHECKPOINT.version,
    weights_sha256=CHECKPOINT.digest,
    input_size=str(SIZE),
    mean="0 0 0",
    deviation="1 1 1",
    precision="fp32",
    opset="18",
)
NAME = "small-55555555-encoder"


def write_small_encoder(path: Path, seed: int = 0) -> None:
    """An ONNX file with the inputs and outputs of an encoder, at a size that takes no time: a convolution for each."""
    random = np.random.default_rng(seed)
    nodes, weights = [], [numpy_helper.from_array(np.array([1]), "channels")]
    for name, shape in SHAPES.items():
        stride, channels = SIZE // shape[-1], shape[0] if len(shape) == 3 else 1
        kernel = random.normal(size=(channels, 3, stride, stride)).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"{name}_kernel"))
        made = name if len(shape) == 3 else f"{name}_channel"
        nodes.append(helper.make_node("Conv", [ENCODER_INPUT, f"{name}_kernel"], [made], strides=[stride, stride]))
        if len(shape) == 2:
            nodes.append(helper.make_node("Squeeze", [made, "channels"], [name]))
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info(ENCODER_INPUT, TensorProto.FLOAT, ["tiles", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tiles", *shape]) for name, shape in SHAPES.items()],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder's file."""
    path = tmp_path_factory.mktemp("small") / "encoder.onnx"
    write_small_encoder(path)
    return path


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A model repository without models."""
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def server(small: Path, models: Path) -> Iterator[TritonServer]:
    write_model(models, small, CARD, SHAPES, most_tiles=4)
    with TritonServer(models) as running:
        yield running


def opened(server: TritonServer, timeout_s: float = 30.0) -> TritonEncoder:
    return TritonEncoder(find_model(server.address(NAME)), CHECKPOINT, CPU, timeout_s=timeout_s)


def images(tiles: int) -> torch.Tensor:
    """As the network makes them: laid out with the channels last."""
    made = torch.randn(tiles, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(tiles))
    return made.to(memory_format=torch.channels_last)


def tensors(made: Encoded) -> list[torch.Tensor]:
    return [made.embedding, *made.high_res, *(made.head or ())]


def assert_features_are_those_of(path: Path, encoder: TritonEncoder, tiles: int = 2) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = session.run(list(SHAPES), {ENCODER_INPUT: images(tiles).contiguous().numpy()})
    got = tensors(encoder(images(tiles)))
    for (name, shape), array, tensor in zip(SHAPES.items(), wanted, got, strict=True):
        assert tuple(tensor.shape) == (tiles, *shape), name
        assert np.allclose(array, tensor.numpy(), atol=1e-5), name


# -- the repository ----------------------------------------------------------------------------------------------------


def test_a_model_is_a_folder_with_its_configuration_and_its_file(small: Path, models: Path) -> None:
    files = write_model(models, small, CARD, SHAPES, most_tiles=4)
    assert [path.relative_to(models).as_posix() for path in files] == [f"{NAME}/config.pbtxt", f"{NAME}/1/model.onnx"]
    assert [path.name for path in models.iterdir()] == [NAME]
    assert files[1].read_bytes() == small.read_bytes()
    assert stat.S_IMODE((models / NAME).stat().st_mode) & 0o055, "the server may be another user"


def test_the_configuration_of_an_engine_names_tensorrt(models: Path, tmp_path: Path) -> None:
    engine = tmp_path / "encoder.engine"
    engine.write_bytes(b"a plan")
    config_path, plan = write_model(models, engine, CARD, SHAPES, most_tiles=8)
    config = text_format.Parse(config_path.read_text(), model_config_pb2.ModelConfig())
    assert (config.platform, config.max_batch_size, plan.name) == ("tensorrt_plan", 8, "model.plan")


def test_a_checkpoints_name_becomes_one_that_an_address_may_have() -> None:
    assert triton.model_name(replace(CARD, checkpoint="my weights/ü-5")) == "my_weights__-5-encoder"


def test_a_model_is_written_whole_or_not_at_all_and_replaces_its_predecessor(
    small: Path, models: Path, tmp_path: Path
) -> None:
    larger = tmp_path / "larger.onnx"
    larger.write_bytes(bytes(2 << 20))
    write_model(models, small, CARD, SHAPES, most_tiles=4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # stands for a full disk
    try:
        with pytest.raises(ExportError, match=f"{NAME}'?: cannot be written: File too large"):
            write_model(models, larger, CARD, SHAPES, most_tiles=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in models.iterdir()] == [NAME]
    assert (models / NAME / "1" / "model.onnx").read_bytes() == small.read_bytes()
    write_model(models, larger, CARD, SHAPES, most_tiles=4)
    assert [path.name for path in models.iterdir()] == [NAME]
    assert (models / NAME / "1" / "model.onnx").stat().st_size == 2 << 20


# -- the client --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [1, 3])
def test_features_are_those_of_the_file(server: TritonServer, small: Path, tiles: int) -> None:
    assert_features_are_those_of(small, opened(server), tiles)


def test_features_come_on_the_networks_device(server: TritonServer) -> None:
    elsewhere = torch.device("meta")  # stands for a GPU: it holds no numbers
    encoder = TritonEncoder(find_model(server.address(NAME)), CHECKPOINT, elsewhere)
    assert {tensor.device for tensor in tensors(encoder(images(1)))} == {elsewhere}


def test_a_proxy_in_the_environment_is_not_used(
    server: TritonServer, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    assert_features_are_those_of(small, opened(server))


def test_more_tiles_than_the_model_takes_are_sent_in_parts(server: TritonServer, small: Path) -> None:
    assert_features_are_those_of(small, opened(server), tiles=10)
    assert server.servicer.batches == [4, 4, 2]


def test_more_tiles_than_a_message_holds_are_sent_in_parts(
    server: TritonServer, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "MOST_BYTES", 3 * (3 * SIZE * SIZE * 4))
    assert_features_are_those_of(small, opened(server), tiles=4)
    assert server.servicer.batches == [3, 1]


def test_a_tile_of_facings_nano_takes_as_many_bytes_as_the_documentation_says() -> None:
    def mib(*shapes: tuple[int, ...]) -> str:
        return f"{4 * sum(map(int, map(np.prod, shapes))) / 2**20:.2f} MiB"

    text = (ROOT / "docs" / "triton.md").read_text()
    assert f"| image, sent | {mib((3, 1024, 1024))} | {mib((3, 1024, 1024))} |" in text
    nano, meta = (output_shapes(1024, width, has_head=head).values() for width, head in ((96, True), (256, False)))
    assert f"| features, received | {mib(*nano)} | {mib(*meta)} |" in text


def config_of(server: TritonServer) -> Any:
    return server.servicer.models[NAME].config


def another_checkpoint(server: TritonServer) -> None:
    config_of(server).parameters["facings_weights_sha256"].string_value = "6" * 64


def a_foreign_model(server: TritonServer) -> None:
    config_of(server).ClearField("parameters")


def a_decoder(server: TritonServer) -> None:
    config_of(server).parameters["facings_part"].string_value = "decoder"


def no_hash(server: TritonServer) -> None:
    del config_of(server).parameters["facings_file_sha256"]


def other_features(server: TritonServer) -> None:
    config_of(server).output[1].dims[1] = 32


def float16(server: TritonServer) -> None:
    config_of(server).input[0].data_type = model_config_pb2.TYPE_FP16


def no_embedding(server: TritonServer) -> None:
    del config_of(server).output[0]


def no_head(server: TritonServer) -> None:
    del config_of(server).output[3:]


def no_batches(server: TritonServer) -> None:
    config_of(server).max_batch_size = 0


REFUSED: list[tuple[Callable[[TritonServer], object], type[EngineError], str]] = [
    (another_checkpoint, CheckpointError, f"exported from {CHECKPOINT.version}, the checkpoint is"),
    (a_foreign_model, CheckpointError, "expected one that facings export wrote, got one without 'part'"),
    (no_hash, CheckpointError, "expected one that facings export wrote, got one without 'file_sha256'"),
    (a_decoder, CheckpointError, "expected an encoder, got a decoder"),
    (other_features, CheckpointError, "expected high_res_feats_0 as FP32 [-1, 1, 16, 16], got FP32 [-1, 1, 32, 16]"),
    (float16, CheckpointError, "expected image as FP32 [-1, 3, 64, 64], got FP16 [-1, 3, 64, 64]"),
    (no_embedding, CheckpointError, "expected image_embed as FP32 "),
    (no_head, CheckpointError, "expected centre_logits as FP32 [-1, 16, 16], got none"),
    (no_batches, CheckpointError, "expected a max_batch_size of at least 1, got 0"),
    (lambda server: server.servicer.models.clear(), NotReady, f"Request for unknown model: '{NAME}' is not found"),
    (lambda server: server.servicer.unready.add(NAME), NotReady, "the server does not have the model ready"),
    (lambda server: server.servicer.unready.add("server"), NotReady, "the server is not ready"),
    (lambda server: server.stop(), NotReady, "is away: "),
]


@pytest.mark.parametrize(("change", "kind", "reason"), REFUSED, ids=[reason for *_, reason in REFUSED])
def test_what_does_not_fit_is_refused_at_the_start_in_one_line(
    server: TritonServer, change: Callable[[TritonServer], object], kind: type[EngineError], reason: str
) -> None:
    change(server)
    with pytest.raises(kind) as caught:
        opened(server)
    assert reason in str(caught.value)
    assert f"encoder '{server.address(NAME)}'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["triton://", "triton://gpu:8001", "triton://gpu/model", "triton://gpu:x/model", "triton://gpu:1/a/b"]
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(CheckpointError, match=f"expected triton://host:port/model, got '{address}'"):
        find_model(address)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(CheckpointError, match="got something else"):
        find_model("triton://me:secret@gpu:8001/model")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(CheckpointError, match=r"expected the extra triton, got none: install facings\[triton\]"):
        find_model("triton://gpu:8001/model")


def shape_changed(answer: Any) -> None:
    answer.outputs[0].shape[:] = [1, 4, 4, 8]


def bytes_lost(answer: Any) -> None:
    answer.raw_output_contents[0] = answer.raw_output_contents[0][:-4]


def output_lost(answer: Any) -> None:
    answer.outputs[0].name = "other"


def type_changed(answer: Any) -> None:
    answer.outputs[0].datatype = "INT32"


def crash(answer: Any) -> None:
    raise RuntimeError("the model crashed")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shape_changed, "expected image_embed as float32 [1, 8, 4, 4], got float32 [1, 4, 4, 8]"),
        (bytes_lost, "image_embed: its bytes do not fit its shape"),
        (output_lost, "expected image_embed as float32 [1, 8, 4, 4], got none"),
        (type_changed, "expected image_embed as float32 [1, 8, 4, 4], got int32"),
        (crash, "failed: StatusCode.UNKNOWN: Exception calling application: the model crashed"),
    ],
)
def test_an_answer_that_is_no_features_is_refused_and_the_next_one_is_taken(
    server: TritonServer, small: Path, change: Callable[[Any], None], reason: str
) -> None:
    encoder, unchanged = opened(server), server.servicer.change
    server.servicer.change = change
    with pytest.raises(EncoderError) as caught:
        encoder(images(1))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    failure = to_client_error(caught.value)
    assert (failure.kind, failure.retryable) == ("engine", False)
    server.servicer.change = unchanged
    assert_features_are_those_of(small, encoder)


def test_a_server_that_is_too_slow_is_given_up_and_asked_again_later(server: TritonServer, small: Path) -> None:
    released, at_once = threading.Event(), server.servicer.before
    server.servicer.before = lambda: released.wait(60) and None
    encoder = opened(server, timeout_s=1.0)
    with pytest.raises(NotReady, match=r"is away: no answer within 1 s"):
        encoder(images(1))
    released.set()
    server.servicer.before = at_once
    assert_features_are_those_of(small, encoder)


def test_a_server_that_stops_during_a_call_is_away(server: TritonServer) -> None:
    asked, released = threading.Event(), threading.Event()

    def hold() -> None:
        asked.set()
        released.wait(60)

    server.servicer.before = hold
    encoder = opened(server)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(encoder, images(1))
        assert asked.wait(60)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        with pytest.raises(NotReady, match="is away: "):
            answer.result(60)
        released.set()
        stopping.join()


def test_a_server_that_returns_with_another_model_is_refused_until_the_first_is_back(
    small: Path, models: Path, tmp_path: Path
) -> None:
    other, port = tmp_path / "other.onnx", free_port()
    write_small_encoder(other, seed=1)
    write_model(models, small, CARD, SHAPES, most_tiles=4)
    with TritonServer(models, port) as server:
        encoder = opened(server)
        encoder(images(1))
    with pytest.raises(NotReady):
        encoder(images(1))
    write_model(models, other, CARD, SHAPES, most_tiles=4)
    with TritonServer(models, port), pytest.raises(EncoderError, match="another under its name; start Facings again"):
        encoder(images(1))
    write_model(models, small, CARD, SHAPES, most_tiles=4)
    with TritonServer(models, port):
        assert_features_are_those_of(small, encoder)


def test_tls_needs_a_certificate_that_is_known(server: TritonServer, certificate: Path, models: Path) -> None:
    pair = certificate.read_bytes()  # both in one file
    with TritonServer(models, credentials=grpc.ssl_server_credentials([(pair, pair)])) as secure:
        address = secure.address(NAME).replace("triton://", "tritons://")
        with pytest.raises(NotReady, match="is away: "):
            find_model(address)
        code = "import sys; from model.triton_encoder import find_model; print(find_model(sys.argv[1]).most_tiles)"
        done = subprocess.run(
            [sys.executable, "-c", code, address],
            env={**os.environ, "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(certificate)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.stdout == "4\n", done.stderr


def test_a_thousand_encodings_leave_the_memory_as_it_was(server: TritonServer) -> None:
    encoder, process, tile, sizes = opened(server), psutil.Process(), images(1), []
    for _ in range(5):
        for _ in range(200):
            encoder(tile)
        sizes.append(process.memory_info().rss)
    assert len(server.servicer.batches) == 1000
    assert sizes[-1] - sizes[0] < 20 * 2**20
