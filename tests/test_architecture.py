"""Imports point one way: scripts → backend → model."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("model", "backend", "scripts")

LABEL_STUDIO = {"label_studio", "label_studio_ml", "label_studio_sdk", "label_studio_tools"}
HTTP = {"flask", "gunicorn", "http", "httpx", "prometheus_client", "requests", "urllib3", "werkzeug"}

# Comparisons with upstream's own predictor and generator live in the benchmark.
IMPORTERS_OF_SAM2 = {
    "model/sam2_module.py",
    "scripts/measure/parity.py",
    "scripts/measure/upstream.py",
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_roots(source: str) -> set[str]:
    """First names of everything imported anywhere in a module, inside functions too."""
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add("." if node.level else (node.module or "").split(".")[0])
    return roots


def reads_environment(source: str) -> bool:
    """Whether a module names os.environ or os.getenv, however imported."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            return any(alias.name in ("environ", "environb", "getenv") for alias in node.names)
    return False


def offenders(package: str, forbidden: set[str]) -> Iterator[str]:
    for path in sources(package):
        for root in sorted(imported_roots(path.read_text()) & forbidden):
            yield f"{path.relative_to(ROOT)} imports {root}"


@pytest.mark.parametrize(
    ("source", "roots"),
    [
        ("", set()),
        ("import os.path, json as j", {"os", "json"}),
        ("def f():\n    from backend.errors import FacingsError", {"backend"}),
        ("from . import boxes", {"."}),
    ],
)
def test_imports_are_seen_wherever_they_stand(source: str, roots: set[str]) -> None:
    assert imported_roots(source) == roots


@pytest.mark.parametrize("source", ["import os\nx = os.environ['A']", "from os import getenv", "os.getenv('A')"])
def test_reading_the_environment_is_seen(source: str) -> None:
    assert reads_environment(source)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_modules_to_look_at(package: str) -> None:
    assert sources(package)


@pytest.mark.parametrize(("package", "above"), [("model", {"backend", "scripts"}), ("backend", {"scripts"})])
def test_no_package_imports_one_above_it(package: str, above: set[str]) -> None:
    assert list(offenders(package, above)) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_are_absolute_and_never_of_tests(package: str) -> None:
    assert list(offenders(package, {".", "tests", "conftest", "fakes"})) == []


def test_the_model_knows_neither_label_studio_nor_http() -> None:
    assert list(offenders("model", LABEL_STUDIO | HTTP)) == []


def test_only_one_module_of_the_model_imports_sam2() -> None:
    importers = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in sources(package)
        if "sam2" in imported_roots(path.read_text())
    }
    assert importers == IMPORTERS_OF_SAM2


@pytest.mark.parametrize("package", ["model", "backend"])
def test_only_the_settings_read_the_environment(package: str) -> None:
    readers = {p.relative_to(ROOT).as_posix() for p in sources(package) if reads_environment(p.read_text())}
    assert readers <= {"backend/settings.py"}
