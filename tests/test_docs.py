"""What the documents say is so: settings, commands, links, metrics, and the README's curl examples against the app."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from fakes import FakeEngine, data_url, painted_photo
from PIL import Image
from werkzeug.serving import make_server

from backend.settings import SETTINGS, Setting, Settings
from backend.transports.label_studio_app import create_app
from scripts import cli

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("model/**/*.md"))]
COMMANDS: dict[str, typer.core.TyperCommand] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
OTHER_PROGRAMS = {".", "curl", "docker", "export", "printf"}

by_path = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def shell_blocks(text: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def command_lines(text: str) -> list[list[str]]:
    """The words of every command in the shell blocks, and of every `make …` and `facings …` within the text."""
    lines = []
    for block in shell_blocks(text):
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
    spans = (span.split() for span in re.findall(r"`([^`\n]+)`", prose))
    lines += [words for words in spans if set(words) & {"make", "facings"} and (len(words) > 1 or words == ["make"])]
    return lines


def mistake(words: list[str]) -> str | None:
    """What is wrong with a command that a document shows, or None."""
    words = words.copy()
    while re.match(r"[A-Z_]+=", words[0]):
        if not re.match(rf"({'|'.join([s.name for s in SETTINGS])})=", words[0]):
            return f"{words[0]} is no setting"
        words.pop(0)
    match words:
        case ["make", *arguments]:
            makefile = (ROOT / "Makefile").read_text()
            for argument in arguments:
                name, is_variable, _ = argument.partition("=")
                if not re.search(rf"^{re.escape(name)}" + (r" \?=" if is_variable else ":"), makefile, re.MULTILINE):
                    return f"the Makefile has no {name!r}"
        case ["facings", "--help"]:
            return None
        case ["facings", name, *arguments]:
            if name not in COMMANDS:
                return f"facings has no {name!r}"
            known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
            unknown = {word for word in arguments if word.startswith("-")} - known
            return f"facings {name} has no {unknown}" if unknown else None
        case ["python", "-m", module]:
            path = ROOT / (module.replace(".", "/") + ".py")
            return None if path.is_file() else f"there is no module {module}"
        case [program, *_]:
            return None if program in OTHER_PROGRAMS else f"{program!r} is not known here"
    return None


def cell(setting: Setting) -> str:
    """The default of a setting as the README shows it."""
    match setting.default:
        case None:
            return "unset"
        case bool():
            return f"`{str(setting.default).lower()}`"
        case float():
            return f"`{setting.default:g}`"
    return f"`{setting.default}`"


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
    ],
)
def test_commands_are_seen_wherever_they_stand(text: str, words: list[list[str]]) -> None:
    assert command_lines(text) == words


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("make rum", "'rum'"),
        ("make run PHOTO=x", "'PHOTO'"),
        ("facings train --fast", "--fast"),
        ("facings import", "'import'"),
        ("COLOUR=red make run", "COLOUR=red"),
        ("rm -r x", "'rm'"),
        ("python -m scripts.none", "scripts.none"),
    ],
)
def test_commands_that_do_not_exist_are_seen(line: str, told: str) -> None:
    assert told in (mistake(line.split()) or "")


@by_path
def test_commands_in_documents_exist_with_their_options(path: Path) -> None:
    lines = command_lines(path.read_text())
    assert [f"{shlex.join(words)}: {wrong}" for words in lines if (wrong := mistake(words))] == []


@by_path
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


@by_path
def test_no_figure_is_left_to_measure(path: Path) -> None:
    assert "TODO" not in path.read_text()


def test_every_setting_stands_in_the_readme_with_its_default_and_what_it_does() -> None:
    section = README.read_text().partition("\n## Settings\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert rows == [f"| `{setting.name}` | {cell(setting)} | {setting.help} |" for setting in SETTINGS]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_stands_in_the_readme(name: str) -> None:
    assert f"facings {name}" in README.read_text()


def test_every_label_config_stands_in_the_readme() -> None:
    shown = re.findall(r"\]\(label_config/(\w+\.xml)\)", README.read_text())
    assert sorted(shown) == sorted(path.name for path in (ROOT / "label_config").glob("*.xml"))


def test_every_metric_stands_in_the_readme_and_the_other_way_round() -> None:
    app = create_app(Settings(), FakeEngine())  # type: ignore[arg-type]
    told = re.findall(r"^# HELP (facings_\w+) ", app.test_client().get("/metrics").text, re.MULTILINE)
    names = {name for name in told if not name.endswith("_created")}
    section = README.read_text().partition("\n## Operating\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(facings_\w+)`", section)) == names


def test_the_changelog_knows_the_version_or_what_is_not_released_yet() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[({re.escape(version)}|Unreleased)\]", text, re.MULTILINE)


def test_every_decision_is_listed_once() -> None:
    folder = ROOT / "docs" / "adr"
    listed = re.findall(r"^\| \[(\d{4})\]\((\1-[\w-]+\.md)\) \|", (folder / "README.md").read_text(), re.MULTILINE)
    records = sorted(path.name for path in folder.glob("[0-9]*.md"))
    assert [name for _, name in listed] == records
    assert [int(name[:4]) for name in records] == list(range(1, len(records) + 1))


@pytest.fixture
def address() -> Iterator[str]:
    """Where the app listens, with an engine that sees areas of one colour."""
    app = create_app(Settings(), FakeEngine())  # type: ignore[arg-type]
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
    (script,) = (block for block in shell_blocks(README.read_text()) if "/predict" in block)
    script = script.replace("http://127.0.0.1:9090", address)
    script = script.replace("https://example.com/shelf.jpg", data_url(photo))

    command = ["bash", "-ec", script]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert shown.returncode == 0, shown.stderr
    setup, *answers = [json.loads(line) for line in shown.stdout.splitlines()]
    assert setup == {"model_version": "fake-12345678"}
    assert [len(answer["results"][0]["result"]) for answer in answers] == [2, 2, 1]
    (clicked,) = answers[-1]["results"][0]["result"]
    assert (clicked["value"]["x"], clicked["value"]["rectanglelabels"]) == (40, ["facing"])
