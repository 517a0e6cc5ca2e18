"""Predictions put on tasks so that each task ends with exactly one of a version, whatever happens on the way.

Knows what can go wrong between a request and the knowledge of it. Knows no photos. Label Studio itself is the only
record of what was done (docs/adr/0011): before every request it is asked what the tasks hold now, and after it, along
with the next batch, what became of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from backend.label_studio.project import Project, Task
from backend.label_studio.retry import RequestRejected, RetryBudget, TransientError

REJECTED_BY_CONTENT = (400, 404, 413)  # of one prediction or of the batch's size: smaller batches find out which


class Uploads:
    """One version of predictions on its way to a project. Not thread-safe: one thread uploads.

    again: the version's predictions that are there already make way for new ones; else they stay and count as stored.
    deleted: how many predictions were taken away because a task held two of the version, or a newer one had come.
    """

    def __init__(self, project: Project, version: str, *, again: bool = False) -> None:
        self._project = project
        self._version = version
        self._again = again
        self._unverified: set[int] = set()
        self._doubtful: set[int] = set()  # answers were lost: Label Studio may still be storing them
        self.deleted = 0

    def put(self, predictions: Mapping[int, bytes]) -> dict[int, str]:
        """Stores predictions, by task id, as JSON with that id; returns the reasons of those that Label Studio
        does not accept.

        Raises as Project does; what was sent until then is stored, or will be when the same is put again.
        """
        return self._put(dict(predictions), self._project.retry_budget())

    def close(self) -> None:
        """Looks once more at what was put last, and at all that was ever in doubt."""
        self._verify(self._project.look(self._unverified | self._doubtful))
        self._doubtful.clear()

    def verify(self, task: Task) -> None:
        """Leaves one prediction of the version on the task: the first one, or with `again` the last one."""
        if task.holds(self._version) and (self._again or task.may_hold_two or task.id in self._doubtful):
            held = self._project.predictions_of(task.id, self._version)
            # Annotators may have begun from the first one already.
            for extra in held[:-1] if self._again else held[1:]:
                self._project.delete_prediction(extra)
                self.deleted += 1

    def _put(self, todo: dict[int, bytes], budget: RetryBudget) -> dict[int, str]:
        before: dict[int, int] | None = None  # with `again`: the version's newest prediction of each task
        while True:
            seen = self._project.look(todo.keys() | self._unverified)
            self._verify({task: seen[task] for task in self._unverified & seen.keys()})
            self._unverified = set()
            refused = {task: "expected a task of the project, got none" for task in todo if task not in seen}
            if before is None:
                before = self._newest(seen) if self._again else {}
                held = set() if self._again else self._stored(seen, before)
            else:
                held = self._stored(seen, before)
            held &= todo.keys()
            self._unverified |= held
            todo = {task: found for task, found in todo.items() if task in seen and task not in held}
            if not todo:
                return refused
            try:
                taken = self._project.post(todo.values())
            except TransientError as error:
                self._doubtful |= todo.keys()
                self._project.retries += 1
                budget.wait(error)
                continue
            except RequestRejected as error:
                if error.status not in REJECTED_BY_CONTENT:
                    raise
                if len(todo) == 1:
                    return {**refused, **dict.fromkeys(todo, str(error))}
                return {**refused, **self._put_halves(todo, budget)}
            if taken < len(todo):  # Label Studio drops predictions that it finds invalid and reports no error
                dropped = todo.keys() - self._stored(self._project.look(todo), before)
                refused |= dict.fromkeys(dropped, "expected Label Studio to store the prediction, but it dropped it")
            self._unverified |= todo.keys() - refused.keys()
            return refused

    def _put_halves(self, todo: dict[int, bytes], budget: RetryBudget) -> dict[int, str]:
        tasks = list(todo)
        halves = tasks[: len(tasks) // 2], tasks[len(tasks) // 2 :]
        return {task: why for half in halves for task, why in self._put({i: todo[i] for i in half}, budget).items()}

    def _verify(self, seen: Mapping[int, Task]) -> None:
        for task in seen.values():
            self.verify(task)

    def _stored(self, seen: Mapping[int, Task], before: Mapping[int, int]) -> set[int]:
        """Those of the tasks that hold the version, with `again` one that is newer than `before`."""
        held = {task for task in seen if seen[task].holds(self._version)}
        if self._again:
            held = {task for task, newest in self._newest(seen).items() if newest > before.get(task, 0)}
        return held

    def _newest(self, seen: Mapping[int, Task]) -> dict[int, int]:
        held = [task for task in seen if seen[task].holds(self._version)]
        return {task: max(self._project.predictions_of(task, self._version), default=0) for task in held}
