"""Stops a run whose network is broken, instead of writing down a million good links as dead.

    last outcomes ──▶ nearly every host silent? ── no ─▶ go on
                               │ yes: suspicion; retries wait longer, so that a short break is bridged
                               └─ for `GRACE_S`, or many links given up and no answer for a while ─▶ stop

A host that gives no sign of life counts once, an answer counts each time, whatever it says.  So a list of dead links at
a few hosts goes on, and one in which something still answers; a missing name server does not.
"""

from __future__ import annotations

import math
from collections import Counter, deque

from tinyvlm.data.addresses import FetchError
from tinyvlm.errors import NetworkError

WINDOW = 300
"""Hosts and answers that are looked back on."""
MIN_HOSTS = 120
"""Silent hosts below which nothing is concluded: a small list may be wholly dead."""
MAX_ANSWERED = 0.05
"""Share of answers above which the network works."""
GRACE_S = 15.0
"""How long a suspicion may last, and how long a link that failed under it waits before it is tried again."""
ANSWER_S = 5.0
"""How long an answer shows that the network works, however many links are given up."""
SILENT = ("dead.dns", "broken.dns", "timeout.connect", "broken.network", "dead.tls")
"""Statuses that a missing network, name server or certificate store would bring about for every host."""


class Breaker:
    """Remembers the last outcomes and says when it is time to stop."""

    def __init__(self) -> None:
        self._recent: deque[str] = deque()  # silent hosts, and "" for each answer
        self._silent: dict[str, str] = {}  # host → status
        self._given_up: set[str] = set()
        self._since: float | None = None
        self._answered_at = -math.inf

    @property
    def suspects(self) -> bool:
        """Whether nearly every host of late was silent."""
        return self._since is not None

    def answered(self, now: float) -> None:
        """Note that some host answered."""
        self._answered_at = now
        self._remember("")
        if not self._is_silent():
            self._since = None

    def silent(self, host: str, failure: FetchError, now: float, *, given_up: bool) -> NetworkError | None:
        """Note that `host` gave no sign of life, with a status of `SILENT`; the error to stop with, if it is time to.

        `given_up`: the link is not tried again.
        """
        if host not in self._silent:
            self._silent[host] = failure.status
            self._remember(host)
        if given_up:
            self._given_up.add(host)
        if not self._is_silent():
            self._since = None
            return None
        self._since = now if self._since is None else self._since
        # Dead names fail at once, while the links of a host that wants a pause wait: a burst of them is no proof.
        is_long = now - self._since >= GRACE_S
        are_many = len(self._given_up) >= MIN_HOSTS and now - self._answered_at >= ANSWER_S
        if not is_long and not are_many:
            return None
        return NetworkError(self._sentence(failure.detail))

    def _remember(self, host: str) -> None:
        self._recent.append(host)
        if len(self._recent) > WINDOW:
            oldest = self._recent.popleft()
            self._silent.pop(oldest, None)
            self._given_up.discard(oldest)

    def _is_silent(self) -> bool:
        answers = len(self._recent) - len(self._silent)
        return len(self._silent) >= MIN_HOSTS and answers <= MAX_ANSWERED * len(self._recent)

    def _sentence(self, detail: str) -> str:
        kinds = Counter(self._silent.values())
        seen = ", ".join(f"{count} × {status}" for status, count in kinds.most_common())
        unresolved = kinds["dead.dns"] + kinds["broken.dns"]
        what = "did not resolve" if unresolved > len(self._silent) / 2 else "could not be reached"
        return (
            f"Of the last {len(self._recent)} hosts {len(self._silent)} {what} ({seen}; the last: {detail[:200]}); "
            "is there a network and a working name server?  Nothing of this part was written: the same command goes on "
            "from here.  If the links are known to be dead, set download.fetch.circuit_breaker=false."
        )
