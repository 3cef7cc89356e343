"""A small corpus and the job that makes it, for tests that disturb the job and compare the outcome.

Imported by tests and by the processes they kill, so it stays light.
"""

import contextlib
import io
import tempfile

from pipeline.corpus import Corpus
from pipeline.ledger import LedgerWriter, ledger_schema
from pipeline.record import Counts
from pipeline.tar import TarWriter

SOURCE = "demo"
FIRST, SECOND = "first", "second"  # two recipes, so two contents


def key_of(index, row):
    return f"{index:05d}{row:04d}"


def rows_of(index, num_rows):
    for row in range(num_rows):
        verdict, reason = [("kept", ""), ("dropped", "too_small"), ("failed", "http_404")][row % 3]
        yield {
            "key": key_of(index, row),
            "source": SOURCE,
            "url": f"http://host/{index}/{row}",
            "verdict": verdict,
            "reason": reason,
        }


def ledger_bytes(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/ledger.parquet"
        with LedgerWriter(path, ledger_schema()) as ledger:
            for row in rows:
                ledger.write(row)
        with open(path, "rb") as stream:
            return stream.read()


def tar_bytes(keys, content):
    stream = io.BytesIO()
    with TarWriter(stream) as tar:
        for key in keys:
            tar.write(key, {"jpg": f"{content} {key}".encode(), "txt": content.encode()})
    return stream.getvalue()


class Recipe:
    """The files of shards with some content, made once so that commits are all that is timed."""

    def __init__(self, content=FIRST, num_rows=4):
        self.content = content
        self.num_rows = num_rows
        self._made = {}

    def files(self, stage, index):
        if (stage, index) not in self._made:
            rows = list(rows_of(index, self.num_rows))
            kept = [row["key"] for row in rows if row["verdict"] == "kept"]
            files = {"parquet": ledger_bytes(rows)}
            if stage != "captions":
                files["tar"] = tar_bytes(kept, self.content)
            self._made[stage, index] = files
        return self._made[stage, index]

    def counts(self):
        tally = {}
        for row in rows_of(0, self.num_rows):
            outcome = row["verdict"], row["reason"]
            tally[outcome] = tally.get(outcome, 0) + 1
        return Counts.of(tally)

    def commit(self, corpus, stage="raw", index=0, **options):
        """Make one attempt at a shard."""
        files = self.files(stage, index)
        with corpus.writer(stage, SOURCE, index, fingerprint=self.content, **options) as writer:
            for suffix, data in files.items():
                with open(writer.path(suffix), "wb") as stream:
                    stream.write(data)
            return writer.commit(rows_in=self.num_rows, counts=self.counts())


RECIPES = {name: Recipe(name) for name in (FIRST, SECOND)}


def build(corpus, num_shards):
    """Bring a corpus to its end from any state: write, derive, replace, derive again."""
    corpus.write_run("recipe: 1\n")
    corpus.sweep()
    for recipe in RECIPES.values():
        for index in range(num_shards):
            raw = corpus.record("raw", SOURCE, index)
            # The recipes are two rounds; a shard of the second is not made again in the first.
            if raw is None or (raw.fingerprint, recipe.content) == (FIRST, SECOND):
                raw = recipe.commit(corpus, "raw", index, replace=raw)
            for stage, above in (("captions", "raw"), ("clean", "captions")):
                inputs = corpus.record(above, SOURCE, index).sha256
                found = corpus.record(stage, SOURCE, index)
                if found is None or found.inputs != inputs:
                    maker = RECIPES[raw.fingerprint]
                    maker.commit(corpus, stage, index, inputs=inputs, replace=found)
    corpus.sweep()


def tree(corpus):
    """Return every file under a corpus's root, by path."""
    fs, root = corpus.store.fs, corpus.store.full("")
    with contextlib.suppress(AttributeError):
        fs.invalidate_cache()
    return {path[len(root) + 1 :]: fs.cat_file(path) for path in fs.find(root)}


def prepare(num_shards):
    """Make every file that `build` commits, so that forked children need no pyarrow to do so."""
    for recipe in RECIPES.values():
        for stage in ("raw", "captions", "clean"):
            for index in range(num_shards):
                recipe.files(stage, index)


def race(root, number, num_rounds, barrier, results):
    """Commit, then replace, shard after shard at the same moment as the other racers."""
    corpus = Corpus(root)
    first, second = Recipe(f"first of {number}"), Recipe(f"second of {number}")
    won = []
    for index in range(num_rounds):
        for recipe, made in ((first, None), (second, first)):
            recipe.files("raw", index)
            replaced = corpus.record("raw", SOURCE, index) if made else None
            barrier.wait()
            won.append(recipe.commit(corpus, "raw", index, replace=replaced).sha256)
            barrier.wait()
    results.put(won)
