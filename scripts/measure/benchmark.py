"""`facings benchmark`: sections of measurements, one after another, and their report.

Knows which module measures what. Measuring returns values; printing is apart.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from typing import Any

from model import EngineOptions
from model.device import choose_placement
from model.memory import is_out_of_memory
from scripts.measure import clicks_beside_training, engine, floor, parity, project, server, transports, upstream

MEGAPIXELS = (2.0, 8.0, 16.0)


class Section(StrEnum):
    """What there is to measure."""

    sizes = "sizes"
    lanes = "lanes"
    training = "training"
    http = "http"
    memory = "memory"
    upstream = "upstream"
    generator = "generator"
    parity = "parity"
    floor = "floor"
    project = "project"
    transports = "transports"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to measure. megapixels: of the photos, in sections that measure several sizes."""

    options: EngineOptions
    repeat: int
    requests: int
    megapixels: Sequence[float]

    @property
    def compared(self) -> dict[str, Any]:
        """What the comparisons with upstream take."""
        return {"config": upstream.compared_config(self.options), "megapixels": self.megapixels}


Print = Callable[[Any], None]

#: Of the sections that ask one engine directly: what measures, and what prints a result. A measurement of several sizes
#: gives its results one by one.
ENGINE_SECTIONS: Mapping[Section, tuple[Callable[[Plan, engine.ObservedEngine], Any], Print]] = {
    Section.sizes: (
        lambda plan, observed: engine.measure_sizes(observed, megapixels=plan.megapixels, repeat=plan.repeat),
        engine.print_size,
    ),
    Section.lanes: (
        lambda _, observed: engine.measure_engine_lanes(observed.engine),
        partial(engine.print_lanes, "engine"),
    ),
    Section.training: (
        lambda plan, observed: clicks_beside_training.measure_clicks_beside_training(
            observed.engine, plan.options.device
        ),
        partial(engine.print_lanes, "engine"),
    ),
}
#: The same of all others.
SECTIONS: Mapping[Section, tuple[Callable[[Plan], Any], Print]] = {
    Section.http: (
        lambda plan: server.measure_http_lanes(plan.options, photos=engine.BULK_PHOTOS),
        partial(engine.print_lanes, "HTTP"),
    ),
    Section.memory: (
        lambda plan: server.measure_memory(plan.options, count=plan.requests),
        server.print_memory,
    ),
    Section.upstream: (
        lambda plan: upstream.measure_upstream(plan.options.device, repeat=plan.repeat, **plan.compared),
        upstream.print_upstream,
    ),
    Section.generator: (
        lambda plan: upstream.measure_generator(plan.options.device, repeat=max(1, plan.repeat // 5), **plan.compared),
        upstream.print_generator,
    ),
    Section.parity: (
        lambda plan: parity.measure_parity(plan.options, megapixels=plan.megapixels),
        parity.print_parity,
    ),
    Section.floor: (lambda plan: floor.measure_floor(plan.options, repeat=plan.repeat), floor.print_floor),
    Section.project: (lambda plan: project.measure_project(plan.options), project.print_project),
    Section.transports: (
        lambda plan: transports.measure_transports(plan.options, megapixels=plan.megapixels[0]),
        transports.print_transport,
    ),
}


def benchmark(
    options: EngineOptions,
    sections: Sequence[Section],
    *,
    repeat: int,
    requests: int,
    megapixels: Sequence[float],
) -> None:
    """Measures the sections one after another and prints each result when it is there; the last line is JSON.

    megapixels: of the photos, in sections that measure several sizes.
    Raises DeviceError for a device that is not there.
    """
    choose_placement(options.device)
    plan = Plan(options=options, repeat=repeat, requests=requests, megapixels=megapixels)
    report: dict[str, Any] = {"cpus": os.cpu_count(), "machine": platform.machine()}
    with ExitStack() as stack:
        of_engine = [section for section in ENGINE_SECTIONS if section in sections]
        if of_engine:
            observed = stack.enter_context(engine.observed_engine(options))
            report["version"] = observed.engine.version
        for section in of_engine:
            measure_with, show = ENGINE_SECTIONS[section]
            report[section] = _reported(measure_with(plan, observed), show)
    for section, (measure, show) in SECTIONS.items():
        if section in sections:
            report[section] = _reported(measure(plan), show)
    report["peak_memory"] = peak_memory_mb()
    print("peak memory: " + ", ".join(f"{name} {value:.0f}" for name, value in report["peak_memory"].items()))
    print(json.dumps(report))


def peak_memory_mb() -> dict[str, float]:
    """The most memory this process has held so far, and its GPU if one was used: since the generator section, which
    counts anew, if that ran."""
    import resource

    import torch

    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if platform.system() == "Darwin" else 1)
    peak = {"process_mb": peak_kb / 1024}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        peak["gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return {name: round(value, 1) for name, value in peak.items()}


def _reported(results: Any, print_result: Print) -> Any:
    """A result, or all of several, as they stand in the report; each is printed when it is there. Results for which
    memory did not suffice are missing."""
    if not isinstance(results, Iterator):
        print_result(results)
        return _fields(results)
    answers: list[dict[str, Any]] = []
    try:
        for result in results:
            print_result(result)
            answers.append(_fields(result))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(f"  out of memory after {len(answers)} sizes: {str(error).splitlines()[0]}")
    return answers


def _fields(result: Any) -> dict[str, Any]:
    """A result's fields and properties."""
    properties = [name for name, member in vars(type(result)).items() if isinstance(member, property)]
    return {**asdict(result), **{name: getattr(result, name) for name in properties}}
