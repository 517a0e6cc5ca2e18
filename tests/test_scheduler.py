"""One thread, two lanes: clicks overtake photos, and prompts that wait together are answered together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from model.scheduler import Scheduler
from model.stages import UNOBSERVED
from model.types import DeadlineExceeded, NotReady


class Doubler:
    """Answers numbers with their doubles, notes in which batches they came, and on which thread."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.threads: set[int] = set()

    def __call__(self, requests: Sequence[int]) -> list[int | Exception]:
        self.events.append(f"{len(requests)} clicks")
        self.threads.add(threading.get_ident())
        return [ValueError("unlucky") if request == 13 else 2 * request for request in requests]


@pytest.fixture
def doubler() -> Doubler:
    return Doubler()


@pytest.fixture
def scheduler(doubler: Doubler) -> Iterator[Scheduler[int, int]]:
    scheduler: Scheduler[int, int] = Scheduler(start_up=lambda: None, answer=doubler, observer=UNOBSERVED)
    yield scheduler
    scheduler.close()


def steps(count: int, step: Callable[[], object]) -> Generator[None, None, int]:
    for _ in range(count):
        step()
        yield
    return count


def test_a_click_overtakes_a_photo_between_two_batches(scheduler: Scheduler[int, int], doubler: Doubler) -> None:
    first_batch_done, go_on = threading.Event(), threading.Event()

    def batch() -> None:
        doubler.events.append("batch")
        first_batch_done.set()
        go_on.wait(10)

    with ThreadPoolExecutor() as pool:
        photo = pool.submit(scheduler.run, steps(3, batch), lane="bulk", deadline=None)
        first_batch_done.wait(10)
        clicks = [pool.submit(scheduler.ask, number, deadline=None) for number in (1, 2)]
        while scheduler.queued("interactive") < 2:
            time.sleep(0.001)
        go_on.set()
        assert photo.result(10) == 3
        assert sorted(click.result(10) for click in clicks) == [2, 4]
    assert doubler.events == ["batch", "2 clicks", "batch", "batch"]


def test_an_opened_photo_overtakes_a_bulk_photo(scheduler: Scheduler[int, int]) -> None:
    order: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def bulk() -> None:
        order.append("bulk")
        begun.set()
        go_on.wait(10)

    with ThreadPoolExecutor() as pool:
        slow = pool.submit(scheduler.run, steps(2, bulk), lane="bulk", deadline=None)
        begun.wait(10)
        quick = pool.submit(scheduler.run, steps(2, lambda: order.append("opened")), lane="interactive", deadline=None)
        while not scheduler.queued("interactive"):
            time.sleep(0.001)
        go_on.set()
        slow.result(10)
        quick.result(10)
    assert order == ["bulk", "opened", "opened", "bulk"]


def test_one_request_that_fails_costs_no_other(scheduler: Scheduler[int, int]) -> None:
    with ThreadPoolExecutor() as pool:
        answers = {number: pool.submit(scheduler.ask, number, deadline=None) for number in (12, 13, 14)}
        with pytest.raises(ValueError, match="unlucky"):
            answers[13].result(10)
        assert (answers[12].result(10), answers[14].result(10)) == (24, 28)


def test_a_failing_photo_fails_alone(scheduler: Scheduler[int, int]) -> None:
    def fail() -> None:
        raise RuntimeError("broken photo")

    with pytest.raises(RuntimeError, match="broken photo"):
        scheduler.run(steps(1, fail), lane="bulk", deadline=None)
    assert scheduler.run(steps(2, lambda: None), lane="bulk", deadline=None) == 2


def test_work_is_dropped_at_its_deadline(scheduler: Scheduler[int, int]) -> None:
    done: list[int] = []
    with pytest.raises(DeadlineExceeded):
        scheduler.run(
            steps(1000, lambda: (done.append(1), time.sleep(0.01))), lane="bulk", deadline=time.monotonic() + 0.1
        )
    assert scheduler.run(steps(1, lambda: None), lane="bulk", deadline=None) == 1
    assert len(done) < 1000
    assert scheduler.queued("bulk") == 0


def test_all_work_runs_on_one_thread(scheduler: Scheduler[int, int], doubler: Doubler) -> None:
    threads: set[int] = set()
    with ThreadPoolExecutor() as pool:
        for number in range(20):
            pool.submit(scheduler.ask, number, deadline=None)
            pool.submit(scheduler.run, steps(2, lambda: threads.add(threading.get_ident())), lane="bulk", deadline=None)
    assert len(threads | doubler.threads) == 1


def test_a_closed_scheduler_refuses_what_waits_and_what_comes(doubler: Doubler) -> None:
    scheduler: Scheduler[int, int] = Scheduler(start_up=lambda: None, answer=doubler, observer=UNOBSERVED)
    begun, go_on = threading.Event(), threading.Event()
    with ThreadPoolExecutor() as pool:
        job = pool.submit(scheduler.run, steps(2, lambda: (begun.set(), go_on.wait(10))), lane="bulk", deadline=None)
        begun.wait(10)
        closing = pool.submit(scheduler.close)
        while not scheduler._closed:
            time.sleep(0.001)
        go_on.set()
        closing.result(10)
        with pytest.raises(NotReady, match="closed"):
            job.result(10)
    with pytest.raises(NotReady, match="closed"):
        scheduler.ask(1, deadline=None)
