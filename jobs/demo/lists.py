"""Writes URL lists as the published datasets have them: LAION-400M, CC3M, COCO captions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.demo.plan import PlannedImage, Split

_LAION_LEAST_SIMILARITY = 0.3  # LAION-400M dropped pairs below it


@dataclass(frozen=True, slots=True)
class UrlLists:
    """Where the lists of a web lie."""

    laion: Path  # LAION-400M's Parquet columns
    cc3m: Path  # headerless TSV: caption, url
    human: Path  # COCO captions JSON, several captions an image
    test: Path  # COCO captions JSON, one caption an image

    @classmethod
    def in_folder(cls, folder: Path) -> "UrlLists":
        """Return the places that `write_lists` fills."""
        names = ("laion.parquet", "cc3m.tsv", "human.json", "test.json")
        return cls(*(folder / name for name in names))


def write_lists(folder: Path, planned: Sequence[PlannedImage], base_url: str) -> UrlLists:
    """Write all four lists with URLs that begin with `base_url` (no closing slash)."""
    folder.mkdir(parents=True, exist_ok=True)
    lists = UrlLists.in_folder(folder)
    by_split = {split: [each for each in planned if each.split is split] for split in Split}
    _write_laion(lists.laion, by_split[Split.LAION], base_url)
    _write_cc3m(lists.cc3m, by_split[Split.CC3M], base_url)
    _write_coco(lists.human, by_split[Split.HUMAN], base_url)
    _write_coco(lists.test, by_split[Split.TEST], base_url)
    return lists


def _write_laion(file: Path, planned: Sequence[PlannedImage], base_url: str) -> None:
    # A constant seed: what looks like a CLIP score says nothing about the truth here.
    similarity = np.random.default_rng(400).uniform(_LAION_LEAST_SIMILARITY, 0.4, len(planned))
    columns = {
        "SAMPLE_ID": pa.array([float(each.row) for each in planned], pa.float64()),
        "URL": pa.array([base_url + each.path for each in planned], pa.string()),
        "TEXT": pa.array([each.captions[0] for each in planned], pa.string()),
        "HEIGHT": pa.array([each.height for each in planned], pa.int32()),
        "WIDTH": pa.array([each.width for each in planned], pa.int32()),
        "LICENSE": pa.array(["?"] * len(planned), pa.string()),
        "NSFW": pa.array(["UNLIKELY"] * len(planned), pa.string()),
        "similarity": pa.array(similarity, pa.float64()),
    }
    pq.write_table(pa.table(columns), file)


def _write_cc3m(file: Path, planned: Sequence[PlannedImage], base_url: str) -> None:
    lines = [f"{each.captions[0]}\t{base_url}{each.path}\n" for each in planned]
    file.write_text("".join(lines), encoding="utf-8", newline="")


def _write_coco(file: Path, planned: Sequence[PlannedImage], base_url: str) -> None:
    images = [
        {
            "license": 1,
            "file_name": each.path.rpartition("/")[2],
            "coco_url": base_url + each.path,
            "height": each.height,
            "width": each.width,
            "id": each.row,
        }
        for each in planned
    ]
    captions = [(each.row, caption) for each in planned for caption in each.captions]
    content = {
        "info": {"description": "Procedural scenes with right captions", "version": "1.0"},
        "licenses": [{"id": 1, "name": "Apache-2.0", "url": ""}],
        "images": images,
        "annotations": [
            {"image_id": image, "id": number, "caption": caption}
            for number, (image, caption) in enumerate(captions)
        ],
    }
    file.write_text(json.dumps(content, indent=0), encoding="utf-8")
