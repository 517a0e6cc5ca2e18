"""One training of one project, as a process of its own: `python -m backend.learning 3`.

Reads the settings from its environment. What goes on and what goes wrong is one line each on standard error.
"""

from __future__ import annotations

import sys

from backend.errors import CommandError, FacingsError
from backend.label_studio.project import Project
from backend.label_studio.retry import ProjectError
from backend.learning.training import learn, lowest_priority
from backend.reporting import configure_logging
from backend.settings import Settings
from model import EngineError
from model.training.heap import keep_freed_memory

RETRY_BUDGET_S = 120.0


def main(project_id: int) -> int:
    """The exit status."""
    settings = Settings.from_env()
    configure_logging(settings.log_level)
    lowest_priority()
    keep_freed_memory()
    try:
        url, key = str(settings.label_studio_url), str(settings.label_studio_api_key)
        with Project(url, key, project_id, retry_budget_s=RETRY_BUDGET_S) as project:
            version = learn(settings, project, show=lambda line: say(project_id, line))
    except (CommandError, FacingsError, ProjectError, EngineError, OSError) as error:
        say(project_id, f"no training: {error}")
        return 1
    say(project_id, "nothing new was submitted" if version is None else version.describe())
    return 0


def say(project_id: int, line: str) -> None:
    print(f"project {project_id}: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
