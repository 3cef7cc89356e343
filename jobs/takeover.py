"""A submitted run that finds its forerunner's heartbeat still fresh waits for it to go stale.

A head that is lost takes its driver along, but not the trace of it: for a minute the corpus looks
as if somebody ran it. Whoever lives goes on beating, and is told from the dead by that.
"""

import logging
import threading
from datetime import UTC, datetime

from jobs.durable import read_status
from pipeline.corpus import Corpus

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 1.0


def wait_for_silence(corpus: Corpus, has_to_end: threading.Event) -> bool:
    """Return whether nobody runs a corpus: at once, or when the last heartbeat is stale.

    Returns False as soon as the heartbeat is a newer one, for then somebody does, and when
    `has_to_end` is set. Raises UserError when the status cannot be read.
    """
    first = read_status(corpus)
    if first is None or not first.is_alive(datetime.now(UTC)):
        return True
    _log.warning(
        "%s was being run by %s until %.0f s ago; waiting up to %.0f s to see whether it is alive",
        corpus.root,
        first.driver.who,
        (datetime.now(UTC) - first.heartbeat_at).total_seconds(),
        first.stale_seconds,
    )
    while not has_to_end.wait(_LOOK_SECONDS):
        status = read_status(corpus)
        if status is None or not status.is_alive(datetime.now(UTC)):
            return True
        if status.heartbeat_at != first.heartbeat_at:
            return False
    return False
