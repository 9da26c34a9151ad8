"""Manners and measure on a clock that runs fast: hosts, places, the breaker, and how little is remembered."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from small_web import on_fast_clock
from yarl import URL

from tinyvlm.data import robots as robots_module
from tinyvlm.data.addresses import FetchError, NotAsked, Resolver
from tinyvlm.data.breaker import ANSWER_S, GRACE_S, MIN_HOSTS, WINDOW, Breaker
from tinyvlm.data.hosts import CLOSED_S, DEAD_S, MAX_HOSTS, MAX_STRIKES, Hosts
from tinyvlm.data.places import FLOOR, START, Places
from tinyvlm.data.robots import Robots


def make_hosts(**changes: Any) -> Hosts:
    settings: dict[str, Any] = {
        "per_host": 8,
        "rate": 0.0,
        "backoff_s": 1.0,
        "max_wait_s": 30.0,
        "dead_after": 5,
        **changes,
    }
    return Hosts(**settings)


async def visit(hosts: Hosts, name: str, seconds: float, times: list[float], *, first: bool = False) -> None:
    await hosts.enter(name, 80, first=first)
    times.append(asyncio.get_running_loop().time())
    await asyncio.sleep(seconds)
    hosts.leave(name)


@pytest.mark.parametrize(
    ("rate", "shared", "num_workers", "gap_s", "most"),
    [
        (0.0, (), 1, 0.0, 8),
        (20.0, (), 4, 0.05, 8),  # not shared: the host is this worker's alone
        (20.0, ("big.test",), 4, 0.2, 2),
        (20.0, ("big.test",), 100, 5.0, 1),
    ],
)
def test_rate_and_connections_of_a_host(
    rate: float, shared: tuple[str, ...], num_workers: int, gap_s: float, most: int
) -> None:
    async def run() -> tuple[list[float], int]:
        hosts = make_hosts(rate=rate, shared=shared, num_workers=num_workers)
        now = 0
        highest = 0
        times: list[float] = []

        async def one() -> None:
            nonlocal now, highest
            await hosts.enter("big.test", 80)
            now += 1
            highest = max(highest, now)
            times.append(asyncio.get_running_loop().time())
            await asyncio.sleep(10.0)
            now -= 1
            hosts.leave("big.test")

        await asyncio.gather(*(one() for _ in range(20)))
        await asyncio.sleep(60)
        assert all(host.idle() for host in hosts._hosts.values())
        return times, highest

    (times, highest), _ = on_fast_clock(run())
    assert highest == most
    assert min(later - earlier for earlier, later in pairwise(times)) >= gap_s * 0.999


def test_a_host_that_only_redirects_lead_to_is_shared_by_all_workers() -> None:
    async def most_at_once(hosts: Hosts, *is_own: bool) -> int:
        now = highest = 0

        async def one(own: bool) -> None:
            nonlocal now, highest
            await hosts.enter("cdn.test", 443, is_own=own)
            now += 1
            highest = max(highest, now)
            await asyncio.sleep(10.0)
            now -= 1
            hosts.leave("cdn.test")

        await asyncio.gather(*(one(own) for own in is_own for _ in range(20)))
        return highest

    async def run() -> None:
        assert await most_at_once(make_hosts(num_workers=4), False) == 2
        assert await most_at_once(make_hosts(num_workers=100), False) == 1
        assert await most_at_once(make_hosts(num_workers=1), False) == 8
        assert await most_at_once(make_hosts(num_workers=4), False, True) == 8, "once it has links of this worker's own"
        assert await most_at_once(make_hosts(num_workers=4, shared=("cdn.test",)), True, False) == 2, (
            "a giant stays one"
        )
        began = asyncio.get_running_loop().time()
        await most_at_once(make_hosts(num_workers=4, rate=20.0), False)
        assert asyncio.get_running_loop().time() - began >= 19 * 4 / 20.0

    on_fast_clock(run())


def test_throttling_pauses_grow_and_end_in_leaving_the_host_alone() -> None:
    async def run() -> None:
        hosts, loop = make_hosts(), asyncio.get_running_loop()
        pauses = []
        for _ in range(MAX_STRIKES - 1):
            await hosts.enter("a.test", 80)
            began = loop.time()
            for _ in range(8):  # the answers to requests that were under way count once
                hosts.answered("a.test", 80, throttled=True)
            hosts.leave("a.test")
            await visit(hosts, "a.test", 0.0, [])
            pauses.append(loop.time() - began)
        assert all(0.5 * 2**n <= pause <= 1.5 * 2**n for n, pause in enumerate(pauses)), pauses
        await hosts.enter("a.test", 80)
        waiting = [asyncio.create_task(hosts.enter("a.test", 80)) for _ in range(20)]
        await asyncio.sleep(0)
        hosts.answered("a.test", 80, throttled=True)
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert sum(isinstance(end, NotAsked) and end.status == "throttled" for end in ends) == 13
        with pytest.raises(NotAsked, match="throttled"):
            await hosts.enter("a.test", 80)
        await asyncio.sleep(CLOSED_S)
        for _ in range(8):
            hosts.leave("a.test")
        await hosts.enter("a.test", 80)
        hosts.answered("a.test", 80, throttled=False)
        hosts.leave("a.test")
        assert len(hosts) == 0, "nothing to remember, nothing remembered"

    on_fast_clock(run())


def test_a_pause_holds_for_one_host_and_retries_go_first() -> None:
    async def run() -> None:
        hosts, loop = make_hosts(per_host=1), asyncio.get_running_loop()
        await hosts.enter("a.test", 80)
        order: list[str] = []

        async def one(name: str, *, first: bool = False) -> None:
            await hosts.enter("a.test", 80, first=first)
            order.append(name)
            hosts.leave("a.test")

        tasks = [asyncio.create_task(one(name)) for name in "bcd"]
        await asyncio.sleep(0)
        hosts.answered("a.test", 80, throttled=True, asked_s=20.0)
        tasks.append(asyncio.create_task(one("a", first=True)))
        hosts.leave("a.test")
        await visit(hosts, "other.test", 0.0, [])
        assert loop.time() == 0.0
        await asyncio.gather(*tasks)
        assert (order, loop.time()) == (["a", "b", "c", "d"], 20.0)

    on_fast_clock(run())


def test_dead_hosts_are_asked_again_after_a_while() -> None:
    async def run() -> None:
        hosts = make_hosts(per_host=1)
        await hosts.enter("a.test", 80)
        queue = [asyncio.create_task(hosts.enter("a.test", port)) for port in (80, 80, 443)]
        await asyncio.sleep(0)
        for _ in range(5):
            hosts.failed("a.test", 80, asyncio.get_running_loop().time())
        hosts.leave("a.test")
        ends = await asyncio.gather(*queue, return_exceptions=True)
        assert [getattr(end, "status", None) for end in ends] == ["dead.host", "dead.host", None]
        hosts.leave("a.test")
        await asyncio.sleep(DEAD_S + 1)
        await visit(hosts, "a.test", 0.0, [])
        hosts.failed("a.test", 80, asyncio.get_running_loop().time())
        with pytest.raises(NotAsked, match=r"dead\.host"):
            await hosts.enter("a.test", 80)
        await asyncio.sleep(DEAD_S + 1)
        hosts.answered("a.test", 80, throttled=False)
        for _ in range(4):
            hosts.failed("a.test", 80, asyncio.get_running_loop().time())
        await visit(hosts, "a.test", 0.0, [])

    on_fast_clock(run())


def test_timeouts_beside_answers_are_no_death() -> None:
    async def run() -> None:
        hosts, loop = make_hosts(), asyncio.get_running_loop()
        began_at = loop.time()
        await asyncio.sleep(1)
        hosts.answered("a.test", 80, throttled=True, asked_s=5.0)
        await asyncio.sleep(4)
        for _ in range(20):  # all had begun before that answer
            hosts.failed("a.test", 80, began_at)
        await visit(hosts, "a.test", 0.0, [])

    on_fast_clock(run())


def test_who_gives_up_waiting_leaves_no_trace() -> None:
    async def run() -> None:
        hosts, places = make_hosts(per_host=1), Places(1, settle_s=5.0)
        both: list[tuple[Callable[[], Any], Callable[[], None]]] = [
            (lambda: hosts.enter("a.test", 80), lambda: hosts.leave("a.test")),
            (places.enter, places.leave),
        ]
        for enter, leave in both:
            await enter()
            for moment in range(3):  # before, at and after being let in
                waiting = asyncio.create_task(enter())
                await asyncio.sleep(0)
                if moment:
                    leave()
                if moment == 2:
                    await waiting
                    continue
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                if moment:
                    await enter()
            leave()
        assert len(hosts) == 0
        assert places._active == 0

    on_fast_clock(run())


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        hosts = make_hosts(rate=20.0)
        for n in range(3 * MAX_HOSTS):
            name = f"host{n}.test"
            await hosts.enter(name, 80)
            if n % 3 == 0:
                hosts.failed(name, 80, 0.0)
            elif n % 3 == 1:
                hosts.answered(name, 80, throttled=True, asked_s=3600.0)
            if n >= 10:  # the first ten are long
                hosts.leave(name)
        assert len(hosts) <= MAX_HOSTS
        assert len(hosts._doors) <= MAX_HOSTS
        for n in range(10):
            hosts.leave(f"host{n}.test")

        cache: dict[str, Any] = {}
        monkeypatch.setattr("tinyvlm.data.addresses.MAX_KNOWN", 100)
        resolver = Resolver((), cache, 1, 1.0)
        for n in range(1000):
            await resolver._look_up(f"host{n}.invalid")
        assert list(cache) == [f"host{n}.invalid" for n in range(900, 1000)]
        await resolver.close()

    on_fast_clock(run())


def test_rules_of_sites_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def read(url: str) -> bytes:
        asked.append(url)
        return b"" if "json" in url else b"User-agent: *\nDisallow: /no\n" + b"#" * 1000

    async def run() -> None:
        robots = Robots(read)
        for n in [*range(20), 0, 19]:
            await robots.check(URL(f"http://host{n}.test/yes"))
        assert robots._num_bytes == sum(rules.num_bytes for rules in robots._known.values()) <= 5000
        assert sum(url.startswith("http://host0.test/robots") for url in asked) == 2, "forgotten, asked again"
        assert sum(url.startswith("http://host19.test/robots") for url in asked) == 1
        with pytest.raises(FetchError, match=r"optout\.robots"):
            await robots.check(URL("http://host19.test/no/x.jpg"))

    monkeypatch.setattr(robots_module, "MAX_TOTAL_BYTES", 5000)
    asyncio.run(run())


def simulate(trouble: Callable[[int], float], seconds: int, *, lag_s: float = 0.0, most: int = 256) -> list[int]:
    """A worker with enough to do, 2 links a second and place; how many places it has after each second."""
    rng = random.Random(0)

    async def run() -> list[int]:
        places = Places(most, settle_s=5.0)
        limits = []
        for second in range(seconds):
            places._wanted = True
            limit = int(places.limit)
            for _ in range(2 * limit):
                places.record(trouble=rng.random() < trouble(limit))
            places.adapt(float(second), lag_s)
            limits.append(int(places.limit))
        return limits

    return on_fast_clock(run())[0]


def test_places_grow_while_all_goes_well_and_ordinary_dead_links_do_not_shake_them() -> None:
    assert simulate(lambda limit: 0.0, 4)[-1] == 256
    for share in (0.06, 0.15):
        limits = simulate(lambda limit, share=share: share, 300)
        assert limits == sorted(limits), f"{share}: never fewer"
        assert limits[-1] == 256


def test_places_of_a_list_that_is_mostly_dead_come_back() -> None:
    for share in (0.25, 0.5, 0.8, 0.95):
        limits = [START, *simulate(lambda limit, share=share: share, 120)]
        assert min(limits) >= START / 2
        assert limits[-1] == 256
        assert sum(later < earlier for earlier, later in pairwise(limits)) <= 1, "halved once, to see whether it helps"


def test_places_follow_what_the_network_bears() -> None:
    def overloaded(limit: int) -> float:
        return 0.05 + max(0.0, 0.9 * (limit - 100) / limit)

    limits = simulate(overloaded, 600)
    assert FLOOR <= min(limits[30:])
    assert max(limits[30:]) < 160
    assert 50 < sum(limits[30:]) / len(limits[30:]) < 130
    # … and rise again when it recovers.
    recovering = simulate(lambda limit: overloaded(limit) if limit > 200 else 0.05, 600)
    assert max(recovering) > 150


def test_a_loop_that_comes_late_has_fewer_places() -> None:
    limits = simulate(lambda limit: 0.0, 60, lag_s=0.6)
    assert limits[-1] == FLOOR
    assert simulate(lambda limit: 0.0, 60, lag_s=0.2)[-1] == 256
    assert simulate(lambda limit: 0.0, 60, lag_s=0.6, most=4)[-1] == 4


def test_the_breaker_counts_hosts_and_not_links() -> None:
    breaker = Breaker()
    for n in range(10_000):
        assert (
            breaker.silent(f"host{n % (MIN_HOSTS - 1)}", FetchError("timeout.connect", "why"), float(n), given_up=True)
            is None
        )
    assert not breaker.suspects


def test_the_breaker_gives_grace_and_says_what_it_saw() -> None:
    breaker = Breaker()
    for n in range(MIN_HOSTS):
        assert breaker.silent(f"host{n}", FetchError("broken.dns", "why"), 0.0, given_up=False) is None
    assert breaker.suspects
    assert breaker.silent("host0", FetchError("broken.dns", "why"), GRACE_S - 0.1, given_up=False) is None
    error = breaker.silent("host0", FetchError("broken.dns", "why"), GRACE_S, given_up=False)
    assert error is not None
    assert f"{MIN_HOSTS} did not resolve ({MIN_HOSTS} × broken.dns; the last: why)" in str(error)
    for _ in range(WINDOW // 20 + 1):
        breaker.answered(GRACE_S)
    assert not breaker.suspects, "one answer in twenty is a network"


@pytest.mark.parametrize("every", [5, 15])
def test_the_breaker_lets_a_list_pass_in_which_some_answer(every: int) -> None:
    breaker = Breaker()
    for n in range(5000):
        if n % every:
            assert breaker.silent(f"host{n}", FetchError("dead.dns", "why"), float(n), given_up=True) is None
        else:
            breaker.answered(float(n))


def test_a_burst_of_dead_names_while_the_living_wait_is_no_proof() -> None:
    def burst(at: float) -> list[bool]:
        breaker = Breaker()
        breaker.answered(0.0)
        failure = FetchError("dead.dns", "why")
        return [breaker.silent(f"host{n}", failure, at, given_up=True) is not None for n in range(2 * WINDOW)]

    assert not any(burst(at=1.0))
    assert any(burst(at=ANSWER_S))
