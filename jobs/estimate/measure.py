"""Quantities that are known within a band, and what follows from them."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

Draws = npt.NDArray[np.float64]
_Z95 = 1.6448536269514722  # a normal variable lies within this of its mean nine times in ten
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Measure(BaseModel):
    """A quantity and the band that it lies in nine times in ten; a bare number is exact."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    value: _Positive
    """The likeliest."""
    low: _Positive
    """Less than this one time in twenty."""
    high: _Positive
    """More than this one time in twenty."""
    source: Annotated[str, Field(min_length=1)]
    """Who says so: a measurement with its place, or `assumption` with its reason."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: object) -> object:
        if isinstance(values, (int, float)) and not isinstance(values, bool):
            values = {"value": values}
        if not isinstance(values, dict) or "value" not in values:
            return values
        exact = {"low": values["value"], "high": values["value"], "source": "given"}
        return exact | values

    @model_validator(mode="after")
    def _is_a_band(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"not in order: low {self.low}, value {self.value}, high {self.high}")
        return self

    @property
    def is_assumed(self) -> bool:
        """Whether nobody has measured it."""
        return self.source.startswith("assumption")

    def draws(self, random: np.random.Generator, number: int) -> Draws:
        """Return (number,) values as likely as the band says: log-normal, each side its own."""
        z = random.standard_normal(number)
        below, above = math.log(self.value / self.low), math.log(self.high / self.value)
        return self.value * np.exp(np.where(z < 0, below, above) * z / _Z95)

    def scaled(self, factor: float, reason: str) -> "Measure":
        """Return the same quantity times a factor, with the reason behind its source."""
        return Measure(
            value=self.value * factor,
            low=self.low * factor,
            high=self.high * factor,
            source=f"{self.source}; {reason}",
        )


@dataclass(frozen=True, slots=True)
class Band:
    """A result: its median, and the bounds it keeps nine times in ten."""

    low: float
    mid: float
    high: float

    @classmethod
    def of(cls, draws: Draws) -> Self:
        """Return the band of what was drawn."""
        low, mid, high = np.quantile(draws, (0.05, 0.5, 0.95))
        return cls(float(low), float(mid), float(high))

    def to_json(self) -> dict[str, Any]:
        """Return the band for machines, to four digits."""
        return {name: float(f"{getattr(self, name):.4g}") for name in ("low", "mid", "high")}


def share_measured(successes: int, trials: int, source: str) -> Measure:
    """Return a share with Wilson's 90% interval, which holds for few trials and near 0 and 1 too.

    Raises ValueError without a success: nothing can be planned from that.
    """
    if not 0 < successes <= trials:
        raise ValueError(f"{successes} of {trials} succeeded")
    share, z2 = successes / trials, _Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 / (1 + z2 / trials)
    half *= math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return Measure(
        value=share, low=min(share, centre - half), high=max(share, centre + half), source=source
    )
