"""Projects of a real Label Studio: made, and looked at."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.demo.demo import ROOT
from scripts.demo.label_studio_client import Client

SHELF_BOXES = (ROOT / "label_config" / "shelf_boxes.xml").read_text()


def new_project(client: Client, addresses: Sequence[str]) -> tuple[int, list[int]]:
    """A project with a task for each address: its number and the tasks' ids."""
    number = client.create_project("bulk", SHELF_BOXES)
    return number, client.import_tasks(number, [{"image": address} for address in addresses]) if addresses else []


def held(client: Client, number: int) -> dict[int, list[str]]:
    """The versions of the predictions of each task."""
    return {task["id"]: [p["model_version"] for p in task["predictions"]] for task in client.tasks(number)}
