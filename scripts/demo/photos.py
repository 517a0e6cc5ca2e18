"""The photos of the demo, found or rendered, in a process of its own.

Rendering and decoding take OpenCV and torch, which is most of a gigabyte. The process that supervises the servers for
days asks this one, which ends when it has answered.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from backend.errors import CommandError
from scripts.console import track

SAMPLE_SEEDS = (11, 12, 13, 17, 18, 22)
SAMPLE_SIZE_WH = (1600, 1200)


def demo_photos(folder: Path | None, samples: Path) -> dict[str, Path]:
    """Photos by the name that they get in Label Studio, unique and the same in each run.

    folder: of the user's photos; None: rendered shelves, kept in `samples`. Progress goes to standard error.
    Raises CommandError when there are no photos.
    """
    arguments = ["samples", str(samples)] if folder is None else ["find", str(folder.resolve())]
    asked = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "scripts.demo.photos", *arguments],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        check=False,
    )
    try:
        answer = json.loads(asked.stdout)
    except ValueError:
        raise CommandError(f"the demo's photos: the process stopped with exit status {asked.returncode}") from None
    if "error" in answer:
        raise CommandError(answer["error"])
    return {name: Path(path) for name, path in answer["photos"].items()}


def render_samples(folder: Path, seeds: Sequence[int], size_wh: tuple[int, int]) -> list[Path]:
    """Rendered shelf photos as JPEG, one for each seed; those that are there already stay."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"shelf-{seed}.jpg" for seed in seeds]
    missing = [(path, seed) for path, seed in zip(paths, seeds, strict=True) if not path.exists()]
    if missing:
        from PIL import Image

        from model.renderer.shelves import render_shelf

        for path, seed in track(missing, total=len(missing), label="Sample photos"):
            partial = path.with_suffix(".partial")
            Image.fromarray(render_shelf(seed, size_wh).photo_rgb).save(partial, "JPEG", quality=92)
            partial.replace(path)
    return paths


def _found(folder: Path) -> dict[str, Path]:
    from backend.photos.files import find_photos, format_left_out

    found = find_photos([folder])
    if found.left_out:
        print(f"{folder}: {format_left_out(found.left_out)}", file=sys.stderr)
    return {re.sub(r"[^-\w.]", "_", photo.name.replace("/", "--")): photo.path for photo in found.photos}


def main(command: str, folder: Path) -> None:
    """Prints the photos, or why there are none, as one line of JSON."""
    try:
        if command == "find":
            photos = _found(folder)
        else:
            photos = {path.name: path for path in render_samples(folder, SAMPLE_SEEDS, SAMPLE_SIZE_WH)}
    except CommandError as error:
        print(json.dumps({"error": str(error)}))
    except OSError as error:
        print(json.dumps({"error": f"{error.strerror}: {str(error.filename)!r}"}))
    else:
        print(json.dumps({"photos": {name: str(path.resolve()) for name, path in photos.items()}}))


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except KeyboardInterrupt:  # Ctrl-C reaches the supervising process too, which prints it
        sys.exit(130)
