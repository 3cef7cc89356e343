"""Models by name: found on disk or on the hub, told apart by their bytes, fed as they were trained.

Only safetensors, JSON and text are ever fetched or read: no pickle, no code of a repository.

H, W height and width of an image, S side of what a model looks at.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from model.med import MedConfig
from pipeline.image_decode import Pixels
from pipeline.model_configs import ModelConfig

WEIGHTS = "*.safetensors"
_FETCHED = (WEIGHTS, "*.json", "*.txt")
# What OpenAI's CLIP and, after it, BLIP normalise by.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Config = TypeVar("Config", bound=ModelConfig)


class ModelError(ValueError):
    """A model cannot be found, or is not what it should be; the message says what to do."""


def resolve_model(config: ModelConfig) -> Path:
    """Return the folder of a model, fetched from the hub unless it is there already.

    Raises ModelError that says what is missing.
    """
    folder = Path(config.name)
    if not folder.is_dir():
        folder = _fetched(config)
    elif config.revision is not None:
        raise ModelError(f"{folder} is a folder and has no revisions, but {config.revision} is set")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: it is no model as transformers saves it")
    if not any(folder.glob(WEIGHTS)):
        raise ModelError(
            f"{config.name} has no safetensors, and nothing else is read; name a revision that has "
            f"(such as refs/pr/1), or a folder to which save_pretrained converted it"
        )
    return folder


def with_commit(config: Config) -> Config:
    """Return the config with the commit that a name on the hub stands for now, fetched.

    A branch moves, and what was made has to say by what. Raises ModelError as `resolve_model` does.
    """
    folder = resolve_model(config)
    if Path(config.name).is_dir():
        return config
    return config.model_copy(update={"revision": folder.name})  # .../snapshots/<commit>


def _fetched(config: ModelConfig) -> Path:
    named = config.name if config.revision is None else f"{config.name} at {config.revision}"
    try:
        return Path(
            snapshot_download(config.name, revision=config.revision, allow_patterns=list(_FETCHED))
        )
    except HFValidationError as error:
        raise ModelError(f"{config.name} is neither a folder nor a name on the hub") from error
    except OfflineModeIsEnabled as error:
        raise ModelError(_offline(named)) from error
    except HfHubHTTPError as error:
        raise ModelError(f"the hub has no {named} for you: {_first_line(error)}") from error
    except FileNotFoundError as error:  # the hub's error for "neither reachable nor cached"
        raise ModelError(_offline(named)) from error


def _offline(named: str) -> str:
    return (
        f"{named} is not on this machine and the hub cannot be reached; fetch it where there is a "
        f"network (hf download, with the same HF_HOME), or name a local folder"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def weights_fingerprint(folder: Path) -> str:
    """Return 16 hexadecimal digits that name a model by its weights, configs and vocabularies.

    The same bytes under the same file names give the same digits, wherever the folder is.
    """
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _FETCHED for path in folder.glob(pattern)):
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{path.name}\n{content}\n".encode())
    return digest.hexdigest()[:16]


def bert_tokenizer(folder: Path, med: MedConfig) -> BertTokenizer:
    """Return the tokenizer of a BLIP model, checked against the ids that its text stack expects.

    [DEC] and [ENC] are BLIP's additions to BERT's vocabulary. Published folders often hold BERT's
    own tokenizer, which stops right before them; anything else raises ModelError.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise ModelError(f"{folder} has no BERT tokenizer: neither tokenizer.json nor vocab.txt")
    try:
        tokenizer: BertTokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} has no sound BERT tokenizer: {_first_line(error)}") from error
    vocabulary = tokenizer.get_vocab()
    for token, expected in (("[DEC]", med.caption_start_id), ("[ENC]", med.match_start_id)):
        found = vocabulary.get(token)
        if found is None and len(vocabulary) != med.caption_start_id:
            raise ModelError(
                f"the tokenizer in {folder} has {len(vocabulary)} tokens and no {token}, which the "
                f"model has as {expected}: it belongs to another model"
            )
        if found not in (None, expected):
            raise ModelError(
                f"the tokenizer in {folder} has {token} as {found}, the model as {expected}"
            )
    return tokenizer


def any_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder. Raises ModelError when there is none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True
        )
        return tokenizer
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} has no tokenizer: {_first_line(error)}") from error


@dataclass(frozen=True)
class ImagePreprocessor:
    """Pixels to what a model looks at, bit for bit as transformers' PIL processors do it.

    BLIP's resizes to S x S; CLIP's resizes the shorter side to S and cuts out the middle. Safe to
    call from many threads.
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resample: Image.Resampling = Image.Resampling.BICUBIC
    is_middle_cut: bool = False

    @classmethod
    def of_folder(cls, folder: Path, size: int, *, is_middle_cut: bool = False) -> Self:
        """Return the preprocessor of a model; mean, std and filter are those in its folder."""
        settings = _processor_settings(folder)
        mean = tuple(settings.get("image_mean", CLIP_MEAN))
        std = tuple(settings.get("image_std", CLIP_STD))
        if len(mean) != 3 or len(std) != 3:
            raise ModelError(f"{folder} normalises by {mean} and {std}; three channels are needed")
        resample = Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC))
        return cls(size, mean, std, resample, is_middle_cut)

    def __call__(self, pixels: Pixels) -> Tensor:
        """Return (3, S, S) float32 for (H, W, 3) RGB."""
        image = Image.fromarray(pixels).resize(self._resized(*pixels.shape[:2]), self.resample)
        levels = np.asarray(image)
        if self.is_middle_cut:
            top, left = ((side - self.size) // 2 for side in levels.shape[:2])
            levels = levels[top : top + self.size, left : left + self.size]
        normalised = np.empty((3, self.size, self.size), np.float32)
        for channel, table in enumerate(self._tables):
            np.take(table, levels[:, :, channel], out=normalised[channel])
        return torch.from_numpy(normalised)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the (width, height) before any cut; rounded as transformers does."""
        if not self.is_middle_cut:
            return self.size, self.size
        longer = int(self.size * max(height, width) / min(height, width))
        return (self.size, longer) if width <= height else (longer, self.size)

    @cached_property
    def _tables(self) -> npt.NDArray[np.float32]:
        """What each of the 256 levels becomes in each channel: (3, 256)."""
        levels = (np.arange(256) * (1 / 255)).astype(np.float32)
        mean, std = (np.array(each, np.float32)[:, None] for each in (self.mean, self.std))
        tables: npt.NDArray[np.float32] = (levels - mean) / std
        return tables


def _processor_settings(folder: Path) -> dict[str, Any]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            try:
                settings = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ModelError(f"{path} is no JSON: {error}") from error
            inner = settings.get("image_processor", settings)
            if isinstance(inner, dict):
                return inner
    return {}
