"""The caption grammar: chooses what to say about a scene, and says it in varying words."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jobs.demo.scenes import OPPOSITE, Scene, SceneObject

# Every way to say a value; the first is the usual one. No word stands for two values.
SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle", "wedge"),
    "star": ("star",),
    "heart": ("heart",),
    "plus": ("plus", "cross"),
}
COLOUR_WORDS = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "amber"),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rose"),
    "brown": ("brown", "chocolate"),
}
TEXTURE_WORDS = {
    "solid": ("plain", "solid"),
    "striped": ("striped", "banded"),
    "dotted": ("dotted", "spotted"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge")}
BACKGROUND_WORDS = {
    "white": ("white",),
    "gray": ("gray", "grey"),
    "beige": ("beige", "cream"),
    "navy": ("navy", "midnight"),
}
RELATION_PHRASES = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
LEAD_INS = ("a photo of", "a picture of", "an image of", "there is")
BACKGROUND_PHRASES = ("on a {} background", "against a {} backdrop", "in front of a {} wall")
TERSE_TAGS = ("icon", "clipart", "sticker", "logo", "emoji")

_USUAL_WORD = 0.6  # how often the first of several words is taken
_LEAD_IN = 0.4  # how often a caption opens with one


@dataclass(frozen=True, slots=True)
class Mention:
    """One object as a caption names it; None for what it leaves out."""

    shape: str
    colour: str | None = None
    texture: str | None = None
    size: str | None = None


@dataclass(frozen=True, slots=True)
class Claims:
    """What a caption states: objects in the order named, and how the first two stand.

    `relation` says where the first mention is, seen from the second. `is_well_formed` is False
    when the text it was read from holds words or an order that the grammar does not.
    """

    mentions: tuple[Mention, ...]
    relation: str | None = None
    background: str | None = None
    is_well_formed: bool = True


def words(caption: str) -> list[str]:
    """Split as BERT's basic tokenizer does: lower case, punctuation signs one by one."""
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", caption.lower())


def full_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption that names every object by colour and shape, and everything rightly."""
    return phrase(choose_claims(scene, rng), rng)


def terse_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a right but meagre alt text about one of the objects, such as `pink plus icon`."""
    each = scene.objects[int(rng.integers(len(scene.objects)))]
    named = [_say(COLOUR_WORDS, each.colour, rng), _say(SHAPE_WORDS, each.shape, rng)]
    if rng.random() < 0.25:
        named.insert(0, _say(SIZE_WORDS, each.size, rng))
    if rng.random() < 0.75:
        named.append(_pick(TERSE_TAGS, rng))
    return " ".join(named)


def choose_claims(scene: Scene, rng: np.random.Generator) -> Claims:
    """Choose what a full caption states; a lone object is described in more detail."""
    is_lone = len(scene.objects) == 1
    detail = 0.85 if is_lone else 0.25
    order = rng.permutation(len(scene.objects)).tolist()
    mentions = tuple(_mention(scene.objects[index], detail, rng) for index in order)
    relation = scene.relation(order[0], order[1]) if len(order) > 1 else None
    has_background = rng.random() < (0.8 if is_lone else 0.3)
    return Claims(mentions, relation, scene.background if has_background else None)


def phrase(claims: Claims, rng: np.random.Generator) -> str:
    """Put claims into words: synonyms, lead-in, and either order of a relation."""
    mentions, relation = claims.mentions, claims.relation
    if relation and rng.random() < 0.5:
        mentions, relation = (mentions[1], mentions[0], *mentions[2:]), OPPOSITE[relation]
    parts = [_noun_phrase(mention, rng) for mention in mentions]
    if relation:
        parts[:2] = [f"{parts[0]} {_pick(RELATION_PHRASES[relation], rng)} {parts[1]}"]
    text = " and ".join(parts)
    if rng.random() < _LEAD_IN:
        text = f"{_pick(LEAD_INS, rng)} {text}"
    if claims.background:
        named = _say(BACKGROUND_WORDS, claims.background, rng)
        text = f"{text} {_pick(BACKGROUND_PHRASES, rng).format(named)}"
    return text


def _mention(each: SceneObject, detail: float, rng: np.random.Generator) -> Mention:
    return Mention(
        shape=each.shape,
        colour=each.colour,
        texture=each.texture if rng.random() < detail else None,
        size=each.size if rng.random() < detail else None,
    )


def _noun_phrase(mention: Mention, rng: np.random.Generator) -> str:
    named = [
        _say(table, value, rng)
        for table, value in (
            (SIZE_WORDS, mention.size),
            (TEXTURE_WORDS, mention.texture),
            (COLOUR_WORDS, mention.colour),
            (SHAPE_WORDS, mention.shape),
        )
        if value
    ]
    article = "an" if named[0][0] in "aeiou" else "a"
    return " ".join((article, *named))


def _say(table: Mapping[str, tuple[str, ...]], value: str, rng: np.random.Generator) -> str:
    usual, *others = table[value]
    return usual if not others or rng.random() < _USUAL_WORD else _pick(others, rng)


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
