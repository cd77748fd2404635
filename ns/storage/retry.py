"""Retries for a server that is busy, restarts or loses connections: exponential backoff with full jitter, in bounded time."""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import structlog
import urllib3
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ProtocolError, ReadTimeoutError, SSLError
from urllib3.response import BaseHTTPResponse

from ns.core import log

# Statuses of servers that may recover soon. 507 (storage is full) and 501 do not pass.
BUSY = frozenset({408, 429, 500, 502, 503, 504, 509, 529})
# AWS answers this with status 400 if an upload was too slow.
REQUEST_TIMEOUT = b"<Code>RequestTimeout</Code>"


def _draw_uniform(low: float, high: float) -> float:
    # A generator of its own: workers with equal seeds must not retry at the same times.
    return random.SystemRandom().uniform(low, high)


@dataclass(frozen=True)
class RetryPolicy:
    """How long a request is repeated without a byte of progress, and the pauses in between.

    A signed request is valid for 15 minutes: `seconds` must stay well below that.
    """

    seconds: float = 180
    first_contact_seconds: float = 10
    """Limit for an endpoint that never answered this process: a wrong address is more likely than a restart."""
    base_seconds: float = 0.1
    cap_seconds: float = 10
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    uniform: Callable[[float, float], float] = _draw_uniform


class RetryBudget:
    """The time and the pauses that are left for one request."""

    def __init__(self, policy: RetryPolicy, request: str) -> None:
        self._policy = policy
        self._request = request
        self.reset_budget()

    def reset_budget(self) -> None:
        """Restores the whole budget, after progress."""
        self._started_at = self._policy.clock()
        self._failures = 0

    def wait_for_retry(self, reason: str, limit_seconds: float | None = None) -> bool:
        """Waits before the next attempt; returns False if the time is up."""
        spent = self._policy.clock() - self._started_at
        ceiling = min(self._policy.cap_seconds, self._policy.base_seconds * 2**self._failures)
        pause = self._policy.uniform(0, ceiling)
        self._failures += 1
        if spent + pause > (self._policy.seconds if limit_seconds is None else limit_seconds):
            return False
        # Without configuration, structlog would write to stdout, which is for results.
        if structlog.is_configured():
            log.get_logger().warning(
                "store_retry", what=self._request, reason=reason, attempt=self._failures, wait=round(pause, 2)
            )
        self._policy.sleep(pause)
        return True


class RetryingPool(urllib3.PoolManager):
    """Repeats requests; urllib3's own retries and redirects are off.

    All requests of the store can be repeated without harm. A body that breaks off while it is streamed is not noticed here; its reader
    asks for the rest.
    """

    def __init__(self, policy: RetryPolicy, **options: Any) -> None:
        super().__init__(**options)
        self._policy = policy
        self._answered = False

    def urlopen(self, method: str, url: str, redirect: bool = False, **options: Any) -> BaseHTTPResponse:  # type: ignore[override]
        budget = RetryBudget(self._policy, f"{method} {url.partition('?')[0]}")
        while True:
            try:
                response = super().urlopen(method, url, redirect, **{**options, "retries": False})
            except HTTPError as error:
                limit = None if self._answered else self._policy.first_contact_seconds
                if not is_transient(error) or not budget.wait_for_retry(type(error).__name__, limit):
                    raise
                continue
            self._answered = True
            if not _is_busy(response) or not budget.wait_for_retry(f"HTTP {response.status}"):
                return response
            with suppress(HTTPError, OSError):
                response.drain_conn()
            response.close()


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed soon."""
    if isinstance(error, SSLError):
        # The connection broke within the handshake. Other TLS errors stay.
        return "EOF occurred" in str(error)
    return isinstance(error, NewConnectionError | ConnectTimeoutError | ReadTimeoutError | ProtocolError)


def _is_busy(response: BaseHTTPResponse) -> bool:
    if response.status == 400:
        with suppress(HTTPError, OSError):
            return REQUEST_TIMEOUT in response.data
    return response.status in BUSY
