"""A process that selects every shard of a corpus, which tests kill: `ROOT` is its one argument."""

import sys

from select_corpora import SOURCE

from pipeline.corpus import Corpus
from pipeline.select import Selector
from pipeline.selection.config import SelectConfig


def run(root, rows_per_block=20):
    """Bring the clean stage to its end from any state."""
    corpus = Corpus(root)
    corpus.sweep()
    selector = Selector(corpus, SelectConfig(), rows_per_block=rows_per_block)
    for raw in corpus.shards("raw", SOURCE):
        selector.select(raw, corpus.record("captions", SOURCE, raw.index))
    corpus.sweep()


if __name__ == "__main__":
    sys.stdout.write("begun\n")
    sys.stdout.flush()
    run(sys.argv[1])
