"""Which captions are kept: one policy, and the rules that run before it."""

import re
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Words = Annotated[tuple[str, ...], Field(min_length=1)]
_STRICT = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Policy(StrEnum):
    """Ways to choose among an image's captions; human captions are kept under all of them."""

    BLIP = "blip"  # ITM >= threshold, each caption on its own (BLIP, Sec. 3.3)
    BLIP2 = "blip2"  # the top k by CLIP of web and synthetic together (BLIP-2, Sec. 3.4)
    WEB_ONLY = "web_only"  # neither captioner nor filter
    CAPTION_ONLY = "caption_only"  # the captioner alone: synthetic captions, unfiltered
    FILTER_ONLY = "filter_only"  # the filter alone: web captions with ITM >= threshold
    EXPRESSION = "expression"  # whatever a SQL condition says


class LengthRule(BaseModel):
    """Drops captions that are too short or too long; scripts without spaces have few words."""

    model_config = _STRICT

    min_words: Annotated[int, Field(ge=0)] = 3
    """Runs of anything but white space."""
    max_words: Annotated[int, Field(ge=1)] = 80
    """BLIP-2 reads 32 tokens, BLIP 30 words; what is longer is mostly no description."""
    min_chars: Annotated[int, Field(ge=0)] = 5
    """Characters, white space included."""
    max_chars: Annotated[int, Field(ge=1)] = 500
    """Characters, white space included."""


class CharacterRule(BaseModel):
    """Drops captions that are mostly no letters, or mostly of other scripts."""

    model_config = _STRICT

    min_letter_share: _Share = 0.5
    """Letters and marks of any script among all characters that are no white space."""
    scripts: _Words = ("Latin",)
    """Unicode's names of scripts, e.g. Latin, Cyrillic, Han."""
    min_script_share: _Share = 0.7
    """Letters of these scripts among all letters; a caption without letters passes this one."""

    @model_validator(mode="after")
    def _scripts_are_names(self) -> Self:
        for script in self.scripts:
            if not re.fullmatch(r"[A-Z][A-Za-z_]+", script):
                raise ValueError(f"{script!r} is no script's name; one is written like 'Latin'")
        return self


class RepetitionRule(BaseModel):
    """Drops captions that say one thing over and over."""

    model_config = _STRICT

    max_word_share: _Share = 0.5
    """Of the commonest word among all, in captions of `min_words` words and more."""
    min_words: Annotated[int, Field(ge=1)] = 4
    """Shorter captions may repeat a word."""
    max_character_run: Annotated[int, Field(ge=1)] = 5
    """How often one character may stand in a row."""


class BoilerplateRule(BaseModel):
    """Drops captions that are file names, or what every page says."""

    model_config = _STRICT

    are_file_names_dropped: bool = True
    """`DSC_0042.JPG`, `IMG 1234`, bare numbers and identifiers."""
    whole: tuple[str, ...] = (
        "advertisement",
        "alt",
        "alt text",
        "avatar",
        "banner",
        "cover",
        "default",
        "featured image",
        "icon",
        "image",
        "image description",
        "img",
        "loading",
        "logo",
        "photo",
        "photo 1",
        "picture",
        "placeholder",
        "profile picture",
        "stock image",
        "stock photo",
        "thumbnail",
        "untitled",
    )
    """Captions that consist of one of these, whatever their case and punctuation."""
    within: tuple[str, ...] = (
        "click for larger",
        "click here",
        "click image",
        "click to enlarge",
        "click to view",
        "image may contain",
        "image not available",
        "image not found",
        "no automatic alt text",
        "no image available",
        "no photo available",
        "photo not available",
        "share on facebook",
        "view full size",
        "view larger",
    )
    """Captions that hold one of these anywhere, whatever their case."""


class PiiRule(BaseModel):
    """Masks e-mail addresses and telephone numbers; the caption stays, and its scores too."""

    model_config = _STRICT

    are_emails_masked: bool = True
    """They become `<EMAIL>`."""
    are_phones_masked: bool = True
    """They become `<PHONE>`: numbers with a country code, or in the groups that people write."""


class ImageSizeRule(BaseModel):
    """Drops images by the size they had at their source; by the stored one where that is unknown.

    A download may have judged them already; this is for raw shards that are there.
    """

    model_config = _STRICT

    min_side_px: Annotated[int, Field(ge=1)] = 1
    """The shorter side; 256 for LAION's subset in BLIP-2 (Sec. 4.1)."""
    max_aspect: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 3.0
    """Longer side over shorter side."""


class NsfwRule(BaseModel):
    """Drops images that their source calls unsafe, in a column that it was told to keep."""

    model_config = _STRICT

    columns: _Words = ("NSFW", "nsfw", "punsafe")
    """Of the source's own; absent ones and empty cells accuse nobody."""
    refused: tuple[str, ...] = ("NSFW",)
    """Words that refuse the image, whatever their case; LAION has UNLIKELY, UNSURE and NSFW."""
    max_probability: _Share = 0.5
    """What a number in such a column may be; true counts as 1."""


class WatermarkRule(BaseModel):
    """Drops images that their source finds watermarked, in a column that it was told to keep."""

    model_config = _STRICT

    columns: _Words = ("pwatermark", "watermark")
    """Of the source's own; absent ones and empty cells accuse nobody."""
    refused: tuple[str, ...] = ()
    """Words that refuse the image, whatever their case."""
    max_probability: _Share = 0.8
    """What a number in such a column may be; true counts as 1."""


class RulesConfig(BaseModel):
    """Which rules run, in this order, before the policy; `{}` turns one on as it is, null off.

    Only masking is on: the policies are then the papers', and nothing is dropped but by them. No
    rule touches a human caption, nor an image that has one.
    """

    model_config = _STRICT

    pii: PiiRule | None = PiiRule()
    """Masks e-mail addresses and telephone numbers."""
    image_size: ImageSizeRule | None = None
    """Drops images that are too small or too long."""
    nsfw: NsfwRule | None = None
    """Drops what the source calls unsafe."""
    watermark: WatermarkRule | None = None
    """Drops what the source finds watermarked."""
    length: LengthRule | None = None
    """Drops captions that are too short or too long."""
    boilerplate: BoilerplateRule | None = None
    """Drops file names and what every page says."""
    characters: CharacterRule | None = None
    """Drops captions that are mostly no letters, or of other scripts."""
    repetition: RepetitionRule | None = None
    """Drops captions that say one thing over and over."""


class SelectConfig(BaseModel):
    """Which captions are kept and which is the best; scores are read, never made."""

    model_config = _STRICT

    policy: Policy = Policy.BLIP
    """How an image's captions are chosen."""
    itm_threshold: _Share = 0.5
    """`blip` and `filter_only` keep a caption whose ITM probability is at least this."""
    top_k: Annotated[int, Field(ge=1, le=1000)] = 2
    """`blip2` keeps this many captions an image."""
    expression: Annotated[str, Field(max_length=10_000)] | None = None
    """`expression` keeps a caption for which this SQL condition is true."""
    rules: RulesConfig = RulesConfig()
    """What is masked and dropped before the policy looks."""

    @model_validator(mode="after")
    def _expression_has_its_policy(self) -> Self:
        if (self.policy is Policy.EXPRESSION) != (self.expression is not None):
            raise ValueError(
                "policy 'expression' and the key `expression` need each other: give both or neither"
            )
        return self

    def content(self) -> dict[str, Any]:
        """Return the settings that decide what clean shards hold, for their fingerprint.

        What the policy does not read is not among them, nor are rules that are off.
        """
        content: dict[str, Any] = {"policy": self.policy.value}
        for name in _READ_BY[self.policy]:
            content[name] = getattr(self, name)
        return {**content, "rules": self.rules.model_dump(mode="json", exclude_none=True)}


_READ_BY: dict[Policy, tuple[str, ...]] = {
    Policy.BLIP: ("itm_threshold",),
    Policy.BLIP2: ("top_k",),
    Policy.WEB_ONLY: (),
    Policy.CAPTION_ONLY: (),
    Policy.FILTER_ONLY: ("itm_threshold",),
    Policy.EXPRESSION: ("expression",),
}
