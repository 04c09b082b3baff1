"""Which task waits for which."""

from __future__ import annotations

import graphlib
import heapq
from collections.abc import Mapping

from .schema import InputValue, PipelineSpec, Reference, sources_of

__all__ = ["circles", "order", "waits_for"]


def waits_for(spec: PipelineSpec) -> dict[str, tuple[str, ...]]:
    """Tasks that each task reads from at any party, in file order."""
    given: dict[str, list[InputValue]] = {name: list(task.inputs.values()) for name, task in spec.tasks.items()}
    for tasks in spec.overrides.values():
        for name, override in tasks.items():
            if name in given:
                given[name] += override.inputs.values()
    edges: dict[str, tuple[str, ...]] = {}
    for name, values in given.items():
        sources = {s.task for value in values for s in sources_of(value) if isinstance(s, Reference)}
        edges[name] = tuple(task for task in spec.tasks if task in sources) if sources else ()
    return edges


def order(spec: PipelineSpec) -> tuple[str, ...]:
    """Tasks in an order in which each comes after what it reads from; the file's order wherever that is free.

    Tasks in a circle, and what waits for them, are left out; `check` has refused them before.
    """
    edges = waits_for(spec)
    position = {name: index for index, name in enumerate(spec.tasks)}
    names = list(spec.tasks)
    missing = {name: len(before) for name, before in edges.items()}
    readers: dict[str, list[str]] = {name: [] for name in names}
    for name, before in edges.items():
        for task in before:
            readers[task].append(name)
    ready = [position[name] for name in names if not missing[name]]
    done: list[str] = []
    while ready:
        name = names[heapq.heappop(ready)]
        done.append(name)
        for reader in readers[name]:
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, position[reader])
    return tuple(done)


def circles(edges: Mapping[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Circles that share no task, each from its first task in file order on, in the order data would flow."""
    left = dict(edges)
    position = {name: index for index, name in enumerate(edges)}
    found: list[tuple[str, ...]] = []
    while True:
        try:
            graphlib.TopologicalSorter(left).prepare()
        except graphlib.CycleError as error:
            ring: list[str] = error.args[1][:-1]
        else:
            return sorted(found, key=lambda ring: position[ring[0]])
        start = min(range(len(ring)), key=lambda index: position[ring[index]])
        found.append(tuple(ring[start:] + ring[:start]))
        left = {name: tuple(t for t in before if t not in ring) for name, before in left.items() if name not in ring}
