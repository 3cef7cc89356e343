"""The synthetic web as a folder: same seed, same bytes; lists as published; files as planned."""

import hashlib
import io
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps
from pydantic import ValidationError

from jobs.demo.behaviours import Behaviour, BehaviourShares, Delivery
from jobs.demo.captions import words
from jobs.demo.drawing import draw_scene
from jobs.demo.encodings import FileKind, FileShares, encode
from jobs.demo.noise import Noise
from jobs.demo.plan import SizeClass, Split, WebConfig, plan_web
from jobs.demo.scenes import sample_scene
from jobs.demo.site import files_of, read_site
from jobs.demo.web import build_web

# Port 0: tests that run side by side must not meet. The lists then name whatever port was free.
SMALL = WebConfig(seed=7, num_web=300, num_human=12, num_test=10, port=0)


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    return build_web(tmp_path_factory.mktemp("web"), SMALL)


@pytest.fixture(scope="module")
def default_plan():
    return plan_web(WebConfig())


def hashes(folder):
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if file.is_file()
    }


def test_two_processes_build_the_same_bytes(web, tmp_path):
    lists = web.write_lists(tmp_path / "here", "http://web.example")
    program = (
        "import sys; from pathlib import Path; from jobs.demo.web import *;"
        f"web = build_web(Path(sys.argv[1]), WebConfig(**{SMALL.model_dump()!r}));"
        "web.write_lists(Path(sys.argv[2]), 'http://web.example')"
    )
    for hash_seed in ("1", "4711"):
        folder, again = tmp_path / f"web{hash_seed}", tmp_path / f"lists{hash_seed}"
        subprocess.run(
            [sys.executable, "-c", program, str(folder), str(again)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            timeout=60,
        )
        ours, theirs = hashes(web.folder), hashes(folder)
        for name in ("files.bin", "site.json", "truth.parquet"):  # the others hold the port
            assert ours[name] == theirs[name], name
        assert hashes(lists.laion.parent) == hashes(again)


def test_a_built_web_is_taken_as_it_is(web):
    before = hashes(web.folder)
    calls = []
    again = build_web(web.folder, SMALL, on_progress=lambda *progress: calls.append(progress))
    assert again == web
    assert calls == []
    assert hashes(web.folder) == before


def test_a_build_that_was_cut_short_is_done_again(web, tmp_path):
    config = SMALL.model_copy(update={"port": web.port})
    first = hashes(build_web(tmp_path, config).folder)
    (tmp_path / "web.json").unlink()
    (tmp_path / "files.bin").write_bytes(b"half of it")
    calls = []
    again = build_web(tmp_path, config, on_progress=lambda *progress: calls.append(progress))
    assert hashes(again.folder) == first
    assert calls[-1] == (322, 322)


def test_a_folder_of_another_web_is_refused_with_the_differing_keys(web):
    with pytest.raises(ValueError, match="seed was 7, is 8") as refused:
        build_web(web.folder, SMALL.model_copy(update={"seed": 8}))
    assert "num_web" not in str(refused.value)


def test_a_taken_port_moves_a_new_web_and_stops_an_old_one(web, tmp_path):
    with web.serve():
        config = SMALL.model_copy(update={"port": web.port})
        other = build_web(tmp_path, config)
        assert web.port < other.port < web.port + 50
        assert build_web(tmp_path, config).port == other.port  # and stays there
        with pytest.raises(OSError, match="in use"):
            web.serve().start()
    moved, stayed = hashes(other.folder), hashes(web.folder)
    assert {name for name in moved if moved[name] == stayed[name]} == {
        "files.bin",
        "site.json",
        "truth.parquet",
    }


def test_the_laion_list_has_the_published_columns(web):
    table = pq.read_table(web.lists.laion)
    assert {field.name: str(field.type) for field in table.schema} == {
        "SAMPLE_ID": "double",
        "URL": "string",
        "TEXT": "string",
        "HEIGHT": "int32",
        "WIDTH": "int32",
        "LICENSE": "string",
        "NSFW": "string",
        "similarity": "double",
    }
    assert table.num_rows == 180
    truth = web.truth()
    for row in table.to_pylist():
        planned = truth[row["URL"].removeprefix(web.base_url)]
        assert planned.split is Split.LAION
        assert (row["TEXT"],) == planned.captions
        assert (row["WIDTH"], row["HEIGHT"]) == (planned.width, planned.height)


def test_the_cc3m_list_has_a_caption_and_a_url_a_line_and_no_header(web):
    lines = web.lists.cc3m.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 120
    truth = web.truth()
    for line in lines:
        caption, url = line.split("\t")
        assert (caption,) == truth[url.removeprefix(web.base_url)].captions


@pytest.mark.parametrize(
    ("name", "num_images", "num_captions"), [("human", 12, 5), ("test", 10, 1)]
)
def test_the_clean_lists_are_coco_captions(web, name, num_images, num_captions):
    content = json.loads(getattr(web.lists, name).read_text(encoding="utf-8"))
    assert set(content) == {"info", "licenses", "images", "annotations"}
    assert len(content["images"]) == num_images
    assert len({each["id"] for each in content["annotations"]}) == num_images * num_captions
    truth = web.truth()
    for image in content["images"]:
        planned = truth[image["coco_url"].removeprefix(web.base_url)]
        said = [x["caption"] for x in content["annotations"] if x["image_id"] == image["id"]]
        assert tuple(said) == planned.captions
        assert len(said) == num_captions
        assert planned.delivery is Delivery.YES


def test_the_truth_file_gives_the_plan_back(web):
    planned = plan_web(SMALL)
    assert list(web.truth().values()) == planned
    table = pq.read_table(web.truth_file).to_pylist()
    assert [row["delivery"] for row in table] == [each.delivery for each in planned]
    assert all(row["is_exact"] for row in table if row["split"] in ("human", "test"))
    assert not any(row["is_consistent"] for row in table if row["noise"] == "generic")


def test_no_scene_is_in_two_splits(web):
    scenes = [each.scene for each in web.truth().values()]
    assert len(set(scenes)) == len(scenes)


def test_noise_of_the_default_web_is_within_binomial_bounds(default_plan):
    noisy = [each for each in default_plan if each.split in (Split.LAION, Split.CC3M)]
    assert Counter(each.split for each in default_plan) == {
        Split.LAION: 3000,
        Split.CC3M: 2000,
        Split.HUMAN: 1500,
        Split.TEST: 500,
    }
    counts = Counter(each.noise for each in noisy)
    for noise, share in (
        (Noise.SWAPPED, 0.20),
        (Noise.GENERIC, 0.12),
        (Noise.WRONG, 0.13),
        (Noise.TERSE, 0.165),
    ):
        assert abs(counts[noise] - 5000 * share) < 4 * np.sqrt(5000 * share * (1 - share)), noise
    lengths = [len(words(text)) + 1 for each in default_plan[5000:] for text in each.captions]
    assert 11.0 < np.mean(lengths) < 12.5


def test_nine_in_ten_rows_of_the_default_web_can_be_had(default_plan):
    deliveries = Counter(each.delivery for each in default_plan[:5000])
    assert 0.89 < (deliveries[Delivery.YES] + deliveries[Delivery.RETRY]) / 5000 < 0.92
    shares = Counter(each.behaviour for each in default_plan)
    assert shares[Behaviour.NOT_FOUND] == 150
    kinds = Counter(each.file_kind for each in default_plan)
    assert kinds[FileKind.BOMB] == 1


@pytest.mark.parametrize("num_web", [300, 5000])
def test_every_oddity_occurs_and_never_two_in_one_row(num_web):
    planned = plan_web(WebConfig(seed=3, num_web=num_web, num_human=0, num_test=0))
    assert {each.behaviour for each in planned} == set(Behaviour)
    assert {each.file_kind for each in planned} == set(FileKind)
    assert {each.size_class for each in planned} == set(SizeClass)
    for each in planned:
        oddities = (
            each.behaviour is not Behaviour.OK,
            each.file_kind is not FileKind.JPEG,
            each.size_class is not SizeClass.USUAL,
        )
        assert sum(oddities) <= 1


def test_sizes_are_what_their_class_says(default_plan):
    for each in default_plan:
        short, long = sorted((each.width, each.height))
        if each.size_class is SizeClass.TINY:
            assert long <= 40
        elif each.size_class is SizeClass.BANNER:
            assert 3.9 <= long / short <= 6.1
        else:
            assert short >= 64
            assert long <= 512
            assert long / short < 1.8


def test_shares_have_the_names_of_what_they_share_out():
    assert set(BehaviourShares.model_fields) == set(Behaviour) - {Behaviour.OK}
    assert set(FileShares.model_fields) == set(FileKind) - {FileKind.JPEG}
    with pytest.raises(ValidationError, match="more than 1"):
        BehaviourShares(not_found=0.6, gone=0.6)
    with pytest.raises(ValidationError, match="not_there"):
        BehaviourShares(not_there=0.1)


def as_shown(data):
    """Decode as a careful client does: orientation applied, laid on white."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image)
    return np.asarray(paper.convert("RGB"))


@pytest.mark.parametrize("kind", [kind for kind in FileKind if kind.is_image])
def test_a_good_file_shows_the_scene(kind):
    for index in range(15):
        picture = draw_scene(sample_scene(2, index), width=96, height=72)
        shown = as_shown(encode(picture, kind, np.random.default_rng(index)))
        assert shown.shape == picture.shape
        difference = np.abs(shown.astype(int) - picture).mean()
        assert difference < (0.02 if kind in (FileKind.PNG, FileKind.PNG_16BIT) else 5.0)


@pytest.mark.parametrize("kind", [kind for kind in FileKind if not kind.is_image])
def test_a_broken_file_does_not_decode(kind):
    picture = draw_scene(sample_scene(2, 1), width=96, height=72)
    for seed in range(20):
        data = encode(picture, kind, np.random.default_rng(seed))
        with pytest.raises((OSError, SyntaxError, Image.DecompressionBombError)):
            as_shown(data)


def test_files_have_the_features_that_make_them_hard():
    picture = draw_scene(sample_scene(2, 1), width=96, height=72)

    def opened(kind, seed=0):
        return Image.open(io.BytesIO(encode(picture, kind, np.random.default_rng(seed))))

    assert opened(FileKind.JPEG_CMYK).mode == "CMYK"
    assert opened(FileKind.JPEG_PROGRESSIVE).info["progressive"]
    assert opened(FileKind.PNG_ALPHA).mode == "RGBA"
    assert opened(FileKind.PNG_ALPHA).getpixel((0, 0)) == (0, 0, 0, 0)
    assert opened(FileKind.PNG_PALETTE).mode == "P"
    png_16bit = encode(picture, FileKind.PNG_16BIT, np.random.default_rng(0))
    assert png_16bit[24] == 16  # IHDR's bit depth
    assert opened(FileKind.WEBP).format == "WEBP"
    assert opened(FileKind.GIF).n_frames == 1
    assert opened(FileKind.GIF_ANIMATED).n_frames == 3
    orientations = {opened(FileKind.JPEG_EXIF, seed).getexif()[0x0112] for seed in range(60)}
    assert orientations == set(range(2, 9))
    assert opened(FileKind.JPEG_EXIF).getexif().get_ifd(0x8825)[1] == "N"  # a GPS position
    bomb = encode(picture, FileKind.BOMB, np.random.default_rng(0))
    assert len(bomb) < 4096
    assert int.from_bytes(bomb[16:20], "big") == int.from_bytes(bomb[20:24], "big") == 60_000


def test_the_site_serves_each_file_as_planned(web):
    site, files = read_site(web.folder), files_of(web.folder).read_bytes()
    for path, planned in web.truth().items():
        page = site[path]
        assert page.behaviour is planned.behaviour
        if planned.file_kind.is_image:
            shown = as_shown(files[page.offset : page.offset + page.num_bytes])
            assert shown.shape == (planned.height, planned.width, 3)
