"""Reads a caption back and checks it against its scene: for measurement, never for training."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import permutations

from jobs.demo.captions import (
    BACKGROUND_PHRASES,
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    LEAD_INS,
    RELATION_PHRASES,
    SHAPE_WORDS,
    SIZE_WORDS,
    TERSE_TAGS,
    TEXTURE_WORDS,
    Claims,
    Mention,
    words,
)
from jobs.demo.scenes import Scene, SceneObject

_MAX_MATCHED = 4  # mentions that are matched with objects; a scene holds three at most


@dataclass(frozen=True, slots=True)
class CaptionCheck:
    """How a caption compares with the truth.

    Exact: all objects named with their colour and shape, and everything stated is right.
    Consistent: something is stated, in the grammar's words, and all of it is right.
    """

    is_exact: bool
    is_consistent: bool
    num_right: int
    num_stated: int

    @property
    def attribute_share(self) -> float:
        """The right share of what is stated, 0 to 1; 0 when nothing is."""
        return self.num_right / self.num_stated if self.num_stated else 0.0


def check_caption(caption: str, scene: Scene) -> CaptionCheck:
    """Compare any text with a scene; text that names no object is neither exact nor consistent."""
    return check_claims(parse_caption(caption), scene)


def check_claims(claims: Claims, scene: Scene) -> CaptionCheck:
    """Compare claims with a scene, pairing mentions and objects as suits them best."""
    num_matched = min(len(claims.mentions), _MAX_MATCHED)
    objects = [*range(len(scene.objects)), *[None] * num_matched]
    num_right = max(_num_right(claims, scene, each) for each in permutations(objects, num_matched))
    num_right += claims.background == scene.background
    num_stated = sum(len(_stated(mention)) for mention in claims.mentions)
    num_stated += (claims.relation is not None) + (claims.background is not None)
    all_right = bool(claims.mentions) and claims.is_well_formed and num_right == num_stated
    names_all = len(claims.mentions) == len(scene.objects)
    return CaptionCheck(
        is_exact=all_right and names_all and all(each.colour for each in claims.mentions),
        is_consistent=all_right,
        num_right=num_right,
        num_stated=num_stated,
    )


def parse_caption(caption: str) -> Claims:
    """Return what a text states, as far as it speaks the grammar.

    Unknown words are passed over, but like a dangling adjective, a repeated attribute or a second
    relation they make the result not well formed.
    """
    reader = _Reader()
    rest = words(caption)
    while rest:
        length = next((n for n in _LENGTHS if tuple(rest[:n]) in _LEXICON), 0)
        if length:
            reader.take(*_LEXICON[tuple(rest[:length])])
        else:
            reader.is_well_formed = False
        rest = rest[length or 1 :]
    return reader.finish()


class _Reader:
    """Collects adjectives until their noun, and facts about the whole."""

    def __init__(self) -> None:
        self.mentions: list[Mention] = []
        self.adjectives: dict[str, str] = {}
        self.facts: dict[str, str] = {}
        self.awaits_object = False
        self.is_well_formed = True

    def take(self, kind: str, value: str) -> None:
        if kind == "shape":
            self.mentions.append(replace(Mention(value), **self.adjectives))
            self.adjectives, self.awaits_object = {}, False
        elif kind in ("colour", "texture", "size"):
            self.is_well_formed &= kind not in self.adjectives
            self.adjectives[kind] = value
        elif kind in ("relation", "background"):
            self.is_well_formed &= kind not in self.facts
            self.facts.setdefault(kind, value)
        if kind == "relation":
            # Only "first relation second" has a place in the grammar.
            self.is_well_formed &= len(self.mentions) == 1 and not self.adjectives
            self.awaits_object = True

    def finish(self) -> Claims:
        is_whole = not self.adjectives and not self.awaits_object
        return Claims(
            tuple(self.mentions),
            self.facts.get("relation"),
            self.facts.get("background"),
            is_well_formed=self.is_well_formed and is_whole,
        )


def _stated(mention: Mention) -> dict[str, str]:
    named = ((each.name, getattr(mention, each.name)) for each in fields(mention))
    return {name: value for name, value in named if value is not None}


def _num_right(claims: Claims, scene: Scene, matched: tuple[int | None, ...]) -> int:
    num_right = 0
    for mention, index in zip(claims.mentions, matched, strict=False):
        if index is not None:
            num_right += _num_shared(mention, scene.objects[index])
    if claims.relation and len(matched) > 1 and None not in matched[:2]:
        first, second, *_ = (index for index in matched if index is not None)
        num_right += scene.relation(first, second) == claims.relation
    return num_right


def _num_shared(mention: Mention, each: SceneObject) -> int:
    return sum(getattr(each, name) == value for name, value in _stated(mention).items())


def _lexicon() -> Mapping[tuple[str, ...], tuple[str, str]]:
    """Map every phrase of the grammar, split in words, to (kind, value)."""
    lexicon = {
        tuple(words(text)): ("glue", "") for text in (*LEAD_INS, *TERSE_TAGS, "a", "an", "and")
    }
    for kind, table in (
        ("shape", SHAPE_WORDS),
        ("colour", COLOUR_WORDS),
        ("texture", TEXTURE_WORDS),
        ("size", SIZE_WORDS),
        ("relation", RELATION_PHRASES),
    ):
        for value, texts in table.items():
            lexicon.update({tuple(words(text)): (kind, value) for text in texts})
    for value, texts in BACKGROUND_WORDS.items():
        for pattern in BACKGROUND_PHRASES:
            for text in texts:
                lexicon[tuple(words(pattern.format(text)))] = ("background", value)
    return lexicon


_LEXICON = _lexicon()
_LENGTHS = sorted({len(phrase) for phrase in _LEXICON}, reverse=True)
