"""How close generated captions come to what people said: BLEU-4 and CIDEr, METEOR by Java.

The metrics are pycocoevalcap's, those of the COCO server. Its tokenizer is Java; without it, words
are split here by much the same punctuation, and the result says so.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_WORD = re.compile(r"[\w'-]+")


@dataclass(frozen=True, slots=True)
class CaptionQuality:
    """Corpus-level figures by name, each image's CIDEr, and who split the words."""

    figures: Mapping[str, float]
    cider: tuple[float, ...]
    tokenizer: str


def caption_quality(
    captions: Sequence[str], references: Sequence[Sequence[str]], *, uses_java: bool = False
) -> CaptionQuality:
    """Compare one caption an image with its references.

    Figures are fractions as pycocoevalcap gives them (papers print them times 100); CIDEr is from 0
    to 10. Raises ValueError for other lengths, for an image without a reference, and where Java is
    asked for and missing.
    """
    from pycocoevalcap.bleu.bleu import Bleu

    if len(captions) != len(references) or not all(references):
        raise ValueError("every caption needs references, one list for each")
    if uses_java and shutil.which("java") is None:
        raise ValueError("uses_java is set and there is no `java`; install one or leave it out")
    said, given = _split(captions, references, uses_java=uses_java)
    bleu, _ = Bleu(4).compute_score(given, said, verbose=0)
    mean, by_image = _cider(given, said)
    figures = {"BLEU-4": float(bleu[3]), "CIDEr": mean}
    if uses_java:
        from pycocoevalcap.meteor.meteor import Meteor

        figures["METEOR"] = float(Meteor().compute_score(given, said)[0])
    return CaptionQuality(
        figures,
        by_image,
        tokenizer="Stanford PTB" if uses_java else "words and apostrophes",
    )


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return what `caption_quality` calls CIDEr, without Java, and nothing else: 0 to 10."""
    said, given = _split(captions, references, uses_java=False)
    return _cider(given, said)[0]


def _cider(
    given: dict[int, list[str]], said: dict[int, list[str]]
) -> tuple[float, tuple[float, ...]]:
    from pycocoevalcap.cider.cider import Cider

    mean, by_image = Cider().compute_score(given, said)
    return float(mean), tuple(float(each) for each in by_image)


def _split(
    captions: Sequence[str], references: Sequence[Sequence[str]], *, uses_java: bool
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Return captions and references by image, words apart by one space."""
    said = {number: [text] for number, text in enumerate(captions)}
    given = {number: list(texts) for number, texts in enumerate(references)}
    if uses_java:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        split: Any = PTBTokenizer().tokenize
        as_asked = [
            {n: [{"caption": text} for text in texts] for n, texts in each.items()}
            for each in (said, given)
        ]
        return split(as_asked[0]), split(as_asked[1])
    plain = [
        {n: [" ".join(_WORD.findall(text.lower())) for text in texts] for n, texts in each.items()}
        for each in (said, given)
    ]
    return plain[0], plain[1]
