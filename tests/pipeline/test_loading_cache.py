"""Copies of a remote corpus's shards: made once, in bounds, gone after crashes, found ahead."""

import fcntl
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest
from loader_corpora import demo_corpus, photo, web_item, write_clean
from loader_process import CONFIG, read_step

from pipeline.corpus import Corpus
from pipeline.loader import Loader, LoaderError
from pipeline.loading.cache import ShardCache
from pipeline.sample import ShardError


@pytest.fixture
def remote():
    """A corpus on a filesystem that is not this machine's disk, with 6 shards of some 20 kB."""
    corpus = Corpus(f"memory://{uuid4().hex}")
    for index in range(6):
        write_clean(corpus, "web", index, [web_item(index, r, photo(r)) for r in range(4)])
    yield corpus
    corpus.store.fs.rm(corpus.store.full(""), recursive=True)


def copies(folder):
    return sorted(p for p in Path(folder).iterdir() if p.suffix in (".tar", ".parquet"))


def copied_bytes(folder):
    return sum(path.stat().st_size for path in copies(folder))


def cache_of(corpus, folder, shards=2.5):
    size = corpus.shards("clean", "web")[0].files["tar"].bytes
    return ShardCache(corpus, str(folder), int(shards * size))


def test_a_local_corpus_is_read_in_place(tmp_path):
    corpus = demo_corpus(tmp_path / "corpus")
    cache = ShardCache(corpus, str(tmp_path / "cache"), 1)
    record = corpus.shards("clean", "web")[0]
    assert cache.path(record, "tar") == str(tmp_path / "corpus/clean/web/00000.tar")
    assert not (tmp_path / "cache").exists()


def test_a_copy_is_the_file_and_is_made_once(remote, tmp_path):
    cache, record = cache_of(remote, tmp_path), remote.shards("clean", "web")[0]
    path = Path(cache.path(record, "tar"))
    with remote.open(record, "tar") as stream:
        assert path.read_bytes() == stream.read()
    inode = path.stat().st_ino
    assert Path(cache.path(record, "tar")).stat().st_ino == inode


def test_the_least_recently_used_copy_makes_room(remote, tmp_path):
    cache, records = cache_of(remote, tmp_path), remote.shards("clean", "web")
    first, second = (cache.path(record, "tar") for record in records[:2])
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    cache.path(records[0], "tar")  # used again, so the other one is older now
    third = cache.path(records[2], "tar")
    assert copies(tmp_path) == sorted(map(Path, (first, third)))


def test_a_copy_that_is_being_read_can_be_read_to_its_end(remote, tmp_path):
    cache, records = cache_of(remote, tmp_path), remote.shards("clean", "web")
    with open(cache.path(records[0], "tar"), "rb") as stream:
        for record in records[1:]:
            cache.path(record, "tar")
        assert not os.path.exists(stream.name)
        with remote.open(records[0], "tar") as original:
            assert stream.read() == original.read()


def test_many_readers_stay_within_the_bound(remote, tmp_path):
    cache, records = cache_of(remote, tmp_path, shards=4.5), remote.shards("clean", "web")
    largest, is_over = 0, threading.Event()

    def read(number):
        descriptor = None
        while descriptor is None:  # another reader's copy may have taken its place
            try:
                descriptor = os.open(cache.path(records[number % 6], "tar"), os.O_RDONLY)
            except FileNotFoundError:
                continue
        size = os.fstat(descriptor).st_size
        os.close(descriptor)
        return size

    def watch():
        nonlocal largest
        while not is_over.wait(0.001):
            largest = max(largest, bytes_on_disk(tmp_path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(4) as pool:
        sizes = list(pool.map(read, range(120)))
    is_over.set()
    watcher.join()
    assert sizes == [records[number % 6].files["tar"].bytes for number in range(120)]
    assert 0 < largest <= cache.max_bytes


def bytes_on_disk(folder):
    """Return what copies and copies in the making take, at one moment: nobody deletes meanwhile."""
    sizes = {}
    with open(Path(folder, ".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in Path(folder).iterdir():
            if path.suffix != ".claim" and path.name != ".lock":
                with suppress(FileNotFoundError):  # it has just got its name, under which it counts
                    status = path.stat()
                    sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


def test_what_a_crash_left_behind_is_cleared(remote, tmp_path):
    cache, records = cache_of(remote, tmp_path, shards=1.5), remote.shards("clean", "web")
    target = remote.copy_path(records[3], "tar", str(tmp_path))
    with open(target + ".claim", "wb") as claim:
        claim.truncate(10**9)  # of a process that is no more: nobody holds its lock
    Path(f"{target}.{uuid4().hex}").write_bytes(b"half a copy")
    path = cache.path(records[0], "tar")
    assert {p.name for p in tmp_path.iterdir()} - {".lock"} <= {
        os.path.basename(path),
        os.path.basename(path) + ".claim",
    }


def test_a_file_that_does_not_fit_is_refused_with_what_to_raise(remote, tmp_path):
    cache, record = cache_of(remote, tmp_path, shards=0.5), remote.shards("clean", "web")[0]
    with pytest.raises(LoaderError, match=r"00000\..*tar has .* bytes.*raise cache_bytes"):
        cache.path(record, "tar")


def test_a_copy_of_damaged_bytes_is_refused(remote, tmp_path):
    cache, record = cache_of(remote, tmp_path), remote.shards("clean", "web")[0]
    path = remote.store.full("clean/web/00000.tar")
    data = bytearray(remote.store.fs.cat_file(path))
    data[700] ^= 1
    remote.store.fs.pipe_file(path, bytes(data))
    with pytest.raises(ShardError, match="does not have the hash that was committed"):
        cache.path(record, "tar")
    assert copies(tmp_path) == []


# The loader on a remote corpus


def remote_config(folder, **options):
    return CONFIG.model_copy(update={"num_workers": 0, "cache_folder": str(folder), **options})


def test_a_remote_corpus_gives_the_same_batches(remote, tmp_path):
    local = Corpus(str(tmp_path / "corpus"))
    for index in range(6):
        write_clean(local, "web", index, [web_item(index, r, photo(r)) for r in range(4)])
    with (
        Loader(remote, remote_config(tmp_path / "cache")) as there,
        Loader(local, remote_config(tmp_path / "unused")) as here,
    ):
        for _ in range(15):
            assert read_step([there]) == read_step([here])


def test_training_in_a_small_cache_copies_again_and_again_and_stays_within_it(remote, tmp_path):
    size = sum(file.bytes for file in remote.shards("clean", "web")[0].files.values())
    config = remote_config(tmp_path, group_shards=1, cache_bytes=int(6.8 * size))
    with Loader(remote, config) as loader:
        for _ in range(24):
            read_step([loader])
            assert copied_bytes(tmp_path) <= config.cache_bytes


def test_the_next_groups_shards_are_copied_before_they_are_read(remote, tmp_path):
    config = remote_config(tmp_path, group_shards=2)
    with Loader(remote, config) as loader:
        read = {row[1] for row in loader.request(0).refs.rows()}
        next(loader)
    # Closing waits for copies in the making; two groups of two shards were asked for.
    copied = {path.name.split(".")[0] for path in copies(tmp_path) if path.suffix == ".tar"}
    assert len(copied) == 4
    assert {f"clean-web-{shard:05d}" for shard in read} < copied


def test_a_remote_corpus_without_a_cache_is_refused(remote):
    with pytest.raises(LoaderError, match="set cache_folder to a local folder"):
        Loader(remote, CONFIG)


def test_a_loader_that_was_closed_can_be_read_again(remote, tmp_path):
    with Loader(remote, remote_config(tmp_path)) as loader:
        first = read_step([loader])
        loader.close()
        assert read_step([loader.at(0)]) == first


def test_a_cache_that_cannot_hold_what_is_read_at_once_is_refused(remote, tmp_path):
    with pytest.raises(LoaderError, match="cache_bytes is 1,000, but two groups of 2 shards"):
        Loader(remote, remote_config(tmp_path, cache_bytes=1000))
