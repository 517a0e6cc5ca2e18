"""A gRPC server of KServe's protocol, version 2, that serves a model repository of ONNX files as Triton does.

What Triton has beyond the protocol is there as far as its clients see it: the model's configuration, whose dimensions
lack the batch's, and a largest batch. As a program: `python triton_server.py FOLDER PORT`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

LOOPBACK = "127.0.0.1"  # not from scripts: as a program, this finds only what is beside it


@dataclass(kw_only=True, eq=False)
class Model:
    """config: a ModelConfig. session: of ONNX Runtime."""

    config: Any
    session: Any


def read_repository(folder: Path) -> dict[str, Model]:
    """The models of a repository by name. Raises text_format.ParseError for what the published schema does not have."""
    models = {}
    for path in sorted(folder.glob("[!.]*/config.pbtxt")):
        config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        assert config.name == path.parent.name
        assert config.platform == "onnxruntime_onnx"
        session = onnxruntime.InferenceSession(path.parent / "1" / "model.onnx", providers=["CPUExecutionProvider"])
        models[config.name] = Model(config=config, session=session)
    return models


@dataclass(kw_only=True, eq=False)
class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """models: by name. unready: what is there, but not ready: names, or "server". batches: tiles of each inference.
    change: what becomes of an answer before it is sent. before: is called with each inference."""

    models: dict[str, Model]
    unready: set[str] = field(default_factory=set)
    batches: list[int] = field(default_factory=list)
    change: Callable[[Any], None] = lambda answer: None
    before: Callable[[], None] = lambda: None

    def ServerReady(self, request: Any, context: grpc.ServicerContext) -> Any:
        return service_pb2.ServerReadyResponse(ready="server" not in self.unready)

    def ModelReady(self, request: Any, context: grpc.ServicerContext) -> Any:
        return service_pb2.ModelReadyResponse(ready=request.name in self.models.keys() - self.unready)

    def ModelConfig(self, request: Any, context: grpc.ServicerContext) -> Any:
        return service_pb2.ModelConfigResponse(config=self._model(request.name, context).config)

    def ModelMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        model = self._model(request.name, context)

        def tensor(one: Any) -> Any:
            data_type = model_config_pb2.DataType.Name(one.data_type).removeprefix("TYPE_")
            return service_pb2.ModelMetadataResponse.TensorMetadata(
                name=one.name, datatype=data_type, shape=[-1, *one.dims]
            )

        return service_pb2.ModelMetadataResponse(
            name=request.name,
            versions=["1"],
            platform=model.config.platform,
            inputs=map(tensor, model.config.input),
            outputs=map(tensor, model.config.output),
        )

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        model = self._model(request.model_name, context)
        self.before()
        (image,), (content,) = request.inputs, request.raw_input_contents
        images = np.frombuffer(content, np.float32).reshape(image.shape)
        self.batches.append(len(images))
        if len(images) > model.config.max_batch_size:
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"[request id: <id_unknown>] inference request batch-size must be <= {model.config.max_batch_size} for"
                f" '{model.config.name}'",
            )
        names = [output.name for output in request.outputs]
        answer = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1")
        for name, array in zip(names, model.session.run(names, {image.name: images}), strict=True):
            answer.outputs.add(name=name, datatype="FP32", shape=array.shape)
            answer.raw_output_contents.append(array.tobytes())
        self.change(answer)
        return answer

    def _model(self, name: str, context: grpc.ServicerContext) -> Model:
        if name not in self.models:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{name}' is not found")
        return self.models[name]


class TritonServer:
    """A running server of a repository. port: 0 takes a free one. credentials: for TLS."""

    def __init__(self, folder: Path, port: int = 0, credentials: grpc.ServerCredentials | None = None) -> None:
        self.servicer = Servicer(models=read_repository(folder))
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._server = grpc.server(ThreadPoolExecutor(4), options=[*options, ("grpc.so_reuseport", 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self.servicer, self._server)
        where = f"{LOOPBACK}:{port}"
        add = self._server.add_insecure_port
        self.port = add(where) if credentials is None else self._server.add_secure_port(where, credentials)
        self._server.start()

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def address(self, model: str) -> str:
        return f"triton://{LOOPBACK}:{self.port}/{model}"

    def stop(self) -> None:
        """Ends calls in progress as well."""
        self._server.stop(grace=0).wait()


if __name__ == "__main__":
    with TritonServer(Path(sys.argv[1]), int(sys.argv[2])):
        threading.Event().wait()
