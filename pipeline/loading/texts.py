"""Captions as models are trained on them: drawn for this visit, cleaned as BLIP does."""

import re
from collections.abc import Sequence

from pipeline.loading.config import LoaderConfig
from pipeline.sample import SampleError

_PUNCTUATION = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))
_SPACES = re.compile(r"\s{2,}")


def clean_caption(text: str, max_words: int) -> str:
    """Return a caption in lower case, without most punctuation, cut after some words.

    Comma, apostrophe, hyphen, question mark and slash survive (BLIP's `pre_caption`).
    """
    text = _SPACES.sub(" ", text.lower().translate(_PUNCTUATION)).rstrip("\n").strip(" ")
    words = text.split(" ")
    return text if len(words) <= max_words else " ".join(words[:max_words])


def draw_text(texts: Sequence[str], draw: float, config: LoaderConfig) -> str:
    """Return one of a record's texts, all equally likely (BLIP-2, Sec. 4.1).

    One that cleaning leaves nothing of gives way to the next. Raises SampleError("empty_caption")
    if that is all of them.
    """
    first = int(draw * len(texts))
    for number in range(len(texts)):
        text = texts[(first + number) % len(texts)]
        if config.are_texts_cleaned:
            text = clean_caption(text, config.max_words)
        if text.strip():
            return text
    raise SampleError("empty_caption", "cleaning leaves nothing of its captions")
