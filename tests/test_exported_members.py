"""What `import model` offers is exactly what `model.__all__` names."""

from __future__ import annotations

from types import ModuleType

import model


def test_every_public_name_of_the_model_is_in_its_all_and_exists() -> None:
    offered = {name for name, value in vars(model).items() if not isinstance(value, ModuleType)}
    assert {name for name in offered if not name.startswith("_")} - {"annotations"} == set(model.__all__)


def test_the_public_names_are_sorted_as_the_linter_sorts_them_and_named_once() -> None:
    constants = [name for name in model.__all__ if name.isupper()]
    others = [name for name in model.__all__ if not name.isupper()]
    assert model.__all__ == sorted(constants) + sorted(others)
    assert len(set(model.__all__)) == len(model.__all__)


def test_these_are_the_public_names() -> None:
    """Whoever adds one to the interface adds it here."""
    assert set(model.__all__) == {
        "BUNDLED",
        "OFFICIAL",
        "CheckpointError",
        "DeadlineExceeded",
        "Detections",
        "DeviceError",
        "DeviceMemoryError",
        "EncoderError",
        "Engine",
        "EngineError",
        "EngineOptions",
        "EngineStats",
        "Lane",
        "Mask",
        "NotReady",
        "Observer",
        "Photo",
        "Prompt",
        "Sam2Engine",
        "Stage",
        "version_of",
    }
