"""Rules: what is masked in a caption, and which captions are dropped whatever their scores.

Patterns are RE2's, which takes time in proportion to the text whatever the text is. Human captions
are left alone by all of them.

M captions of a block.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.selection.candidates import HUMAN, Block, Captions
from pipeline.selection.checks import Check, Codes, mark
from pipeline.selection.config import (
    BoilerplateRule,
    CharacterRule,
    ImageSizeRule,
    LengthRule,
    NsfwRule,
    PiiRule,
    RepetitionRule,
    RulesConfig,
    WatermarkRule,
)

EMAIL, PHONE = "email", "phone"  # what the ledger calls what was masked
_Flags = NDArray[np.bool_]

_EMAIL = r"[\pL\pN._%+-]+@[\pL\pN-]+(?:\.[\pL\pN-]+)*\.\pL{2,}"
# With a country code; as North America groups them; as much of Europe does, from a 0 on.
_PHONE = (
    r"(?:\+|\b00)[1-9]\d{0,2}(?:[ ./()-]{0,2}\d){6,12}\b"
    r"|(?:\b|\()\d{3}\)?[ .-]{1,2}\d{3}[ .-]\d{4}\b"
    r"|\(?\b0\d{1,4}\)?[ /-]\d{2,4}(?:[ -]?\d{2,4}){1,3}\b"
)
_FILE_NAME = (
    r"(?i)^(?:"
    r"[^\s/\\]*[^/\\]{0,80}\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif)"
    r"|(?:img|dsc[nf]?|dscf?|pict?|p|image|photo|picture|screenshot|screen shot|scan|file|untitled|"
    r"whatsapp image|signal)[ _-]*[\d_ .():-]*\d[\d_ .():-]*(?:at [\d.:apm ]+)?"
    r"|[\d\pP\s]*\d[\d\pP\s]*"
    r"|[0-9a-f]{12,}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    r")$"
)
_CHARACTER_RUN = r"(\S)\1{%d}"
_LONGEST_LOOKED_AT = 2_000  # characters, for repetition


def mask(captions: Captions, rule: PiiRule | None) -> tuple[Captions, pa.Array]:
    """Return the captions with what identifies people masked, and what was masked in each.

    The latter is (M,) strings: "", "email", "phone" or "email,phone".
    """
    found = pa.array(np.full(len(captions), "", dtype=object), pa.string())
    if rule is None or not len(captions):
        return captions, found
    text, may_change = captions.table["text"].combine_chunks(), captions.origin != HUMAN
    for name, is_on, pattern in (
        (EMAIL, rule.are_emails_masked, _EMAIL),
        (PHONE, rule.are_phones_masked, _PHONE),
    ):
        hits = _matches(text, pattern) & may_change if is_on else np.zeros(0, bool)
        if not hits.any():
            continue
        where = pa.array(hits)
        masked = pc.replace_substring_regex(text.filter(where), pattern, f"<{name.upper()}>")
        text = pc.replace_with_mask(text, where, masked)
        so_far = found.filter(where)
        noted = pc.if_else(
            pc.equal(so_far, ""), name, pc.binary_join_element_wise(so_far, name, ",")
        )
        found = pc.replace_with_mask(found, where, noted)
    column = captions.table.schema.get_field_index("text")
    return replace(captions, table=captions.table.set_column(column, "text", text)), found


def apply_rules(block: Block, config: RulesConfig, codes: Codes) -> None:
    """Note in `codes`, (M,), the first rule that each caption does not pass."""
    captions = block.captions
    if not len(captions):
        return
    is_machine = captions.origin != HUMAN
    for check, fails in _image_failures(block, config):
        mark(codes, fails[captions.row] & is_machine, check)
    text = captions.table["text"].combine_chunks()
    for check, fails in _text_failures(text, config):
        mark(codes, fails & is_machine, check)


def _image_failures(block: Block, config: RulesConfig) -> Iterable[tuple[Check, _Flags]]:
    """Yield (N,) flags for each rule of images that is on."""
    if config.image_size:
        yield from _wrong_sizes(block.rows, config.image_size)
    if config.nsfw:
        yield Check.NSFW, _accused(block.rows, config.nsfw)
    if config.watermark:
        yield Check.WATERMARK, _accused(block.rows, config.watermark)


def _text_failures(text: pa.Array, config: RulesConfig) -> Iterable[tuple[Check, _Flags]]:
    """Yield (M,) flags for each rule of texts that is on."""
    if config.length:
        yield from _wrong_lengths(text, config.length)
    if config.boilerplate:
        yield from _boilerplate(text, config.boilerplate)
    if config.characters:
        yield from _wrong_characters(text, config.characters)
    if config.repetition:
        yield Check.REPETITION, _repetitive(text, config.repetition)


# Images


def _wrong_sizes(rows: pa.Table, rule: ImageSizeRule) -> Iterable[tuple[Check, _Flags]]:
    width, height = (
        pc.coalesce(rows[f"original_{side}"], rows[side]).to_numpy().astype(np.float64)
        for side in ("width", "height")
    )
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    yield Check.IMAGE_TOO_SMALL, shorter < rule.min_side_px  # an unknown size is NaN, so passes
    yield Check.ASPECT_TOO_LARGE, longer > rule.max_aspect * shorter


def _accused(rows: pa.Table, rule: NsfwRule | WatermarkRule) -> _Flags:
    refused = {word.casefold() for word in rule.refused}
    flags = np.zeros(rows.num_rows, bool)
    for position, extra in enumerate(rows["extra"].to_pylist()):
        if extra is None:
            continue
        values = _object(extra)
        flags[position] = any(
            _is_accusation(values[name], refused, rule.max_probability)
            for name in rule.columns
            if name in values
        )
    return flags


def _object(text: str) -> Mapping[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _is_accusation(value: object, refused: set[str], max_probability: float) -> bool:
    if isinstance(value, str) and value.strip().casefold() in refused:
        return True
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        return False
    return number > max_probability


# Texts


def _wrong_lengths(text: pa.Array, rule: LengthRule) -> Iterable[tuple[Check, _Flags]]:
    words = pc.count_substring_regex(text, r"\S+").to_numpy()
    chars = pc.utf8_length(text).to_numpy()
    yield Check.TOO_SHORT, (words < rule.min_words) | (chars < rule.min_chars)
    yield Check.TOO_LONG, (words > rule.max_words) | (chars > rule.max_chars)


def _boilerplate(text: pa.Array, rule: BoilerplateRule) -> Iterable[tuple[Check, _Flags]]:
    text = pc.utf8_trim_whitespace(text)
    if rule.are_file_names_dropped:
        yield Check.FILE_NAME, _matches(text, _FILE_NAME)
    lower = pc.utf8_lower(text)
    fails = np.zeros(len(text), bool)
    if rule.whole:
        bare = pc.replace_substring_regex(lower, r"^[\pP\pS\s]+|[\pP\pS\s]+$", "")
        wanted = pa.array([phrase.lower() for phrase in rule.whole])
        fails |= pc.is_in(bare, value_set=wanted).to_numpy(zero_copy_only=False)
    if rule.within:
        phrases = "|".join(_quoted(phrase.lower()) for phrase in rule.within)
        fails |= _matches(lower, rf"(?:^|[^\pL\pN])(?:{phrases})(?:[^\pL\pN]|$)")
    yield Check.BOILERPLATE, fails


def _quoted(phrase: str) -> str:
    return r"\s+".join(re.escape(word) for word in phrase.split())


def _wrong_characters(text: pa.Array, rule: CharacterRule) -> Iterable[tuple[Check, _Flags]]:
    scripts = "".join(rf"\p{{{script}}}" for script in rule.scripts)
    visible = _length_without(text, r"\s+")
    yield Check.FEW_LETTERS, _length_without(text, r"[^\pL\pM]+") < rule.min_letter_share * visible
    letters = _length_without(text, r"[^\pL]+")
    others = _length_without(text, rf"[^\pL]+|[{scripts}]+")
    yield Check.OTHER_SCRIPT, letters - others < rule.min_script_share * letters


def _length_without(text: pa.Array, pattern: str) -> NDArray[np.int32]:
    lengths: NDArray[np.int32] = pc.utf8_length(
        pc.replace_substring_regex(text, pattern, "")
    ).to_numpy()
    return lengths


def _repetitive(text: pa.Array, rule: RepetitionRule) -> _Flags:
    # Python's expressions know back-references; this one takes linear time as well.
    run = re.compile(_CHARACTER_RUN % rule.max_character_run)
    starts = pc.utf8_slice_codeunits(text, 0, _LONGEST_LOOKED_AT).to_pylist()
    return np.fromiter((_says_one_thing(each, rule, run) for each in starts), bool, len(starts))


def _says_one_thing(text: str, rule: RepetitionRule, run: re.Pattern[str]) -> bool:
    if run.search(text):
        return True
    words = text.casefold().split()
    if len(words) < rule.min_words:
        return False
    return max(Counter(words).values()) > rule.max_word_share * len(words)


def _matches(text: pa.Array, pattern: str) -> _Flags:
    flags = pc.match_substring_regex(text, pattern).to_numpy(zero_copy_only=False)
    return np.asarray(flags, dtype=bool)
