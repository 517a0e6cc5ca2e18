"""What the import contracts in pyproject.toml cannot say: who reads the environment, who imports sam2, how long."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("model", "backend", "label_config", "scripts")
MAX_LINES = 450

# Two sections of the benchmark compare boxes and times with upstream's own predictor and generator.
IMPORTERS_OF_SAM2 = {"model/sam2_module.py", "scripts/measure/parity.py", "scripts/measure/upstream.py"}


def sources(*packages: str) -> dict[str, str]:
    """The text of every module, by its path in the repository."""
    paths = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def imported_roots(source: str) -> set[str]:
    """First names of everything imported anywhere in a module, inside functions too."""
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or ".").split(".")[0])
    return roots


def reads_environment(source: str) -> bool:
    """Whether a module names os.environ or os.getenv, however imported."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            return any(alias.name in ("environ", "environb", "getenv") for alias in node.names)
    return False


@pytest.mark.parametrize(
    ("source", "roots"),
    [
        ("", set()),
        ("import os.path, json as j", {"os", "json"}),
        ("def f():\n    from backend.errors import FacingsError", {"backend"}),
    ],
)
def test_imports_are_found_wherever_they_stand(source: str, roots: set[str]) -> None:
    assert imported_roots(source) == roots


@pytest.mark.parametrize("source", ["import os\nx = os.environ['A']", "from os import getenv", "os.getenv('A')"])
def test_reading_the_environment_is_found(source: str) -> None:
    assert reads_environment(source)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_modules_to_check(package: str) -> None:
    assert sources(package)


def test_only_three_modules_import_sam2() -> None:
    importers = {path for path, source in sources(*PACKAGES).items() if "sam2" in imported_roots(source)}
    assert importers == IMPORTERS_OF_SAM2


def test_in_model_and_backend_only_the_settings_read_the_environment() -> None:
    readers = {path for path, source in sources("model", "backend").items() if reads_environment(source)}
    assert readers == {"backend/settings.py"}


def test_no_module_has_more_than_450_lines() -> None:
    lengths = {path: len(source.splitlines()) for path, source in sources(*PACKAGES).items()}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_every_package_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.rpartition("/")[0].replace("/", ".") for path in sources(*PACKAGES)}
    assert folders - set(project["tool"]["setuptools"]["packages"]) == set()
