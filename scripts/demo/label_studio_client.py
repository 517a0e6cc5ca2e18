"""Label Studio's API, as one user.

Knows the tokens and endpoints of Label Studio 1.23.2. Knows nothing of Facings, nor how a Label Studio is started.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

REQUEST_TIMEOUT_S = 130.0  # Label Studio itself waits up to 100 s for a backend


@dataclass(frozen=True, kw_only=True)
class Account:
    """The first user of a Label Studio. token: 40 hex digits, what Label Studio calls a legacy token."""

    email: str
    password: str
    token: str

    @classmethod
    def new(cls, email: str) -> Account:
        """An account with a password and a token that nobody else knows."""
        return cls(email=email, password=secrets.token_urlsafe(9), token=secrets.token_hex(20))


class ApiError(Exception):
    """Label Studio refused a request. status: HTTP status; str: what was asked and what Label Studio answered."""

    def __init__(self, response: requests.Response) -> None:
        request = response.request
        super().__init__(f"Label Studio: {request.method} {request.path_url}: {response.status_code}: {response.text}")
        self.status = response.status_code


class Client:
    """Label Studio's API, as one user. Every method raises ApiError when Label Studio refuses."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy of the machine is not for a server on the machine
        self._session.headers["Authorization"] = f"Token {token}"

    @classmethod
    def login(cls, url: str, account: Account) -> Client:
        """A client with the cookies of the login form, which works where legacy tokens are turned off."""
        client = cls(url, account.token)
        del client._session.headers["Authorization"]
        client._get("/user/login/")
        form = {
            "email": account.email,
            "password": account.password,
            "csrfmiddlewaretoken": client._session.cookies["csrftoken"],
        }
        client._checked(client._session.post(f"{url}/user/login/", data=form, timeout=REQUEST_TIMEOUT_S))
        client._session.headers["X-CSRFToken"] = client._session.cookies["csrftoken"]
        client._get("/api/current-user/whoami")
        return client

    def is_up(self) -> bool:
        """Whether this Label Studio answers and knows this user."""
        try:
            self._get("/api/current-user/whoami")
        except (requests.ConnectionError, requests.Timeout):
            return False
        except ApiError as error:
            if error.status >= requests.codes.server_error:
                return False
            raise
        return True

    def personal_access_token(self) -> str:
        """A new personal access token of this user."""
        return str(self._post("/api/token/", {})["token"])

    def allow_tokens(self, *, legacy: bool, personal: bool) -> None:
        """Which kinds of token the organisation accepts."""
        self._post("/api/jwt/settings", {"legacy_api_tokens_enabled": legacy, "api_tokens_enabled": personal})

    def create_project(self, title: str, label_config: str) -> int:
        """A new project. The id."""
        return int(self._post("/api/projects/", {"title": title, "label_config": label_config})["id"])

    def find_project(self, title: str) -> int | None:
        """The id of the newest project of that very title."""
        found = self._get("/api/projects/", title=title, page_size=1000)["results"]
        return max((int(project["id"]) for project in found if project["title"] == title), default=None)

    def project(self, project: int) -> dict[str, Any]:
        """A project with all its fields."""
        return dict(self._get(f"/api/projects/{project}/"))

    def set_label_config(self, project: int, label_config: str) -> None:
        """Replaces a project's label config."""
        self._patch(f"/api/projects/{project}/", {"label_config": label_config})

    def upload(self, project: int, photos: Mapping[str, Path]) -> list[int]:
        """Uploads photos, by the names they shall have, in one request; the ids of the new tasks in the same order."""
        # One form field each: of fields with the same name, Label Studio takes only the last.
        files = {f"photo{i}": (name, path.read_bytes()) for i, (name, path) in enumerate(photos.items())}
        url = f"{self.url}/api/projects/{project}/import?return_task_ids=true"
        answer = self._checked(self._session.post(url, files=files, timeout=REQUEST_TIMEOUT_S)).json()
        return [int(task) for task in answer["task_ids"]]

    def import_tasks(self, project: int, tasks: Iterable[Mapping[str, Any]]) -> list[int]:
        """Tasks from their data; their ids."""
        return self.import_whole_tasks(project, [{"data": data} for data in tasks])

    def import_whole_tasks(self, project: int, tasks: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tasks with their data, predictions and annotations; their ids."""
        answer = self._post(f"/api/projects/{project}/import?return_task_ids=true", list(tasks))
        return [int(task) for task in answer["task_ids"]]

    def tasks(self, project: int) -> list[dict[str, Any]]:
        """All tasks with their predictions and annotations, oldest first."""
        view = {"project": project, "fields": "all", "page_size": 10_000}
        return sorted(self._get("/api/tasks/", **view)["tasks"], key=lambda task: int(task["id"]))

    def create_view(self, project: int, filters: Mapping[str, Any]) -> int:
        """A tab of the Data Manager that shows the tasks that these filters let through; its id."""
        body = {
            "project": project,
            "data": {"title": "view", "filters": {"conjunction": "and", "items": [], **filters}},
        }
        return int(self._post("/api/dm/views/", body)["id"])

    def task(self, task: int) -> dict[str, Any]:
        """One task as a labelling page gets it: a task without a prediction is predicted first."""
        return dict(self._get(f"/api/tasks/{task}/"))

    def connect_backend(
        self, project: int, url: str, *, title: str = "Facings", basic_auth: tuple[str, str] | None = None
    ) -> int:
        """Connects an ML backend with interactive pre-annotation on; the backend's id."""
        body: dict[str, Any] = {"project": project, "url": url, "title": title, "is_interactive": True}
        if basic_auth is not None:
            user, password = basic_auth
            body |= {"auth_method": "BASIC_AUTH", "basic_auth_user": user, "basic_auth_pass": password}
        return int(self._post("/api/ml/", body)["id"])

    def backends(self, project: int) -> list[dict[str, Any]]:
        """The project's ML backends; Label Studio asks each for its health and setup meanwhile."""
        return list(self._get("/api/ml/", project=project))

    def move_backend(self, backend: int, project: int, url: str) -> None:
        """Gives a connected backend another address."""
        self._patch(f"/api/ml/{backend}", {"project": project, "url": url})

    def retrieve_predictions(self, project: int, tasks: Sequence[int] | None = None) -> str:
        """The Data Manager's action of that name, for these tasks or for all; Label Studio's message."""
        selected: dict[str, Any] = {"all": True, "excluded": []}
        if tasks is not None:
            selected = {"all": False, "included": list(tasks)}
        action = f"/api/dm/actions?id=retrieve_tasks_predictions&project={project}"
        return str(self._post(action, {"selectedItems": selected})["detail"])

    def annotate_interactively(self, backend: int, task: int, prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The answer to prompts as the labelling page sends them: {"data": …} or {"errors": …}."""
        body = {"task": task, "context": {"result": list(prompts)}}
        return dict(self._post(f"/api/ml/{backend}/interactive-annotating", body))

    def delete_task(self, task: int) -> None:
        """Deletes a task with its predictions and annotations."""
        self._checked(self._session.delete(f"{self.url}/api/tasks/{task}/", timeout=REQUEST_TIMEOUT_S))

    def start_training(self, backend: int) -> None:
        """Presses *Start Training* of a connected backend."""
        url = f"{self.url}/api/ml/{backend}/train"
        self._checked(self._session.post(url, json={}, timeout=REQUEST_TIMEOUT_S))

    def annotate(self, task: int, regions: Sequence[Mapping[str, Any]]) -> int:
        """Submits an annotation; its id."""
        return int(self._post(f"/api/tasks/{task}/annotations/", {"result": list(regions)})["id"])

    def export(self, project: int) -> list[dict[str, Any]]:
        """The annotated tasks as *Export*, *JSON* gives them."""
        return list(self._get(f"/api/projects/{project}/export", exportType="JSON"))

    def _get(self, path: str, **query: Any) -> Any:
        response = self._checked(self._session.get(self.url + path, params=query, timeout=REQUEST_TIMEOUT_S))
        return response.json() if "json" in response.headers.get("Content-Type", "") else None

    def _post(self, path: str, body: Any) -> Any:
        return self._checked(self._session.post(self.url + path, json=body, timeout=REQUEST_TIMEOUT_S)).json()

    def _patch(self, path: str, body: Any) -> Any:
        return self._checked(self._session.patch(self.url + path, json=body, timeout=REQUEST_TIMEOUT_S)).json()

    @staticmethod
    def _checked(response: requests.Response) -> requests.Response:
        if not response.ok:
            raise ApiError(response)
        return response
