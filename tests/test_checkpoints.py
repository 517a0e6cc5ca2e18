"""Checkpoints by name and by path: official ones load strictly, and what is missing is said in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoints import BUNDLED, OFFICIAL, Checkpoint, excess_width, find_checkpoint, read_weights
from model.device import Placement
from model.network import Network
from model.sam2_module import FacingsModule, build_module, load_weights
from model.types import CheckpointError

CPU = Placement(device=torch.device("cpu"), autocast=None, encode_batch=1, decode_batch=16, reason="test")


@pytest.fixture(scope="module")
def tiny() -> FacingsModule:
    torch.manual_seed(0)
    return build_module(OFFICIAL["sam2.1_hiera_tiny"].config)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_weights_fit_the_official_config_strictly(name: str) -> None:
    """With the names and shapes that sam2 itself gives its network, and random content."""
    from hydra.utils import instantiate
    from sam2.build_sam import compose  # sam2's own way to its configs

    shapes = {
        key: value.shape
        for key, value in instantiate(compose(config_name=OFFICIAL[name].config).model).state_dict().items()
    }
    weights = {key: torch.rand(()).expand(shape) for key, shape in shapes.items()}
    module = build_module(OFFICIAL[name].config)
    load_weights(module, weights, name)
    assert torch.equal(module.sam.no_mem_embed, weights["no_mem_embed"])
    some = next(iter(weights))
    with pytest.raises(CheckpointError, match="1 tensors missing"):
        load_weights(module, {key: value for key, value in weights.items() if key != some}, name)
    with pytest.raises(CheckpointError, match="1 not in the network"):
        load_weights(module, weights | {"surplus": torch.zeros(1)}, name)
    with pytest.raises(CheckpointError, match="1 of another shape"):
        load_weights(module, weights | {some: torch.zeros(3, 3, 3, 3, 3)}, name)


def test_a_file_as_meta_publishes_it_loads_by_its_name(tiny: FacingsModule, tmp_path: Path) -> None:
    path = tmp_path / "sam2.1_hiera_tiny.pt"
    torch.save({"model": tiny.sam.state_dict()}, path)
    checkpoint = find_checkpoint(str(path), config=None, has_gpu=False)
    assert checkpoint.config == OFFICIAL["sam2.1_hiera_tiny"].config
    assert checkpoint.version == f"sam2.1_hiera_tiny-{checkpoint.digest[:8]}"
    network = Network(checkpoint, CPU)
    assert (network.size, network.has_proposals) == (1024, False)


def test_weights_of_another_network_are_refused(tiny: FacingsModule, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_file({"sam.a": torch.zeros(1)}, path)
    checkpoint = find_checkpoint(str(path), config="facings-nano", has_gpu=False)
    with pytest.raises(CheckpointError, match=r"does not fit its network: .* is the config the right one"):
        Network(checkpoint, CPU)


def test_the_bundled_checkpoint_is_the_default_without_a_gpu() -> None:
    checkpoint = find_checkpoint("auto", config=None, has_gpu=False)
    assert checkpoint.name == BUNDLED
    assert checkpoint.weights.stat().st_size <= 24_000_000
    assert Network(checkpoint, CPU).has_proposals


def test_the_width_by_which_boxes_are_too_wide_is_that_of_the_weights_that_it_was_measured_for(tmp_path: Path) -> None:
    bundled = find_checkpoint("auto", config=None, has_gpu=False)
    assert excess_width(bundled) == pytest.approx(0.05)
    save_file({"sam.a": torch.zeros(1)}, tmp_path / "mine.safetensors")
    mine = find_checkpoint(str(tmp_path / "mine.safetensors"), config="facings-nano", has_gpu=False)
    assert excess_width(mine) == 0


@pytest.mark.parametrize(
    ("requested", "config", "message"),
    [
        ("sam2.1_hiera_huge", None, "expected auto, facings-nano, sam2.1_hiera_tiny.* got 'sam2.1_hiera_huge'"),
        ("/nowhere/weights.pt", None, "no file at '/nowhere/weights.pt'"),
        ("{tmp}/weights.pt", None, "its network is unknown; set checkpoint_config"),
    ],
)
def test_a_checkpoint_that_cannot_be_had_is_named(
    requested: str, config: str | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(requested.format(tmp=tmp_path), config=config, has_gpu=False)


@pytest.mark.parametrize("name", ["empty.pt", "text.pt", "text.safetensors", "list.pt"])
def test_a_damaged_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"not weights at all" if "text" in name else b"")
    if name == "list.pt":
        torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match=f"checkpoint '{name}'") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    assert "mmap" not in str(caught.value)  # torch's own advice is for programmers


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"model": Runs()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError):
        read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_an_unknown_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'nowhere\.yaml'.*no such file"):
        build_module("nowhere.yaml")
    (tmp_path / "odd.yaml").write_text("trunk: 3")
    with pytest.raises(CheckpointError, match="expected a YAML file with a key 'model'"):
        build_module(str(tmp_path / "odd.yaml"))


HUB = """
from model.checkpoints import find_checkpoint
from model.types import CheckpointError
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
for requested in ("auto", "sam2.1_hiera_small"):
    try:
        print("got", find_checkpoint(requested, config=None, has_gpu=True).name)
    except CheckpointError as error:
        print("error", error)
"""


def test_a_hub_out_of_reach_costs_the_default_a_warning_and_a_name_an_error(tmp_path: Path) -> None:
    """huggingface_hub reads its environment when imported, hence another process. Offline, it gives up at once."""
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", HUB], env=environ, capture_output=True, text=True, check=True)
    lines = [line for line in ran.stdout.splitlines() if line.startswith(("WARNING NOT", "got", "error"))]
    assert len(lines) == 3, ran.stdout
    assert lines[0].startswith("WARNING NOT RUNNING SAM 2.1 LARGE")
    assert lines[1] == "got facings-nano"
    assert "sam2.1_hiera_small.pt on another machine and give its path as the checkpoint: /path/to/" in lines[2]


def test_a_checkpoints_version_follows_its_content(tmp_path: Path) -> None:
    versions = set()
    for content in (b"a", b"b", b"a"):
        path = tmp_path / "sam2.1_hiera_tiny.pt"
        path.write_bytes(content)
        checkpoint: Checkpoint = find_checkpoint(str(path), config=None, has_gpu=False)
        versions.add(checkpoint.version)
    assert len(versions) == 2
