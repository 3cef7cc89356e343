"""Alarms: the known ways in which training goes on without learning, each with what to do.

A loss that is not finite stops training; everything else is written down and goes on. Nothing here
makes the device wait: it is looked at when a record is due anyway.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jobs.errors import RunError

# Guessing one match among three pairs, whatever is seen (BLIP, Sec. 3.2: B true, 2B negative).
ITM_PRIOR = -(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3
PATIENCE = 3  # records in a row before a condition is an alarm
_NEAR = 0.01


class DivergedError(RunError):
    """A loss or gradient is not finite: says since when and what to do."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that training does not get over by itself."""

    name: str
    advice: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Expectations:
    """What tells learning from not learning, for one stage."""

    num_contrasted: int | None = None  # columns of ITC's softmax
    temperature_range: tuple[float, float] | None = None
    after_steps: int = 1000  # what is not learned before is no alarm


@dataclass(slots=True)
class Gates:
    """Judges records of training; remembers how often in a row each condition was seen."""

    expected: Expectations
    held: dict[str, int] = field(default_factory=dict)  # by alarm, in records that tell of it

    def judge(self, step: int, record: Mapping[str, float]) -> list[Alarm]:
        """Return the alarms that hold after `PATIENCE` records in a row, given the newest one.

        What a record does not tell of stays as it was: probes come less often than records.
        """
        if step < self.expected.after_steps:
            return []
        advice = {}
        for name, is_sick, what_to_do in self._conditions(record):
            self.held[name] = self.held.get(name, 0) + 1 if is_sick else 0
            advice[name] = what_to_do
        return [Alarm(n, advice[n]) for n in advice if self.held[n] >= PATIENCE]

    def _conditions(self, record: Mapping[str, float]) -> Iterator[tuple[str, bool, str]]:
        """Yield each condition that the record tells of: its name, if it holds, and advice."""
        if (itm := record.get("itm")) is not None:
            yield (
                "itm_at_prior",
                abs(itm - ITM_PRIOR) < _NEAR,
                f"ITM is at {ITM_PRIOR:.4f}, the entropy of guessing: the image is ignored. It "
                "leaves this once ITC is learned; if ITC is, check that images and captions "
                "belong together, lower the rate or train longer",
            )
        if (columns := self.expected.num_contrasted) and "itc" in record:
            yield (
                "itc_at_chance",
                record["itc"] > math.log(columns) - _NEAR,
                f"ITC is at ln {columns:,} = {math.log(columns):.3f}, that of a random choice: "
                "raise the rate or the batch, and check that captions belong to their images",
            )
        if (limits := self.expected.temperature_range) and "temperature" in record:
            low, high = limits
            yield (
                "temperature_at_limit",
                not low * 1.01 < record["temperature"] < high * 0.99,
                f"the temperature {record['temperature']:.4f} is at a limit of {limits}: lower "
                "the rate; many captions that are equal push it up",
            )
        yield from self._captions(record)

    def _captions(self, record: Mapping[str, float]) -> Iterator[tuple[str, bool, str]]:
        if "lm_seen" in record and "lm_blind" in record:
            seen = record["lm_seen"]
            blind = min(record["lm_blind"], record.get("lm_blank", math.inf))
            yield (
                "lm_blind",
                seen >= blind - _NEAR,
                f"captions are predicted no better with the image ({seen:.3f}) than without "
                f"({blind:.3f}): check that the image encoder's weights were loaded, and that "
                "images and captions belong together",
            )
        if (different := record.get("num_distinct_captions")) is not None:
            yield (
                "same_caption",
                different == 1,
                "every held-out image gets the same caption: the language model does not read "
                "the image. Check that stage 1 was trained, then the rate and the prompt",
            )


class FiniteGuard:
    """Remembers on the device at which step a loss or gradient was first not finite."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), -1, dtype=torch.int64, device=device)

    def see(self, step: int, *values: Tensor) -> None:
        """Look at the values of a step without waiting for them."""
        is_bad = ~torch.stack([value.detach().isfinite().all() for value in values]).all()
        at = torch.full_like(self._first, step)
        self._first = torch.where((self._first < 0) & is_bad, at, self._first)

    def check(self) -> None:
        """Raise DivergedError if anything was not finite; waits for the device."""
        if (step := int(self._first)) >= 0:
            raise DivergedError(
                f"the loss or its gradient is not finite since step {step}; the last checkpoint is "
                "from before. Lower peak_rate, lengthen warmup_steps, set clip_norm=1, or set "
                "precision=float32, and give the same command again"
            )
