"""A Label Studio project through the SDK: its tasks page by page, what they hold, and predictions sent to it.

Knows the SDK and Label Studio's paths. Knows neither photos nor boxes. Two calls go their own ways, as measured in
docs/adr/0011: tasks are listed with the versions of their predictions but without their bodies, and predictions are
posted without the SDK's checks of every region.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import httpx
from label_studio_sdk import LabelStudio
from label_studio_sdk.core.api_error import ApiError

from backend.label_studio.access import TokenAuth
from backend.label_studio.label_config import LabelConfig, parse_label_config
from backend.label_studio.retry import RequestRejected, RetryBudget, TransientError, classify, require_success
from backend.photos.connections import tls_context

Answer = TypeVar("Answer")

TASKS_PER_PAGE = 200
TASKS_PER_LOOK = 100  # asked for by their ids, which all stand in the address of the request
ANSWER_TIMEOUT_S = 120.0
CONNECT_TIMEOUT_S = 10.0
FIRST_CONTACT_S = 10.0  # a wrong address shall be reported soon
# Label Studio cuts the list of a task's versions after so many characters.
VERSIONS_LIMIT = 500


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task without the bodies of its predictions and annotations.

    data: None when the project has no such task. versions: of its predictions, joined by commas.
    predictions: how many there are. is_labelled: whether it has annotations.
    """

    id: int
    data: Mapping[str, Any] | None
    versions: str = ""
    predictions: int = 0
    is_labelled: bool = False

    def holds(self, version: str) -> bool:
        """Whether it holds a prediction of this version."""
        return f",{version}," in f",{self.versions},"

    @property
    def may_hold_two(self) -> bool:
        """Whether two of its predictions are of one version."""
        return self.predictions > 1 + self.versions.count(",")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which tasks of a project. ids, view: None for all. Later changes of the view do not count."""

    ids: Sequence[int] | None = None
    view: int | None = None


class Project:
    """A project, as the owner of a token sees it. Thread-safe. Leaving its `with` block ends its connections.

    project_id: as it stands in the project's address. retry_budget_s: how long a request is tried again while Label
    Studio is away, busy or failing. stopping: set it to end such waiting. All methods raise Unavailable when that time
    is over, Interrupted when it was ended, and RequestRejected when trying again is no use.
    """

    def __init__(self, url: str, api_key: str, project_id: int, *, retry_budget_s: float) -> None:
        self.url, self.id = url.rstrip("/"), project_id
        self.retries = 0
        self.stopping = threading.Event()
        self._retry_budget_s = min(retry_budget_s, FIRST_CONTACT_S)
        self._http = httpx.Client(
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            verify=tls_context(),
            trust_env=False,  # as for photos: the token goes to Label Studio and to no proxy
            follow_redirects=False,
            auth=TokenAuth(self.url, api_key, exchange=self._post_without_token, timeout_s=ANSWER_TIMEOUT_S),
        )
        # Tried again here, where it is known which requests may be repeated. The slash keeps a path. The SDK's own
        # header is replaced by TokenAuth's.
        self._sdk = LabelStudio(base_url=f"{self.url}/", api_key="-", httpx_client=self._http, max_retries=0)  # type: ignore[no-untyped-call]
        try:
            facts: Any = self._with_retries(f"project {self.id}", lambda: self._sdk.projects.get(id=self.id))
            self.label_config: LabelConfig = parse_label_config(str(facts.label_config))
        except BaseException:
            self._http.close()
            raise
        self.title = str(facts.title)
        self.key = f"{self.id}.{int(facts.created_at.timestamp())}"  # as /setup and /predict name the project
        self.task_count = int(facts.task_number or 0)
        self._retry_budget_s = retry_budget_s

    def __enter__(self) -> Project:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def retry_budget(self) -> RetryBudget:
        """For work that is more than one request."""
        return RetryBudget(self._retry_budget_s, self.stopping)

    def wait_until_up(self) -> None:
        """Returns as soon as Label Studio answers."""
        self._with_retries("health", lambda: require_success(self._http.get(f"{self.url}/api/projects/{self.id}/")))

    def pages(self, selection: Selection) -> Iterator[list[Task]]:
        """The tasks, each once: by id, or in the view's order. Tasks that come while this goes on may be missed."""
        ids = selection.ids if selection.view is None else self._ids_of_view(selection.view)
        if ids is None:
            yield from self._all()
            return
        for start in range(0, len(ids), TASKS_PER_LOOK):
            chunk = ids[start : start + TASKS_PER_LOOK]
            found = self.look(chunk)
            yield [found.get(task, Task(id=task, data=None)) for task in chunk]

    def count(self, selection: Selection) -> int:
        """About how many tasks there are to look at."""
        if selection.ids is not None:
            return len(selection.ids)
        if selection.view is None:
            return self.task_count
        self._check_view(selection.view)
        page: Any = self._with_retries(
            f"view {selection.view}",
            lambda: self._sdk.tasks.list(view=selection.view, project=self.id, page_size=1, fields="task_only"),
        )
        return int(page.response.total)

    def look(self, ids: Iterable[int]) -> dict[int, Task]:
        """What the tasks hold now, by id; those that the project does not have are left out."""
        wanted = list(ids)
        found: dict[int, Task] = {}
        for start in range(0, len(wanted), TASKS_PER_LOOK):
            selected = {"all": False, "included": wanted[start : start + TASKS_PER_LOOK]}
            tasks = self._with_retries("tasks", partial(self._list, TASKS_PER_LOOK, selectedItems=selected))
            found.update((task.id, task) for task in tasks)
        return found

    def latest_annotated(self) -> Iterator[list[Task]]:
        """Tasks with annotations, page by page, those first that were fully annotated last. Tasks that are annotated
        while this goes on may come twice."""
        annotated = {"filter": "filter:tasks:total_annotations", "operator": "greater", "type": "Number", "value": 0}
        for number in itertools.count(1):

            def read(number: int = number) -> list[Task]:
                try:
                    return self._list(
                        TASKS_PER_PAGE, page=number, filters=[annotated], ordering=["-tasks:completed_at"]
                    )
                except ApiError as error:
                    if error.status_code == 404:  # behind the last page
                        return []
                    raise

            tasks = self._with_retries("tasks", read)
            if not tasks:
                return
            yield tasks

    def predictions_of(self, task: int, version: str) -> list[int]:
        """The ids of a task's predictions of one version, oldest first. Label Studio sends their bodies along."""
        listed: Any = self._with_retries("predictions", lambda: self._sdk.predictions.list(task=task))
        return sorted(int(prediction.id) for prediction in listed if prediction.model_version == version)

    def regions_of(self, task: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """A task's predictions and its annotations with all their regions, each oldest first."""
        return self.regions_of_all([task]).get(task, ([], []))

    def regions_of_all(self, tasks: Sequence[int]) -> dict[int, tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
        """`regions_of` of several tasks in one request, by id; those that the project does not have are left out."""
        selected = json.dumps({"selectedItems": {"all": False, "included": list(tasks)}})
        asked = {"project": str(self.id), "fields": "all", "query": selected, "resolve_uri": "false"}
        asked["page_size"] = str(len(tasks))

        def read() -> Any:
            return require_success(self._http.get(f"{self.url}/api/tasks/", params=asked)).json()["tasks"]

        found = {}
        for task in self._with_retries(f"tasks {', '.join(map(str, tasks))}"[:100], read):
            kinds = [task[kind] for kind in ("predictions", "annotations")]
            predictions, annotations = (sorted(kind, key=lambda one: int(one["id"])) for kind in kinds)
            found[int(task["id"])] = predictions, annotations
        return found

    def delete_prediction(self, prediction: int) -> None:
        """Deletes a prediction; one that is gone already is no error."""

        def delete() -> None:
            try:
                self._sdk.predictions.delete(prediction)
            except ApiError as error:
                if error.status_code != 404:
                    raise

        self._with_retries(f"prediction {prediction}", delete)

    def post(self, predictions: Iterable[bytes]) -> int:
        """Sends predictions, each as JSON with its task, once; returns how many Label Studio reports as stored.

        Raises TransientError when it may have stored them.
        """
        # The SDK walks through every region of every prediction before it sends them, on the processor that the
        # engine needs: 14 ms for a task of 150 boxes.
        try:
            response = self._http.post(
                f"{self.url}/api/projects/{self.id}/import/predictions",
                content=b"[" + b",".join(predictions) + b"]",
                headers={"Content-Type": "application/json"},
            )
            return int(require_success(response).json()["created"])
        except Exception as error:
            raise classify(self._where("predictions"), error) from None

    def _all(self) -> Iterator[list[Task]]:
        """All tasks. Each page begins behind the last id, so that it does not matter what happens to earlier tasks."""
        last = 0
        while True:
            after = {"filter": "filter:tasks:id", "operator": "greater", "type": "Number", "value": last}
            page: list[Task] = self._with_retries("tasks", partial(self._list, TASKS_PER_PAGE, filters=[after]))
            if not page:
                return
            yield page
            last = page[-1].id

    def _list(
        self, count: int, *, page: int = 1, filters: Sequence[Mapping[str, Any]] = (), **query: Any
    ) -> list[Task]:
        # A filter that lets everything through: it makes Label Studio look up the versions of each task's predictions.
        versions = {
            "filter": "filter:tasks:predictions_model_versions",
            "operator": "not_contains",
            "type": "List",
            "value": [],
        }
        query["filters"] = {"conjunction": "and", "items": [versions, *filters]}
        listed: Any = self._sdk.tasks.list(
            project=self.id, page=page, page_size=count, fields="task_only", query=json.dumps(query), resolve_uri=False
        )
        return [self._task(task) for task in listed.items or []]

    def _task(self, task: Any) -> Task:
        count = int(task.total_predictions or 0)
        versions = task.predictions_model_versions
        if count and (versions is None or len(str(versions)) >= VERSIONS_LIMIT):
            listed: Any = self._sdk.predictions.list(task=task.id)
            versions = ",".join(sorted({str(prediction.model_version) for prediction in listed}))
        versions = str(versions or "").replace(", ", ",")
        labelled = bool(task.total_annotations)
        return Task(id=int(task.id), data=task.data, versions=versions, predictions=count, is_labelled=labelled)

    def _check_view(self, view: int) -> None:
        """Raises RequestRejected when the view is another project's, of which Label Studio makes an internal error."""
        found: Any = self._with_retries(f"view {view}", lambda: self._sdk.views.get(id=str(view)))
        if int(found.project) != self.id:
            raise RequestRejected(
                f"view {view}: expected one of project {self.id}, got one of project {found.project}", 404
            )

    def _ids_of_view(self, view: int) -> list[int]:
        """All ids, before any work: the work may change which tasks the view shows."""
        self._check_view(view)
        ids: dict[int, None] = {}  # in order, each once
        for page in itertools.count(1):

            def read(page: int = page) -> list[Any]:
                try:
                    listed: Any = self._sdk.tasks.list(
                        view=view,
                        project=self.id,
                        page=page,
                        page_size=TASKS_PER_PAGE,
                        fields="task_only",
                        resolve_uri=False,
                    )
                    return list(listed.items or [])
                except ApiError as error:
                    if error.status_code == 404:  # behind the last page
                        return []
                    raise

            tasks = self._with_retries(f"view {view}", read)
            ids.update((int(task.id), None) for task in tasks)
            if len(tasks) < TASKS_PER_PAGE:
                break
        return list(ids)

    def _post_without_token(self, url: str, body: Mapping[str, str]) -> httpx.Response:
        return self._http.post(url, json=body, auth=httpx.Auth())

    def _where(self, what: str) -> str:
        return f"Label Studio at {self.url}: {what}"

    def _with_retries(self, what: str, call: Callable[[], Answer]) -> Answer:
        budget = self.retry_budget()
        while True:
            try:
                return call()
            except Exception as error:
                classified = classify(self._where(what), error)
                if not isinstance(classified, TransientError):
                    raise classified from None
            self.retries += 1
            budget.wait(classified)
