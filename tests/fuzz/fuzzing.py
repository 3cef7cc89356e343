"""What every fuzzer shares: a case for every number, a clock, and escapes that can be shown again.

    python tests/fuzz/fuzz_NAME.py --seconds 600     ten minutes of fresh cases
    python tests/fuzz/fuzz_NAME.py --only 1234       case 1234 again, with its traceback

A case is a pure function of its number, so a number is all that a report of an escape needs.
"""

import argparse
import json
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable

Check = Callable[[random.Random], str]  # makes one case and tries it; says how it ended, or raises

_EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF)


def fuzz(name: str, check: Check, argv: list[str] | None = None) -> int:
    """Run a fuzzer's command line; returns its exit code: 1 where a case escaped."""
    parser = argparse.ArgumentParser(description=f"Fuzz {name}.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="run this case alone and let it raise")
    options = parser.parse_args(argv)
    if options.only is not None:
        print(check(random.Random(options.only)))
        return 0
    started, number = time.monotonic(), options.first
    outcomes: Counter[str] = Counter()
    escapes: list[int] = []
    while time.monotonic() - started < options.seconds:
        try:
            outcomes[check(random.Random(number))] += 1
        except Exception:
            escapes.append(number)
            if len(escapes) <= 5:
                print(f"case {number} escaped:", file=sys.stderr)
                traceback.print_exc()
        number += 1
    for outcome, count in outcomes.most_common(40):
        print(f"{count:>10,}  {outcome}")
    figures = {
        "name": f"fuzz {name}",
        "cases": number - options.first,
        "escapes": len(escapes),
        "first_escapes": escapes[:10],
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(figures))
    return 1 if escapes else 0


def mutate(draw: random.Random, data: bytes, most: int = 8) -> bytes:
    """Return the bytes with one to `most` faults: changed, cut, doubled, moved or left out."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, most)):
        if not changed:
            break
        at = draw.randrange(len(changed))
        span = min(len(changed) - at, 1 << draw.randrange(8))
        kind = draw.randrange(7)
        if kind == 0:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[at] = draw.choice(_EDGES)
        elif kind == 2:
            changed[at : at + span] = draw.randbytes(span)
        elif kind == 3:
            del changed[at : at + span]
        elif kind == 4:
            changed[at:at] = changed[at : at + span]
        elif kind == 5:
            del changed[at:]
        else:
            to = draw.randrange(len(changed))
            changed[to : to + span] = changed[at : at + span]
    return bytes(changed)
