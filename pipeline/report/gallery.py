"""Examples to look at: images that were kept, dropped, or nearly the other, with all captions.

They come from a few shards spread over the corpus, and in each are chosen by a hash of the key: the
same corpus shows the same ones.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pipeline.corpus import Corpus
from pipeline.record import ShardRecord
from pipeline.report import thumbnails
from pipeline.report.ledgers import Ledgers, Shard
from pipeline.sample import Origin

MAX_SHARDS = 10
MAX_SAMPLES = 30  # of each group
MAX_CAPTIONS = 24  # of an image
MAX_THUMBNAIL_BYTES = 1_600_000  # all together
ITM_MARGIN, CLIP_MARGIN = 0.1, 0.01  # how near a decision is to the other one
DEFAULT_ITM_THRESHOLD = 0.5
_ROWS_PER_SHARD = 150  # looked at, of each verdict

_CLEAN_SQL = """
    SELECT key, source, url, verdict, reason, captions, image_offset, image_bytes FROM (
        SELECT *, row_number() OVER (PARTITION BY verdict ORDER BY hash(key), key) AS place
        FROM {table} WHERE verdict IN ('kept', 'dropped') AND len(captions) > 0
    ) WHERE place <= {rows} ORDER BY place, verdict, key
"""
_CAPTIONS_SQL = """
    WITH chosen AS (
        SELECT key FROM (SELECT DISTINCT key FROM {table} WHERE text IS NOT NULL)
        ORDER BY hash(key), key LIMIT {rows}
    )
    SELECT key, any_value(source), any_value(url), '', '', list(struct_pack(
        text := text, origin := origin, index := index, itm := itm, itc := itc, clip := clip,
        verdict := verdict, reason := reason) ORDER BY origin DESC, index), NULL, NULL
    FROM {table} SEMI JOIN chosen USING (key) WHERE text IS NOT NULL
    GROUP BY key ORDER BY hash(key), key
"""
_RAW_SQL = """
    SELECT key, source, url, '', '', [struct_pack(text := caption,
        origin := coalesce(origin, 'web'), index := 0, itm := NULL, itc := NULL, clip := NULL,
        verdict := '', reason := '')], NULL, NULL
    FROM {table} WHERE verdict = 'kept' AND caption IS NOT NULL
    ORDER BY hash(key), key LIMIT {rows}
"""
_SQL = {"clean": _CLEAN_SQL, "captions": _CAPTIONS_SQL, "raw": _RAW_SQL}


class Group(StrEnum):
    """Why an example is shown."""

    KEPT = "kept"
    DROPPED = "dropped"
    BORDERLINE = "borderline"
    UNDECIDED = "undecided"  # no policy has seen it yet


@dataclass(slots=True, kw_only=True)
class Example:
    """An image with its captions and what was decided about each."""

    group: Group
    key: str
    source: str
    shard: str
    url: str | None
    verdict: str  # empty before selection
    reason: str
    captions: list[dict[str, Any]]
    span: tuple[int, int] | None = None  # of the image in the clean tar
    thumbnail: bytes | None = field(default=None, repr=False)


def examples(corpus: Corpus, ledgers: Ledgers) -> list[Example]:
    """Return examples of the last stage that has any, with thumbnails where images are there."""
    snapshot = ledgers.snapshot
    stage = next((s for s in ("clean", "captions", "raw") if snapshot.shards[s]), None)
    if stage is None:
        return []
    found: list[Example] = []
    shards = spread(snapshot.shards[stage])
    thresholds = {r.fingerprint: itm_threshold(r.stats) for r in snapshot.records(stage)}
    for number, shard in enumerate(shards):
        table = f"examples_{number}"
        ledgers.add_table(table, stage, [shard.url])
        rows = ledgers.rows(_SQL[stage].format(table=table, rows=_ROWS_PER_SHARD))
        threshold = thresholds[shard.record.fingerprint]
        found += [_example(row, shard.record, stage, threshold) for row in rows]
    chosen = choose(found)
    _add_thumbnails(
        corpus, {r.name: r for s in ("raw", "clean") for r in snapshot.records(s)}, chosen
    )
    return chosen


def spread(shards: Sequence[Shard]) -> list[Shard]:
    """Return a few shards, of as many sources as possible and far apart within each."""
    by_source: dict[str, list[Shard]] = {}
    for shard in shards:
        by_source.setdefault(shard.record.source, []).append(shard)
    largest = sorted(by_source.values(), key=lambda s: (-len(s), s[0].record.source))[:MAX_SHARDS]
    each = max(1, MAX_SHARDS // max(1, len(largest)))
    chosen = []
    for of_source in largest:
        num = min(each, len(of_source))
        chosen += [of_source[i * len(of_source) // num] for i in range(num)]
    return chosen


def _example(row: tuple[Any, ...], record: ShardRecord, stage: str, threshold: float) -> Example:
    key, source, url, verdict, reason, captions, offset, size = row
    if stage != "clean":
        group = Group.UNDECIDED
    elif is_borderline(captions, threshold):
        group = Group.BORDERLINE
    else:
        group = Group(verdict)
    return Example(
        group=group,
        key=key,
        source=source,
        shard=record.name,
        url=url,
        verdict=verdict,
        reason=reason,
        captions=captions[:MAX_CAPTIONS],
        span=None if offset is None or size is None else (offset, size),
    )


def is_borderline(captions: Iterable[Mapping[str, Any]], threshold: float) -> bool:
    """Say whether a slightly different score would have changed what became of a caption."""
    judged = [c for c in captions if c["origin"] != Origin.HUMAN.value]
    kept = [c for c in judged if c["verdict"] == "kept"]
    below = [c for c in judged if c["reason"] == "itm_below_threshold"]
    outranked = [
        c["clip"] for c in judged if c["reason"] == "below_top_k" and c["clip"] is not None
    ]
    if outranked:
        last = min((c["clip"] for c in kept if c["clip"] is not None), default=None)
        return last is not None and last - max(outranked) <= CLIP_MARGIN
    near = [c for c in (*kept, *below) if c["itm"] is not None]
    return any(abs(c["itm"] - threshold) <= ITM_MARGIN for c in near)


def itm_threshold(settings: object) -> float:
    """Return the ITM threshold that settings hold, at any depth, else BLIP's."""
    if isinstance(settings, Mapping):
        value = settings.get("itm_threshold")
        if isinstance(value, int | float):
            return float(value)
        for inner in settings.values():
            found = itm_threshold(inner)
            if found != DEFAULT_ITM_THRESHOLD:
                return found
    return DEFAULT_ITM_THRESHOLD


def choose(found: Sequence[Example]) -> list[Example]:
    """Return at most MAX_SAMPLES of each group, as evenly from the shards as they allow."""
    chosen: list[list[Example]] = []
    for group in Group:
        by_shard: dict[str, list[Example]] = {}
        for example in found:
            if example.group is group:
                by_shard.setdefault(example.shard, []).append(example)
        queues = [list(reversed(by_shard[shard])) for shard in sorted(by_shard)]
        taken: list[Example] = []
        while queues and len(taken) < MAX_SAMPLES:
            for queue in queues:
                taken.append(queue.pop())
            queues = [queue for queue in queues if queue]
        chosen.append(taken[:MAX_SAMPLES])
    # One of each group in turn, so that the first ones seen are of every kind.
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*chosen))
    return [example for example in in_turn if example is not None]


def _add_thumbnails(
    corpus: Corpus, records: Mapping[str, ShardRecord], chosen: Sequence[Example]
) -> None:
    """Give the examples their images: from the clean tar's index, else by walking the raw tar."""
    missing: dict[str, list[str]] = {}
    images: dict[tuple[str, str], bytes] = {}
    for example in chosen:
        place = example.shard.split("/", 1)[1]
        record = records.get(f"clean/{place}")
        data = None
        if record is not None and example.span is not None:
            data = thumbnails.read_span(corpus, record, *example.span)
        if data is not None:
            images[place, example.key] = data
        else:
            missing.setdefault(place, []).append(example.key)
    for place, keys in missing.items():
        record = records.get(f"raw/{place}")
        if record is not None:
            for key, data in thumbnails.images_of(corpus, record, keys).items():
                images[place, key] = data
    left = MAX_THUMBNAIL_BYTES
    for example in chosen:
        data = images.get((example.shard.split("/", 1)[1], example.key))
        small = thumbnails.thumbnail(data) if data else None
        if small is not None and len(small) <= left:
            example.thumbnail = small
            left -= len(small)
