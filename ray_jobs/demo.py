"""The whole line, small and real, on this machine: `make demo` = `tinyvlm demo` = `python -m ray_jobs.demo`.

    local web server ─▶ links.parquet ─▶ local Ray ─▶ one `ray job submit` a stage ─▶ five questions over HTTP
                                                                   │
                                              summary.json, report.html, the page stays up

It does nothing that a user of a cluster could not do by hand: every stage is a job, every hand-over a folder.  The same
command again continues: finished stages say so and end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_jobs._demo_screen import Screen
from ray_jobs._demo_summary import ask_questions, summarise, write_report
from ray_jobs._jobs import JobClient, command_line
from ray_jobs._local_cluster import LocalCluster, MemoryMeter, require_port, start_beside
from tinyvlm import recipes
from tinyvlm.errors import ClusterError, ConfigError, TinyVLMError
from tinyvlm.folders import write_atomic

STAGES = ("download", "preprocess", "explore", "encode", "prepare", "pretrain", "sft", "instruct", "evaluate", "serve")
WEB_PORT = 8123
"""Where the pictures are served from.  Fixed, because the links (and so every fingerprint) contain it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What the command line chose."""

    output: Path
    exit_when_done: bool
    seed: int
    num_pictures: int | None
    dashboard_port: int
    port: int
    web_port: int
    recipe: str
    overrides: tuple[str, ...]


def parse(argv: list[str]) -> Options:
    parser = argparse.ArgumentParser(prog="tinyvlm demo", description="From links to a served answer, on this machine.")
    parser.add_argument("--exit", action="store_true", help="end after the summary instead of keeping the page up")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="where everything is written")
    parser.add_argument("--seed", type=int, default=0, help="seed of the links' order and of training")
    parser.add_argument("--pictures", type=int, help="use only so many of easy-VQA's pictures (a miniature run)")
    parser.add_argument("--dashboard-port", type=int, default=8265, help="Ray's dashboard")
    parser.add_argument("--port", type=int, default=8000, help="the web page and the endpoint")
    parser.add_argument("--web-port", type=int, default=WEB_PORT, help="the local server of pictures and trouble")
    parser.add_argument("--recipe", default="tiny", help="a recipe's name or a JSON file")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=V", help="a setting of the recipe")
    args = parser.parse_args(argv)
    seeds = tuple(f"{stage}.seed={args.seed}" for stage in ("pretrain", "sft", "instruct"))
    serve = (f"serve.port={args.port}",)
    # The recipe's steps are for all pictures; fewer are seen once.
    fewer = tuple(f"{stage}.steps=0" for stage in ("pretrain", "sft", "instruct")) if args.pictures else ()
    return Options(
        args.output.absolute(), args.exit, args.seed, args.pictures, args.dashboard_port, args.port, args.web_port,
        args.recipe, (*seeds, *serve, *fewer, *args.set),
    )  # fmt: skip


@contextlib.contextmanager
def serve_pictures(options: Options, environment: dict[str, str]) -> Iterator[Path]:
    """Run the local web server and write the list of links to it; yields the list's path."""
    from tinyvlm.toy.links import write_links

    require_port(options.web_port, "the local picture server", "--web-port")
    base_url = f"http://127.0.0.1:{options.web_port}"
    log_path = options.output / "logs" / "web_server.log"
    links = options.output / "links" / "links.parquet"
    command = [sys.executable, "-m", "tinyvlm.toy.web_server", "--port", str(options.web_port)]
    server = start_beside(command, environment, log_path)
    try:
        wait_for(f"{base_url}/healthz", 30, f"The local picture server did not start; see {log_path}.")
        # A closed port for "connection refused"; port 1 (tcpmux) is never open on a laptop.
        write_links(links, base_url, closed_port=1, seed=options.seed, num_pictures=options.num_pictures)
        yield links
    finally:
        # It has nothing to put away, and connections that it keeps open on purpose would hold it up.
        server.kill()
        server.wait()


def highest_peak(output: Path, meter: MemoryMeter) -> int:
    """Peak memory, bytes, over this command and those that it continues: a finished stage costs nothing again."""
    path = output / "peak_memory.json"
    before = int(json.loads(path.read_text())["bytes"]) if path.is_file() else 0
    write_atomic(path, json.dumps({"bytes": max(before, meter.peak_bytes)}))
    return max(before, meter.peak_bytes)


def wait_for(url: str, timeout_s: float, complaint: str) -> None:
    """Raises ClusterError(complaint) when `url` does not answer 200 in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise ClusterError(complaint)


def run_stages(
    options: Options, links: Path, client: JobClient, meter: MemoryMeter, screen: Screen
) -> dict[str, float]:
    """Submit every stage in turn; returns seconds by stage (those of an earlier run for finished stages)."""
    times_path = options.output / "times.json"
    times: dict[str, Any] = json.loads(times_path.read_text()) if times_path.is_file() else {}
    for stage in STAGES:
        arguments = ["--recipe", options.recipe, "--input", str(links if stage == "download" else options.output)]
        arguments += [] if stage == "serve" else ["--output", str(options.output)]
        for override in options.overrides:
            arguments += ["--set", override]
        screen.begin(stage, options.output)
        started, started_at = time.monotonic(), time.time()
        job = client.submit(stage, arguments, {})
        client.follow(stage, job, lambda: screen.tick(meter), options.output / "logs" / f"{stage}.log")
        highest_peak(options.output, meter)
        folder, fresh = latest_folder(options.output, stage, started_at)
        recorded = times.get(stage)
        if fresh or recorded is None or recorded["folder"] != folder:
            times[stage] = {"seconds": time.monotonic() - started, "folder": folder}
            write_atomic(times_path, json.dumps(times, indent=2))
        screen.end(stage, times[stage]["seconds"], finished_before=not fresh and recorded is not None)
        logger.debug("%s", command_line(stage, arguments))
    return {stage: float(times[stage]["seconds"]) for stage in STAGES}


def latest_folder(root: Path, stage: str, since: float) -> tuple[str, bool]:
    """Name of the folder that a stage just made or confirmed, and whether its manifest is newer than `since`."""
    pointer = root / "latest" / f"{stage}.json"
    if not pointer.is_file():
        return "", True
    folder = str(json.loads(pointer.read_text())["folder"])
    return folder, (root / folder / "manifest.json").stat().st_mtime >= since - 1


def run(options: Options) -> None:
    """The whole demo.

    Raises:
        TinyVLMError: with one sentence; finished stages stay finished.
    """
    # Before anything starts: a wrong setting must not leave anything behind.
    recipe = recipes.load(options.recipe, options.overrides)
    require_port(options.port, "the web page and the endpoint", "--port")
    require_easy_vqa()
    (options.output / "logs").mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    cluster = LocalCluster(options.dashboard_port, options.output / "logs" / "ray.log")
    with Screen(STAGES) as screen, serve_pictures(options, cluster.environment) as links:
        screen.say(f"starting a local Ray, dashboard at {cluster.dashboard_url}")
        with cluster, MemoryMeter(cluster) as meter:
            set_up = time.monotonic() - started
            checkout = Path(__file__).parent.parent
            working_dir = checkout if (checkout / "pyproject.toml").is_file() else None
            client = JobClient(cluster.dashboard_url, cluster.environment, working_dir)
            seconds = {"start": set_up, **run_stages(options, links, client, meter, screen)}
            url = f"http://127.0.0.1:{options.port}"
            asked = ask_questions(options.output, url, recipe.serve.model_name, count=5)
            summary = summarise(options.output, seconds, highest_peak(options.output, meter), asked, options.seed)
            write_atomic(options.output / "summary.json", json.dumps(summary, indent=2))
            write_report(options.output, summary, asked)
            screen.close(summary, asked, options.output, url)
            if not options.exit_when_done:
                keep_up(screen, url, cluster.dashboard_url)


def keep_up(screen: Screen, url: str, dashboard_url: str) -> None:
    """Hold everything up until Ctrl-C."""
    screen.say(f"page {url}   Ray dashboard {dashboard_url}   Ctrl-C ends both")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)


def require_easy_vqa() -> None:
    """Raises ConfigError when the demo's pictures are not installed."""
    import importlib.util

    if importlib.util.find_spec("easy_vqa") is None:
        raise ConfigError(
            "The demo wants the pictures of the package easy-vqa; run `pip install easy-vqa`, or `make demo`."
        )


def main(argv: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    # A polite kill puts things away, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(options)
    except TinyVLMError as error:
        sys.stderr.write(f"error: {error}\nThe same command again continues where this one stopped.\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command again continues.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
