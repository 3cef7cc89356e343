"""The truth about every image, in a file of its own that measurements and tests alone read."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.demo.behaviours import Behaviour
from jobs.demo.caption_check import check_caption
from jobs.demo.encodings import FileKind
from jobs.demo.noise import Noise
from jobs.demo.plan import PlannedImage, SizeClass, Split
from jobs.demo.scenes import scene_from_json


def write_truth(file: Path, planned: Sequence[PlannedImage]) -> None:
    """Write one row per image; `is_consistent` and its like are about the first caption.

    The path, not the URL, names an image: the file is the same whatever the port.
    """
    checks = [check_caption(each.captions[0], each.scene) for each in planned]
    columns = {
        "split": [each.split.value for each in planned],
        "row": pa.array([each.row for each in planned], pa.int64()),
        "path": [each.path for each in planned],
        "captions": pa.array([list(each.captions) for each in planned], pa.list_(pa.string())),
        "noise": [each.noise.value for each in planned],
        "is_consistent": [check.is_consistent for check in checks],
        "is_exact": [check.is_exact for check in checks],
        "attribute_share": [check.attribute_share for check in checks],
        "scene": [each.scene.to_json() for each in planned],
        "file_kind": [each.file_kind.value for each in planned],
        "behaviour": [each.behaviour.value for each in planned],
        "size_class": [each.size_class.value for each in planned],
        "delivery": [each.delivery.value for each in planned],
        "width": pa.array([each.width for each in planned], pa.int32()),
        "height": pa.array([each.height for each in planned], pa.int32()),
    }
    pq.write_table(pa.table(columns), file)


def read_truth(file: Path) -> dict[str, PlannedImage]:
    """Return all images by the path of their URL (`urlsplit(url).path`)."""
    return {
        row["path"]: PlannedImage(
            split=Split(row["split"]),
            row=row["row"],
            path=row["path"],
            scene=scene_from_json(row["scene"]),
            captions=tuple(row["captions"]),
            noise=Noise(row["noise"]),
            file_kind=FileKind(row["file_kind"]),
            behaviour=Behaviour(row["behaviour"]),
            size_class=SizeClass(row["size_class"]),
            width=row["width"],
            height=row["height"],
        )
        for row in pq.read_table(file).to_pylist()
    }
