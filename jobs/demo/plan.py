"""Plans a synthetic web: what every URL shows, says and does, as a function of the config alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from jobs.demo.answers import ROBOTS_FOLDER
from jobs.demo.behaviours import Behaviour, BehaviourShares, Delivery
from jobs.demo.captions import full_caption
from jobs.demo.encodings import FileKind, FileShares
from jobs.demo.noise import Noise, NoiseConfig, WebCaption, web_caption
from jobs.demo.scenes import Scene, SceneConfig, sample_scene
from jobs.demo.shares import Share, Shares

# Splits take their scenes from ranges this far apart, so that no scene is in two of them. Whoever
# needs still other scenes (to pretrain an image encoder, say) starts at NUM_SPLIT_SCENES.
_SCENES_PER_SPLIT = 1_000_000
NUM_SPLIT_SCENES = 3 * _SCENES_PER_SPLIT
_LONGEST_SIDE = 512
# Shares, and least and greatest shorter side in pixels.
_SIDES = ((0.78, 64, 112), (0.18, 112, 224), (0.04, 224, 384))
_ASPECTS = (1.0, 1.0, 1.0, 1.0, 1.25, 4 / 3, 4 / 3, 1.5, 16 / 9)


class Split(StrEnum):
    """The lists of a web; the first two are noisy, the others clean."""

    LAION = "laion"
    CC3M = "cc3m"
    HUMAN = "human"
    TEST = "test"


class SizeClass(StrEnum):
    """Whether a picture has a size that a dataset would want."""

    USUAL = "usual"  # shorter side 64 px or more, at most 16:9
    TINY = "tiny"  # both sides 16 to 40 px
    BANNER = "banner"  # four to six times as long as high


class SizeShares(Shares):
    """How many of the web's pictures have a size to be refused."""

    tiny: Share = 0.008
    banner: Share = 0.003


class WebConfig(BaseModel):
    """How large a synthetic web is, what is wrong with it, and where it is served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(default=0, ge=0)
    num_web: int = Field(default=5000, ge=0, lt=_SCENES_PER_SPLIT)  # rows of both noisy lists
    num_human: int = Field(default=1500, ge=0, lt=_SCENES_PER_SPLIT)  # images
    num_test: int = Field(default=500, ge=0, lt=_SCENES_PER_SPLIT)  # images, a caption each
    captions_per_human_image: int = Field(default=5, ge=1)
    laion_share: Share = 0.6  # of the noisy rows; the others are in the CC3M-style list
    port: int = Field(default=8437, ge=0, le=65535)  # taken: the next free one; 0: any
    scenes: SceneConfig = SceneConfig()
    noise: NoiseConfig = NoiseConfig()
    behaviours: BehaviourShares = BehaviourShares()
    files: FileShares = FileShares()
    sizes: SizeShares = SizeShares()

    @classmethod
    def quick(cls, seed: int = 0) -> "WebConfig":
        """Return the smaller web of `--quick`."""
        return cls(seed=seed, num_web=1500, num_human=500, num_test=200)


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """One image of the web and the whole truth about it."""

    split: Split
    row: int  # in its list, from 0
    path: str  # of its URL
    scene: Scene
    captions: tuple[str, ...]  # one, or several by people
    noise: Noise  # what is wrong with the caption
    file_kind: FileKind
    behaviour: Behaviour
    size_class: SizeClass
    width: int  # pixels, as shown
    height: int

    @property
    def delivery(self) -> Delivery:
        """Whether a careful client gets the picture. No image has more than one oddity."""
        if not self.file_kind.is_image:
            return Delivery.NO
        if self.size_class is not SizeClass.USUAL:
            return Delivery.POLICY
        return self.behaviour.delivery


class Stream(IntEnum):
    """Separate randomness for separate questions, so that a change in one moves no other."""

    ODDITIES = 1
    CAPTION = 2
    PICTURE = 3
    SIZE = 4


def stream(config: WebConfig, kind: Stream, index: int) -> np.random.Generator:
    """Return the generator that answers one question about scene `index`."""
    return np.random.default_rng((config.seed, index, kind))


def scene_index(config: WebConfig, split: Split, row: int) -> int:
    """Return the number of a row's scene in the world `config.seed`."""
    if split is Split.HUMAN:
        return _SCENES_PER_SPLIT + row
    if split is Split.TEST:
        return 2 * _SCENES_PER_SPLIT + row
    return row + (num_laion_rows(config) if split is Split.CC3M else 0)


def num_laion_rows(config: WebConfig) -> int:
    """Return how many of the noisy rows are in the LAION-style list."""
    return round(config.laion_share * config.num_web)


def plan_web(config: WebConfig) -> list[PlannedImage]:
    """Return all images, list by list; the same ones for the same config always and everywhere."""
    scenes = [sample_scene(config.seed, row, config.scenes) for row in range(config.num_web)]
    oddities = _deal_oddities(config)
    num_laion = num_laion_rows(config)
    planned = []
    for index, (scene, oddity) in enumerate(zip(scenes, oddities, strict=True)):
        split, row = (Split.LAION, index) if index < num_laion else (Split.CC3M, index - num_laion)
        planned.append(_image(config, (split, row), scene, _say(config, scenes, index), oddity))
    return planned + _plan_clean(config, Split.HUMAN) + _plan_clean(config, Split.TEST)


def _plan_clean(config: WebConfig, split: Split) -> list[PlannedImage]:
    is_human = split is Split.HUMAN
    num_captions = config.captions_per_human_image if is_human else 1
    planned = []
    for row in range(config.num_human if is_human else config.num_test):
        index = scene_index(config, split, row)
        scene, rng = sample_scene(config.seed, index, config.scenes), _caption_rng(config, index)
        captions = [WebCaption(full_caption(scene, rng), Noise.FULL) for _ in range(num_captions)]
        planned.append(_image(config, (split, row), scene, captions, _Oddity()))
    return planned


@dataclass(frozen=True, slots=True)
class _Oddity:
    """What is special about a row beside its caption: one thing at most."""

    behaviour: Behaviour = Behaviour.OK
    file_kind: FileKind = FileKind.JPEG
    size_class: SizeClass = SizeClass.USUAL


def _deal_oddities(config: WebConfig) -> list[_Oddity]:
    rng = stream(config, Stream.ODDITIES, 0)
    dealt = [
        _Oddity(behaviour=Behaviour(name))
        for name in config.behaviours.deal(config.num_web, Behaviour.OK, rng)
    ]
    plain = [row for row, each in enumerate(dealt) if each == _Oddity()]
    for row, name in zip(plain, config.files.deal(len(plain), FileKind.JPEG, rng), strict=True):
        dealt[row] = _Oddity(file_kind=FileKind(name))
    plain = [row for row, each in enumerate(dealt) if each == _Oddity()]
    for row, name in zip(plain, config.sizes.deal(len(plain), SizeClass.USUAL, rng), strict=True):
        dealt[row] = _Oddity(size_class=SizeClass(name))
    return dealt


def _caption_rng(config: WebConfig, index: int) -> np.random.Generator:
    return stream(config, Stream.CAPTION, index)


def _say(config: WebConfig, scenes: Sequence[Scene], index: int) -> list[WebCaption]:
    rng = _caption_rng(config, index)
    other = (index + 1 + int(rng.integers(max(1, len(scenes) - 1)))) % len(scenes)
    return [web_caption(scenes[index], scenes[other], rng, config.noise)]


def _image(
    config: WebConfig,
    where: tuple[Split, int],
    scene: Scene,
    captions: Sequence[WebCaption],
    oddity: _Oddity,
) -> PlannedImage:
    split, row = where
    rng = stream(config, Stream.SIZE, scene_index(config, split, row))
    width, height = _picture_size(oddity.size_class, rng)
    folder = ROBOTS_FOLDER if oddity.behaviour is Behaviour.ROBOTS else ""
    return PlannedImage(
        split=split,
        row=row,
        path=f"{folder}/{split}/{row:06d}{oddity.file_kind.suffix}",
        scene=scene,
        captions=tuple(each.text for each in captions),
        noise=captions[0].noise,
        file_kind=oddity.file_kind,
        behaviour=oddity.behaviour,
        size_class=oddity.size_class,
        width=width,
        height=height,
    )


def _picture_size(size_class: SizeClass, rng: np.random.Generator) -> tuple[int, int]:
    """Draw (width, height) in pixels."""
    if size_class is SizeClass.TINY:
        width, height = rng.integers(16, 41, size=2).tolist()
        return width, height
    if size_class is SizeClass.BANNER:
        height = int(rng.integers(64, 86))
        return round(height * float(rng.uniform(4, 6))), height
    _, least, greatest = _SIDES[int(rng.choice(len(_SIDES), p=[share for share, *_ in _SIDES]))]
    short = int(rng.integers(least, greatest + 1))
    long = min(_LONGEST_SIDE, round(short * _ASPECTS[int(rng.integers(len(_ASPECTS)))]))
    return (long, short) if rng.random() < 0.6 else (short, long)
