"""A plan for people, as Markdown that can be put into a proposal, and for machines."""

from collections.abc import Iterator, Sequence
from typing import Any

from jobs.estimate.estimate import Estimate
from jobs.estimate.measure import Band, Draws
from jobs.estimate.reckoning import StagePlan, band

_HOUR, _TERA = 1 / 3600, 1e-12


def plan_text(estimate: Estimate) -> str:
    """Return the plan as Markdown."""
    return "\n".join(_lines(estimate))


def plan_json(estimate: Estimate) -> dict[str, Any]:
    """Return the plan for machines: hours, USD, TB and counts, as {low, mid, high}."""
    reckoning, result = estimate.reckoning, estimate.simulated
    return {
        "run": reckoning.work.name,
        "cluster": reckoning.cluster.name,
        "hours": band(estimate.seconds, _HOUR).to_json(),
        "gpu_hours": band(reckoning.gpu_seconds, _HOUR).to_json(),
        "usd": band(estimate.total_usd).to_json(),
        "usd_by_part": {name: band(draws).to_json() for name, draws in estimate.usd.items()},
        "storage_usd_per_month": band(estimate.storage_usd_per_month).to_json(),
        "bottleneck": reckoning.bottleneck.name,
        "stages": {
            stage.name: {
                "actors": stage.num_actors,
                "pool": stage.pool.name,
                "hours_alone": band(stage.seconds, _HOUR).to_json(),
                f"{stage.unit.lower()}_hours": _unit_hours(stage).to_json(),
            }
            for stage in reckoning.stages
        },
        "survivors": {name: band(each).to_json() for name, each in reckoning.survivors.items()},
        "terabytes": {name: band(each, _TERA).to_json() for name, each in reckoning.bytes.items()},
        "node_hours": {
            name: band(each, _HOUR).to_json() for name, each in estimate.node_seconds.items()
        },
        "simulated": None
        if result is None
        else {
            "hours": round(result.seconds * _HOUR, 3),
            "shards_made": dict(result.shards_made),
            "peak_nodes": dict(result.peak_nodes),
            "preemptions": result.num_preemptions,
            "attempts_lost": result.num_lost,
            "second_copies": result.num_second_copies,
            "set_aside": result.num_set_aside,
        },
        "rates": {name: rate.model_dump() for name, rate in reckoning.used.items()},
        "prices": reckoning.cluster.prices.model_dump(),
    }


def _lines(estimate: Estimate) -> Iterator[str]:
    reckoning = estimate.reckoning
    work, cluster = reckoning.work, reckoning.cluster
    shards = sum(work.num_shards(source) for source in work.sources)
    yield f"# Plan of {work.name} on {cluster.name} ({cluster.place})"
    yield ""
    yield f"{work.num_rows:,} rows of {len(work.sources)} sources in {shards:,} shards. Each figure"
    yield "is the likeliest, with bounds that hold nine times in ten if the rates at the end do."
    yield "Disks, addresses and traffic between zones or out of the cloud are not in it; nor is"
    yield "training."
    yield ""
    yield from _table(("", "likeliest", "nine in ten"), _totals(estimate))
    yield ""
    yield from _table(
        ("stage", "at work", "alone, hours", "nine in ten", "busy", ""),
        [_stage_row(estimate, stage) for stage in reckoning.stages],
    )
    yield from _hints(estimate)
    yield ""
    first = work.num_rows
    yield from _table(
        ("samples after each step", "likeliest", "nine in ten", "of all rows"),
        [
            (name, *_cells(band(draws)), f"{band(draws).mid / first:.1%}")
            for name, draws in reckoning.survivors.items()
        ],
    )
    yield ""
    yield from _table(
        ("bytes", "TB", "nine in ten"),
        [(name, *_cells(band(draws, _TERA))) for name, draws in reckoning.bytes.items()],
    )
    yield ""
    yield from _table(
        ("cost", "USD", "nine in ten"),
        [(name, *_cells(band(draws))) for name, draws in estimate.usd.items()],
    )
    yield ""
    yield from _simulated(estimate)
    yield from _assumptions(estimate)


def _totals(estimate: Estimate) -> list[tuple[str, ...]]:
    reckoning = estimate.reckoning
    totals: list[tuple[str, Draws]] = [
        ("hours from start to end", estimate.seconds * _HOUR),
        ("GPU-hours at work", reckoning.gpu_seconds * _HOUR),
        ("USD for machines and requests", estimate.total_usd),
        ("USD a month for storing it", estimate.storage_usd_per_month),
    ]
    rows = [(name, *_cells(band(draws))) for name, draws in totals]
    return [*rows, ("bottleneck", reckoning.bottleneck.name, "")]


def _stage_row(estimate: Estimate, stage: StagePlan) -> tuple[str, ...]:
    mid, bounds = _cells(band(stage.seconds, _HOUR))
    per_node = min(stage.actors_per_node, stage.num_actors)
    nodes = -(-stage.num_actors // per_node)
    holds = f"{stage.num_gpus:g} GPU" if stage.num_gpus else f"{stage.num_cpus:g} CPU"
    return (
        stage.name,
        f"{stage.num_actors:,} actors of {holds}, {nodes:,} x {stage.pool.machine}",
        mid,
        bounds,
        f"{_number(_unit_hours(stage).mid)} {stage.unit}-hours",
        "bottleneck" if stage is estimate.reckoning.bottleneck else "",
    )


def _unit_hours(stage: StagePlan) -> Band:
    per_actor = stage.num_gpus or stage.num_cpus
    return band(stage.busy_seconds, _HOUR * per_actor)


def _hints(estimate: Estimate) -> Iterator[str]:
    for stage in estimate.reckoning.stages:
        places = stage.actors_per_node * stage.pool.max_nodes
        if stage.num_wanted > places:
            yield (
                f"\nThe recipe allows {stage.num_wanted:,} actors of {stage.name}; the cluster has "
                f"places for {places:,}."
            )
        elif stage is estimate.reckoning.bottleneck and stage.num_wanted < places:
            yield (
                f"\nThe cluster has places for {places:,} actors of {stage.name}; the recipe "
                f"allows {stage.num_wanted:,} (run.{stage.name}.max_actors)."
            )


def _simulated(estimate: Estimate) -> Iterator[str]:
    result = estimate.simulated
    if result is None:
        yield "Not simulated: 20% is added to machines' time for starting and waiting."
        yield ""
        return
    alone = band(estimate.reckoning.seconds, _HOUR).mid
    peaks = ", ".join(f"{number} {name}" for name, number in result.peak_nodes.items())
    yield (
        f"Simulated with the run's own dispatching: {_number(result.seconds * _HOUR)} hours, where "
        f"the slowest stage alone takes {_number(alone)}; at most {peaks} nodes at once; "
        f"{result.num_preemptions:,} nodes taken back, {result.num_lost:,} attempts lost with them "
        f"and made again, {result.num_second_copies:,} stragglers begun a second time, "
        f"{result.num_set_aside:,} shards set aside."
    )
    yield ""


def _assumptions(estimate: Estimate) -> Iterator[str]:
    used = estimate.reckoning.used
    num_assumed = sum(rate.is_assumed for rate in used.values())
    yield f"{num_assumed} of {len(used)} rates are assumptions; `--probe` measures what it can here"
    yield "and `--rates` takes what you know."
    yield ""
    yield from _table(
        ("rate", "value", "nine in ten", "source"),
        [
            (name, *_cells(Band(rate.low, rate.value, rate.high)), rate.source)
            for name, rate in used.items()
        ],
    )
    counted = [source.name for source in estimate.reckoning.work.sources if not source.is_counted]
    if counted:
        yield f"\nRows as given, lists not read: {', '.join(counted)}."
    if estimate.reckoning.work.models:
        yield f"\nModels: {estimate.reckoning.work.models} in {estimate.reckoning.work.dtype}."
    yield f"\nPrices: {estimate.reckoning.cluster.prices.source.strip()}."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for number, row in enumerate((head, *rows)):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"| {' | '.join(cells)} |"
        if number == 0:
            yield f"|{'|'.join('-' * (width + 2) for width in widths)}|"


def _cells(result: Band) -> tuple[str, str]:
    if result.low == result.high:
        return _number(result.mid), "exact"
    return _number(result.mid), f"{_number(result.low)} to {_number(result.high)}"


def _number(value: float) -> str:
    """Return a figure with no more digits than a plan can know."""
    if value == 0 or abs(value) >= 1e15:
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{float(f'{value:.3g}'):g}"
