"""Tars: what is written, what is read from other writers, and what is refused."""

import hashlib
import io
import resource
import subprocess
import sys
import tarfile
import tracemalloc

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sample import SampleError
from pipeline.tar import TarError, TarLimits, TarWriter, read_samples

KEYS = st.text(
    st.characters(exclude_characters="/\\.", exclude_categories=["Cs"]), min_size=1, max_size=20
).filter(str.isprintable)
MEMBERS = st.dictionaries(
    st.sampled_from(["jpg", "json", "txt", "cls.txt"]), st.binary(max_size=1200), min_size=1
)


class Pipe(io.RawIOBase):
    """A stream that can only be read forwards, a little at a time."""

    def __init__(self, data):
        self._stream = io.BytesIO(data)

    def read(self, size=-1):
        return self._stream.read(min(size, 700))

    def seekable(self):
        return False


def write(samples):
    stream = io.BytesIO()
    with TarWriter(stream) as tar:
        spans = {key: tar.write(key, members) for key, members in samples}
    return stream.getvalue(), spans


def read(data, **options):
    faults = []
    stream = data if isinstance(data, io.RawIOBase) else io.BytesIO(data)
    samples = list(read_samples(stream, shard="raw/s/00000", on_fault=faults.append, **options))
    return samples, faults


def entry(name, data=b"x", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tar_of(*entries, format=tarfile.USTAR_FORMAT):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return stream.getvalue()


def with_field(data, at, raw):
    """Change bytes of the header that begins at a multiple of 512 and mend its checksum."""
    start = at - at % 512
    header = bytearray(data[start : start + 512])
    header[at - start : at - start + len(raw)] = raw
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + data[start + 512 :]


# Written


@given(st.dictionaries(KEYS, MEMBERS, max_size=5))
def test_writing_then_reading_is_the_identity(samples):
    data, spans = write(sorted(samples.items()))
    found, faults = read(data)
    assert faults == []
    assert {sample.key: sample.members for sample in found} == samples
    assert [sample.key for sample in found] == sorted(samples)
    for sample in found:
        assert sample.spans == spans[sample.key]
        for extension, span in sample.spans.items():
            assert data[span.offset : span.offset + span.size] == sample.members[extension]
    indexed, _ = read(data, load=False)
    assert [sample.spans for sample in indexed] == [sample.spans for sample in found]
    piped, _ = read(Pipe(data))
    assert piped == found


def test_others_can_read_what_is_written(tmp_path):
    data, _ = write([("000000000", {"jpg": b"j" * 600, "txt": b"a"}), ("000000001", {"jpg": b""})])
    path = tmp_path / "00000.tar"
    path.write_bytes(data)
    with tarfile.open(path) as tar:
        assert [m.name for m in tar] == ["000000000.jpg", "000000000.txt", "000000001.jpg"]
    found = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in found] == ["000000000", "000000001"]
    assert found[0]["jpg"] == b"j" * 600
    listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == ["000000000.jpg", "000000000.txt", "000000001.jpg"]
    assert listed.stderr == ""


def test_an_archive_without_samples_is_read_as_such():
    data, _ = write([])
    assert read(data) == ([], [])


@pytest.mark.parametrize("key", ["", "a/b", "a.b", "..", "a\0", "a\nb", "a\\b", "\ud800", "\x7f"])
def test_a_key_that_cannot_be_a_file_name_is_refused(key):
    with pytest.raises(SampleError) as caught:
        write([(key, {"jpg": b""})])
    assert caught.value.reason == "bad_key"


def test_a_key_that_does_not_fit_is_refused_before_anything_is_written():
    stream = io.BytesIO()
    tar = TarWriter(stream)
    tar.write("é" * 48, {"jpg": b""})
    size = stream.tell()
    with pytest.raises(SampleError, match="101 bytes"):
        tar.write("é" * 48 + "z", {"jpg": b""})
    assert stream.tell() == size


@pytest.mark.parametrize("keys", [("b", "a"), ("a", "a"), ("10", "9", "80")])
def test_keys_out_of_order_are_refused(keys):
    with pytest.raises(ValueError, match="strictly ascend"):
        write([(key, {"jpg": b""}) for key in keys])


@pytest.mark.parametrize("extension", ["", "JPG", "../x", "j/pg", "jpg."])
def test_an_extension_that_is_none_is_refused(extension):
    with pytest.raises(ValueError, match="extension"):
        write([("a", {extension: b""})])


def test_a_writer_that_fails_leaves_an_archive_that_nobody_takes_for_whole():
    stream = io.BytesIO()

    def fail_halfway():
        with TarWriter(stream) as tar:
            tar.write("a", {"jpg": b"x"})
            raise ConnectionError

    with pytest.raises(ConnectionError):
        fail_halfway()
    with pytest.raises(TarError, match="cut off"):
        read(stream.getvalue())


def test_bytes_are_the_same_in_another_process():
    program = (
        "import hashlib, io, sys\nfrom pipeline.tar import TarWriter\nstream = io.BytesIO()\n"
        "with TarWriter(stream) as tar:\n"
        "    for key in sorted({'b', 'a', 'ü'}):\n"
        "        tar.write(key, {e: key.encode() for e in {'jpg', 'txt', 'json'}})\n"
        "print(hashlib.sha256(stream.getvalue()).hexdigest())"
    )
    expected, _ = write([(k, dict.fromkeys(["txt", "jpg", "json"], k.encode())) for k in "abü"])
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "TZ": f"UTC+{seed}"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == hashlib.sha256(expected).hexdigest()


# Read from other writers


def test_what_webdataset_writes_is_read(tmp_path):
    path = tmp_path / "00000.tar"
    with webdataset.TarWriter(str(path)) as tar:
        for index in range(3):
            tar.write({"__key__": f"{index:09d}", "jpg": b"j" * index, "txt": f"caption {index}"})
    samples, faults = read(path.read_bytes())
    assert faults == []
    assert [s.key for s in samples] == ["000000000", "000000001", "000000002"]
    assert samples[2].members == {"jpg": b"jj", "txt": b"caption 2"}


@pytest.mark.parametrize("form", ["gnu", "ustar", "pax", "v7", "oldgnu"])
def test_what_gnu_tar_writes_is_read(tmp_path, form):
    folder = tmp_path / "in"
    folder.mkdir()
    long = "k" * (60 if form in ("v7", "ustar") else 150)
    for name in ("a.jpg", "a.txt", f"{long}.jpg"):
        (folder / name).write_bytes(name.encode())
    path = tmp_path / "out.tar"
    subprocess.run(
        ["tar", f"--format={form}", "--sort=name", "-cf", path, "./"], cwd=folder, check=True
    )
    samples, faults = read(path.read_bytes())
    assert faults == []
    assert {s.key: s.members for s in samples} == {
        "a": {"jpg": b"a.jpg", "txt": b"a.txt"},
        long: {"jpg": f"{long}.jpg".encode()},
    }


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_python_writes_is_read(form):
    key = "k" * (90 if form == tarfile.USTAR_FORMAT else 200)
    data = tar_of(
        entry("a.jpg", b"1", mtime=1.5 if form == tarfile.PAX_FORMAT else 1),
        entry(f"{key}.jpg", b"2" * 513),
        format=form,
    )
    samples, faults = read(data)
    assert faults == []
    assert {s.key: s.members for s in samples} == {"a": {"jpg": b"1"}, key: {"jpg": b"2" * 513}}


# Hostile


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/passwd.jpg", "absolute_name"),
        ("C:evil.jpg", "absolute_name"),
        ("\\evil.jpg", "absolute_name"),
        ("../evil.jpg", "parent_in_name"),
        ("a/../../evil.jpg", "parent_in_name"),
        ("..", "parent_in_name"),
        ("a/b.jpg", "nested_name"),
        ("noextension", "no_extension"),
        ("dot.", "no_extension"),
        (".hidden", "bad_name"),
        ("a\nb.jpg", "bad_name"),
        ("b.j\x1bpg", "bad_name"),
        ("\udcff.jpg", "bad_name"),
    ],
)
def test_a_name_that_no_sample_may_have_is_skipped_and_counted(name, reason):
    data = tar_of(entry("a.jpg"), entry(name), entry("z.jpg"))
    samples, faults = read(data)
    assert [s.key for s in samples] == ["a", "z"]
    assert [(f.reason, f.key) for f in faults] == [(reason, None)]
    assert "raw/s/00000" in str(faults[0])


@pytest.mark.parametrize(
    ("type", "reason"),
    [
        (tarfile.SYMTYPE, "link"),
        (tarfile.LNKTYPE, "link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.BLKTYPE, "device"),
        (tarfile.FIFOTYPE, "fifo"),
    ],
)
def test_what_is_not_a_file_costs_its_sample(type, reason):
    data = tar_of(
        entry("a.jpg"), entry("a.txt", b"", type=type, linkname="/etc/passwd"), entry("b.jpg")
    )
    samples, faults = read(data)
    assert [s.key for s in samples] == ["b"]
    assert [(f.reason, f.key) for f in faults] == [(reason, "a")]


@pytest.mark.parametrize("type", [b"1", b"2", b"3", b"4", b"5", b"6"])
def test_data_behind_what_has_none_is_refused(type):
    # Readers differ in whether they skip it, so one of them would see members that others do not.
    data = with_field(tar_of(entry("a.jpg", b"x" * 600), entry("b.jpg")), 156, type)
    with pytest.raises(TarError, match="600 bytes of data"):
        read(data)


def test_an_unknown_kind_of_member_costs_its_sample():
    data = with_field(tar_of(entry("a.jpg"), entry("b.jpg")), 156, b"Z")
    samples, faults = read(data)
    assert [s.key for s in samples] == ["b"]
    assert [f.reason for f in faults] == ["unknown_type"]


@pytest.mark.parametrize("load", [True, False])
def test_a_member_that_is_there_twice_costs_its_sample(load):
    data = tar_of(entry("a.jpg", b"1"), entry("a.jpg", b"2"), entry("a.txt"), entry("b.jpg"))
    samples, faults = read(data, load=load)
    assert [s.key for s in samples] == ["b"]
    assert [(f.reason, f.key) for f in faults] == [("duplicate_member", "a")]


def test_members_that_come_after_another_sample_are_dropped():
    data = tar_of(entry("a.jpg"), entry("b.jpg"), entry("a.txt"), entry("a.json"), entry("c.jpg"))
    samples, faults = read(data)
    assert [(s.key, set(s.members)) for s in samples] == [
        ("a", {"jpg"}),
        ("b", {"jpg"}),
        ("c", {"jpg"}),
    ]
    assert [(f.reason, f.key) for f in faults] == [("repeated_key", "a")]


def test_a_member_over_the_limit_costs_its_sample_and_is_not_read():
    data = tar_of(entry("a.jpg", b"x" * 5000), entry("a.txt"), entry("b.jpg", b"y" * 100))
    for stream in (data, Pipe(data)):
        samples, faults = read(stream, limits=TarLimits(max_member_bytes=4999))
        assert [s.key for s in samples] == ["b"]
        assert [f.reason for f in faults] == ["too_large"]


def test_a_sample_over_the_limit_is_dropped():
    data = tar_of(entry("a.jpg", b"x" * 60), entry("a.txt", b"x" * 60), entry("b.jpg"))
    samples, faults = read(data, limits=TarLimits(max_sample_bytes=100))
    assert [s.key for s in samples] == ["b"]
    assert [f.reason for f in faults] == ["too_large"]


def test_a_sample_of_too_many_members_is_dropped():
    data = tar_of(*[entry(f"a.e{n}", b"") for n in range(70)], entry("b.jpg"))
    samples, faults = read(data)
    assert [s.key for s in samples] == ["b"]
    assert [f.reason for f in faults] == ["too_many_members"]


def test_an_archive_of_too_many_samples_is_refused():
    data = tar_of(*[entry(f"{n}.jpg", b"") for n in range(5)])
    with pytest.raises(TarError, match="more than 4 samples"):
        read(data, limits=TarLimits(max_samples=4))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\xff" * 12, "negative"),
        (b"\xc0" + bytes(11), "negative"),
        (b"\x80" + b"\xff" * 11, "bytes"),
        (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", "bytes"),
        (b"77777777777\0", "bytes"),
        (b"-0000000001\0", "not a number"),
        (b"99999999999\0", "not a number"),
    ],
)
def test_a_negative_or_impossible_size_is_refused(raw, message):
    data = with_field(tar_of(entry("a.jpg"), entry("b.jpg")), 124, raw)
    with pytest.raises(TarError, match=message):
        read(data)
    with pytest.raises(TarError, match=f"{message}|cut off"):
        read(Pipe(data))


def test_a_size_in_base_256_is_read():
    data = with_field(tar_of(entry("a.jpg", b"xyz")), 124, b"\x80" + bytes(10) + b"\x03")
    assert read(data)[0][0].members == {"jpg": b"xyz"}


def test_every_cut_is_noticed():
    data, _ = write([("a", {"jpg": b"x" * 700, "txt": b""}), ("b", {"jpg": b"y"})])
    end = data.rindex(b"y") // 512 * 512 + 1024 + 512  # behind the second empty block
    assert read(data[:end])[1] == []
    for cut in range(end):
        with pytest.raises(TarError, match="cut off|bytes, .* are left"):
            read(data[:cut])


def test_a_wrong_checksum_is_refused_and_says_where():
    data = bytearray(tar_of(entry("a.jpg"), entry("b.jpg")))
    data[1024] ^= 1
    with pytest.raises(TarError, match=r"shard raw/s/00000, byte 1,024: .*checksum.*again"):
        read(bytes(data))


def test_members_behind_a_lone_empty_block_are_refused():
    one = tar_of(entry("a.jpg"))[:1024]
    with pytest.raises(TarError, match="empty block"):
        read(one + bytes(512) + tar_of(entry("b.jpg")))


@pytest.mark.parametrize("type", [b"L", b"K", b"x", b"g"])
def test_a_huge_extended_header_is_refused(type):
    head = with_field(tar_of(entry("a", b"x" * 70_000)), 156, type)
    with pytest.raises(TarError, match="extended header claims 70,000 bytes"):
        read(head)


@pytest.mark.parametrize("type", [b"L", b"x"])
def test_an_archive_that_ends_after_an_extended_header_is_refused(type):
    data = with_field(tar_of(entry("a", b"12 path=a.b\n")), 156, type)
    with pytest.raises(TarError, match="before its member"):
        read(data)


@pytest.mark.parametrize(
    "records",
    [
        b"12 path=a.b",
        b"99 path=a.b\n",
        b"0 path=a.b\n",
        b"-5 path=a.b\n",
        b"path=a.b\n",
        b"9 patha.b\n",
        b"12345678901 path=a.b\n",
        b"10 size=-1\n",
        b"12 size=1e3\n",
        b"31 size=99999999999999999999999\n",
    ],
)
def test_pax_records_that_make_no_sense_are_refused(records):
    data = tar_of(entry("p", records), entry("a.jpg"))
    with pytest.raises(TarError, match="PAX"):
        read(with_field(data, 156, b"x"))


def test_a_pax_size_is_what_counts():
    data = tar_of(entry("p", b"9 size=2\n"), entry("a.jpg", b"xyz"))
    assert read(with_field(data, 156, b"x"))[0][0].members == {"jpg": b"xy"}


def test_a_global_header_may_not_name_every_member():
    data = tar_of(entry("p", b"12 path=a.b\n"), entry("a.jpg"))
    with pytest.raises(TarError, match="global"):
        read(with_field(data, 156, b"g"))
    harmless = tar_of(entry("p", b"13 comment=x\n"), entry("a.jpg"))
    assert [s.key for s in read(with_field(harmless, 156, b"g"))[0]] == ["a"]


def test_sparse_files_are_not_unfolded():
    with pytest.raises(TarError, match="sparse"):
        read(with_field(tar_of(entry("a.jpg")), 156, b"S"))
    data = tar_of(entry("p", b"22 GNU.sparse.major=1\n"), entry("a.jpg"), entry("b.jpg"))
    samples, faults = read(with_field(data, 156, b"x"))
    assert [s.key for s in samples] == ["b"]
    assert [f.reason for f in faults] == ["sparse"]


def test_a_pax_path_is_judged_like_any_name():
    data = tar_of(entry("p", b"17 path=../a.jpg\n"), entry("a.jpg"))
    assert [f.reason for f in read(with_field(data, 156, b"x"))[1]] == ["parent_in_name"]


def test_reading_writes_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read(tar_of(entry("../a.jpg"), entry("a.jpg"), entry("b.jpg", b"", type=tarfile.SYMTYPE)))
    assert list(tmp_path.iterdir()) == []
    assert not (tmp_path.parent / "a.jpg").exists()


def test_memory_is_bounded_by_one_sample():
    member = entry("x.jpg", bytes(1 << 20))[1]
    stream = io.BytesIO()
    with TarWriter(stream) as tar:
        for index in range(40):
            tar.write(f"{index:03d}", {"jpg": member})
    stream.seek(0)
    tracemalloc.start()
    for sample in read_samples(stream, shard="s", on_fault=pytest.fail):
        del sample
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20


# Fuzzed


VICTIM = tar_of(
    entry("a.jpg", b"x" * 700),
    entry("a.txt", b"caption"),
    entry("k" * 130 + ".jpg", b"y" * 20),
    entry("b.jpg", b"z", mtime=1.5),
    entry("c.txt", b"", type=tarfile.SYMTYPE, linkname="l" * 120),
    format=tarfile.PAX_FORMAT,
)
GNU_VICTIM = tar_of(entry("k" * 130 + ".jpg", b"y"), entry("b.jpg"), format=tarfile.GNU_FORMAT)


@settings(max_examples=400)
@given(
    st.sampled_from([VICTIM, GNU_VICTIM]),
    st.lists(
        st.tuples(st.integers(0, len(VICTIM) - 1), st.binary(min_size=1, max_size=12)), max_size=4
    ),
    st.booleans(),
    st.integers(0, 10240),
)
def test_damage_gives_samples_faults_or_a_clear_error_and_nothing_else(data, edits, mend, cut):
    for at, raw in edits:
        at %= len(data) - len(raw)
        data = data[:at] + raw + data[at + len(raw) :]
        if mend:
            data = with_field(data, at - at % 512, b"")
    data = data[: len(data) - cut] if cut < 2000 else data
    outcomes = []
    for stream in (data, Pipe(data)):
        try:
            samples, faults = read(stream)
            outcomes.append((samples, faults, all(f.reason and f.message for f in faults)))
        except TarError as error:
            outcomes.append(([], [], 0 <= error.offset <= len(data)))
    assert all(is_clear for _, _, is_clear in outcomes)
    assert outcomes[0] == outcomes[1]


def test_memory_stays_bounded_while_a_claim_is_checked():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    huge = with_field(tar_of(entry("a.jpg")), 124, b"77777777777\0")
    for _ in range(3):
        with pytest.raises(TarError):
            read(Pipe(huge), limits=TarLimits(max_member_bytes=1 << 40, max_sample_bytes=1 << 40))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
