"""Work done ahead of its use by a few threads, in order, with memory that stays flat."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

AHEAD = 32

T = TypeVar("T")
U = TypeVar("U")


def in_order(pool: ThreadPoolExecutor, function: Callable[[T], U], items: Iterable[T]) -> Iterator[tuple[T, U]]:
    """Pairs (item, function(item)) in the order of items, at most AHEAD of them under way at once."""
    waiting: deque[tuple[T, Future[U]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) >= AHEAD:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()
