"""Downloads: how the web answered, which hosts, how it went over time, licences and opt-outs."""

from collections.abc import Sequence
from typing import Any

from pipeline.report.ledgers import Ledgers, Shard
from pipeline.sample import Verdict

NUM_HOSTS = 25
NUM_LICENCES = 15
_NUM_BUCKETS = 60
# A page's or site's own word against use, and the lists that a run was given.
OPT_OUTS = ("robots_txt", "robots_header", "blocked_domain", "blocked_url", "blocked_image")
_NO_HOST = "(no host)"

# What stands between // and the next slash, less any user name and port. Grouped as it is written
# first, so that patterns see each host a few times rather than each row.
_HOSTS_SQL = f"""
    CREATE OR REPLACE TEMP TABLE hosts AS
    WITH written AS (
        SELECT split_part(url, '/', 3) AS place, count(*) AS num_rows,
               count(*) FILTER (verdict = 'kept') AS kept,
               count(*) FILTER (verdict = 'failed') AS failed,
               coalesce(sum(num_bytes), 0)::BIGINT AS num_bytes
        FROM raw GROUP BY place
    ), named AS (
        SELECT *, lower(regexp_extract(coalesce(place, ''),
            '^(?:.*@)?(\\[[^\\]]*\\]|[^:]*)', 1)) AS name FROM written
    )
    SELECT CASE WHEN name = '' THEN '{_NO_HOST}' ELSE name END AS host,
           sum(num_rows)::BIGINT AS num_rows, sum(kept)::BIGINT AS kept,
           sum(failed)::BIGINT AS failed, sum(num_bytes)::BIGINT AS num_bytes
    FROM named GROUP BY ALL
"""
_LICENCES_SQL = """
    WITH given AS (
        SELECT CASE WHEN json_valid(extra) THEN coalesce(
            extra ->> '$.license', extra ->> '$.LICENSE', extra ->> '$.licence') END AS name
        FROM raw WHERE verdict = 'kept' AND extra ILIKE '%"licen%'
    )
    SELECT name, count(*) FROM given WHERE name IS NOT NULL GROUP BY ALL ORDER BY 2 DESC, 1
"""


def downloads(ledgers: Ledgers) -> dict[str, Any]:
    """Return HTTP answers, attempts, bytes, the hosts of most rows, and success over time."""
    redirected, num_bytes, num_rows, kept = ledgers.row(
        "SELECT count(final_url), coalesce(sum(num_bytes), 0)::BIGINT, count(*), "
        "count(*) FILTER (verdict = 'kept') FROM raw"
    )
    answers = ledgers.rows("SELECT http_status, count(*) FROM raw GROUP BY ALL ORDER BY 2 DESC, 1")
    attempts = ledgers.rows(
        "SELECT attempts, count(*), count(*) FILTER (verdict = 'kept') FROM raw "
        "WHERE attempts IS NOT NULL GROUP BY ALL ORDER BY 1"
    )
    return {
        "rows": num_rows,
        "kept": kept,
        "redirected": redirected,
        "bytes": num_bytes,
        "http_status": [{"status": status, "rows": rows} for status, rows in answers],
        "attempts": [{"attempts": a, "rows": rows, "kept": k} for a, rows, k in attempts],
        "hosts": _hosts(ledgers),
        "over_time": over_time(ledgers.snapshot.shards["raw"]),
    }


def _hosts(ledgers: Ledgers) -> dict[str, Any]:
    ledgers.execute(_HOSTS_SQL)
    (num_hosts,) = ledgers.row("SELECT count(*) FROM hosts WHERE host != ?", [_NO_HOST])
    columns = ("host", "rows", "kept", "failed", "bytes")
    top = ledgers.rows("SELECT * FROM hosts ORDER BY num_rows DESC, host LIMIT ?", [NUM_HOSTS])
    worst = ledgers.rows(
        "SELECT * FROM hosts WHERE failed > 0 ORDER BY failed DESC, host LIMIT ?", [NUM_HOSTS]
    )
    return {
        "distinct": num_hosts,
        "largest": [dict(zip(columns, row, strict=True)) for row in top],
        "most_failed": [dict(zip(columns, row, strict=True)) for row in worst],
    }


def over_time(shards: Sequence[Shard]) -> list[dict[str, Any]]:
    """Return rows and kept rows of runs of shards in the order they were committed.

    From markers alone; at most a page's width of points, the last moment of each.
    """
    dated = sorted(
        (shard for shard in shards if shard.committed_at),
        key=lambda s: (s.committed_at, s.record.name),
    )
    size = max(1, -(-len(dated) // _NUM_BUCKETS))
    points = []
    for start in range(0, len(dated), size):
        part = dated[start : start + size]
        points.append(
            {
                "time": part[-1].committed_at.isoformat(timespec="seconds"),  # type: ignore[union-attr]
                "shards": len(part),
                "rows": sum(shard.record.rows_in for shard in part),
                "kept": sum(shard.record.counts.kept for shard in part),
            }
        )
    return points


def licences(ledgers: Ledgers) -> dict[str, Any]:
    """Return what sources say of licences, and how many rows were left out on someone's wish."""
    found = ledgers.rows(_LICENCES_SQL)
    (kept,) = ledgers.row("SELECT count(*) FROM raw WHERE verdict = ?", [Verdict.KEPT.value])
    refused: dict[str, int] = dict(
        ledgers.rows(
            "SELECT reason, count(*) FROM raw WHERE verdict = 'dropped' AND reason IN "
            f"({', '.join('?' for _ in OPT_OUTS)}) GROUP BY ALL",
            OPT_OUTS,
        )
    )
    return {
        "rows_kept": kept,
        "rows_with_licence": sum(count for _, count in found),
        "distinct": len(found),
        "commonest": [{"licence": name, "rows": count} for name, count in found[:NUM_LICENCES]],
        "opt_outs": {reason: refused.get(reason, 0) for reason in OPT_OUTS},
    }
