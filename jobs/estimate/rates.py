"""How fast the stages are, what survives them and what it weighs: measured, given, or assumed.

Every default is an assumption and says on what; `capfilt plan` prints each one that it used.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobs.errors import UserError
from jobs.estimate.measure import Measure
from jobs.yaml_lines import parse_yaml

_FROZEN = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _assumed(value: float, low: float, high: float, reason: str) -> Measure:
    return Measure(value=value, low=low, high=high, source=f"assumption: {reason}")


_LINK_ROT = "lists are years old and links rot; probe yours"
_SUCCESS = {
    "laion400m": _assumed(0.75, 0.55, 0.9, _LINK_ROT),
    "cc3m": _assumed(0.75, 0.55, 0.9, _LINK_ROT),
    "cc12m": _assumed(0.7, 0.5, 0.9, _LINK_ROT),
    "sbu": _assumed(0.8, 0.6, 0.95, _LINK_ROT),
    "coco": _assumed(0.995, 0.98, 1.0, "one maintained host"),
    "visual_genome": _assumed(0.99, 0.97, 1.0, "one maintained host"),
    "table": _assumed(0.75, 0.5, 0.95, _LINK_ROT),
    "folder": _assumed(0.99, 0.95, 1.0, "images that are here already"),
    "webdataset": _assumed(0.99, 0.95, 1.0, "images that are here already"),
    "img2dataset": _assumed(0.75, 0.5, 0.95, "what it had failed to fetch stays failed"),
}
_FILTERED = _assumed(
    0.88,
    0.7,
    0.97,
    "an image goes only when all its captions do; BLIP's filter rejects 25% of nucleus captions "
    "(BLIP, Table 2), more of the web's",
)
_RANKED = _assumed(0.995, 0.97, 1.0, "the best captions of an image always stay (BLIP-2, Sec. 3.4)")


class Rates(BaseModel):
    """All that a plan reckons with beside the recipe and the cluster."""

    model_config = _FROZEN

    download_rows_per_cpu_second: Measure = _assumed(
        87, 40, 150, "img2dataset's README gives 100M URLs in 20 h on 16 cores"
    )
    """Rows that one CPU of a download actor visits, the web's slowness included."""
    success_share: dict[str, Measure] = Field(default_factory=dict)
    """Rows that become images, by source name or by format; defaults by format."""
    gpu_utilisation: Measure = _assumed(0.30, 0.15, 0.45, "share of a GPU's peak that is reached")
    """Used where no rate of the GPU is given."""
    score_images_per_gpu_second: dict[str, Measure] = Field(default_factory=dict)
    """Images that one whole GPU captions and scores, by accelerator (L4, A100...)."""
    select_images_per_cpu_second: Measure = _assumed(400, 150, 1000, "not measured for this recipe")
    """Images that one CPU selects among and copies."""
    kept_share: dict[str, Measure] = Field(default_factory=dict)
    """Scored images of which a caption is kept, by policy; human ones always are."""
    fetched_bytes_per_row: Measure = _assumed(110_000, 60_000, 250_000, "a typical web image")
    stored_bytes_per_image: Measure = _assumed(
        25_000, 17_000, 36_000, "LAION-400M takes 10 TB at 256 px, by its authors"
    )
    """As given; the default is that of 256 px and is scaled to the recipe's."""
    ledger_bytes_per_row: Measure = _assumed(220, 120, 400, "compressed Parquet")
    sidecar_bytes_per_caption: Measure = _assumed(70, 40, 120, "compressed Parquet")
    rows: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Rows of a source whose lists cannot be read here, by its name."""

    def success_of(self, source: str, form: str) -> Measure:
        """Return the share of rows of a source that become images."""
        for key in (source, form):
            if key in self.success_share:
                return self.success_share[key]
        return _SUCCESS.get(form, _SUCCESS["table"])

    def kept_under(self, policy: str) -> Measure:
        """Return the share of scored images of which a caption is kept."""
        default = _RANKED if policy in ("blip2", "web_only", "caption_only") else _FILTERED
        return self.kept_share.get(policy, default)


def load_rates(given: Sequence[str]) -> Rates:
    """Return the rates of YAML files and of `key.name=value` settings, the last of equals winning.

    A rate is a number, or `{value, low, high, source}`; what is not given is assumed. Raises
    UserError, a line for each fault.
    """
    document: dict[str, Any] = {}
    for each in given:
        _merge(document, _setting(each) if "=" in each else _file(each))
    try:
        return Rates.model_validate(document)
    except ValidationError as error:
        lines = [
            f"--rates: {'.'.join(map(str, each['loc']))}: {each['msg']}"
            for each in error.errors(include_url=False)
        ]
        raise UserError("\n".join(lines)) from None


def _file(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--rates {path}: cannot be read: {error}") from error
    document: dict[str, Any] = parse_yaml(text, path).data
    return document


def _setting(given: str) -> dict[str, Any]:
    key, _, text = given.partition("=")
    value = parse_yaml(text, f"--rates {key}", mapping=False).data
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    settings: dict[str, Any] = value
    return settings


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict) and "value" not in value:
            _merge(into[key], value)
        else:
            into[key] = value


def dump_rates(rates: Rates) -> dict[str, Any]:
    """Return what was measured or given, without what is assumed, as `load_rates` reads it."""
    document = rates.model_dump(mode="json")
    return {key: kept for key, value in document.items() if (kept := _known(value))}


def _known(value: Any) -> Any:  # noqa: ANN401 (a tree of YAML)
    if not isinstance(value, dict):
        return value
    if "source" in value:
        return None if value["source"].startswith("assumption") else value
    return {key: kept for key, each in value.items() if (kept := _known(each))}
