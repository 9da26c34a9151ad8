"""Pictures decoded in processes of their own: one that crashes the decoder, or never ends, costs itself and no other.

    submit(body) ─▶ a thread for each child ──length──▶ child process: `decode` ─┐
          Future ◀─ Decoded ◀───────────────facts, as a line of JSON─────────────┘
                        └── bytes both ways in memory that the two share

A child has one picture at a time, so when it dies or misses its deadline that picture is the culprit: it becomes
`crashed`, and a new child goes on with the next.  Children end with their parent, however that ends.  They import
`images` and little else, and what they answer is read as data, never as code: pictures come from strangers.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import logging
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from tinyvlm import images
from tinyvlm.errors import TinyVLMError

_log = logging.getLogger(__name__)

Store = Literal["finished", "original"]

MAX_DETAIL = 200
"""Characters of a row's detail."""
_NUM_STARTS = 3
_START_TIMEOUT_S = 60.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What a picture's row keeps of it."""

    status: str
    detail: str | None = None
    image: bytes | None = None
    """The finished picture; None for a bad one, and for `store=original`, which keeps the body as it was sent."""
    sha256: str | None = None
    """Of the body, in hex."""
    phash: int | None = None
    format: str | None = None
    width: int | None = None
    """Of the whole picture, upright, px."""
    height: int | None = None
    fit: images.Fit | None = None


Work = Callable[[bytes, images.PictureConfig, images.LimitConfig, Store], Decoded]
_Job = tuple[Work, images.PictureConfig, images.LimitConfig, Store]


def decode(body: bytes, picture: images.PictureConfig, limits: images.LimitConfig, store: Store) -> Decoded:
    """Decode a body to the end and keep what `store` says; whatever is wrong with it becomes the status."""
    sha256 = hashlib.sha256(body).hexdigest()
    try:
        done = images.finish(body, picture, limits, encode=store == "finished")
    except images.ImageError as error:
        return Decoded(status=error.status, detail=error.detail[:MAX_DETAIL], sha256=sha256)
    except Exception as error:  # a bug of ours, or no memory: costs a row, not the run
        _log.exception("cannot decode the picture with sha256 %s", sha256)
        detail = f"{type(error).__name__}: {error}"[:MAX_DETAIL]
        return Decoded(status="internal_error", detail=detail, sha256=sha256)
    # schema.OK would bring pyarrow into every child.
    return Decoded(
        status="ok",
        image=done.jpeg,
        sha256=sha256,
        phash=done.phash,
        format=done.format,
        width=done.width,
        height=done.height,
        fit=done.fit,
    )


class Decoders:
    """A pool of decoder processes, each started when it is first needed.

    With `num_processes=0` the work is done in threads of this process, as many as it has cores: for platforms without
    processes.  Nothing survives a crash there, and there is no deadline.  A pickled pool arrives as a new one.
    """

    def __init__(
        self,
        picture: images.PictureConfig,
        limits: images.LimitConfig,
        store: Store,
        num_processes: int,
        timeout_s: float,
        work: Work = decode,
    ) -> None:
        """`timeout_s`: how long a child may take over one picture.  `work`: a function of a module's top level."""
        self._settings = (picture, limits, store, num_processes, timeout_s, work)
        self._job: _Job = (work, picture, limits, store)
        self._num_processes, self._timeout_s = num_processes, timeout_s
        # A body over the limit is refused unread, and no JPEG takes more than four bytes a pixel.
        self._max_bytes = max(limits.max_bytes, 4 * picture.size**2)
        self._threads = ThreadPoolExecutor(num_processes or os.cpu_count(), thread_name_prefix="decode")
        self._mine = threading.local()
        self._children: set[_Child] = set()

    def submit(self, body: bytes) -> Future[Decoded]:
        """Have a picture decoded; any number of threads may call.

        The future fails only if no child can be started at all (TinyVLMError).
        """
        return self._threads.submit(self._decode, body)

    def close(self) -> None:
        """Finish what was handed in, then end the children."""
        self._threads.shutdown()
        for child in list(self._children):
            self._drop(child)

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Decoders], tuple[Any, ...]]:
        return Decoders, self._settings

    def _decode(self, body: bytes) -> Decoded:
        """In one of the pool's threads; each has a child of its own."""
        if not self._num_processes or len(body) > self._max_bytes:
            return _done(self._job, body)
        child: _Child | None = getattr(self._mine, "child", None)
        if child is None or not child.is_alive():  # one that died idle costs no picture
            self._drop(child)
            child = self._mine.child = self._started()
        try:
            return child.decode(body)
        except (OSError, EOFError) as error:
            if not child.has_begun and not isinstance(error, TimeoutError):
                self._drop(child)  # killed while it was idle, and only now seen to be dead: a new one does it
                return self._decode(body)
            reason = f"no answer in {self._timeout_s:g} s" if isinstance(error, TimeoutError) else child.last_words()
            self._drop(child)
            _log.warning("a decoder process was lost: %s", reason)
            return Decoded(status="crashed", detail=reason, sha256=hashlib.sha256(body).hexdigest())

    def _started(self) -> _Child:
        for _ in range(_NUM_STARTS):
            child = _Child(self._job, self._max_bytes, self._timeout_s)
            self._children.add(child)
            try:
                child.wait_until_ready()
                return child
            except (OSError, EOFError):
                reason = child.last_words()
                self._drop(child)
        raise TinyVLMError(
            f"A decoder process wants to start, but ended early {_NUM_STARTS} times ({reason}); "
            "see its words on standard error, and whether there is memory left."
        )

    def _drop(self, child: _Child | None) -> None:
        if child is not None:
            child.end()
            self._children.discard(child)


class _Child:
    """A decoder process, seen from the thread that owns it.

    That thread has to start it: the system ends a child when the thread that started it ends.
    """

    def __init__(self, job: _Job, max_bytes: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        setup = pickle.dumps(job)
        self._link, theirs = socket.socketpair()
        with theirs, _anonymous_file() as file:
            os.ftruncate(file.fileno(), max(max_bytes, len(setup)) + 1)  # the last byte: it has begun
            self._memory = mmap.mmap(file.fileno(), 0)
            numbers = (theirs.fileno(), file.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {__name__} import serve; serve{(*numbers, os.getpid())}"],
                pass_fds=numbers,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # The same modules as here; and no threads of a matrix library that has nothing to multiply.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"},
            )
        self._lines = self._link.makefile("rb")
        self._memory[: len(setup)] = setup
        self._setup_bytes = len(setup)

    def wait_until_ready(self) -> None:
        """Raises OSError or EOFError if it died or slept instead."""
        self._ask(self._setup_bytes, _START_TIMEOUT_S)

    def decode(self, body: bytes) -> Decoded:
        """Raises OSError or EOFError if the child died, TimeoutError if it is late."""
        self._memory[: len(body)] = body
        self._memory[-1] = 0
        facts = json.loads(self._ask(len(body), self._timeout_s))
        num_bytes = facts.pop("image")
        return Decoded(**facts, image=None if num_bytes is None else self._memory[:num_bytes])

    @property
    def has_begun(self) -> bool:
        """It looked at the last picture that it was given; one that died before is not that picture's fault."""
        return bool(self._memory[-1])

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def last_words(self) -> str:
        """How it ended; for one whose socket is closed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(timeout=5)
            return f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        return "it stopped answering"

    def end(self) -> None:
        """Kill it, wait until it is gone and give back what it held; it has nothing to lose."""
        self._process.kill()
        self._process.wait()
        self._lines.close()
        self._link.close()
        self._memory.close()

    def _ask(self, num_bytes: int, timeout_s: float) -> bytes:
        self._link.settimeout(timeout_s)
        self._link.sendall(b"%d\n" % num_bytes)
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return line


def serve(link_number: int, memory_number: int, parent: int) -> None:
    """The life of a child: read a length, decode that many bytes of the shared memory, answer with a line."""
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    images.quiet_pillow()
    with (
        socket.socket(fileno=link_number) as link,
        mmap.mmap(memory_number, 0) as memory,
        link.makefile("rb") as lines,
    ):
        job: _Job = pickle.loads(memory[: int(lines.readline())])
        link.sendall(b"ready\n")
        for line in lines:
            memory[-1] = 1
            decoded = _done(job, memory[: int(line)])
            facts: dict[str, Any] = dataclasses.asdict(decoded)
            if decoded.image is not None:
                facts["image"] = len(decoded.image)
                memory[: len(decoded.image)] = decoded.image
            link.sendall(json.dumps(facts).encode() + b"\n")


def _done(job: _Job, body: bytes) -> Decoded:
    work, picture, limits, store = job
    return work(body, picture, limits, store)


def _end_with(parent: int) -> None:
    """Have the system kill this process when its parent dies.

    An idle child sees the end of its socket anyway; one that hangs in a decoder reads nothing more.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        sys.exit()


def _anonymous_file() -> BinaryIO:
    """A file without a name, in memory where the system can."""
    if sys.platform == "linux":
        return os.fdopen(os.memfd_create("tinyvlm-picture"), "r+b")
    return tempfile.TemporaryFile()
