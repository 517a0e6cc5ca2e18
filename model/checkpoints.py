"""From a checkpoint's name or path to its network config, its weights and its version.

Knows files, hashes and the Hugging Face hub; does not build networks. Weights are read with safetensors or with torch's
`weights_only`, so that a file cannot run code.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from model.types import CheckpointError

log = logging.getLogger(__name__)

BUNDLED = "facings-nano"
BUNDLED_CONFIG = "facings-nano"
#: Networks of this project by name: their files in this package.
OWN_CONFIGS = {BUNDLED_CONFIG: "facings_nano.yaml"}
BUNDLED_WEIGHTS = Path(__file__).parent / "weights" / "facings-nano.safetensors"


@dataclass(frozen=True, kw_only=True)
class _Official:
    config: str
    repository: str

    @property
    def file_name(self) -> str:
        return self.repository.removeprefix("facebook/").replace("-", "_") + ".pt"


#: name → sam2's config and the hub's repository. Names are those of the files that Meta publishes.
OFFICIAL = {
    "sam2.1_hiera_tiny": _Official(
        config="configs/sam2.1/sam2.1_hiera_t.yaml", repository="facebook/sam2.1-hiera-tiny"
    ),
    "sam2.1_hiera_small": _Official(
        config="configs/sam2.1/sam2.1_hiera_s.yaml", repository="facebook/sam2.1-hiera-small"
    ),
    "sam2.1_hiera_base_plus": _Official(
        config="configs/sam2.1/sam2.1_hiera_b+.yaml", repository="facebook/sam2.1-hiera-base-plus"
    ),
    "sam2.1_hiera_large": _Official(
        config="configs/sam2.1/sam2.1_hiera_l.yaml", repository="facebook/sam2.1-hiera-large"
    ),
}
DEFAULT_WITH_GPU = "sam2.1_hiera_large"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """config: one of OWN_CONFIGS, a config of the sam2 package, or a YAML file's path.
    weights: the file. digest: sha256 of the file, hex."""

    name: str
    config: str
    weights: Path
    digest: str

    @property
    def version(self) -> str:
        """Name and hash: `<name>-<8 hex digits>`."""
        return f"{self.name}-{self.digest[:8]}"


def find_checkpoint(requested: str, *, config: str | None, has_gpu: bool) -> Checkpoint:
    """`auto`, a name or a path to a Checkpoint; official ones are downloaded on first use (resumed when cut off).

    `auto` is the bundled checkpoint, or SAM 2.1 large with a GPU; if that is unavailable, the bundled one with a
    warning. Raises CheckpointError when a named one is unavailable; it names where to fetch the file by hand.
    """
    if requested == "auto" and not has_gpu:
        requested = BUNDLED
    if requested == "auto":
        try:
            return _download(DEFAULT_WITH_GPU)
        except CheckpointError as error:
            log.warning(
                "NOT RUNNING SAM 2.1 LARGE, the default with a GPU, but the small bundled %s: %s", BUNDLED, error
            )
            requested = BUNDLED
    if requested == BUNDLED:
        return _at(BUNDLED_WEIGHTS, name=BUNDLED, config=BUNDLED_CONFIG)
    if requested in OFFICIAL:
        return _download(requested)
    return _from_path(requested, config)


def _download(name: str) -> Checkpoint:
    from huggingface_hub import hf_hub_download

    official = OFFICIAL[name]
    try:
        path = hf_hub_download(official.repository, official.file_name)
    except Exception as error:  # its client's errors changed with the HTTP library below it, and have no common base
        raise CheckpointError(
            f"checkpoint {name!r}: the Hugging Face hub is unavailable ({type(error).__name__}) and its cache has no"
            f" {official.file_name}. Fetch https://huggingface.co/{official.repository}/resolve/main/{official.file_name}"
            f" on another machine and give its path as the checkpoint: /path/to/{official.file_name}"
        ) from error
    return _at(Path(path), name=name, config=official.config)


def _from_path(requested: str, config: str | None) -> Checkpoint:
    path = Path(requested)
    if path.suffix not in (".pt", ".safetensors"):
        known = ", ".join(["auto", BUNDLED, *OFFICIAL])
        raise CheckpointError(
            f"checkpoint: expected {known} or the path of a .pt or .safetensors file, got {requested!r}"
        )
    if not path.is_file():
        raise CheckpointError(f"checkpoint: no file at {requested!r}")
    config = config or read_facts(path).get("network") or _config_by_file_name(path)
    if config is None:
        raise CheckpointError(
            f"checkpoint {path.name!r}: its network is unknown; set checkpoint_config to {BUNDLED_CONFIG!r}, a config"
            f" of sam2 such as {OFFICIAL[DEFAULT_WITH_GPU].config!r}, or to the path of a YAML file"
        )
    return _at(path, name=path.stem, config=config)


def _config_by_file_name(path: Path) -> str | None:
    return next((entry.config for entry in OFFICIAL.values() if entry.file_name == path.name), None)


def _at(path: Path, *, name: str, config: str) -> Checkpoint:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"checkpoint {name!r}: cannot read {path.name}: {error.strerror}") from error
    return Checkpoint(name=name, config=config, weights=path, digest=digest)


def read_facts(path: Path) -> dict[str, str]:
    """What `write_weights` wrote about weights; empty for a file of another kind. Raises CheckpointError."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {path.name!r}: cannot be read as safetensors: {error}") from error


def calibrated_threshold(checkpoint: Checkpoint) -> float | None:
    """The score threshold that the weights' file carries: the one that cost the fewest corrections when measured."""
    text = read_facts(checkpoint.weights).get("score_threshold")
    return None if text is None else float(text)


def excess_width(checkpoint: Checkpoint) -> float:
    """By how much of their width the boxes of the checkpoint's detector are too wide on real shelves, as the weights'
    file says; 0 where that was not measured."""
    return float(read_facts(checkpoint.weights).get("excess_width", 0))


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` or `.pt` file by name. Raises CheckpointError for anything else in it."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        if path.is_file() and not zipfile.is_zipfile(path):
            raise OSError("expected a file that torch.save or safetensors wrote, with its suffix")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint {path.name!r}: cannot be read: {first_line}") from error
    tensors = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise CheckpointError(f"checkpoint {path.name!r}: expected a dictionary of tensors, or one under 'model'")
    return tensors


def blended(
    tensors: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor], share: float
) -> dict[str, torch.Tensor]:
    """Tensors by name, moved by this share of the way towards the others of the same names; whole numbers stay."""
    return {
        name: torch.lerp(tensor.float(), others[name].float(), share) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def write_weights(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, str]) -> None:
    """Writes tensors by name as fp16 safetensors, with facts about them in the file's metadata; whole or not at all.

    Not by safetensors' save_file, which makes a file that only its owner can read. Raises OSError.
    """
    halved = {
        name: (value.half() if value.is_floating_point() else value).contiguous().cpu()
        for name, value in tensors.items()
    }
    partial = path.with_suffix(".partial")
    try:
        partial.write_bytes(save(halved, metadata=dict(facts)))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
