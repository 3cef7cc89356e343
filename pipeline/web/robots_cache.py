"""robots.txt of the hosts in use: fetched once each, under the same guard, and held in bounds."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from pipeline.web.config import FetchConfig
from pipeline.web.deadline import Deadline
from pipeline.web.failures import FailureReason, FetchError
from pipeline.web.guard import Target
from pipeline.web.robots import ALLOW_ALL, DENY_ALL, RobotsRules, parse_robots

MAX_ROBOTS_BYTES = 2 * 2**20  # RFC 9309, Sec. 2.5 wants 500 KiB at least
_FRESH_SECONDS = 24 * 3600.0  # RFC 9309, Sec. 2.4

GetText = Callable[[str, Deadline], bytes]


class RobotsCache:
    """Answers whether a host's robots.txt allows a target; threads may share it."""

    def __init__(self, config: FetchConfig, get: GetText, clock: Callable[[], float]) -> None:
        """`get` returns the bytes at a URL or raises FetchError; `clock` counts seconds."""
        self._token = config.user_agent_token
        self._max_hosts = config.robots_cache_hosts
        self._get = get
        self._clock = clock
        self._lock = threading.Lock()
        self._hosts: OrderedDict[tuple[str, str, int], tuple[float, Future[RobotsRules]]] = (
            OrderedDict()
        )

    def check(self, target: Target, deadline: Deadline) -> None:
        """Return when the target may be fetched; raises FetchError when not, or when unknown."""
        if not self._rules(target, deadline).allow(target.path):
            raise FetchError(FailureReason.ROBOTS_TXT, f"robots.txt of {target.host_header}")

    def _rules(self, target: Target, deadline: Deadline) -> RobotsRules:
        with self._lock:
            since, rules = self._hosts.get(target.origin, (0.0, None))
            if rules is not None and self._clock() - since < _FRESH_SECONDS:
                self._hosts.move_to_end(target.origin)
                is_ours = False
            else:
                rules = Future()
                self._hosts[target.origin] = (self._clock(), rules)
                self._hosts.move_to_end(target.origin)
                is_ours = True
                if len(self._hosts) > self._max_hosts:
                    self._hosts.popitem(last=False)
        if is_ours:
            self._fill(rules, target, deadline)
        try:
            return rules.result(timeout=deadline.cut(deadline.remaining_seconds))
        except TimeoutError as error:
            raise deadline.exceeded() from error

    def _fill(self, rules: Future[RobotsRules], target: Target, deadline: Deadline) -> None:
        try:
            rules.set_result(self._ask(target, deadline))
        except BaseException as error:  # those who wait for the same answer must not wait forever
            with self._lock:
                if self._hosts.get(target.origin, (0.0, None))[1] is rules:
                    del self._hosts[target.origin]  # the next URL asks again
            rules.set_exception(error)

    def _ask(self, target: Target, deadline: Deadline) -> RobotsRules:
        """Only "no such file" allows everything; a file that we cannot use denies everything."""
        url = f"{target.scheme}://{target.host_header}/robots.txt"
        try:
            text = self._get(url, deadline)
        except FetchError as error:
            if error.http_status is not None and 400 <= error.http_status < 500:
                is_absent = error.reason is not FailureReason.TOO_MANY_REQUESTS
            else:
                is_absent = error.reason is FailureReason.EMPTY_BODY
            if is_absent:
                return ALLOW_ALL
            if not error.reason.is_transient:
                return DENY_ALL
            if error.http_status is not None:
                raise FetchError(FailureReason.ROBOTS_UNREACHABLE, error.detail) from error
            raise
        return parse_robots(text.decode("utf-8", errors="replace"), self._token)
