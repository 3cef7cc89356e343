"""Text of strangers made fit to be looked at: nothing in it is hidden, and nothing acts.

Escaping for HTML is the template's; this is about characters that a page would obey or swallow.
"""

import unicodedata
from urllib.parse import urlsplit

MAX_CHARS = 500
_SHOWN = frozenset("\u200c\u200d")  # joiners: scripts and emoji need them, and they move nothing
# Format, control, private, unassigned and surrogate characters, line and paragraph separators.
_HIDDEN = frozenset({"Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp"})
_NAMES = {"\n": "⏎", "\t": "⇥"}
_MAX_MARKS = 4  # combining marks on one letter; more are meant to deface what is around


def visible(text: str, max_chars: int = MAX_CHARS) -> str:
    """Return the text with every control, bidi and other invisible character spelled out.

    A text that is too long is cut, and says how much is missing.
    """
    shown = "".join(_characters(text[:max_chars]))
    missing = len(text) - max_chars
    return f"{shown}… (+{missing:,} characters)" if missing > 0 else shown


def _characters(text: str) -> list[str]:
    characters, num_marks = [], 0
    for char in text:
        num_marks = num_marks + 1 if unicodedata.combining(char) else 0
        if num_marks > _MAX_MARKS:
            continue
        if char in _NAMES:
            characters.append(_NAMES[char])
        elif char not in _SHOWN and unicodedata.category(char) in _HIDDEN:
            characters.append(f"⟨U+{ord(char):04X}⟩")
        else:
            characters.append(char)
    return characters


def web_link(url: str | None) -> str | None:
    """Return a URL if it is safe to link to: http or https, with a host, and nothing hidden."""
    if not url or visible(url, len(url)) != url or not url.isascii():
        return None
    try:
        parts = urlsplit(url)
        is_web = parts.scheme.lower() in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return None
    return url if is_web and not parts.username and not parts.password else None
