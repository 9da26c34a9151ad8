"""Being asked to stop: SIGTERM, as a spot instance or a cluster sends it before it takes the machine away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def sigterm_noticed() -> Iterator[threading.Event]:
    """An event that is set by the first SIGTERM, which then does nothing else; a second one does what it always did.

    Outside of the main thread, where Python takes no signals, it is never set.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def notice(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, notice)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
