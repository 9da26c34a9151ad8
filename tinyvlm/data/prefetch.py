"""Work done in threads ahead of where its results are used, in order and bounded.

items ──▶ make, in threads ──▶ at most `depth` results wait ──▶ in the order of the items
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(make: Callable[[Item], Result], items: Iterable[Item], num_threads: int, depth: int) -> Iterator[Result]:
    """`map(make, items)`, computed up to `depth` results ahead.  What `make` raises comes at its result's place."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="prefetch") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # an error here, or a reader that stopped: nobody waits for the rest
            for future in waiting:
                future.cancel()
