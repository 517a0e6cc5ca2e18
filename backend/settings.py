"""The settings: one table of names, defaults and help texts; the only reader of the environment.

Knows nothing of what the settings do. A variable that is unset or empty takes its default. Wrong values stop the start
with one line that names every wrong variable, what was expected and what was found. The help texts become the settings'
page of the documentation.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from backend.errors import SettingsError

if TYPE_CHECKING:
    from model import EngineOptions

MIB = 1 << 20


class _Wrong(Exception):
    """What was expected instead of the text at hand."""


def _text(text: str) -> str:
    return text


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,18}", text, re.ASCII) or not low <= int(text) <= high:
            raise _Wrong(f"a whole number from {low} to {high}")
        return int(text)

    return parse


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise _Wrong(f"a number from {low:g} to {high:g}")
        return value

    return parse


def _flag(text: str) -> bool:
    value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
    if value is None:
        raise _Wrong("true or false")
    return value


def _log_level(text: str) -> str:
    if text.lower() not in ("debug", "info", "warning", "error"):
        raise _Wrong("debug, info, warning or error")
    return text.lower()


def _proposals(text: str) -> str:
    if text.lower() not in ("auto", "learned", "grid"):
        raise _Wrong("auto, learned or grid")
    return text.lower()


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text, re.ASCII):
        raise _Wrong("auto, cpu, cuda or cuda:N")
    return text


def _url(text: str) -> str:
    expected = _Wrong("an http or https address without a query, such as https://labels.example.com")
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises on one that is no number
    except ValueError:
        raise expected from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise expected
    return text.rstrip("/")


def _folder(text: str) -> str:
    if not Path(text).is_dir():
        raise _Wrong("an existing folder")
    return text


def _file(text: str) -> str:
    if not Path(text).is_file():
        raise _Wrong("an existing file")
    return text


def _encoder(text: str) -> str:
    if "://" in text:
        if not _is_triton_address(text):
            raise _Wrong("triton://host:port/model, or tritons:// with TLS")
        return text
    path = Path(text)
    if not path.is_dir() and not (path.is_file() and path.suffix in (".onnx", ".engine")):
        raise _Wrong("an existing folder, .onnx or .engine file that facings export wrote, or triton://host:port/model")
    return text


def _object_stores(text: str) -> tuple[str, ...]:
    prefixes = tuple(text.replace(",", " ").split())
    if not all(re.match(r"(s3|gs|azure|azure-blob)://", prefix) for prefix in prefixes):
        raise _Wrong("addresses that begin with s3://, gs:// or azure://, with commas between them")
    return prefixes


def _is_triton_address(text: str) -> bool:
    """The engine judges it as well, but only when it loads; to import it here would take seconds."""
    found = re.fullmatch(r"tritons?://(?:[\w.-]+|\[[\da-fA-F:.]+\]):(\d{1,5})/[\w.-]+", text, re.ASCII)
    return found is not None and 1 <= int(found[1]) <= 65_535


def _detector(text: str) -> str:
    path = Path(text)
    if not (path.is_file() and path.suffix in (".pt", ".safetensors")):
        raise _Wrong("an existing .safetensors or .pt file with weights of facings-nano")
    return text


def _secret(text: str) -> str:
    if not text.isascii() or not text.isprintable():
        raise _Wrong("printable ASCII characters")
    return text


def _setting(default: Any, help: str, parse: Callable[[str], Any]) -> Any:
    return field(default=default, repr=parse is not _secret, metadata={"help": help, "parse": parse})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one process. The variable of a field is its name in upper case; secrets stay out of `repr`."""

    checkpoint: str = _setting(
        "auto",
        "The weights that find the facings: `facings-nano`, `sam2.1_hiera_tiny`, `sam2.1_hiera_small`, "
        "`sam2.1_hiera_base_plus`, `sam2.1_hiera_large`, or a path to a file (`.pt`, `.safetensors`). "
        "`auto`: `sam2.1_hiera_large` with a GPU, else `facings-nano`.",
        _text,
    )
    checkpoint_config: str | None = _setting(
        None,
        "Network config of a checkpoint given by path: the name of one in the package `sam2`, or a YAML file.",
        _text,
    )
    device: str = _setting(
        "auto", "Where the network runs: `auto`, `cpu`, `cuda` or `cuda:N`. `auto`: a GPU if there is one.", _device
    )
    encoder: str | None = _setting(
        None,
        "The exported encoder of this checkpoint that runs instead of torch, as `facings export` wrote it: an `.onnx` "
        "file on a CPU, an `.engine` file on a GPU, or the folder of either. `triton://host:port/model`: on a Triton "
        "server; needs the extra `triton`; `tritons://` with TLS. Unset: torch.",
        _encoder,
    )
    detector: str | None = _setting(
        None,
        "Weights of `facings-nano`, such as fine-tuned ones, that find the facings: in place of `facings-nano`, or as "
        "the detector whose boxes are SAM 2's prompts. Unset: the bundled ones.",
        _detector,
    )
    proposals: str = _setting(
        "auto",
        "How pre-annotation finds candidates. `learned`: with a detector, the checkpoint's own or, for SAM 2, that of "
        "`facings-nano`, whose boxes are SAM 2's prompts. `grid`: with a grid of points, as SAM 2's own mask generator "
        "does; this finds objects of any kind and takes far longer. `auto`: `learned`, and for SAM 2 the grid on "
        "photos where the detector finds nothing.",
        _proposals,
    )
    cache_mb: int = _setting(
        1024,
        "Size of the cache of photo features, in MiB. Clicks on a photo in the cache are answered faster.",
        _integer(0, 1 << 20),
    )
    max_device_mb: int = _setting(
        0,
        "Limit of the GPU memory used, in MiB: for weights, cached features (a quarter at most) and work. The driver "
        "needs a few hundred MiB more. A batch that does not fit is split in two. 0: no limit.",
        _integer(0, 1 << 20),
    )
    score_threshold: float | None = _setting(
        None,
        "Boxes with a lower score are left out, 0 to 1. Unset: the checkpoint's own threshold. "
        "`model_score_threshold` in a label config overrides it.",
        _number(0, 1),
    )
    max_detections: int = _setting(
        1000, "Limit of the number of boxes for one photo; those with the highest scores are kept.", _integer(1, 10_000)
    )
    host: str = _setting("0.0.0.0", "Address that the server listens on.", _text)  # noqa: S104  Label Studio is elsewhere
    port: int = _setting(9090, "Port that the server listens on.", _integer(1, 65_535))
    grpc_port: int | None = _setting(
        None,
        "Port of gRPC; needs the extra `grpc`. Unset: no gRPC. `facings serve --grpc` sets 50051.",
        _integer(1, 65_535),
    )
    grpc_tls_cert: str | None = _setting(
        None, "File with the certificate chain (PEM) that gRPC shows its clients. Unset: no TLS.", _file
    )
    grpc_tls_key: str | None = _setting(None, "File with the key (PEM) that belongs to `GRPC_TLS_CERT`.", _file)
    threads: int = _setting(32, "How many requests are answered at the same time.", _integer(4, 1000))
    deadline_s: float = _setting(
        90.0,
        "Seconds after which `/predict` answers with the tasks that are done. Label Studio gives up after 100 s, and "
        "then stores nothing.",
        _number(1, 3600),
    )
    label_studio_url: str | None = _setting(
        None,
        "Address of Label Studio as this server reaches it. Unset: the one that Label Studio sends when it connects.",
        _url,
    )
    label_studio_api_key: str | None = _setting(
        None,
        "Access token for the photos, personal or legacy; needs `LABEL_STUDIO_URL`. Unset: the token that Label Studio "
        "sends when it connects, which works only while legacy tokens are enabled there.",
        _secret,
    )
    basic_auth_user: str | None = _setting(
        None, "User name that every client must send, except to `/webhook`, where Label Studio sends none.", _secret
    )
    basic_auth_pass: str | None = _setting(None, "Password that belongs to `BASIC_AUTH_USER`.", _secret)
    allow_private_addresses: bool = _setting(
        True,
        "Whether photos may come from private networks. Link-local addresses, where clouds keep their metadata, are "
        "always refused.",
        _flag,
    )
    local_files_root: str | None = _setting(
        None,
        "Folder of Label Studio's local files storage, if it is mounted on this machine too. "
        "Unset: such photos are read from Label Studio.",
        _folder,
    )
    text_detector: str | None = _setting(
        None,
        "Zero-shot detector that finds objects by their names for `facings sagemaker`: the name of a checkpoint on the "
        "Hugging Face hub, such as `IDEA-Research/grounding-dino-tiny` or `google/owlv2-base-patch16-ensemble`, or a "
        "folder with one. Needs the extra `text`. Unset: no objects by name.",
        _text,
    )
    catalogue: str | None = _setting(
        None, "JSON file that names pictures of products by room and category, for `facings sagemaker`.", _file
    )
    object_stores: tuple[str, ...] | None = _setting(
        None,
        "What may be read in object stores with this machine's credentials: addresses like `s3://shelves/2026`, with "
        "commas between them; `s3://` alone is all of S3. Needs the extra `stores`. Unset: nothing; such photos are "
        "read through Label Studio, where they stand in a task.",
        _object_stores,
    )
    max_photo_bytes: int = _setting(100_000_000, "Largest photo file that is read, in bytes.", _integer(1, 1 << 40))
    max_photo_pixels: int = _setting(
        100_000_000, "Largest photo that is decoded, in pixels (width × height).", _integer(1, 1 << 31)
    )
    photo_cache_mb: int = _setting(
        256,
        "Size of the cache of decoded photos, in MiB. A click on a photo in the cache does not read it again.",
        _integer(0, 1 << 20),
    )
    fetch_timeout_s: float = _setting(20.0, "Seconds within which a photo must be read.", _number(0.1, 600))
    max_request_mb: int = _setting(64, "Largest body of a request, or message of a broker, in MiB.", _integer(1, 4096))
    max_label_config_chars: int = _setting(
        1 << 18, "Longest label config that is read, in characters.", _integer(1000, 1 << 26)
    )
    state_dir: str | None = _setting(
        None,
        "Folder where projects keep what was learned from their annotators' corrections. Needs `LABEL_STUDIO_URL` and "
        "`LABEL_STUDIO_API_KEY`. Unset: nothing is learned.",
        _text,
    )
    learn_every: int = _setting(
        0,
        "Learn from a project's corrections whenever so many photos were submitted since the last time. 0: only when "
        "*Start Training* is pressed, or by `facings project learn`.",
        _integer(0, 1_000_000),
    )
    learn_minutes: float = _setting(12.0, "Longest training of a project's detector, in minutes.", _number(0.05, 1440))
    log_level: str = _setting("info", "Lowest level that is logged: `debug`, `info`, `warning` or `error`.", _log_level)

    def __post_init__(self) -> None:
        if self.label_studio_api_key is not None and self.label_studio_url is None:
            raise SettingsError(
                "LABEL_STUDIO_URL: expected the address that LABEL_STUDIO_API_KEY belongs to, so that the key goes "
                "nowhere else, got none"
            )
        if self.state_dir is not None and self.label_studio_api_key is None:
            raise SettingsError("STATE_DIR: expected LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY next to it, got none")
        if (self.basic_auth_user is None) != (self.basic_auth_pass is None):
            given, missing = ("USER", "PASS") if self.basic_auth_pass is None else ("PASS", "USER")
            raise SettingsError(f"BASIC_AUTH_{missing}: expected a value next to BASIC_AUTH_{given}, got none")
        if (self.grpc_tls_cert is None) != (self.grpc_tls_key is None):
            given, missing = ("KEY", "CERT") if self.grpc_tls_cert is None else ("CERT", "KEY")
            raise SettingsError(f"GRPC_TLS_{missing}: expected a file next to GRPC_TLS_{given}, got none")
        if self.basic_auth_user is not None and ":" in self.basic_auth_user:
            raise SettingsError("BASIC_AUTH_USER: expected a name without a colon, which basic auth cannot carry")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """The settings that `environ`, by default the environment of this process, asks for. Raises SettingsError."""
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        wrong: list[str] = []
        for setting in SETTINGS:
            text = environ.get(setting.name, "").strip()
            if not text:
                continue
            try:
                values[setting.name.lower()] = setting.parse(text)
            except _Wrong as expected:
                actual = "something else" if setting.is_secret or "@" in text else repr(text)
                wrong.append(f"{setting.name}: expected {expected}, got {actual}")
        if wrong:
            raise SettingsError("; ".join(wrong))
        return cls(**values)

    def child_environ(self) -> dict[str, str]:
        """The environment of a child process that is to have these settings: this process's, with them over it."""
        own = {setting.name: getattr(self, setting.name.lower()) for setting in SETTINGS}
        texts = {name: "" if value is None else _as_text(value) for name, value in own.items()}
        return {**os.environ, **texts}

    def engine_options(self) -> EngineOptions:
        """The part that the engine takes."""
        from model import EngineOptions

        return EngineOptions(
            checkpoint=self.checkpoint,
            checkpoint_config=self.checkpoint_config,
            device=self.device,
            encoder=self.encoder,
            detector=self.detector,
            proposals=self.proposals,  # type: ignore[arg-type]  # one of three, see _proposals
            cache_bytes=self.cache_mb * MIB,
            max_device_mb=self.max_device_mb,
            score_threshold=self.score_threshold,
            max_detections=self.max_detections,
        )


def _as_text(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A row of the table. name: the environment variable. help: Markdown. parse: refuses a wrong text."""

    name: str
    default: Any
    help: str
    parse: Callable[[str], Any]

    @property
    def is_secret(self) -> bool:
        """Whether the value must stay out of messages and logs."""
        return self.parse is _secret


SETTINGS: tuple[Setting, ...] = tuple(
    Setting(name=f.name.upper(), default=f.default, help=f.metadata["help"], parse=f.metadata["parse"])
    for f in fields(Settings)
)
