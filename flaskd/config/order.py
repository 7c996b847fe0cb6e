"""Names in an order in which each comes after those that it waits for, and the circles in which there is none."""

from __future__ import annotations

import graphlib
import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


def circle_in(after: Mapping[str, Iterable[str]]) -> list[str]:
    """A circle, read as "a after b after a"; empty when there is none.

    `after` has what each name waits for. The circle begins and ends with that of its names that stands first there.
    """
    return _prepared(after)[1]


def in_turn(after: Mapping[str, Iterable[str]]) -> Iterator[tuple[str, list[str]]]:
    """Give every name in turn, in the order of `after` as far as what each waits for allows; other names do not count.

    Where names wait for each other in a circle, the first of them goes first; it comes with the circle (see
    `circle_in`), and every other name with an empty one.
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
    """A sorter that gives what no circle keeps, and a circle if there is one."""
    place = {name: number for number, name in enumerate(after)}
    sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    for name in reversed(place):
        sorter.add(name, *after[name])
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        # Each name stands before the one that waits for it, and the last is the first again.
        circle: list[str] = error.args[1][:0:-1]
        start = circle.index(min(circle, key=place.__getitem__))
        return sorter, [*circle[start:], *circle[: start + 1]]
    return sorter, []
