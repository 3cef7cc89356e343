"""Where stages hand over: a folder that transformers loads, and `capfilt.json`, written last.

`<root>/train/<stage>/export` exists once `capfilt.json` does, which names every file by its hash.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobs.errors import UserError
from jobs.training.config import Stage
from pipeline.models import CLIP_MEAN, CLIP_STD
from pipeline.sample import canonical_json
from pipeline.store import Store, hash_stream

CARD = "capfilt.json"
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ExportCard(BaseModel):
    """What an export is: which training made it, what it came to, and its files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    stage: str
    step: int
    content: dict[str, Any]  # what decided the weights: recipe, data, tokenizer, where it began
    losses: dict[str, float]  # of the last record
    probes: dict[str, float]  # of the last look at held-out samples
    numbers: dict[str, float]  # learned constants that transformers has no place for
    files: dict[str, _Sha256]

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that name the exported files."""
        return sha256(canonical_json(self.files).encode()).hexdigest()[:16]


def stage_folder(stage: Stage) -> str:
    """Return the folder of a stage below the root."""
    return f"train/{stage}"


def read_card(store: Store, stage: Stage) -> ExportCard | None:
    """Return the card of a stage's export, or None before it exists. Raises UserError."""
    path = f"{stage_folder(stage)}/export/{CARD}"
    data = store.read(path)
    if data is None:
        return None
    try:
        return ExportCard.model_validate(json.loads(data))
    except (ValueError, ValidationError) as error:
        raise UserError(
            f"{store.full(path)} cannot be read ({error}); delete the folder and train {stage} "
            "again: its last checkpoint makes that short"
        ) from error


def write_export(
    store: Store, stage: Stage, card: dict[str, Any], export: Callable[[Path], None]
) -> ExportCard:
    """Make an export with `export`, in place of what was there; return its card."""
    folder = f"{stage_folder(stage)}/export"
    store.remove(f"{folder}/{CARD}")  # from here on there is none, until the last line
    store.remove_folder(folder)
    store.make_folder(stage_folder(stage))
    with store.scratch(stage_folder(stage), "00000.export") as scratch:
        export(Path(scratch))
        paths = sorted(path for path in Path(scratch).rglob("*") if path.is_file())
        names = {path: path.relative_to(scratch).as_posix() for path in paths}
        made = ExportCard(stage=stage, files={names[path]: _hash(path) for path in paths}, **card)
        for path in paths:
            store.make_folder(f"{folder}/{names[path]}".rpartition("/")[0])
            store.upload(str(path), f"{folder}/{names[path]}")
    text = canonical_json(made.model_dump(), indent=1) + "\n"
    store.create(f"{folder}/{CARD}", text.encode())
    return made


@contextmanager
def opened_export(store: Store, stage: Stage, card: ExportCard) -> Iterator[Path]:
    """Give the local folder of an export, checked file by file. Raises UserError."""
    folder = f"{stage_folder(stage)}/export"
    for name, digest in card.files.items():
        if store.sha256(f"{folder}/{name}") != digest:
            raise UserError(
                f"{store.full(folder)}: {name} is not the file that {CARD} names; delete the "
                f"folder and train {stage} again: its last checkpoint makes that short"
            )
    if store.is_local:
        yield Path(store.full(folder))
        return
    with TemporaryDirectory(prefix=f"capfilt-{stage}-") as local:
        for name in card.files:
            target = Path(local) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with store.open(f"{folder}/{name}") as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
        yield Path(local)


def write_processor(folder: Path, image_size: int) -> None:
    """Write what transformers' BlipImageProcessor reads: a direct resize, CLIP's mean and std."""
    settings = {
        "image_processor_type": "BlipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def set_token_ids(folder: Path, section: str | None, ids: dict[str, int]) -> None:
    """Put special tokens' ids into a folder's config.json, where they are not BERT's."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    (config if section is None else config[section]).update(ids)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hash_stream(stream)
