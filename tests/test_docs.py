"""The documents are true: commands and options, generated pages, links, metrics, errors, examples that run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import stat
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from fakes import FakeEngine, painted_photo
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.serving import make_server

from backend.errors import FacingsError
from backend.metrics import STATES, Metrics, Outcome, ProjectFigures
from backend.settings import SETTINGS, Settings
from backend.transports import http, label_studio_app
from model.renderer.shelves import render_shelf
from model.stages import Stage
from scripts import generate_docs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
CHANGELOG = ROOT / "CHANGELOG.md"
PAGES = [README, *sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("model/**/*.md"))]
COMMANDS = generate_docs.commands()
GROUPS = {name.rpartition(" ")[0] for name in COMMANDS} - {""}
SETTING_NAMES = {setting.name for setting in SETTINGS}
OTHER_PROGRAMS = {
    *(".", "curl", "docker", "echo", "export", "grpcurl", "hf", "printf", "redis-cli", "tritonserver", "unzip", "uv")
}
README_LINES = 200


def by_path(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.relative_to(ROOT).as_posix())


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def section(path: Path, heading: str) -> str:
    """What stands in a page under a heading of the second level."""
    _, found, rest = path.read_text().partition(f"\n## {heading}\n")
    assert found, f"{path.name} has no heading {heading!r}"
    return rest.partition("\n## ")[0]


def command_lines(text: str) -> list[list[str]]:
    """The words of every command in the shell blocks, and of every `make …` and `facings …` within the text."""
    lines = []
    for block in code_blocks(text, "sh"):
        lexer = shlex.shlex(block.replace("\\\n", " ").replace("\n", "\n;"), posix=True, punctuation_chars=";|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= {";", "|"}:
                lines += [words] if words else []
                words = []
            else:
                words.append(word)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = (span.split() for span in re.findall(r"`([^`\n]+\n?[^`\n]*)`", prose))
    lines += [words for words in spans if set(words) & {"make", "facings"} and (len(words) > 1 or words == ["make"])]
    return lines


def mistake(words: list[str]) -> str | None:
    """What is wrong with a command in a document, or None."""
    words = words.copy()
    while re.match(r"[A-Z_]+=", words[0]):
        if words[0].partition("=")[0] not in SETTING_NAMES:
            return f"{words[0]} is no setting"
        words.pop(0)
    match words:
        case ["make", *arguments]:
            makefile = (ROOT / "Makefile").read_text()
            for argument in arguments:
                name, is_variable, _ = argument.partition("=")
                if not re.search(rf"^{re.escape(name)}" + (r" \?=" if is_variable else ":"), makefile, re.MULTILINE):
                    return f"the Makefile has no {name!r}"
        case ["facings", "--help"] | ["facings", "…"]:
            return None
        case ["facings", *rest]:
            return _mistake_of_facings(rest)
        case ["python", "-m", module]:
            path = ROOT / (module.replace(".", "/") + ".py")
            return None if path.is_file() else f"there is no module {module}"
        case ["sh", script]:
            return None if (ROOT / script).is_file() else f"there is no {script}"
        case [program, *_]:
            return None if program in OTHER_PROGRAMS else f"{program!r} is not known here"
    return None


def _mistake_of_facings(rest: list[str]) -> str | None:
    if " ".join(rest).removesuffix(" …") in GROUPS:
        return None
    for length in (2, 1):
        name = " ".join(rest[:length])
        if name in COMMANDS:
            known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
            unknown = {word for word in rest[length:] if word.startswith("-")} - known
            return f"facings {name} has no {unknown}" if unknown else None
    return f"facings has no {' '.join(rest[:2])!r}"


def anchors(text: str) -> set[str]:
    """The names under which a Markdown page's headings can be linked to."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("```sh\nmake a \\\n  B=c\nd | e\n```", [["make", "a", "B=c"], ["d"], ["e"]]),
        ("```sh\nprintf 'a\nb' |\n  curl -d @-\n```", [["printf", "a\n;b"], ["curl", "-d", "@-"]]),
        ("Run `make x`, not `y z`, nor `facings`.", [["make", "x"]]),
        ("Run `make\nx`, or `make y`.", [["make", "x"], ["make", "y"]]),
    ],
)
def test_commands_are_found_wherever_they_stand(text: str, words: list[list[str]]) -> None:
    assert command_lines(text) == words


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("make rum", "'rum'"),
        ("make run PHOTO=x", "'PHOTO'"),
        ("facings train --fast", "--fast"),
        ("facings import", "'import'"),
        ("facings project import", "'project import'"),
        ("COLOUR=red make run", "COLOUR=red"),
        ("rm -r x", "'rm'"),
        ("python -m scripts.none", "scripts.none"),
        ("sh scripts/none.sh", "scripts/none.sh"),
    ],
)
def test_commands_that_do_not_exist_are_found(line: str, message: str) -> None:
    assert message in (mistake(line.split()) or "")


@by_path(PAGES)
def test_commands_in_documents_exist_with_their_options(path: Path) -> None:
    lines = command_lines(path.read_text())
    assert [f"{shlex.join(words)}: {wrong}" for words in lines if (wrong := mistake(words))] == []


@by_path([*PAGES, CHANGELOG])
def test_relative_links_and_pictures_lead_somewhere(path: Path) -> None:
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            lost.append(link)
    assert lost == []


@by_path(PAGES)
def test_modules_and_tests_that_documents_name_exist(path: Path) -> None:
    names = re.findall(r"\b((?:model|backend|scripts|tests)/[\w/]+\.(?:py|sh|yaml))\b", path.read_text())
    assert [name for name in names if not (ROOT / name).is_file()] == []


def test_modules_in_the_map_of_the_architecture_exist() -> None:
    lost, parents = [], {0: ROOT}
    for indent, name in re.findall(r"^( *)([\w/]+(?:\.py|/)) ", section(DOCS / "architecture.md", "The house"), re.M):
        parents[len(indent) + 2] = parents[len(indent)] / name
        if not parents[len(indent) + 2].exists():
            lost.append(name)
    assert lost == []


@by_path(PAGES)
def test_every_page_has_one_title(path: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"^# ", prose, re.MULTILINE)) == 1


def test_the_readme_is_short_and_links_every_page() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= README_LINES
    linked = {link.partition("#")[0] for link in re.findall(r"\]\((docs/[^)\s]+)\)", text)}
    assert {path.relative_to(ROOT).as_posix() for path in DOCS.glob("*.md")} <= linked


@pytest.mark.parametrize(
    ("name", "page"), [("settings.md", generate_docs.settings_page), ("cli.md", generate_docs.cli_page)]
)
def test_generated_pages_are_current(name: str, page: Any) -> None:
    assert (DOCS / name).read_text() == page(), "run make docs"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_stands_in_the_readme(name: str) -> None:
    assert f"`facings {name}`" in README.read_text()


def test_every_label_config_stands_in_its_page() -> None:
    listed = re.findall(r"\]\(\.\./label_config/(\w+\.xml)\)", (DOCS / "label-configs.md").read_text())
    assert sorted(listed) == sorted(path.name for path in (ROOT / "label_config").glob("*.xml"))


def test_every_metric_stands_in_operations_with_its_labels_and_the_other_way_round() -> None:
    app = label_studio_app.create_app(Settings(), FakeEngine())
    metrics: Metrics = app.extensions["facings"].metrics
    metrics.count_request("/predict", 200, 0.1)
    metrics.count_error("request")
    metrics.count_photo("done")
    metrics.count_boxes("dense", 1)
    metrics.waited("bulk", 0.1)
    metrics.stage("encode", 0.1)
    metrics.watch_projects(lambda: [ProjectFigures(project=1, version=2, corrections=55.0, is_training=True)])
    exposed = {}
    for family in text_string_to_metric_families(app.test_client().get("/metrics").text):
        name = family.name + ("_total" if family.type == "counter" else "")
        if name.startswith("facings_") and not name.endswith("_created"):
            exposed[name] = {label for sample in family.samples for label in sample.labels} - {"le"}

    table = section(DOCS / "operations.md", "Metrics").splitlines()
    rows = [line.split("|")[1:4] for line in table if line.startswith("| `")]
    documented = {
        name: set(re.findall(r"`(\w+)`", labels))
        for names, labels, _ in rows
        for name in re.findall(r"`(facings_\w+)`", names)
    }
    assert documented == exposed
    values = {re.search(r"`(\w+)`", labels).group(1): text for _, labels, text in rows if "`" in labels}  # type: ignore[union-attr]
    assert {f"`{value}`" for value in get_args(Outcome)} <= set(re.findall(r"`\w+`", values["outcome"]))
    assert set(re.findall(r"`(\w+)`", values["stage"])) == set(get_args(Stage))
    assert set(re.findall(r"`(\w+)`", values["state"])) == set(STATES)


def test_every_event_of_the_log_stands_in_operations_and_the_other_way_round() -> None:
    source = "".join(path.read_text() for path in (ROOT / "backend").rglob("*.py"))
    logged = set(re.findall(r'log_event\(\s*[\w.]+(?: if [^,]+)?,\s*"(\w+)"', source)) | {"incident"}
    rows = re.findall(r"^\| (`event=[^|]*) \|", section(DOCS / "operations.md", "Logs"), re.MULTILINE)
    assert set(re.findall(r"`event=(\w+)`", " ".join(rows))) == logged


def test_every_kind_of_error_stands_in_the_http_api_with_its_status() -> None:
    def kinds(error: type[FacingsError]) -> set[str]:
        return {error.kind}.union(*(kinds(child) for child in error.__subclasses__()))

    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", section(DOCS / "http-api.md", "Errors"), re.MULTILINE)
    documented = {kind: int(status) for kind, status in rows}
    assert documented.pop("request_too_large") == 413  # Flask's own, of no class
    assert documented == {kind: http.STATUSES[kind] for kind in kinds(FacingsError)}


def test_the_changelog_knows_the_version_or_what_is_not_released_yet() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(rf"^## \[({re.escape(version)}|Unreleased)\]", CHANGELOG.read_text(), re.MULTILINE)


def test_every_decision_is_listed_once() -> None:
    folder = DOCS / "adr"
    listed = re.findall(r"^\| \[(\d{4})\]\((\1-[\w-]+\.md)\) \|", (folder / "README.md").read_text(), re.MULTILINE)
    records = sorted(path.name for path in folder.glob("[0-9]*.md"))
    assert [name for _, name in listed] == records
    assert [int(name[:4]) for name in records] == list(range(1, len(records) + 1))


def test_make_alone_prints_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)

    command = ["/usr/bin/env", "make", "-s"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert re.findall(r"^  make ([\w-]+) ", printed, re.MULTILINE) == phony.split()


# -- Docker ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


@pytest.mark.parametrize("service", ["facings", "facings-gpu"])
def test_every_setting_is_passed_on_to_the_container(compose: dict[str, Any], service: str) -> None:
    environment = compose[service]["environment"]
    assert set(environment) == SETTING_NAMES
    fixed = {name for name, value in environment.items() if value is not None}
    assert fixed == {"HOST", "PORT", "LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY"}


def test_the_container_for_a_gpu_differs_by_the_gpu_only(compose: dict[str, Any]) -> None:
    cpu, gpu = compose["facings"], compose["facings-gpu"]
    assert (cpu.pop("profiles"), gpu.pop("profiles")) == (["cpu"], ["gpu"])
    assert gpu.pop("networks") == {"default": {"aliases": ["facings"]}}
    assert gpu.pop("deploy")["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert cpu == gpu


def test_label_studio_and_facings_share_one_token(compose: dict[str, Any]) -> None:
    tokens = {
        compose["label-studio"]["environment"]["LABEL_STUDIO_USER_TOKEN"],
        compose["facings"]["environment"]["LABEL_STUDIO_API_KEY"],
    }
    assert len(tokens) == 1


def create_env(folder: Path) -> str:
    command = ["sh", str(ROOT / "scripts" / "create_env.sh")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_the_file_for_docker_has_what_compose_asks_for_and_is_for_its_owner_only(tmp_path: Path) -> None:
    create_env(tmp_path)

    path = tmp_path / ".env"
    lines = [line.partition("=") for line in path.read_text().splitlines() if line and not line.startswith("#")]
    values = {name: value for name, _, value in lines}
    asked = set(re.findall(r"\$\{(\w+):", (ROOT / "docker-compose.yml").read_text()))
    assert asked - set(values) <= {"PORT"}
    assert re.fullmatch(r"[0-9a-f]{40}", values["LABEL_STUDIO_TOKEN"])
    assert len(values["LABEL_STUDIO_PASSWORD"]) >= 16
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == [".env"]


def test_the_file_for_docker_is_never_changed(tmp_path: Path) -> None:
    create_env(tmp_path)
    before = (tmp_path / ".env").read_text()

    assert "stays as it is" in create_env(tmp_path)

    assert (tmp_path / ".env").read_text() == before


def test_two_files_for_docker_have_different_secrets(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        create_env(tmp_path / name)
    assert (tmp_path / "a" / ".env").read_text() != (tmp_path / "b" / ".env").read_text()


# -- examples that run -----------------------------------------------------------------------------------------------


@by_path([README, DOCS / "python.md"])
def test_the_python_examples_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(render_shelf(17, (800, 600)).photo_rgb).save(tmp_path / "shelf.jpg", quality=92)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}

    for block in code_blocks(path.read_text(), "python"):
        exec(compile(block, str(path), "exec"), names)  # noqa: S102  our own documents

    assert len(names["facings"]) > 20
    assert np.isfinite(names["facings"].boxes_xyxy).all()
    assert capsys.readouterr().out


@pytest.fixture
def address() -> Iterator[str]:
    """Where the app listens, with an engine that sees areas of one colour."""
    app = label_studio_app.create_app(Settings(), FakeEngine())
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, name="app")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not there: apt-get install curl")
@pytest.mark.skipif(sys.platform != "linux", reason="base64 -w is GNU's")
def test_the_curl_examples_give_boxes(address: str, tmp_path: Path) -> None:
    photo = painted_photo({(255, 0, 0): (80, 20, 120, 60), (0, 0, 255): (10, 10, 20, 20)})
    Image.fromarray(photo).save(tmp_path / "shelf.jpg", "PNG")
    (script,) = (block for block in code_blocks(README.read_text(), "sh") if "/predict" in block)
    script = script.replace("http://127.0.0.1:9090", address)

    command = ["bash", "-ec", script]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert finished.returncode == 0, finished.stderr
    setup, *answers = [json.loads(line) for line in finished.stdout.splitlines()]
    assert setup == {"model_version": "fake-12345678"}
    assert [len(answer["results"][0]["result"]) for answer in answers] == [2, 1]
    (clicked,) = answers[-1]["results"][0]["result"]
    assert (clicked["value"]["x"], clicked["value"]["rectanglelabels"]) == (40, ["facing"])
