"""Every number of the report, as one JSON object; the page, the card and the JSON show these."""

from datetime import datetime
from typing import Any

from pipeline.corpus import Corpus
from pipeline.report.downloads import downloads, licences
from pipeline.report.facts import provenance, read_json, stages, times, training
from pipeline.report.funnel import funnel
from pipeline.report.ledgers import Ledgers
from pipeline.report.pictures import pictures
from pipeline.report.scores import explorer, scores
from pipeline.report.texts import texts

FORMAT = 1
ABLATION, CALIBRATION = "report/ablation.json", "report/calibration.json"
GONE = "The {} shards are not here any more; what they would tell is missing."
Json = dict[str, Any]


def numbers(corpus: Corpus, ledgers: Ledgers, made_at: datetime) -> Json:
    """Return what the ledgers, markers and files of a corpus say; nothing is left out if absent.

    Counts are exact. Percentiles are exact to the width of their bins, distinct values to the
    collisions of a 64-bit hash, and words are of the share of captions that `one_caption_in` says.
    """
    found: Json = {
        "format": FORMAT,
        "made_at": made_at.isoformat(timespec="seconds"),
        "name": corpus.root.rstrip("/").rsplit("/", 1)[-1] or corpus.root,
        "root": corpus.root,
        "stages": stages(ledgers.snapshot),
        "funnel": funnel(ledgers),
        "downloads": downloads(ledgers),
        "scores": scores(ledgers),
        "explorer": explorer(ledgers),
        "texts": texts(ledgers),
        "images": pictures(ledgers),
        "times": times(ledgers.snapshot),
        "licences": licences(ledgers),
        "training": training(corpus),
        "ablation": read_json(corpus, ABLATION),
        "calibration": read_json(corpus, CALIBRATION),
        "provenance": provenance(corpus, ledgers),
    }
    found["headline"] = headline(found)
    found["missing"] = missing(found)
    return found


def headline(found: Json) -> Json:
    """Return the few numbers that one wants first."""
    total = found["funnel"]["total"]
    clean, raw = total["clean"], total["raw"]
    return {
        # Where raw shards were removed after selection, the clean ledger still has every row.
        "rows_in": raw["rows"] or clean["rows"],
        "images": raw["kept"] if raw["rows"] or not clean["rows"] else None,
        "images_scored": total["images_scored"],
        "samples_kept": clean["kept"] if clean["rows"] else None,
        "captions_scored": {o: c["kept"] for o, c in total["scoring"].items() if o != "none"},
        "captions_kept": {o: c["kept"] for o, c in total["captions"].items()},
        "sources": len(found["funnel"]["sources"]),
        "bytes": sum(stage["bytes"] for stage in found["stages"].values()),
        "first": found["times"]["first"],
        "last": found["times"]["last"],
        "seconds": found["times"]["seconds"],
    }


def missing(found: Json) -> list[str]:
    """Return, in words, what a complete corpus would have and this one has not, or not yet."""
    lines = []
    stage_of = found["stages"]
    for stage, verb in (("captions", "captioned and scored"), ("clean", "selected from")):
        waiting, above = stage_of[stage]["waiting"], {"captions": "raw", "clean": "captions"}[stage]
        if not stage_of[stage]["shards"]:
            is_gone = stage == "captions" and stage_of["clean"]["shards"]
            lines.append(f"No shard has been {verb} yet." if not is_gone else GONE.format(stage))
        elif waiting:
            num = stage_of[above]["shards"]
            lines.append(f"{waiting:,} of {num:,} {above} shards have not been {verb} yet.")
        if stale := len(stage_of[stage]["stale"]):
            lines.append(
                f"{stale:,} {stage} shards are stale: the {above} shards they were made from have "
                "been replaced. Run the job again."
            )
    if not stage_of["raw"]["shards"]:
        is_gone = stage_of["captions"]["shards"] or stage_of["clean"]["shards"]
        lines.insert(0, GONE.format("raw") if is_gone else "No shard has been downloaded yet.")
    for facts in stage_of.values():
        lines += [
            f"{path} is damaged and was passed over; `capfilt verify` says what to do."
            for path in facts["damaged"]
        ]
    for name, score in (("ITM", "itm"), ("ITC", "itc"), ("CLIP", "clip")):
        without = found["scores"][score]["missing"]
        if without and without == found["scores"]["captions"]:
            lines.append(f"The captions have no {name} score.")
    return lines
