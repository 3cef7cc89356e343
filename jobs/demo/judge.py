"""How good the demo's filter and captions are, by the truth that no model has seen."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq

from jobs.demo.caption_check import check_caption
from jobs.demo.plan import PlannedImage
from pipeline.corpus import Corpus
from pipeline.record import ShardRecord
from pipeline.roc import area_under_curve

_COLUMNS = ["url", "origin", "text", "itm"]


@dataclass(frozen=True, slots=True)
class FilterQuality:
    """The filter at its threshold, over captions of one origin; shares from 0 to 1."""

    num_captions: int
    right_before: float
    right_after: float | None  # of what is kept; None when nothing is
    recall_of_wrong: float | None  # how many of the wrong ones are dropped
    precision_of_dropping: float | None  # how many of those dropped are wrong
    auc: float | None

    def text(self, name: str) -> str:
        """Return a row of the demo's table."""
        cells = (
            self.right_before,
            self.right_after,
            self.recall_of_wrong,
            self.precision_of_dropping,
            self.auc,
        )
        shown = "".join(f"{'-' if cell is None else f'{cell:.2f}':>14}" for cell in cells)
        return f"{name:<11}{self.num_captions:>9,}{shown}"


HEADER = f"{'captions':<11}{'scored':>9}" + "".join(
    f"{name:>14}" for name in ("right before", "right after", "wrong found", "drops right", "AUC")
)


def judge_filter(
    corpus: Corpus, truth: Mapping[str, PlannedImage], threshold: float
) -> dict[str, FilterQuality]:
    """Return the quality of the filter on web and on synthetic captions.

    A caption is right when everything it states is true of its picture.
    """
    scores: dict[str, list[float]] = {"web": [], "synthetic": []}
    is_right: dict[str, list[bool]] = {"web": [], "synthetic": []}
    for row in _rows(corpus):
        if row["origin"] in scores and row["itm"] is not None:
            planned = truth[urlsplit(row["url"]).path]
            scores[row["origin"]].append(row["itm"])
            is_right[row["origin"]].append(check_caption(row["text"], planned.scene).is_consistent)
    return {
        origin: _quality(np.array(scores[origin]), np.array(is_right[origin]), threshold)
        for origin in scores
        if scores[origin]
    }


def exact_share(
    said: Mapping[str, str], corpus: Corpus, source: str, truth: Mapping[str, PlannedImage]
) -> float:
    """Return the share of captions, by key, that name every object and state nothing wrong.

    `corpus` and `source` are where the images lie.
    """
    right = [
        check_caption(said[row["key"]], truth[urlsplit(row["url"]).path].scene).is_exact
        for record in corpus.shards("raw", source)
        for row in _table(corpus, record, ["key", "url"])
        if row["key"] in said
    ]
    return float(np.mean(right))


def _rows(corpus: Corpus) -> Iterator[dict[str, Any]]:
    for record in corpus.shards("captions"):
        yield from _table(corpus, record, _COLUMNS)


def _table(corpus: Corpus, record: ShardRecord, columns: list[str]) -> list[dict[str, Any]]:
    with corpus.open(record, "parquet") as stream:
        rows: list[dict[str, Any]] = pq.read_table(stream, columns=columns).to_pylist()
    return rows


def _quality(scores: Any, is_right: Any, threshold: float) -> FilterQuality:  # noqa: ANN401
    is_kept = scores >= threshold
    return FilterQuality(
        num_captions=len(scores),
        right_before=float(is_right.mean()),
        right_after=_share(is_right, is_kept),
        recall_of_wrong=_share(~is_kept, ~is_right),
        precision_of_dropping=_share(~is_right, ~is_kept),
        auc=area_under_curve(scores[is_right], scores[~is_right]),
    )


def _share(values: Any, among: Any) -> float | None:  # noqa: ANN401
    return float(values[among].mean()) if among.any() else None
