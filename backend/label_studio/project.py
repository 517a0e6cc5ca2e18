"""A Label Studio project through the SDK: its tasks page by page, what they hold, and predictions sent to it.

Knows the SDK, HTTP failures and how long to put up with them. Knows neither photos nor boxes. Two calls go their own
ways, as measured in docs/adr/0011: tasks are listed with the versions of their predictions but without their bodies,
and predictions are posted without the SDK's checks of every region.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import httpx
from label_studio_sdk import LabelStudio
from label_studio_sdk.core.api_error import ApiError

from backend.errors import CommandError
from backend.label_studio.label_config import LabelConfig, parse_label_config
from backend.photos.connections import tls_context

Answer = TypeVar("Answer")

TASKS_PER_PAGE = 200
TASKS_PER_LOOK = 100  # asked for by their ids, which all stand in the address of the request
ANSWER_TIMEOUT_S = 120.0
CONNECT_TIMEOUT_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
STOPPING_S = 10.0  # for what is done already
FIRST_CONTACT_S = 10.0  # a wrong address shall be told soon
# Label Studio cuts the list of a task's versions after so many characters.
VERSIONS_LIMIT = 500
NOT_NOW = frozenset({408, 425, 429})


class Unavailable(CommandError):
    """Label Studio was away for longer than the budget."""

    exit_status = 4


class Refused(CommandError):
    """Label Studio answered, and will give the same answer again. status: of HTTP."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Interrupted(CommandError):
    """The run was told to stop while it waited for Label Studio."""


class Trouble(Exception):
    """A request came to nothing, or its answer was lost: nobody here knows. It may work later."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


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


class Patience:
    """Pauses between attempts of one piece of work, longer and longer, until the budget is spent.

    Told to stop, it has a few seconds left at most, so that what is done can still be stored.
    """

    def __init__(self, budget_s: float, stopping: threading.Event) -> None:
        self._budget_s = budget_s
        self._stopping = stopping
        self._give_up_at: float | None = None
        self._pause_s = FIRST_PAUSE_S
        self._is_hurried = False

    def wait(self, trouble: Trouble) -> None:
        """Pauses after a failed attempt. Raises Unavailable when the budget is spent, Interrupted when told to stop."""
        now = time.monotonic()
        if self._give_up_at is None:
            self._give_up_at = now + self._budget_s
        if self._stopping.is_set() and not self._is_hurried:
            self._is_hurried = True
            self._give_up_at = min(self._give_up_at, now + STOPPING_S)
        if now >= self._give_up_at:
            if self._is_hurried:
                raise Interrupted(str(trouble))
            raise Unavailable(f"{trouble}; tried for {self._budget_s:.0f} s")
        # Not all at the same moment, when many wait for the same server.
        pause_s = max(trouble.retry_after_s, self._pause_s * random.uniform(0.5, 1.0))  # noqa: S311
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        pause_s = min(pause_s, self._give_up_at - now)
        if self._is_hurried:
            time.sleep(min(pause_s, 1.0))
        else:
            self._stopping.wait(pause_s)


class RenewedAccess(httpx.Auth):
    """Exchanges a personal token once more when Label Studio refuses what it was exchanged for.

    The SDK renews that when its five minutes are over by the clock of this machine. Label Studio's may run ahead, or a
    request may have waited there until they were over. tokens: the SDK's, once there are any.
    """

    def __init__(self) -> None:
        self.tokens: Any = None

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response]:
        response = yield request
        scheme, _, refused = request.headers.get("Authorization", "").partition(" ")
        if response.status_code == 401 and scheme == "Bearer" and self.tokens is not None:
            if self.tokens._access_token == refused:  # else another thread has renewed it already
                self.tokens._access_token = None
            request.headers["Authorization"] = f"Bearer {self.tokens.api_key}"
            yield request


class Project:
    """A project, as the owner of a token sees it. Thread-safe. Leaving its `with` block ends its connections.

    patience_s: how long a request is tried again while Label Studio is away, busy or broken. stopping: set it to end
    such waiting. All methods raise Unavailable when that time is over, Interrupted when it was ended, and Refused when
    trying again is no use.
    """

    def __init__(self, url: str, api_key: str, number: int, *, patience_s: float) -> None:
        self.url, self.number = url.rstrip("/"), number
        self.retries = 0
        self._patience_s = min(patience_s, FIRST_CONTACT_S)
        self.stopping = threading.Event()
        self._access = RenewedAccess()
        self._http = httpx.Client(
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            verify=tls_context(),
            trust_env=False,  # as for photos: the token goes to Label Studio and to no proxy
            follow_redirects=False,
            auth=self._access,
        )
        try:
            facts = self._connect(api_key)
        except BaseException:
            self._http.close()
            raise
        self.title = str(facts.title)
        self.task_count = int(facts.task_number or 0)
        self.label_config: LabelConfig = parse_label_config(str(facts.label_config))
        self._patience_s = patience_s

    def __enter__(self) -> Project:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def patience(self) -> Patience:
        """For work that is more than one request."""
        return Patience(self._patience_s, self.stopping)

    def wait_until_up(self) -> None:
        """Returns as soon as Label Studio answers."""
        self._patiently("health", self._health)

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
        page: Any = self._patiently(
            f"view {selection.view}",
            lambda: self._sdk.tasks.list(view=selection.view, project=self.number, page_size=1, fields="task_only"),
        )
        return int(page.response.total)

    def look(self, ids: Iterable[int]) -> dict[int, Task]:
        """What the tasks hold now, by id; those that the project does not have are left out."""
        wanted = list(ids)
        found: dict[int, Task] = {}
        for start in range(0, len(wanted), TASKS_PER_LOOK):
            selected = {"all": False, "included": wanted[start : start + TASKS_PER_LOOK]}
            tasks = self._patiently("tasks", partial(self._list, TASKS_PER_LOOK, selectedItems=selected))
            found.update((task.id, task) for task in tasks)
        return found

    def predictions_of(self, task: int, version: str) -> list[int]:
        """The ids of a task's predictions of one version, oldest first. Label Studio sends their bodies along."""
        listed: Any = self._patiently("predictions", lambda: self._sdk.predictions.list(task=task))
        return sorted(int(prediction.id) for prediction in listed if prediction.model_version == version)

    def regions_of(self, task: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """A task's predictions and its annotations with all their regions, each oldest first."""

        selected = json.dumps({"selectedItems": {"all": False, "included": [task]}})
        asked = {"project": str(self.number), "fields": "all", "query": selected, "resolve_uri": "false"}

        def read() -> Any:
            response = self._http.get(f"{self.url}/api/tasks/", params=asked, headers=self._headers())
            return _checked(response).json()["tasks"]

        tasks = self._patiently(f"task {task}", read)
        kinds = [tasks[0][kind] if tasks else [] for kind in ("predictions", "annotations")]
        predictions, annotations = (sorted(kind, key=lambda found: int(found["id"])) for kind in kinds)
        return predictions, annotations

    def delete_prediction(self, prediction: int) -> None:
        """Deletes a prediction; one that is gone already is no error."""

        def delete() -> None:
            try:
                self._sdk.predictions.delete(prediction)
            except ApiError as error:
                if error.status_code != 404:
                    raise

        self._patiently(f"prediction {prediction}", delete)

    def post(self, predictions: Iterable[bytes]) -> int:
        """Sends predictions, each as JSON with its task, once; how many Label Studio says it took.

        Raises Trouble when it may have taken them.
        """
        # The SDK walks through every region of every prediction before it sends them, on the processor that the
        # engine needs: 14 ms for a task of 150 boxes.
        try:
            response = self._http.post(
                f"{self.url}/api/projects/{self.number}/import/predictions",
                content=b"[" + b",".join(predictions) + b"]",
                headers={**self._headers(), "Content-Type": "application/json"},
            )
            return int(_checked(response).json()["created"])
        except Exception as error:
            raise self._judged("predictions", error) from None

    def _connect(self, api_key: str) -> Any:
        """Makes the SDK's client; what Label Studio says of the project."""

        def connect() -> LabelStudio:
            # Tried again here, where it is known which requests may be repeated. The slash keeps a path.
            return LabelStudio(base_url=f"{self.url}/", api_key=api_key, httpx_client=self._http, max_retries=0)  # type: ignore[no-untyped-call]

        self._sdk = self._patiently("connect", connect)
        self._access.tokens = self._sdk._client_wrapper._tokens_client
        return self._patiently(f"project {self.number}", lambda: self._sdk.projects.get(id=self.number))

    def _headers(self) -> dict[str, str]:
        return self._sdk._client_wrapper.get_headers()  # renews the access token where there is one

    def _health(self) -> None:
        _checked(self._http.get(f"{self.url}/api/projects/{self.number}/", headers=self._headers()))

    def _all(self) -> Iterator[list[Task]]:
        """All tasks. Each page begins behind the last id, so that it does not matter what happens to earlier tasks."""
        last = 0
        while True:
            after = {"filter": "filter:tasks:id", "operator": "greater", "type": "Number", "value": last}
            page = self._patiently("tasks", partial(self._list, TASKS_PER_PAGE, filters=[after]))
            if not page:
                return
            yield page
            last = page[-1].id

    def _list(self, count: int, *, filters: Sequence[Mapping[str, Any]] = (), **query: Any) -> list[Task]:
        # A filter that lets everything through: it makes Label Studio look up the versions of each task's predictions.
        versions = {
            "filter": "filter:tasks:predictions_model_versions",
            "operator": "not_contains",
            "type": "List",
            "value": [],
        }
        query["filters"] = {"conjunction": "and", "items": [versions, *filters]}
        page = self._sdk.tasks.list(
            project=self.number, page_size=count, fields="task_only", query=json.dumps(query), resolve_uri=False
        )
        return [self._task(task) for task in page.items or []]

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
        """Raises Refused when the view is another project's, of which Label Studio makes an internal error."""
        found: Any = self._patiently(f"view {view}", lambda: self._sdk.views.get(id=str(view)))
        if int(found.project) != self.number:
            raise Refused(
                f"view {view}: expected one of project {self.number}, got one of project {found.project}", 404
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
                        project=self.number,
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

            tasks = self._patiently(f"view {view}", read)
            ids.update((int(task.id), None) for task in tasks)
            if len(tasks) < TASKS_PER_PAGE:
                break
        return list(ids)

    def _patiently(self, what: str, call: Callable[[], Answer]) -> Answer:
        patience = self.patience()
        while True:
            try:
                return call()
            except Exception as error:
                judged = self._judged(what, error)
                if not isinstance(judged, Trouble):
                    raise judged from None
            self.retries += 1
            patience.wait(judged)

    def _judged(self, what: str, error: Exception) -> Exception:
        """Trouble when the same request may work later, Refused when it will not; else the error itself."""
        where = f"Label Studio at {self.url}: {what}"
        match error:
            case ApiError():
                status, detail = error.status_code or 0, _detail(error.body)
                if 200 <= status < 300:  # the page of a proxy in between, where the SDK expects JSON
                    return Trouble(f"{where}: expected JSON, got something else")
                if status >= 500 or status in NOT_NOW:
                    return Trouble(f"{where}: {status} {detail}".strip(), _retry_after_s(error.headers))
                if status in (401, 403):
                    detail += " (--api-key or LABEL_STUDIO_API_KEY)"
                if 300 <= status < 400:
                    detail = "expected Label Studio, got a redirect: give the address that it leads to"
                return Refused(f"{where}: {status} {detail}".strip(), status)
            case httpx.InvalidURL() | httpx.UnsupportedProtocol():
                return Refused(f"{where}: {error}", 0)
            case httpx.TransportError():
                reason = str(error) or type(error).__name__
                return Trouble(f"{where}: {reason}")
            case json.JSONDecodeError():  # the same
                return Trouble(f"{where}: expected JSON, got something else")
        return error


def _checked(response: httpx.Response) -> httpx.Response:
    if not 200 <= response.status_code < 300:
        raise ApiError(status_code=response.status_code, headers=dict(response.headers), body=response.text)
    return response


def _detail(body: Any) -> str:
    """What Label Studio says of a failure, in one short line."""
    if isinstance(body, str):
        with suppress(ValueError):
            body = json.loads(body)
    if isinstance(body, Mapping):
        errors = body.get("validation_errors")
        body = errors or body.get("detail") or body
    text = " ".join(str(body or "").split())
    return f"{text[:200]}…" if len(text) > 200 else text


def _retry_after_s(headers: Mapping[str, str] | None) -> float:
    """The seconds that a server asks for, 0 when it does not say or names a date."""
    text = next((value for name, value in (headers or {}).items() if name.lower() == "retry-after"), "")
    return float(text) if text.strip().isdigit() else 0.0
