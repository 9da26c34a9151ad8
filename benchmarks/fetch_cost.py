"""CPU time of the fetching process for each picture, against a server in a process of its own on this machine.

    python -m benchmarks.fetch_cost [--num 10000] [--kb 100] [--tls] [--uvloop] [--new-connections] [--profile]

The server sends the same bytes for every address and does nothing else, so that the fetching side is what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import multiprocessing
import pstats
import resource
import ssl
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tinyvlm.data.fetch import FetchConfig, Fetcher
from tinyvlm.images import LimitConfig


class _Server(asyncio.Protocol):
    answer = b""
    close = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.head = b""

    def data_received(self, data: bytes) -> None:
        self.head += data
        while (end := self.head.find(b"\r\n\r\n")) >= 0:
            self.head = self.head[end + 4 :]
            self.transport.write(self.answer)
            if self.close:
                self.transport.close()


def _serve(kb: int, certificate: Path | None, close: bool, ready: Connection) -> None:
    body = b"\xff\xd8\xff\xe0" + bytes(kb * 1000 - 4)
    more = "Connection: close\r\n" if close else ""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nServer: bench\r\n{more}Content-Length: {len(body)}\r\n\r\n"
    _Server.answer, _Server.close = head.encode() + body, close

    async def main() -> None:
        context = None
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, certificate.with_name("key.pem"))
        server = await asyncio.get_running_loop().create_server(_Server, "127.0.0.1", 0, ssl=context, backlog=1024)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.run(main())
    asyncio.run(main())


def _certificate(folder: Path) -> Path:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", "key.pem", "-out", "certificate.pem", "-days", "2", "-subj", "/CN=local"]
    subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], cwd=folder, check=True, capture_output=True)
    return folder / "certificate.pem"


async def _fetch(base_url: str, num: int, ca_file: str, concurrency: int) -> None:
    config = FetchConfig(
        allow_hosts=("127.0.0.1",),
        ca_file=ca_file,
        rate_per_host=0,
        concurrency=concurrency,
        concurrency_per_host=concurrency,
    )
    async with Fetcher(config, LimitConfig()) as fetcher:

        async def one(n: int) -> None:
            answer = await fetcher.fetch(f"{base_url}/pictures/{n}.jpg?size=large")
            assert answer.status == "ok", answer
            fetcher.let_go(answer)

        for begin in range(0, num, 1000):
            await asyncio.gather(*(one(n) for n in range(begin, min(num, begin + 1000))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--kb", type=int, default=100)
    parser.add_argument("--concurrency", type=int, default=64)
    for flag in ("--tls", "--uvloop", "--new-connections", "--profile"):
        parser.add_argument(flag, action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        certificate = _certificate(Path(folder)) if given.tls else None
        ready, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        arguments = (given.kb, certificate, given.new_connections, theirs)
        server = context.Process(target=_serve, args=arguments, daemon=True)
        server.start()
        base_url = f"{'https' if given.tls else 'http'}://127.0.0.1:{ready.recv()}"
        work = _fetch(base_url, given.num, str(certificate or ""), given.concurrency)
        if given.uvloop:
            import uvloop

            run = uvloop.run
        else:
            run = asyncio.run
        profile = cProfile.Profile()
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        if given.profile:
            profile.runcall(run, work)
        else:
            run(work)
        after, took_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - began
        server.terminate()
    user = (after.ru_utime - before.ru_utime) * 1000 / given.num
    system = (after.ru_stime - before.ru_stime) * 1000 / given.num
    parts = f"{user:.3f} user, {system:.3f} system"
    words = f"{user + system:.3f} ms CPU a picture ({parts}), {given.num / took_s:.0f} a second"
    sys.stdout.write(f"{words}\n")
    if given.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(35)


if __name__ == "__main__":
    main()
