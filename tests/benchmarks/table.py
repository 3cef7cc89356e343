"""Every benchmark, one after the other, and their results as one table in README.

    python tests/benchmarks/table.py [--only captions --only loader]

Sizes are small enough for half an hour on two cores; each benchmark takes larger ones by itself.
What is measured anew replaces its rows in README's table; other rows stay, each with its own date.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks: `make bench` writes this table -->", "<!-- end of benchmarks -->"
HEADER = [
    "| benchmark | unit | ours | peer | ratio | machine | date |",
    "|---|---|---:|---:|---:|---|---|",
]
ONE_CORE = ("--threads", "1", "--cpu-time")
# Captions are decoded in groups of 16 images, of 8 with ten captions each: fewer would not be what
# a shard is.
RUNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("download", ()),
    ("stage1", ()),
    ("captions", ONE_CORE),
    ("pairs", ("--images", "1", *ONE_CORE)),
    ("score", ("--images", "16", "--repeats", "3")),
    ("select", ()),
    ("loader", ()),
    ("report", ()),
    ("control_plane", ("--shards", "2000", "--s3-shards", "500")),
)
# What is compared, and with what; a benchmark without a peer prints its figures and has no row.
TITLES = {
    "download_http": ("download over HTTP, 800x600 JPEG to 256 px", "img2dataset"),
    "download_https": ("download over HTTPS", "img2dataset"),
    "stage1_step": ("stage-1 step, 4 layers of BERT-base, batch 4", "transformers' modules"),
    "captions": ("captions, BLIP-base, 384 px, {} an image", "transformers' `generate`"),
    "itm_pairs": ("ITM, BLIP-base, 384 px, {} captions an image", "transformers"),
    "score_shard": ("whole shard, raw tar to scores", "transformers in a loop"),
    "select_blip": ("select by BLIP's policy", "pandas and webdataset"),
    "loader": ("loader, 512 px JPEG to 224 px batches", "webdataset and PIL"),
}
PEERS = {"pairs": ", pair by pair", "once": ", its ViT once an image"}


def main() -> None:
    """Run what is asked for and write README's table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=[name for name, _ in RUNS])
    wanted = parser.parse_args().only
    rows: dict[str, str] = {}
    for name, arguments in RUNS:
        if wanted is None or name in wanted:
            print(f"==> {name}", flush=True)
            rows |= {
                title: row for result in measured(name, arguments) for title, row in lines(result)
            }
            README.write_text(with_rows(README.read_text(), rows))  # a late failure loses nothing
    print("\n".join([*HEADER, *rows.values()]))


def measured(name: str, arguments: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Run one benchmark, show what it prints, and yield its lines of JSON."""
    command = [sys.executable, str(HERE / f"bench_{name}.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None, "it is piped"
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("{"):
                yield json.loads(line)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")


def lines(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a title and a row for each comparison of a result; none where there is no peer."""
    if "peer" not in result or result["name"] not in TITLES:
        return
    title, peer = TITLES[result["name"]]
    theirs = result["peer"] if isinstance(result["peer"], dict) else {"": result["peer"]}
    for case, value in theirs.items():
        number, _, side = case.partition(" ")
        ours, ratio = (
            each if not isinstance(each, dict) else each.get(case, each.get(number))
            for each in (result["ours"], result["ratio"])
        )
        full = title.format(number)
        cells = (
            full,
            result["unit"],
            shown(ours),
            f"{peer}{PEERS.get(side, '')}: {shown(value)}",
            f"{ratio:.2f}",
            machine(),
            datetime.now(UTC).date().isoformat(),
        )
        yield f"{full} {side}", f"| {' | '.join(cells)} |"


def shown(value: float) -> str:
    """Return a figure with three digits that count."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def machine() -> str:
    """Return the machine in a few words."""
    return f"{os.cpu_count()} cores, {platform.machine()}"


def compared(row: str) -> tuple[str, str]:
    """Return what a row is about: the benchmark and the peer."""
    cells = [cell.strip() for cell in row.split("|")]
    return cells[1], cells[4].rpartition(":")[0]


def with_rows(readme: str, rows: dict[str, str]) -> str:
    """Return README with rows of the table replaced by their title, or added."""
    head, _, rest = readme.partition(BEGIN)
    table, _, tail = rest.partition(END)
    known = {compared(row): row for row in re.findall(r"^\| .*$", table, re.MULTILINE)}
    known.pop(compared(HEADER[0]))
    known |= {compared(row): row for row in rows.values()}
    body = "\n".join([*HEADER, *known.values()])
    return f"{head}{BEGIN}\n{body}\n{END}{tail}"


if __name__ == "__main__":
    main()
