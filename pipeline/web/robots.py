"""What a site asks of robots: robots.txt (RFC 9309) and the X-Robots-Tag header."""

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

_MAX_RULES = 5000  # per site; a file is an instruction, not a way to keep us busy
_SCOPE = re.compile(r"\s*([^:,\s]+)\s*:\s*(.*)", re.DOTALL)
# Directives that hold a colon themselves, so that it is not the end of a robot's name.
_VALUED = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")


@dataclass(frozen=True, slots=True)
class _Rule:
    pattern: str
    is_allowed: bool

    def matches(self, path: str) -> bool:
        is_anchored = self.pattern.endswith("$")
        first, *rest = self.pattern.removesuffix("$").split("*")
        if not path.startswith(first):
            return False
        at = len(first)
        for number, part in enumerate(rest, start=1):  # linear, where a regex could blow up
            is_last = is_anchored and number == len(rest)
            found = path.rfind(part, at) if is_last else path.find(part, at)
            if found < 0:
                return False
            at = found + len(part)
        return not is_anchored or at == len(path)


@dataclass(frozen=True, slots=True)
class RobotsRules:
    """The rules of one site that are addressed to us, most specific first."""

    rules: tuple[_Rule, ...] = ()

    def allow(self, path: str) -> bool:
        """Tell whether a path with its query may be fetched: the longest match decides."""
        verdict = next((rule for rule in self.rules if rule.matches(path)), None)
        return verdict is None or verdict.is_allowed


ALLOW_ALL = RobotsRules()
DENY_ALL = RobotsRules((_Rule("/", is_allowed=False),))


def parse_robots(text: str, token: str) -> RobotsRules:
    """Return the rules for a robot's name; the groups for `*` hold when none names it."""
    named: list[_Rule] = []
    general: list[_Rule] = []
    is_named = False
    agents: list[str] = []
    is_in_rules = False
    for field, value in _fields(text):
        if field == "user-agent":
            agents = [value.lower()] if is_in_rules else [*agents, value.lower()]
            is_in_rules = False
            is_named = is_named or value.lower() == token.lower()
            continue
        if field not in ("allow", "disallow"):
            continue
        is_in_rules = True
        rule = _Rule(quote(value, safe=string.punctuation), field == "allow")
        if value and len(named) + len(general) < _MAX_RULES:
            named += [rule] * (token.lower() in agents)
            general += [rule] * ("*" in agents)
    chosen = named if is_named else general
    # Longest pattern first; between equals the permission wins (RFC 9309, Sec. 2.2.2).
    return RobotsRules(tuple(sorted(chosen, key=lambda r: (-len(r.pattern), not r.is_allowed))))


def _fields(text: str) -> Iterable[tuple[str, str]]:
    for line in text.removeprefix("\ufeff").splitlines():
        field, colon, value = line.partition("#")[0].partition(":")
        if colon:
            yield field.strip().lower(), value.strip()


def forbidding_directive(
    headers: Sequence[str], token: str, disallowed: frozenset[str]
) -> str | None:
    """Return the first X-Robots-Tag directive that forbids us the response, None when none does.

    `headers` are the header's values, `token` our name; a directive behind another robot's name
    is not meant for us. `none` is short for noindex, nofollow.
    """
    for header in headers:
        is_for_us = True
        for part in header.split(","):
            directive = part.strip().lower()
            scope = _SCOPE.fullmatch(directive)
            if scope and scope[1] not in _VALUED:
                is_for_us = scope[1] in ("*", token.lower())
                directive = scope[2].strip()
            implied = {"noindex"} if directive == "none" else {directive}
            if is_for_us and implied & disallowed:
                return directive
    return None
