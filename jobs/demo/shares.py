"""Shares of rows by name, and how rows are dealt out to them."""

from math import ceil
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]


class Shares(BaseModel):
    """Base of configurations whose fields are all shares of the same rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="after")
    def _sum_is_a_share(self) -> "Shares":
        total = sum(share for _, share in self)
        if total > 1:
            raise ValueError(f"the shares sum to {total:g}, which is more than 1")
        return self

    def deal(self, num_rows: int, plain: str, rng: np.random.Generator) -> list[str]:
        """Return a name for each row in random order; rows that no share takes are `plain`.

        Shares are rounded up, so that even a small web has one row of every name; where that
        would need more rows than there are, the last names go without.
        """
        named = [name for name, share in self for _ in range(ceil(share * num_rows - 1e-9))]
        dealt = (named + [plain] * num_rows)[:num_rows]
        return [dealt[int(index)] for index in rng.permutation(num_rows)]
