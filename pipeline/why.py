"""One sample's whole story: where it came from, what was said of it, and what was decided why.

    print(*tell(corpus, "000420013").lines(), sep="\\n")

Works on a corpus of any age: what has not happened yet is said to be so. All text is the web's, so
nothing of it reaches a terminal that could do more there than be read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.corpus import Corpus
from pipeline.layout import STAGES, UPSTREAM
from pipeline.record import ShardRecord
from pipeline.runfile import flatten
from pipeline.sample import Verdict
from pipeline.selection.candidates import SCORES
from pipeline.why_find import Found, KeyNotFoundError, describe_keys, find

__all__ = ["KeyNotFoundError", "SampleStory", "Story", "tell"]

_MAX_SHOWN = 300  # characters of any one text; JSON has all of them
_LABEL_WIDTH = 12
_MODELS = ("captioner", "filter", "clip_model")


@dataclass(frozen=True, slots=True)
class Story:
    """What is known of a key: a sample in each source that has it."""

    key: str
    samples: tuple["SampleStory", ...]

    def lines(self) -> Iterator[str]:
        """Yield the story for people, without a character that a terminal would act on."""
        for number, sample in enumerate(self.samples):
            if number:
                yield ""
            yield from sample.lines()
        if len(self.samples) > 1:
            names = ", ".join(sample.source for sample in self.samples)
            yield ""
            yield f"{len(self.samples)} sources have this key: {names}; name one to see it alone"

    def to_json(self) -> dict[str, Any]:
        """Return the story as JSON values, every column of every ledger included."""
        return {"key": self.key, "samples": [sample.to_json() for sample in self.samples]}


def tell(corpus: Corpus, key: str, source: str | None = None) -> Story:
    """Return the story of a key, in one source or in all that have it.

    Raises KeyNotFoundError, which says what keys there are, also for a source that does not exist.
    """
    known = sorted({name for stage in STAGES for name in corpus.sources(stage)})
    if not known:
        raise KeyNotFoundError(f"{corpus.root} has no shards")
    if source is not None and source not in known:
        raise KeyNotFoundError(f"no source {source!r}; there is: {', '.join(known)}")
    sources = known if source is None else [source]
    samples = []
    for name in sources:
        if found := find(corpus, key, name):
            samples.append(SampleStory(key, name, found))
    if not samples:
        there = "; ".join(describe_keys(corpus, name) for name in sources)
        raise KeyNotFoundError(f"no row with key {key!r}: {there}")
    return Story(key, tuple(samples))


@dataclass(frozen=True, slots=True)
class SampleStory:
    """What each stage knows of one sample of one source."""

    key: str
    source: str
    found: Mapping[str, Found]  # by stage

    def lines(self) -> Iterator[str]:
        """Yield the story for people."""
        yield f"sample {shown(self.key)} of source {self.source}"
        yield from self._download_lines()
        yield from self._caption_lines()
        yield from self._verdict_lines()
        yield from self._shard_lines()

    def to_json(self) -> dict[str, Any]:
        """Return the story as JSON values."""
        return {
            "key": self.key,
            "source": self.source,
            "raw": self._row("raw"),
            "captions": [dict(row) for row in self._rows("captions")],
            "clean": self._row("clean"),
            "shards": [
                {
                    "name": found.record.name,
                    "fingerprint": found.record.fingerprint,
                    "content": found.record.stats.get("content"),
                    "is_stale": self._is_stale(found.record),
                    "problem": found.problem or None,
                }
                for found in self.found.values()
            ],
        }

    def _rows(self, stage: str) -> tuple[dict[str, Any], ...]:
        found = self.found.get(stage)
        return found.rows if found else ()

    def _row(self, stage: str) -> dict[str, Any] | None:
        return next(iter(self._rows(stage)), None)

    def _is_stale(self, record: ShardRecord) -> bool:
        above = self.found.get(UPSTREAM.get(record.stage, ""))
        return above is not None and record.inputs != above.record.sha256

    # The download

    def _download_lines(self) -> Iterator[str]:
        row = self._row("raw") or self._row("clean") or self._row("captions")
        if row is None:
            return
        yield _line("url", shown(row["url"]) if row["url"] else "none")
        if row.get("final_url"):
            yield _line("redirected", shown(row["final_url"]))
        raw = self._row("raw")
        if raw is None:
            return
        yield _line("fetch", _fetch(raw))
        if raw["sha256"]:
            yield _line("downloaded", f"{raw['num_bytes'] or 0:,} bytes, sha256 {raw['sha256']}")
        if raw["width"]:
            original = f"{raw['original_width']} x {raw['original_height']}"
            size = f"{raw['width']} x {raw['height']} pixels, of {original}, phash {raw['phash']}"
            yield _line("image", size)
        if raw["extra"]:
            yield _line("the list", shown(raw["extra"]))

    # The captions

    def _caption_lines(self) -> Iterator[str]:
        captions = list(self._captions())
        if not captions:
            return
        yield "captions"
        for caption in captions:
            scores = "  ".join(f"{name} {_score(caption[name])}" for name in SCORES)
            state = f"{caption['verdict']}: {caption['reason']}" if caption["reason"] else "kept"
            if not caption["is_judged"]:
                state = caption["reason"] or "scored"
            name = f"{caption['origin']} {caption['index']}"
            yield f"  {name:<{_LABEL_WIDTH}}{scores}  {state}{_making(caption)}"
            yield f"  {'':<{_LABEL_WIDTH}}{shown(caption['text'] or '')}"

    def _captions(self) -> Iterator[dict[str, Any]]:
        """Yield every caption with its scores, in the clean shard's order where there is one."""
        scored = {
            (row["origin"], row["index"]): row for row in self._rows("captions") if row["origin"]
        }
        clean = self._row("clean")
        if clean is None:
            for row in scored.values():
                yield {**row, "masked": "", "is_judged": False}
            return
        for caption in clean["captions"]:
            row = scored.get((caption["origin"], caption["index"]), {})
            yield {**row, **caption, "is_judged": True}

    # What became of it

    def _verdict_lines(self) -> Iterator[str]:
        clean = self._row("clean")
        if clean is not None:
            kept = f"{clean['num_kept']} of {clean['num_captions']} captions kept"
            yield _line("verdict", f"{_outcome(clean)}; {kept}")
            content = flatten(self.found["clean"].record.stats.get("content", {}))
            if content:
                said = ", ".join(f"{name} {shown(str(value))}" for name, value in content.items())
                yield _line("policy", said)
            if clean["image_offset"] is not None:
                where = f"bytes {clean['image_offset']:,} to "
                where += f"{clean['image_offset'] + clean['image_bytes']:,}"
                yield _line("in the tar", f"image at {where}, json at {clean['json_offset']:,}")
            return
        raw = self._row("raw")
        if raw is not None and raw["verdict"] != Verdict.KEPT:
            yield _line("verdict", f"{_outcome(raw)}; it goes no further")
        elif "captions" not in self.found:
            yield _line("verdict", "not scored yet, so not selected either")
        else:
            lost = [row for row in self._rows("captions") if not row["origin"]]
            yield _line("verdict", f"not selected yet{f'; {_outcome(lost[0])}' if lost else ''}")

    def _shard_lines(self) -> Iterator[str]:
        yield "shards"
        for found in self.found.values():
            record = found.record
            notes = [f"made by {record.fingerprint}"]
            if record.stage == "captions":
                notes += _models(found.rows)
            if self._is_stale(record):
                above = self.found[UPSTREAM[record.stage]].record.name
                notes.append(f"STALE: {above} was replaced after it was made; run again")
            if found.problem:
                notes.append(f"CANNOT BE READ: {shown(found.problem)}")
            yield f"  {record.name}: {', '.join(notes)}"


def shown(text: str) -> str:
    """Return a text with every character escaped that is not simply visible, cut when long."""
    visible = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text[:_MAX_SHOWN]
    )
    return visible if len(text) <= _MAX_SHOWN else f"{visible}... ({len(text):,} characters)"


def _line(label: str, text: str) -> str:
    return f"  {label:<{_LABEL_WIDTH}}{text}"


def _outcome(row: Mapping[str, Any]) -> str:
    return f"{row['verdict']}: {shown(row['reason'])}" if row["reason"] else str(row["verdict"])


def _fetch(raw: Mapping[str, Any]) -> str:
    parts = [_outcome(raw)]
    if raw["http_status"] is not None:
        parts.append(f"HTTP {raw['http_status']}")
    if raw["attempts"] is not None:
        parts.append(f"{raw['attempts']} attempt{'s' if raw['attempts'] != 1 else ''}")
    if raw["error_message"] and raw["error_message"] != raw["reason"]:
        parts.append(shown(raw["error_message"].removeprefix(f"{raw['reason']}: ")))
    return ", ".join(parts)


def _score(value: float | None) -> str:
    return "-    " if value is None else f"{value:.3f}"


def _making(caption: Mapping[str, Any]) -> str:
    """Return how a caption was written and changed, to follow its verdict."""
    parts = []
    if caption.get("seed") is not None:
        parts.append(f"seed {caption['seed']}")
    if caption.get("num_tokens") is not None:
        parts.append(f"{caption['num_tokens']} tokens")
    if caption["masked"]:
        parts.append(f"masked {caption['masked']}")
    return f" ({', '.join(parts)})" if parts else ""


def _models(rows: tuple[dict[str, Any], ...]) -> list[str]:
    found = {name: next((row[name] for row in rows if row[name]), None) for name in _MODELS}
    return [f"{name} {weights}" for name, weights in found.items() if weights]
