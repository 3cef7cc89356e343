"""Every number of a report is what a plain recount of the rows gives."""

import json
import math
import re
import unicodedata
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from report_corpora import HOSTILE, build, commit

from pipeline.corpus import Corpus
from pipeline.report.build import build_report
from pipeline.report.facts import read_curves
from pipeline.report.histograms import percentile

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
OPT_OUTS = ("robots_txt", "robots_header", "blocked_domain", "blocked_url", "blocked_image")


def report_of(corpus):
    build_report(corpus)
    return json.loads(Path(corpus.root, "report/report.json").read_text(encoding="utf-8"))


# The recount: loops over rows that the shards were made from, no SQL and none of the report's code.


def outcomes(pairs):
    tally = Counter(pairs)
    return {
        "rows": tally.total(),
        "kept": tally["kept", ""],
        "dropped": {r: n for (v, r), n in tally.items() if v == "dropped"},
        "failed": {r: n for (v, r), n in tally.items() if v == "failed"},
    }


def judged(rows):
    return outcomes((row["verdict"], row["reason"]) for row in rows)


def by_origin(rows, name="origin"):
    origins = sorted({row.get(name) or "none" for row in rows})
    return {o: judged([row for row in rows if (row.get(name) or "none") == o]) for o in origins}


def chosen_captions(clean):
    return [caption for row in clean for caption in row["captions"]]


def funnel_part(raw, captions, clean):
    had_image = {(r["source"], r["key"]) for r in raw if r["verdict"] == "kept"}
    return {
        "raw": judged(raw),
        "images_scored": len({(r["source"], r["key"]) for r in captions}),
        "scoring": by_origin(captions),
        "clean": judged(clean),
        "selection": judged([r for r in clean if (r["source"], r["key"]) in had_image]),
        "captions": by_origin(chosen_captions(clean)),
    }


def recount_funnel(made):
    sources = sorted({row["source"] for row in made["raw"]})
    return {
        "total": funnel_part(made["raw"], made["captions"], made["clean"]),
        "sources": [
            {
                "source": source,
                **funnel_part(
                    *([r for r in made[stage] if r["source"] == source] for stage in made)
                ),
            }
            for source in sources
        ],
    }


def host_of(row):
    return urlsplit(row["url"] or "").hostname or "(no host)"


def recount_downloads(raw):
    hosts = {}
    for row in raw:
        host = hosts.setdefault(host_of(row), {"rows": 0, "kept": 0, "failed": 0, "bytes": 0})
        host["rows"] += 1
        host["kept"] += row["verdict"] == "kept"
        host["failed"] += row["verdict"] == "failed"
        host["bytes"] += row.get("num_bytes") or 0
    named = [{"host": name, **host} for name, host in hosts.items()]
    statuses = Counter(row["http_status"] for row in raw)
    attempts = Counter(row["attempts"] for row in raw if row["attempts"] is not None)
    won = Counter(row["attempts"] for row in raw if row["verdict"] == "kept")
    return {
        "rows": len(raw),
        "kept": sum(row["verdict"] == "kept" for row in raw),
        "redirected": sum(row.get("final_url") is not None for row in raw),
        "bytes": sum(row.get("num_bytes") or 0 for row in raw),
        "http_status": [
            {"status": s, "rows": n}
            for s, n in sorted(statuses.items(), key=lambda i: (-i[1], i[0] is None, i[0] or 0))
        ],
        "attempts": [
            {"attempts": a, "rows": attempts[a], "kept": won[a]} for a in sorted(attempts)
        ],
        "hosts": {
            "distinct": len(hosts.keys() - {"(no host)"}),
            "largest": sorted(named, key=lambda h: (-h["rows"], h["host"]))[:25],
            "most_failed": sorted(
                (h for h in named if h["failed"]), key=lambda h: (-h["failed"], h["host"])
            )[:25],
        },
    }


def summary(values, unit=1):
    """Percentiles of whole numbers: the first value with so many of all at or below it."""
    ordered = sorted(values)
    found = {}
    for p in PERCENTILES:
        reached = [v for n, v in enumerate(ordered, start=1) if n >= p / 100 * len(ordered)]
        found[f"p{p}"] = round(reached[0] * unit, 6) if reached else None
    return {"count": len(ordered), "percentiles": found}


def bins(values, width=1):
    return [list(item) for item in sorted(Counter(v // width for v in values).items())]


def fine(value):
    return math.floor(float(np.float32(value)) * 1000)


def spread(values):
    whole = [fine(value) for value in values]
    return {**summary(whole, 1 / 1000), "bins": bins(whole, 20)}


def recount_scores(captions):
    rows = [row for row in captions if row.get("origin")]
    kept = [row for row in rows if row["verdict"] == "kept"]
    found = {"captions": len(kept), "bin_width": 0.02}
    for name in ("itm", "itc", "clip"):
        groups = {}
        for row in rows:
            if row.get(name) is not None:
                groups.setdefault((row["source"], row["origin"]), []).append(row[name])
        origins = sorted({origin for _, origin in groups})
        found[name] = {
            "missing": sum(row.get(name) is None for row in kept),
            "by_origin": {
                o: spread([v for (_, origin), g in groups.items() if origin == o for v in g])
                for o in origins
            },
            "by_source": [
                {"source": source, "origin": origin, **spread(groups[source, origin])}
                for source, origin in sorted(groups)
            ],
        }
    return found


def recount_explorer(captions):
    rows = [row for row in captions if row.get("origin") and row["verdict"] == "kept"]
    sources, origins = (sorted({row[name] for row in rows}) for name in ("source", "origin"))
    cells = Counter()
    for row in rows:
        itm, clip = (
            None if row.get(name) is None else math.floor(float(np.float32(row[name])) * scale)
            for name, scale in (("itm", 50), ("clip", 100))
        )
        cells[sources.index(row["source"]), origins.index(row["origin"]), itm, clip] += 1
    return {
        "itm_step": 0.02,
        "clip_step": 0.01,
        "sources": sources,
        "origins": origins,
        "cells": {(*cell, count) for cell, count in cells.items()},
    }


def lower(text):
    """One character for one, as SQL does it; Python's own may give two, or look at neighbours."""
    return "".join(char.lower()[0] for char in text)


def is_wordly(char):
    return unicodedata.category(char)[0] in "LMN"


def words_of(text):
    return "".join(c if is_wordly(c) else " " for c in lower(text)).split()


SCRIPTS = {
    "Latin": ("LATIN",),
    "Cyrillic": ("CYRILLIC",),
    "Greek": ("GREEK",),
    "Han": ("CJK",),
    "Kana": ("HIRAGANA", "KATAKANA"),
    "Hangul": ("HANGUL",),
    "Arabic": ("ARABIC",),
    "Hebrew": ("HEBREW",),
    "Devanagari": ("DEVANAGARI",),
    "Thai": ("THAI",),
}
BIDI = {chr(c) for c in (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
CLASSES = {
    "no letters": lambda t: not any(unicodedata.category(c)[0] == "L" for c in t),
    "digits": lambda t: any(c in "0123456789" for c in t),
    "web address": lambda t: re.search(r"(?i)https?://|www\.", t),
    "e-mail address": lambda t: re.search(r"[A-Za-z0-9._+-]+@[A-Za-z0-9-]+\.[A-Za-z]", t),
    "file name": lambda t: re.search(
        r"(?i)\.(jpe?g|png|gif|webp|bmp)(\Z|[^a-z])|(img|dsc)[_-]?[0-9]", t
    ),
    "markup": lambda t: re.search(r"<[/!A-Za-z]", t),
    "symbols": lambda t: any(unicodedata.category(c) == "So" for c in t),
    "control or bidi characters": lambda t: any(
        (unicodedata.category(c) == "Cc" and c not in "\t\n") or c in BIDI for c in t
    ),
}


def has_script(text, prefixes):
    return any(unicodedata.name(c, "").startswith(prefixes) for c in text)


def recount_words(captions):
    split = [words_of(text) for text in captions]
    ngrams = {}
    for n in (1, 2, 3):
        grams = Counter(
            " ".join(words[i : i + n]) for words in split for i in range(len(words) - n + 1)
        )
        total = grams.total()
        ngrams[str(n)] = {
            "total": total,
            "distinct": len(grams),
            "distinct_share": round(len(grams) / total, 6) if total else None,
            "commonest": [
                {"words": gram[: n * 40], "count": count}
                for gram, count in sorted(grams.items(), key=lambda i: (-i[1], i[0]))[:12]
            ],
        }
    numbers = [len(words) for words in split]
    return {
        "captions": len(captions),
        **summary(numbers),
        "bins": bins(numbers),
        "ngrams": ngrams,
        "scripts": {
            name: sum(has_script(t, prefixes) for t in captions)
            for name, prefixes in SCRIPTS.items()
        },
        "classes": {name: sum(bool(f(t)) for t in captions) for name, f in CLASSES.items()},
    }


def recount_repeats(captions):
    plain = {}
    for text in captions:
        plain.setdefault("".join(c for c in lower(text) if is_wordly(c)), []).append(text)
    groups = sorted((len(same) for same in plain.values() if len(same) > 1), reverse=True)
    return {
        "captions": len(captions),
        "distinct": len(plain),
        "shared": sum(len(same) for same in plain.values() if len(same) > 1),
        "commonest": groups[:12],
    }, {text[:120]: len(same) for same in plain.values() for text in same}


def take_examples(found, counts):
    """Replace examples of repeated captions by their counts, having looked that they are right."""
    for entry in found["commonest"]:
        assert counts[entry["text"]] == entry["captions"]
    found["commonest"] = [entry["captions"] for entry in found["commonest"]]


def recount_texts(made):
    if made["captions"]:
        rows = [(r["origin"], r["text"]) for r in made["captions"] if r.get("origin") and r["text"]]
    else:
        rows = [
            (r["origin"], r["caption"])
            for r in made["raw"]
            if r["verdict"] == "kept" and r["caption"]
        ]
    found, examples = {}, {}
    for origin in sorted({origin for origin, _ in rows}):
        captions = [text for o, text in rows if o == origin]
        lengths = [len(text) for text in captions]
        repeats, examples[origin] = recount_repeats(captions)
        found[origin] = {
            "characters": {**summary(lengths), "bins": bins(lengths, 5)},
            "repeats": repeats,
            "words": recount_words(captions),
        }
    return {
        "stage": "captions" if made["captions"] else "raw",
        "captions": len(rows),
        "one_caption_in": 1,
        "by_origin": found,
    }, examples


def same(values):
    counts = Counter(values)
    return {
        "images": counts.total(),
        "distinct": len(counts),
        "shared": sum(n for n in counts.values() if n > 1),
        "most": max(counts.values(), default=0),
    }


def ending_of(url):
    path = re.split(r"[?#]", url)[0]
    stem, dot, ending = path.rpartition(".")
    is_file = dot and stem.count("/") >= 3 and re.fullmatch("[A-Za-z0-9]{1,5}", ending)
    return ending.lower() if is_file else "(none)"


def recount_images(raw):
    kept = [row for row in raw if row["verdict"] == "kept"]
    sides = [(row["original_width"], row["original_height"]) for row in kept]
    endings = Counter(ending_of(row["url"]) for row in kept if row["url"] is not None)
    short, long = [min(s) for s in sides], [max(s) for s in sides]
    return {
        "kept": len(kept),
        "short_side": {**summary(short), "bins": bins(short, 64)},
        "long_side": {**summary(long), "bins": bins(long, 64)},
        "aspect": {"bins": bins([math.floor(math.log2(w / h) * 10) for w, h in sides])},
        "bytes": {"bins": bins([math.floor(math.log2(r["num_bytes"]) * 2) for r in kept])},
        "same_bytes": same(row["sha256"] for row in kept),
        "same_look": same(row["phash"] for row in kept),
        "url_endings": {
            "one_url_in": 1,
            "urls": endings.total(),
            "commonest": [
                {"ending": e, "urls": n}
                for e, n in sorted(
                    endings.items(), key=lambda i: (-i[1], "" if i[0] == "(none)" else i[0])
                )[:12]
            ],
        },
    }


def recount_licences(raw):
    kept = [row for row in raw if row["verdict"] == "kept"]
    given = Counter(
        json.loads(r["extra"])["license"] for r in kept if "license" in (r.get("extra") or "")
    )
    refused = Counter(r["reason"] for r in raw if r["verdict"] == "dropped")
    return {
        "rows_kept": len(kept),
        "rows_with_licence": given.total(),
        "distinct": len(given),
        "commonest": [
            {"licence": name, "rows": n}
            for name, n in sorted(given.items(), key=lambda i: (-i[1], i[0]))[:15]
        ],
        "opt_outs": {reason: refused[reason] for reason in OPT_OUTS},
    }


def markers(root, stage):
    """(marker's content, when it was written) of a stage, straight from the disk."""
    paths = sorted(Path(root, stage).glob("*/*.json"))
    return [(json.loads(path.read_text()), path.stat().st_mtime) for path in paths]


def recount_stages(root):
    found = {}
    for stage in ("raw", "captions", "clean"):
        records = [record for record, _ in markers(root, stage)]
        files = [p for p in Path(root, stage).glob("*/*") if p.suffix in (".tar", ".parquet")]
        found[stage] = {
            "shards": len(records),
            "rows": sum(record["rows_in"] for record in records),
            "sources": sorted({record["source"] for record in records}),
            "bytes": sum(path.stat().st_size for path in files),
            "damaged": [],
            "stale": [],
        }
    counts = [found[stage]["shards"] for stage in ("raw", "captions", "clean")]
    waiting = [0, counts[0] - counts[1], counts[1] - counts[2]]
    for stage, number in zip(found, waiting, strict=True):
        found[stage]["waiting"] = number
    return found


def moment(seconds):
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def recount_times(root):
    stages, ends = {}, []
    for stage in ("raw", "captions", "clean"):
        dated = sorted(((t, record) for record, t in markers(root, stage)), key=lambda d: d[0])
        times = [t for t, _ in dated]
        ends += times
        seconds = times[-1] - times[0] if times else None
        later = sum(record["rows_in"] for t, record in dated if t != times[0])
        stages[stage] = {
            "first": moment(times[0]) if times else None,
            "last": moment(times[-1]) if times else None,
            "seconds": pytest.approx(seconds, abs=1e-5) if times else None,
            "rows_per_second": pytest.approx(later / seconds, rel=0.01) if seconds else None,
            "over_time": [
                {
                    "time": moment(t),
                    "shards": 1,
                    "rows": record["rows_in"],
                    "kept": record["counts"]["kept"],
                }
                for t, record in dated
            ],
        }
    return {
        "first": moment(min(ends)),
        "last": moment(max(ends)),
        "seconds": pytest.approx(max(ends) - min(ends), abs=1e-5),
        "stages": stages,
    }


def recount_headline(made, root):
    times = recount_times(root)
    scored = by_origin(made["captions"])
    return {
        "rows_in": len(made["raw"]),
        "images": sum(row["verdict"] == "kept" for row in made["raw"]),
        "images_scored": len({(r["source"], r["key"]) for r in made["captions"]}),
        "samples_kept": sum(r["verdict"] == "kept" for r in made["clean"])
        if made["clean"]
        else None,
        "captions_scored": {o: c["kept"] for o, c in scored.items() if o != "none"},
        "captions_kept": {
            o: c["kept"] for o, c in by_origin(chosen_captions(made["clean"])).items()
        },
        "sources": len({row["source"] for row in made["raw"]}),
        "bytes": sum(stage["bytes"] for stage in recount_stages(root).values()),
        "first": times["first"],
        "last": times["last"],
        "seconds": times["seconds"],
    }


def recount_makers(made, root):
    names = ("captioner", "filter", "clip_model")
    rows = [r for r in made["captions"] if r.get("origin")]
    models = Counter(tuple(row.get(name) for name in names) for row in rows)
    policies = Counter(row["policy"] for row in made["clean"])
    stages = {}
    for stage in ("raw", "captions", "clean"):
        records = [record for record, _ in markers(root, stage)]
        stages[stage] = [
            {
                "fingerprint": fingerprint,
                "shards": number,
                "settings": next(
                    r["stats"]["content"] for r in records if r["fingerprint"] == fingerprint
                ),
            }
            for fingerprint, number in Counter(r["fingerprint"] for r in records).items()
        ]
    return (
        {tuple(model.items()) for model in _models(models, names)},
        [{"policy": policy, "rows": n} for policy, n in policies.items()],
        stages,
    )


def _models(models, names):
    return [{**dict(zip(names, model, strict=True)), "rows": n} for model, n in models.items()]


def check(corpus, made):
    """Compare every field of a report with the recount, and make sure that none is left out."""
    found, root = report_of(corpus), corpus.root
    assert found.pop("funnel") == recount_funnel(made)
    over_time = found["downloads"].pop("over_time")
    assert found.pop("downloads") == recount_downloads(made["raw"])
    assert found.pop("scores") == recount_scores(made["captions"])
    joint = found.pop("explorer")
    cells = joint["cells"]
    joint["cells"] = {tuple(cell) for cell in cells}
    assert len(joint["cells"]) == len(cells)
    assert joint == recount_explorer(made["captions"])
    texts, examples = recount_texts(made)
    for origin, statistics in found["texts"]["by_origin"].items():
        take_examples(statistics["repeats"], examples[origin])
    assert found.pop("texts") == texts
    assert found.pop("images") == recount_images(made["raw"])
    assert found.pop("licences") == recount_licences(made["raw"])
    assert found.pop("stages") == recount_stages(root)
    times = recount_times(root)
    assert over_time == times["stages"]["raw"]["over_time"]
    assert found.pop("times") == times
    assert found.pop("headline") == recount_headline(made, root)
    provenance = found.pop("provenance")
    models, policies, stages = recount_makers(made, root)
    assert {tuple(model.items()) for model in provenance.pop("models")} == {
        tuple(dict(sorted(model)).items()) for model in models
    }
    assert provenance.pop("policies") == policies
    assert provenance.pop("stages") == stages
    assert provenance == {"recipe": corpus.read_run(), "recipe_problem": None}
    assert found.pop("missing") is not None
    assert found.pop("training") == []
    assert (found.pop("format"), found.pop("root")) == (1, root)
    assert found.pop("name") == Path(root).name
    assert datetime.fromisoformat(found.pop("made_at")) <= datetime.now(UTC)
    assert found == {"ablation": None, "calibration": None}


# Letters of several scripts and cases, marks, digits, symbols, spaces, controls, bidi.
ALPHABET = st.sampled_from(
    "abzAZßÉéσςΣİıЖжאبकไ漢ひカ한0١²½ _-.,!@<>/\"'\\&;{}$%#\t\n\x00\x07\x1b\x85\u00a0\u0301\u200d"
    "\u200e\u202e\u2028\u2066\ufeff☃🙂"
)
TEXTS = st.text(ALPHABET, max_size=40) | st.sampled_from(
    [*HOSTILE, "www.a.b", "IMG_12", "x.PNG", "a@b.c", "the same", "The  same!", "THE SAME"]
)
SHAPES = st.dictionaries(
    st.sampled_from(["a", "b", "cc3m", "coco"]),
    st.lists(st.integers(1, 25), min_size=1, max_size=2),
    min_size=1,
    max_size=3,
)


# Without shrinking, which would make hundreds of corpora; the seed is small to read as it is.
@settings(max_examples=20, phases=[Phase.generate])
@given(
    shape=SHAPES,
    seed=st.integers(0, 2**32),
    texts=st.lists(TEXTS, max_size=12),
    stages=st.sampled_from([1, 2, 3, 3, 3]),
)
def test_every_number_is_what_a_plain_recount_gives(tmp_path_factory, shape, seed, texts, stages):
    root = tmp_path_factory.mktemp("counted")
    corpus, made = build(root, shape, seed=seed, texts=texts, stages=stages)
    check(corpus, made)


def test_a_larger_corpus_of_five_sources_is_counted_right(tmp_path):
    shape = {"laion": [150, 150], "cc3m": [100], "cc12m": [80], "sbu": [60], "coco": [50]}
    corpus, made = build(tmp_path, shape, texts=HOSTILE)
    check(corpus, made)


def test_odd_urls_are_counted_under_the_host_that_was_asked(tmp_path):
    urls = [
        "http://A.example/x.JPG",
        "https://u:p@a.example:8443/y.png?z=.gif#.bmp",
        "http://[2001:db8::1]:80/z",
        "file.jpg",
        None,
    ]
    made, rows = {"raw": [], "captions": [], "clean": []}, []
    for number, url in enumerate(urls):
        rows.append(
            {
                "key": f"00000{number:04d}",
                "source": "odd",
                "url": url,
                "verdict": "failed",
                "reason": "http_404",
                "origin": "web",
                "caption": "x",
                "http_status": 404,
                "attempts": 1,
            }
        )
    corpus = Corpus(str(tmp_path))
    commit(corpus, ("raw", "odd", 0), rows)
    made["raw"] = rows
    hosts = report_of(corpus)["downloads"]["hosts"]
    counted = {host["host"]: host["rows"] for host in hosts["largest"]}
    assert counted == {"a.example": 2, "[2001:db8::1]": 1, "(no host)": 2}


def test_scores_that_are_no_numbers_are_in_no_histogram(tmp_path):
    base = {"source": "s", "url": "http://h/", "verdict": "kept", "reason": "", "origin": "web"}
    raw = [base | {"key": f"00000000{n}", "caption": "x", "num_bytes": 9} for n in range(3)]
    corpus = Corpus(str(tmp_path))
    above = commit(corpus, ("raw", "s", 0), raw)
    rows = [
        base | {"key": row["key"], "index": 0, "text": "x", "itm": itm}
        for row, itm in zip(raw, (math.nan, math.inf, 0.25), strict=True)
    ]
    commit(corpus, ("captions", "s", 0), rows, inputs=above.sha256)
    found = report_of(corpus)
    assert found["scores"]["itm"]["by_origin"]["web"]["count"] == 1
    assert sum(cell[-1] for cell in found["explorer"]["cells"]) == 3
    assert found["scores"]["clip"]["missing"] == 3


@given(st.lists(st.integers(-50, 50), min_size=1), st.sampled_from(PERCENTILES))
def test_a_percentile_has_its_share_of_values_at_or_below_it_and_no_less(values, p):
    found = percentile(Counter(values), p / 100)
    wanted = p / 100 * len(values)
    assert sum(v <= found for v in values) >= wanted
    assert sum(v < found for v in values) < wanted


def test_a_log_of_a_resumed_training_counts_the_last_value_of_a_step():
    lines = [
        '{"step": 1, "loss": 3.0}',
        '{"step": 2, "loss": 2.0, "probe": {"tr1": 0.5}, "note": "x"}',
        '{"step": 2, "loss": 1.5}',
        '{"step": 3, "loss": NaN}',
        "{ cut",
        "[1]",
    ]
    curves, num_bad = read_curves(lines)
    assert curves == {"loss": [(1, 3.0), (2, 1.5)], "probe.tr1": [(2, 0.5)]}
    assert num_bad == 2
