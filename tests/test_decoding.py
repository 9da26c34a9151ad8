"""Decoder processes: a picture that crashes or hangs its process costs itself, and no process is left behind."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import psutil
import pytest
from PIL import Image

from tinyvlm import images, schema
from tinyvlm.data.decoding import Decoded, Decoders, Store, decode
from tinyvlm.errors import TinyVLMError
from tinyvlm.images import LimitConfig, PictureConfig

PICTURE = PictureConfig(size=64)
LIMITS = LimitConfig(max_bytes=200_000)
TIMEOUT_S = 30.0


def picture(seed: int, *, size: tuple[int, int] = (120, 90)) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def sabotaged(body: bytes, picture: PictureConfig, limits: LimitConfig, store: Store) -> Decoded:
    """`decode`, but what stands behind the picture's end is obeyed; the children of these tests run it."""
    if body.endswith(b"SEGV"):
        signal.raise_signal(signal.SIGSEGV)
    if body.endswith(b"KILL"):
        signal.raise_signal(signal.SIGKILL)
    if body.endswith(b"EXIT"):
        os._exit(3)
    if body.endswith(b"HANG"):
        time.sleep(600)
    if body.endswith(b"WHO"):
        return Decoded(status="ok", detail=str(os.getpid()))
    if body.endswith(b"STOP"):
        with open(body[:-4], "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)
    return decode(body, picture, limits, store)


def refuses_to_start(*_: object) -> Decoded:
    raise AssertionError("its module cannot be imported in a child")


def pool(num_processes: int = 2, timeout_s: float = TIMEOUT_S, store: Store = "finished") -> Decoders:
    return Decoders(PICTURE, LIMITS, store, num_processes, timeout_s, sabotaged)


def who(decoders: Decoders) -> int:
    return int(decoders.submit(b"WHO").result().detail or "")


def wait_until(true: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    end = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def is_running(pid: int) -> bool:
    """Not gone, nor dead and merely not yet collected by the machine's first process."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_decode_keeps_what_the_row_needs() -> None:
    body = picture(0)
    done = decode(body, PICTURE, LIMITS, "finished")
    finished = images.finish(body, PICTURE, LIMITS)
    assert done.image == finished.jpeg
    assert (done.status, done.detail, done.format, done.fit) == (schema.OK, None, "JPEG", "crop")
    assert (done.width, done.height, done.phash) == (120, 90, finished.phash)
    assert done.sha256 == hashlib.sha256(body).hexdigest()
    assert decode(body, PICTURE, LIMITS, "original") == dataclasses.replace(done, image=None)


def test_decode_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    body = picture(0)
    for store in ("finished", "original"):
        cut = decode(body[:400], PICTURE, LIMITS, store)
        assert (cut.status, cut.image, cut.sha256) == ("corrupt", None, hashlib.sha256(body[:400]).hexdigest())
        assert decode(b"<html>", PICTURE, LIMITS, store).status == "not_image"
        assert decode(body, PICTURE, LimitConfig(max_pixels=99), store).status == "bomb"

    def no_memory(*_: object, **__: object) -> images.Finished:
        raise MemoryError("1 GB wanted")

    monkeypatch.setattr(images, "finish", no_memory)
    failed = decode(body, PICTURE, LIMITS, "finished")
    assert (failed.status, failed.detail) == ("internal_error", "MemoryError: 1 GB wanted")
    assert "cannot decode" in caplog.text


@pytest.mark.parametrize("store", ["finished", "original"])
def test_four_bad_pictures_of_two_hundred_cost_four(store: Store) -> None:
    bodies = [picture(seed) for seed in range(200)]
    for index, word in ((3, b"SEGV"), (77, b"KILL"), (78, b"EXIT"), (199, b"SEGV")):
        bodies[index] += word
    order = list(range(200))
    random.Random(0).shuffle(order)
    with pool(store=store) as decoders:
        futures = {index: decoders.submit(bodies[index]) for index in order}
        rows = [futures[index].result(timeout=120) for index in range(200)]
    bad = {index: row for index, row in enumerate(rows) if row.status == "crashed"}
    assert {index: row.detail for index, row in bad.items()} == {
        3: "killed by SIGSEGV",
        77: "killed by SIGKILL",
        78: "exit status 3",
        199: "killed by SIGSEGV",
    }
    assert all(row.image is None and row.sha256 for row in bad.values())
    with Decoders(PICTURE, LIMITS, store, 0, TIMEOUT_S) as here:
        expected = [here.submit(body).result() for body in bodies]
    assert [row for index, row in enumerate(rows) if index not in bad] == [
        row for index, row in enumerate(expected) if index not in bad
    ]
    assert sum(row.status == schema.OK for row in rows) == 196
    assert {"crashed", *(row.status for row in rows)} <= set(schema.STATUSES)


def test_a_picture_that_hangs_its_decoder_costs_its_deadline() -> None:
    with pool(num_processes=2, timeout_s=1.0) as decoders:
        hanging = decoders.submit(picture(0) + b"HANG")
        others = [decoders.submit(picture(seed)) for seed in range(1, 30)]
        assert {other.result().status for other in others} == {schema.OK}
        assert (hanging.result().status, hanging.result().detail) == ("crashed", "no answer in 1 s")


def test_a_child_killed_from_outside_costs_the_picture_it_was_on(tmp_path: object) -> None:
    note = os.path.join(str(tmp_path), "pid")
    with pool(num_processes=1) as decoders:
        stopped = decoders.submit(note.encode() + b"STOP")
        waiting = [decoders.submit(picture(seed)) for seed in range(5)]
        assert wait_until(lambda: os.path.exists(note) and os.path.getsize(note) > 0)
        with open(note) as file:
            os.kill(int(file.read()), signal.SIGKILL)
        assert (stopped.result().status, stopped.result().detail) == ("crashed", "killed by SIGKILL")
        assert [row.result().status for row in waiting] == [schema.OK] * 5


def test_a_child_that_died_idle_costs_nothing() -> None:
    with pool(num_processes=1) as decoders:
        first = who(decoders)
        os.kill(first, signal.SIGKILL)
        assert wait_until(lambda: not is_running(first))
        assert decoders.submit(picture(0)).result().status == schema.OK
        assert who(decoders) != first


def test_children_start_when_needed_and_all_are_gone_after_closing() -> None:
    def mine() -> set[int]:
        return {child.pid for child in psutil.Process().children(recursive=True)}

    before = mine()
    decoders = pool(num_processes=2)
    assert mine() == before
    rows = [decoders.submit(body) for body in [picture(seed) for seed in range(20)] + [picture(0) + b"SEGV"]]
    decoders.close()
    assert [row.result().status for row in rows] == [schema.OK] * 20 + ["crashed"]
    assert mine() == before, "not even a zombie"
    with pytest.raises(RuntimeError):
        decoders.submit(picture(0))


def test_many_threads_may_submit() -> None:
    bodies = [picture(seed) for seed in range(40)]
    rows: dict[int, Decoded] = {}
    with pool(num_processes=2) as decoders:

        def some(start: int) -> None:
            for index in range(start, 40, 4):
                rows[index] = decoders.submit(bodies[index]).result()

        threads = [threading.Thread(target=some, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(rows[index] == decode(body, PICTURE, LIMITS, "finished") for index, body in enumerate(bodies))


def test_bodies_up_to_the_limit_and_above() -> None:
    body = picture(0)
    full = body + bytes(LIMITS.max_bytes - len(body))
    with pool(num_processes=1) as decoders:
        assert decoders.submit(full).result() == decode(full, PICTURE, LIMITS, "finished")
        assert decoders.submit(full).result().status == schema.OK
        assert decoders.submit(full + b"x").result().status == "too_large"
        assert decoders.submit(b"").result().status == "not_image"


def test_a_pool_is_pickled_as_a_new_one() -> None:
    with pool(num_processes=1) as decoders:
        first = who(decoders)
        with pickle.loads(pickle.dumps(decoders)) as copy:
            assert who(copy) != first
            assert copy.submit(picture(0)).result() == decoders.submit(picture(0)).result()


def test_children_that_cannot_start_are_no_fault_of_the_pictures(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    refuses_to_start.__module__ = "a_module_that_is_not_there"
    sys.modules["a_module_that_is_not_there"] = sys.modules[__name__]
    try:
        with (
            Decoders(PICTURE, LIMITS, "finished", 1, TIMEOUT_S, refuses_to_start) as decoders,
            pytest.raises(TinyVLMError, match="exit status 1"),
        ):
            decoders.submit(picture(0)).result()
    finally:
        del sys.modules["a_module_that_is_not_there"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems end idle children only")
@pytest.mark.parametrize("busy", [False, True])
def test_a_killed_parent_leaves_no_child(busy: bool) -> None:
    code = (
        "import test_decoding, time\n"
        "decoders = test_decoding.pool(num_processes=2)\n"
        "pids = {test_decoding.who(decoders) for _ in range(8)}\n"
        f"work = [decoders.submit(b'HANG') for _ in range({2 if busy else 0})]\n"
        "time.sleep(0.5)\n"
        "print(*pids, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        named = {int(pid) for pid in parent.stdout.readline().split()}
        children = {child.pid for child in psutil.Process(parent.pid).children()}
        assert named <= children
        assert all(is_running(pid) for pid in children)
        parent.kill()
    assert wait_until(lambda: not any(is_running(pid) for pid in children))


def test_a_child_imports_little() -> None:
    code = "import sys, tinyvlm.data.decoding; sys.exit(bool({'torch', 'pyarrow', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
