"""Sorts names so that each comes after those that it waits for, and finds circles."""

from __future__ import annotations

import graphlib
import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


def circle_in(after: Mapping[str, Iterable[str]]) -> list[str]:
    """A circle, read as "a after b after a"; empty if there is none.

    `after` maps each name to those that it waits for. The circle begins and ends with its name that comes first in
    `after`.
    """
    return _prepared(after)[1]


def in_turn(after: Mapping[str, Iterable[str]]) -> Iterator[tuple[str, list[str]]]:
    """Yield every name in the order of `after`, but each after those that it waits for; unknown names are ignored.

    If names wait for each other in a circle, the first of them comes first, with the circle (see `circle_in`); all
    other names come with an empty list.
    """
    place = {name: number for number, name in enumerate(after)}
    names = list(after)
    left = {name: [other for other in others if other in place] for name, others in after.items()}
    while left:
        sorter, circle = _prepared(left)
        free: list[int] = []
        while True:
            for name in sorter.get_ready():
                heapq.heappush(free, place[name])
            if not free:
                break
            name = names[heapq.heappop(free)]
            del left[name]
            sorter.done(name)
            yield name, []
        if circle:
            del left[circle[0]]
            yield circle[0], circle
        left = {name: [other for other in others if other in left] for name, others in left.items()}


def _prepared(after: Mapping[str, Iterable[str]]) -> tuple[graphlib.TopologicalSorter[str], list[str]]:
    """A sorter that gives all names that no circle blocks, and one circle if there is any."""
    place = {name: number for number, name in enumerate(after)}
    sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    for name in reversed(place):
        sorter.add(name, *after[name])
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        # Each name comes before the one that waits for it, and the last is the first again.
        circle: list[str] = error.args[1][:0:-1]
        start = circle.index(min(circle, key=place.__getitem__))
        return sorter, [*circle[start:], *circle[: start + 1]]
    return sorter, []
