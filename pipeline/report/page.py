"""The page: one HTML file with its data, scripts and pictures inside; it needs no network.

Strangers' text passes `visible` and the templates' escaping, and a Content-Security-Policy allows
the two blocks whose hashes it names, and nothing else, to run or to style.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report import formats
from pipeline.report.gallery import Example
from pipeline.report.scores import COARSE, FINE
from pipeline.report.visible import visible, web_link

_SCRIPTS = (
    "vendor/d3-7.9.2.min.js",
    "vendor/plot-0.6.17.umd.min.js",
    "figures.js",
    "charts.js",
    "explorer.js",
    "gallery.js",
    "start.js",
)
_STYLES = ("page.css", "parts.css")
# What closes a script block, or opens another reading of it, wherever it stands in JSON.
_UNSAFE = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def render(found: Mapping[str, Any], examples: list[Example]) -> str:
    """Return the page that shows these numbers and examples."""
    environment = Environment(
        autoescape=True,
        loader=PackageLoader("pipeline.report", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(formats.FILTERS)
    script = _static(*_SCRIPTS)
    style = _static(*_STYLES)
    shown = _shown(found)
    recipe = found["provenance"]["recipe"]
    return environment.get_template("page.html.j2").render(
        r=shown,
        recipe_lines=[visible(line) for line in recipe.splitlines()] if recipe else [],
        examples=[_example(example) for example in examples],
        score_step=COARSE / FINE,
        policy=_policy(script, style),
        script=Markup(script),  # noqa: S704 - our own files, and their hash is in the policy
        style=Markup(style),  # noqa: S704
        data=Markup(_json(shown)),  # noqa: S704 - _json leaves nothing that HTML would read
    )


def _static(*names: str) -> str:
    folder = resources.files("pipeline.report") / "static"
    text = "\n".join((folder / name).read_text(encoding="utf-8") for name in names)
    # Line ends are counted in the hash as the browser sees them.
    text = text.replace("\r\n", "\n")
    assert "</script" not in text.lower(), "a script would end where it names its own end"
    assert "</style" not in text.lower(), "a style would end where it names its own end"
    return text


def _policy(script: str, style: str) -> str:
    """Return a Content-Security-Policy: our script, our style, pictures in the page; no network."""

    def digest(text: str) -> str:
        # The block's text is between its tags, a line end after and before them.
        return base64.b64encode(hashlib.sha256(f"\n{text}\n".encode()).digest()).decode()

    return "; ".join(
        (
            "default-src 'none'",
            f"script-src 'sha256-{digest(script)}'",
            f"style-src 'sha256-{digest(style)}'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def _json(value: object) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).translate(_UNSAFE)


def _shown(value: object) -> object:
    """Return numbers as they are and every text, keys too, as it may be shown."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {visible(str(key)): _shown(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(inner) for inner in value]
    return value


def _example(example: Example) -> dict[str, Any]:
    image = None
    if example.thumbnail is not None:
        image = "data:image/webp;base64," + base64.b64encode(example.thumbnail).decode()
    captions = [_shown(caption) for caption in example.captions]
    reasons = {example.reason, *(caption["reason"] for caption in example.captions)} - {"", None}
    return {
        "group": example.group.value,
        "key": visible(example.key),
        "source": visible(example.source),
        "shard": visible(example.shard),
        "url": visible(example.url or ""),
        "link": web_link(example.url),
        "verdict": example.verdict,
        "reason": visible(example.reason),
        "reasons": [visible(reason) for reason in sorted(reasons)],
        "captions": captions,
        "image": image,
    }
