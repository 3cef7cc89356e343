"""How well scores tell captions that belong to an image from others, and where to set thresholds.

Pairs of the corpus are set against the same images with other images' captions, which are wrong
nearly always; and, if there are any, against pairs that people have labelled. Many pairs of a noisy
corpus are wrong themselves, so recall against shuffled pairs is of all pairs, not of the good ones.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus import Corpus
from pipeline.image_decode import Pixels, decode
from pipeline.image_header import read_header
from pipeline.report.build import write_file
from pipeline.report.gallery import spread
from pipeline.report.labels import LabelledPair, stored_captions
from pipeline.report.ledgers import Ledgers, Row, Snapshot, SqlLimits
from pipeline.report.scores import FINE, SCORES
from pipeline.report.thumbnails import images_of
from pipeline.roc import area_under_curve
from pipeline.sample import SampleError, canonical_json

NUM_POINTS = 60  # of a curve
SHUFFLED, LABELLED = "shuffled pairs", "labelled pairs"
FILE = "calibration.json"
_Scores = NDArray[np.float64]

_PAIRS_SQL = """
    SELECT key, text FROM {table}
    WHERE verdict = 'kept' AND origin IN ('web', 'human') AND index = 0 AND text IS NOT NULL
    ORDER BY hash(key), key LIMIT {rows}
"""
_WHOLE_SQL = """
    SELECT floor({score}::DOUBLE * {fine})::INTEGER, count(*) FROM captions
    WHERE isfinite({score}) AND origin != 'human' GROUP BY ALL
"""


class PairScores(Protocol):
    """The scores of one caption for one image; None where a score is not taken."""

    @property
    def itm(self) -> float | None:
        """The filter's probability that they match."""

    @property
    def itc(self) -> float | None:
        """The cosine of their embeddings."""

    @property
    def clip(self) -> float | None:
        """The cosine of CLIP's embeddings."""


class PairScorer(Protocol):
    """What is asked of a scorer; `pipeline.scorer.Scorer` is one."""

    def preprocess(self, pixels: Pixels) -> Any:  # noqa: ANN401 - the scorer's own
        """Return what the models want of an image."""

    def score(
        self, images: Sequence[Any], texts: Sequence[Sequence[str]]
    ) -> Sequence[Sequence[PairScores]]:
        """Return the scores of each image's texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """How many pairs are looked at, and what thresholds are suggested for."""

    num_pairs: int = 1000
    batch_size: int = 16
    wanted_precision: float = 0.95
    wanted_share: float = 0.5
    """Of the corpus's captions, as a budget."""
    max_pixels: int = 50_000_000


@dataclass(frozen=True, slots=True)
class Point:
    """What a threshold does: shares from 0 to 1; no precision where nothing is kept."""

    threshold: float
    precision: float | None
    recall: float
    kept: float  # of all pairs that were looked at, right and wrong


@dataclass(frozen=True, slots=True)
class ScoreCalibration:
    """One score against one kind of wrong pairs."""

    score: str
    against: str
    num_right: int
    num_wrong: int
    auroc: float
    points: tuple[Point, ...]
    for_precision: Point | None  # the lowest threshold with the wanted precision
    for_share: Point | None  # the threshold that keeps the wanted share of the corpus


@dataclass(frozen=True, slots=True)
class Calibration:
    """All scores, and what was looked at."""

    num_pairs: int
    num_shuffled: int
    num_labelled: int
    wanted_precision: float
    wanted_share: float
    scores: tuple[ScoreCalibration, ...]

    def lines(self) -> list[str]:
        """Return what it came to, for people."""
        lines = []
        for s in self.scores:
            best, budget = s.for_precision, s.for_share
            wanted = f"precision {self.wanted_precision:g}"
            lines.append(
                f"{s.score.upper()} against {s.num_wrong:,} {s.against}: AUROC {s.auroc:.3f}; "
                + (
                    f"{wanted} from {best.threshold:.3f} (recall {best.recall:.3f})"
                    if best
                    else f"{wanted} is not reached"
                )
                + (
                    f"; {self.wanted_share:.0%} of the corpus from {budget.threshold:.3f}"
                    if budget
                    else ""
                )
            )
        return lines


def calibrate(
    corpus: Corpus,
    labelled: Sequence[LabelledPair] = (),
    *,
    scorer: PairScorer | None = None,
    config: CalibrationConfig | None = None,
    limits: SqlLimits | None = None,
) -> Calibration:
    """Return how good the scores are; also leaves it at report/calibration.json, for the page.

    Needs the corpus's scorer for shuffled pairs, or labelled pairs, whose scores are those that are
    stored, or both. Raises ValueError where there is neither, or nothing was scored.
    """
    config = config or CalibrationConfig()
    if scorer is None and not labelled:
        raise ValueError("calibration needs a scorer to score shuffled pairs, or labelled pairs")
    with Ledgers.open(corpus, Snapshot.take(corpus), limits) as ledgers:
        if not ledgers.snapshot.shards["captions"]:
            raise ValueError(f"{corpus.root} has no scored captions yet; score them first")
        budgets = {score: _budget(ledgers, score, config.wanted_share) for score in SCORES}
        found: list[ScoreCalibration] = []
        pairs: list[Row] = []
        shuffled: list[Row] = []
        if scorer is not None:
            pairs, shuffled = _shuffled_pairs(corpus, ledgers, scorer, config)
            found += _all_scores(pairs, shuffled, SHUFFLED, budgets, config)
        known = stored_captions(ledgers, labelled)
        right, wrong = (
            [(c.itm, c.itc, c.clip) for n, c in known.items() if labelled[n].is_match is kind]
            for kind in (True, False)
        )
        found += _all_scores(right, wrong, LABELLED, budgets, config)
    calibration = Calibration(
        num_pairs=len(pairs),
        num_shuffled=len(shuffled),
        num_labelled=len(known),
        wanted_precision=config.wanted_precision,
        wanted_share=config.wanted_share,
        scores=tuple(found),
    )
    write_file(corpus, FILE, canonical_json(asdict(calibration)) + "\n")
    return calibration


def _budget(ledgers: Ledgers, score: str, share: float) -> float | None:
    """Return the threshold at and above which this share of the corpus lies, to 1/1000."""
    counts: dict[int, int] = dict(ledgers.rows(_WHOLE_SQL.format(score=score, fine=FINE)))
    wanted, reached = share * sum(counts.values()), 0
    for position in sorted(counts, reverse=True):
        reached += counts[position]
        if reached >= wanted:
            return float(position / FINE)
    return None


def _shuffled_pairs(
    corpus: Corpus, ledgers: Ledgers, scorer: PairScorer, config: CalibrationConfig
) -> tuple[list[Row], list[Row]]:
    """Return (itm, itc, clip) of pairs of the corpus, and of their images with others' captions."""
    pairs: list[Row] = []
    shuffled: list[Row] = []
    shards = spread(ledgers.snapshot.shards["captions"])
    raw = {(r.source, r.index): r for r in ledgers.snapshot.records("raw")}
    each = math.ceil(config.num_pairs / len(shards))
    for number, shard in enumerate(shards):
        record = raw.get((shard.record.source, shard.record.index))
        if record is None:
            continue
        table = f"pairs_{number}"
        ledgers.add_table(table, "captions", [shard.url])
        rows = ledgers.rows(_PAIRS_SQL.format(table=table, rows=each))
        images = images_of(corpus, record, [row[0] for row in rows])
        for start in range(0, len(rows), config.batch_size):
            batch = rows[start : start + config.batch_size]
            ready = [
                (row, text, scorer.preprocess(pixels))
                for row, text in zip(batch, _others_texts(rows, start, len(batch)), strict=True)
                if text is not None
                and (pixels := _pixels(images.get(row[0]), config.max_pixels)) is not None
            ]
            if not ready:
                continue
            # Both are scored now, so that no difference of weights or precision comes between.
            texts = [[row[1], other] for row, other, _ in ready]
            for own, other in scorer.score([image for *_, image in ready], texts):
                pairs.append((own.itm, own.itc, own.clip))
                shuffled.append((other.itm, other.itc, other.clip))
    return pairs, shuffled


def _others_texts(rows: Sequence[Row], start: int, count: int) -> list[str | None]:
    """Return for each row the next row's text that is not its own, around the end; else None."""
    texts: list[str | None] = []
    for position in range(start, start + count):
        own = rows[position][1].casefold().strip()
        others = (rows[(position + step) % len(rows)][1] for step in range(1, len(rows)))
        texts.append(next((text for text in others if text.casefold().strip() != own), None))
    return texts


def _pixels(data: bytes | None, max_pixels: int) -> Pixels | None:
    if data is None:
        return None
    try:
        header = read_header(data)
        if header.width * header.height > max_pixels:
            return None
        size = {"min_width": header.width, "min_height": header.height}
        return decode(data, header, **size).pixels
    except SampleError:
        return None  # the scoring stage has counted it


def _all_scores(
    right: Sequence[Row],
    wrong: Sequence[Row],
    against: str,
    budgets: dict[str, float | None],
    config: CalibrationConfig,
) -> Iterable[ScoreCalibration]:
    for column, score in enumerate(SCORES):
        r, w = (
            np.array([row[column] for row in rows if row[column] is not None], dtype=np.float64)
            for rows in (right, wrong)
        )
        if len(r) and len(w):
            yield calibration_of(score, against, (r, w), budgets[score], config.wanted_precision)


def calibration_of(
    score: str,
    against: str,
    values: tuple[_Scores, _Scores],
    budget: float | None,
    wanted_precision: float,
) -> ScoreCalibration:
    """Return curves and thresholds of one score from its values of right and of wrong pairs.

    Both kinds weigh the same, whatever their numbers.
    """
    right, wrong = np.sort(values[0]), np.sort(values[1])
    everything = np.unique(np.concatenate([right, wrong]))
    precise = [
        point
        for threshold in everything
        if (point := _point(right, wrong, float(threshold))).precision is not None
        and point.precision >= wanted_precision
    ]
    low, high = float(everything[0]), float(everything[-1])
    auroc = area_under_curve(right, wrong)
    assert auroc is not None, "both kinds have values"
    grid = np.linspace(low, high, NUM_POINTS) if high > low else np.array([low])
    return ScoreCalibration(
        score=score,
        against=against,
        num_right=len(right),
        num_wrong=len(wrong),
        auroc=auroc,
        points=tuple(_point(right, wrong, float(threshold)) for threshold in grid),
        for_precision=precise[0] if precise else None,
        for_share=None if budget is None else _point(right, wrong, budget),
    )


def _point(right: _Scores, wrong: _Scores, threshold: float) -> Point:
    """Return what a threshold does to sorted scores."""
    r, w = (float((len(s) - np.searchsorted(s, threshold)) / len(s)) for s in (right, wrong))
    return Point(threshold, r / (r + w) if r + w else None, r, (r + w) / 2)
