"""Gives web images the captions that the web gives them: some right, some terse, some wrong."""

from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from jobs.demo import captions
from jobs.demo.caption_check import check_claims
from jobs.demo.captions import Claims, Mention, choose_claims, full_caption, phrase, terse_caption
from jobs.demo.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, TEXTURES, Scene

GENERIC_TEXTS = (
    "img_1234.jpg",
    "dsc_0042.jpg",
    "untitled.png",
    "click to enlarge",
    "image not available",
    "free shipping on all orders",
    "product thumbnail",
    "scan_0007.gif",
    "add to cart",
    "stock photo",
    "share this",
    "logo",
    "a photo",
    "buy now",
)
_VALUES = {
    "shape": SHAPES,
    "colour": COLOURS,
    "texture": TEXTURES,
    "size": SIZES,
    "relation": RELATIONS,
    "background": BACKGROUNDS,
}


class Noise(StrEnum):
    """What is wrong with a web caption; FULL and TERSE ones are right."""

    FULL = "full"
    TERSE = "terse"
    SWAPPED = "swapped"
    GENERIC = "generic"
    WRONG = "wrong_attribute"


class NoiseConfig(BaseModel):
    """Shares of web captions, all 0 to 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    swapped: float = Field(default=0.20, ge=0, le=1)  # another image's caption
    generic: float = Field(default=0.12, ge=0, le=1)  # file names and boilerplate
    wrong_attribute: float = Field(default=0.13, ge=0, le=1)  # one or two, equally often
    terse: float = Field(default=0.30, ge=0, le=1)  # of the captions that are right

    @model_validator(mode="after")
    def _leaves_a_rest(self) -> "NoiseConfig":
        if self.swapped + self.generic + self.wrong_attribute > 1:
            raise ValueError("swapped + generic + wrong_attribute is more than 1")
        return self


@dataclass(frozen=True, slots=True)
class WebCaption:
    """A caption as the web has it, and the truth about it."""

    text: str
    noise: Noise


def web_caption(
    scene: Scene, other: Scene, rng: np.random.Generator, config: NoiseConfig
) -> WebCaption:
    """Return a caption for `scene`; a swapped one describes `other`, and may fit by chance."""
    chance = float(rng.random())
    for noise, share in (
        (Noise.SWAPPED, config.swapped),
        (Noise.GENERIC, config.generic),
        (Noise.WRONG, config.wrong_attribute),
    ):
        if chance < share:
            return WebCaption(_noisy_text(noise, scene, other, rng, config), noise)
        chance -= share
    if rng.random() < config.terse:
        return WebCaption(terse_caption(scene, rng), Noise.TERSE)
    return WebCaption(full_caption(scene, rng), Noise.FULL)


def spoil(claims: Claims, scene: Scene, rng: np.random.Generator) -> Claims:
    """Change one or two of the stated attributes so that the claims no longer fit the scene."""
    num_changes = 1 + int(rng.integers(2))
    while True:
        spoilt = claims
        places = _places(claims)
        for index in rng.choice(len(places), size=num_changes, replace=False).tolist():
            spoilt = _with_another_value(spoilt, places[index], rng)
        if not check_claims(spoilt, scene).is_consistent:
            return spoilt


def vocabulary() -> tuple[str, ...]:
    """Return every word that captions of this web are made of, as `words` splits them, sorted."""
    tables = (
        captions.SHAPE_WORDS,
        captions.COLOUR_WORDS,
        captions.TEXTURE_WORDS,
        captions.SIZE_WORDS,
        captions.BACKGROUND_WORDS,
        captions.RELATION_PHRASES,
    )
    said = [text for table in tables for texts in table.values() for text in texts]
    frames = [pattern.format("") for pattern in captions.BACKGROUND_PHRASES]
    texts = (*said, *frames, *captions.LEAD_INS, *captions.TERSE_TAGS, *GENERIC_TEXTS, "a an and")
    return tuple(sorted({word for text in texts for word in captions.words(text)}))


def _noisy_text(
    noise: Noise, scene: Scene, other: Scene, rng: np.random.Generator, config: NoiseConfig
) -> str:
    if noise is Noise.GENERIC:
        return GENERIC_TEXTS[int(rng.integers(len(GENERIC_TEXTS)))]
    if noise is Noise.WRONG:
        return phrase(spoil(choose_claims(scene, rng), scene, rng), rng)
    return (terse_caption if rng.random() < config.terse else full_caption)(other, rng)


def _places(claims: Claims) -> list[tuple[str, int]]:
    """List what may be changed, as (attribute, index of its mention); -1 for the whole scene's."""
    places = [
        (name, index)
        for index, mention in enumerate(claims.mentions)
        for name in ("shape", "colour", "texture", "size")
        if getattr(mention, name)
    ]
    return places + [(name, -1) for name in ("relation", "background") if getattr(claims, name)]


def _with_another_value(claims: Claims, place: tuple[str, int], rng: np.random.Generator) -> Claims:
    name, index = place
    said: Claims | Mention = claims if index < 0 else claims.mentions[index]
    others = [value for value in _VALUES[name] if value != getattr(said, name)]
    value = others[int(rng.integers(len(others)))]
    if name == "relation":
        return replace(claims, relation=value)
    if name == "background":
        return replace(claims, background=value)
    mentions = list(claims.mentions)
    mentions[index] = replace(mentions[index], **{name: value})
    return replace(claims, mentions=tuple(mentions))
