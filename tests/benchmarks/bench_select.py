"""Rows per CPU-second of select alone: ours against the same policy with pandas, on one core.

    python tests/benchmarks/bench_select.py                  # both sides, 20,000 rows
    python tests/benchmarks/bench_select.py --rows 1000000   # ours alone: time and memory
    python tests/benchmarks/bench_select.py --rows 1000000 --rules   # and with every rule on

A row is an image of a raw shard with a web and a synthetic caption; shards have 10,000 rows and
images of 200 bytes, so that what is measured is deciding and bookkeeping, not copying. The peer
does what a script with pandas would: read both tables, keep by ITM, write the kept samples with
webdataset and a table of verdicts. Each side is a process of its own, and so is the making of the
shards. The last line is JSON.
"""

import argparse
import datetime
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS_PER_SHARD, ROWS = 10_000, 20_000
DISTINCT_SHARDS = 2
ROUNDS = 3
TEXT = """a the on of in with two red blue small old dog cat bird house street table plate man woman
child sitting standing running next to near green tree water sky photo photograph stock image"""
WORDS = TEXT.split()


def main() -> None:
    options = _parser().parse_args()
    if options.side:
        sides = {"make": make, "ours": run_ours, "peer": run_peer}
        print(json.dumps(sides[options.side](options.out, options.rows, options.rules)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-select.") as name:
        folder = Path(name)
        if options.rows:
            run_side("make", folder, options.rows, options.rules)
            print(json.dumps(measure_large(folder, options.rows, options.rules)))
        else:
            run_side("make", folder, ROWS, False)
            print(json.dumps(measure_speed(folder, ROWS)))


def measure_speed(folder: Path, rows: int) -> dict[str, object]:
    found: dict[str, list[float]] = {"ours": [], "peer": []}
    kept = {}
    for _ in range(ROUNDS):
        for side, rates in found.items():
            result = run_side(side, folder, rows, False)
            rates.append(rows / result["seconds"])
            kept[side] = result["kept"]
    assert kept["ours"] == kept["peer"], kept
    rates = {side: statistics.median(each) for side, each in found.items()}
    for side, each in found.items():
        shown = ", ".join(f"{rate:,.0f}" for rate in each)
        print(f"{side}: {rates[side]:,.0f} rows a CPU-second (of {shown}), {kept[side]:,} kept")
    return {
        "name": "select_blip",
        "unit": "rows/CPU-s",
        "ours": round(rates["ours"]),
        "peer": round(rates["peer"]),
        "peer_name": "pandas and webdataset",
        "ratio": round(rates["ours"] / rates["peer"], 2),
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
    }


def measure_large(folder: Path, rows: int, are_rules_on: bool) -> dict[str, object]:
    result = run_side("ours", folder, rows, are_rules_on)
    megabytes = result["megabytes"]
    print(
        f"{rows:,} rows with {2 * rows * 9 // 10:,} captions in {result['seconds']:.1f} "
        f"CPU-seconds ({result['wall']:.1f} s by the clock), "
        f"{result['kept']:,} kept; memory after the first shard {megabytes[0]:.0f} MiB, at its "
        f"highest {max(megabytes):.0f} MiB, after the last {megabytes[-1]:.0f} MiB"
    )
    return {
        "name": "select_all_rules" if are_rules_on else "select_large",
        "unit": "CPU-s",
        "rows": rows,
        "ours": round(result["seconds"], 1),
        "wall_s": round(result["wall"], 1),
        "first_mib": round(megabytes[0]),
        "highest_mib": round(max(megabytes)),
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
    }


# The sides, each a process of its own


def make(out: Path, rows: int, _: bool) -> dict[str, object]:
    """Write raw shards and sidecars under `out`/corpus; those after the first few repeat them."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))
    import select_corpora as corpora

    from pipeline.corpus import Corpus

    corpus, draw = Corpus(str(out / "corpus")), random.Random(0)
    made = []
    for index in range(rows // ROWS_PER_SHARD):
        if index >= DISTINCT_SHARDS:
            raw, scored = made[index % DISTINCT_SHARDS]
            _repeat(corpus, scored, index, inputs=_repeat(corpus, raw, index).sha256)
            continue
        images = []
        for number in range(ROWS_PER_SHARD):
            key = f"{index * ROWS_PER_SHARD + number:09d}"
            if number % 10 == 0:
                row = corpora.raw_row(key, verdict="failed", reason="not_found", source="bench")
                images.append((row, []))
                continue
            captions = [
                make_caption(_text(draw), itm=draw.random(), clip=draw.random() * 0.4)
                for make_caption in (corpora.web, corpora.synthetic)
            ]
            images.append((corpora.raw_row(key, source="bench"), captions))
        made.append(corpora.commit(corpus, images, source="bench", index=index))
    return {}


def _repeat(corpus, record, index, inputs=None):
    """Commit the files of a shard under another number, without a copy."""
    making = {"fingerprint": record.fingerprint, "inputs": inputs}
    with corpus.writer(record.stage, "bench", index, **making) as writer:
        for suffix in record.files:
            os.link(corpus.local_path(record, suffix), writer.path(suffix))
        return writer.commit(rows_in=record.rows_in, counts=record.counts)


def _text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(4, 16)))


def run_ours(out: Path, rows: int, are_rules_on: bool) -> dict[str, object]:
    from pipeline.corpus import Corpus
    from pipeline.select import Selector
    from pipeline.selection.config import RulesConfig, SelectConfig

    rules = RulesConfig()
    if are_rules_on:
        rules = RulesConfig.model_validate({name: {} for name in RulesConfig.model_fields})
    corpus = Corpus(str(out / "corpus"))
    selector = Selector(corpus, SelectConfig(rules=rules))
    raw, scored = corpus.shards("raw"), corpus.shards("captions")
    begun_at, started_at, kept, megabytes = time.perf_counter(), time.process_time(), 0, []
    for pair in zip(raw, scored, strict=True):
        kept += selector.select(*pair).record.counts.kept
        megabytes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    seconds, wall = time.process_time() - started_at, time.perf_counter() - begun_at
    for record in corpus.shards("clean"):  # so that the next round makes them again
        for suffix in ("json", *record.files):
            corpus.store.remove(f"{record.name}.{suffix}")
    return {"seconds": seconds, "wall": wall, "kept": kept, "megabytes": megabytes}


def run_peer(out: Path, rows: int, _: bool) -> dict[str, object]:
    import pandas as pd
    import webdataset as wds

    target = out / "peer"
    target.mkdir(exist_ok=True)
    started_at, num_kept = time.process_time(), 0
    for tar in sorted((out / "corpus" / "raw" / "bench").glob("*.tar")):
        raw = pd.read_parquet(tar.with_suffix(".parquet"))
        scored = pd.read_parquet(out / "corpus" / "captions" / "bench" / f"{tar.stem}.parquet")
        passed = scored[scored.itm >= 0.5].sort_values(["key", "itm"], ascending=[True, False])
        captions = {
            key: group[["text", "origin", "itm", "clip"]].to_dict("records")
            for key, group in passed.groupby("key", sort=False)
        }
        rows_by_key = raw.set_index("key")[["url", "sha256", "width", "height"]].to_dict("index")
        with wds.TarWriter(str(target / tar.name)) as writer:
            for sample in wds.WebDataset(str(tar), shardshuffle=False):
                key = sample["__key__"]
                if key in captions:
                    found = {**rows_by_key[key], "captions": captions[key]}
                    text = captions[key][0]["text"]
                    writer.write({"__key__": key, "jpg": sample["jpg"], "json": found, "txt": text})
        is_kept = raw.key.isin(captions)
        raw["num_kept"] = raw.key.map({key: len(each) for key, each in captions.items()}).fillna(0)
        raw.loc[(raw.verdict == "kept") & ~is_kept, "reason"] = "itm_below_threshold"
        raw.loc[(raw.verdict == "kept") & ~is_kept, "verdict"] = "dropped"
        raw.to_parquet(target / f"{tar.stem}.parquet")
        num_kept += int(is_kept.sum())
    return {"seconds": time.process_time() - started_at, "kept": num_kept}


def run_side(side: str, folder: Path, rows: int, are_rules_on: bool) -> dict:
    command = [sys.executable, __file__, "--side", side, "--out", folder, "--rows", str(rows)]
    command += ["--rules"] if are_rules_on else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, help="ours alone, with so many rows")
    parser.add_argument("--rules", action="store_true", help="with every rule on")
    parser.add_argument("--side", choices=["make", "ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
