"""The dataset card: README.md as the Hugging Face hub reads it, and Croissant JSON-LD."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.report import formats
from pipeline.report.visible import visible

_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|<>&~:@-])")
_CROISSANT = "http://mlcommons.org/croissant/1.0"
_ROOT, _LEDGERS, _TARS = "corpus", "ledgers", "shards"
_FIELDS = (
    ("key", "sc:Text", "Names the sample, and its files in the tar."),
    ("source", "sc:Text", "The list that the row came from."),
    ("url", "sc:URL", "Where the image was found."),
    ("verdict", "sc:Text", "kept, dropped (on purpose) or failed (by a fault)."),
    ("reason", "sc:Text", "Why the row was not kept; empty if it was."),
    ("sha256", "sc:Text", "Of the image as it was downloaded, hexadecimal."),
    ("width", "sc:Integer", "Of the stored image, in pixels."),
    ("height", "sc:Integer", "Of the stored image, in pixels."),
    ("num_kept", "sc:Integer", "How many captions were kept."),
)


def dataset_card(found: Mapping[str, Any]) -> str:
    """Return the card as Markdown under a YAML header."""
    return "\n".join([*_header(found), *_body(found)]) + "\n"


def _header(found: Mapping[str, Any]) -> Iterator[str]:
    kept = found["headline"]["samples_kept"] or 0
    size = next((name for limit, name in _SIZES if kept < limit), "n>1B")
    yield "---"
    yield f"pretty_name: {json.dumps(visible(found['name']))}"  # a JSON string is a YAML string
    yield "license: other"
    yield "license_name: rights-remain-with-the-owners-of-the-images"
    yield from ("task_categories:", "- image-to-text", "- text-to-image")
    yield from ("size_categories:", f"- {size}")
    yield from ("tags:", "- image-text-pairs", "- webdataset", "- capfilt")
    yield from ("configs:", "- config_name: default", '  data_files: "clean/*/*.tar"', "---")


def _body(found: Mapping[str, Any]) -> Iterator[str]:
    h, total = found["headline"], found["funnel"]["total"]
    yield f"\n# {escaped(found['name'])}\n"
    if h["samples_kept"] is None:
        yield f"{h['rows_in']:,} image URLs; no sample has been selected yet.\n"
    else:
        captions = ", ".join(f"{n:,} {origin}" for origin, n in h["captions_kept"].items())
        yield (
            f"{h['samples_kept']:,} images with captions ({captions or 'none'}), chosen from "
            f"{h['rows_in']:,} image URLs by captioning and filtering (CapFilt).\n"
        )
    yield from (f"> {escaped(line)}\n" for line in found["missing"])
    yield "## Counts\n"
    yield "| source | rows in | images had | samples kept |"
    yield "|---|---:|---:|---:|"
    for s in found["funnel"]["sources"]:
        counts = (s["raw"]["rows"], s["raw"]["kept"], s["clean"]["kept"])
        yield f"| {escaped(s['source'])} | " + " | ".join(f"{n:,}" for n in counts) + " |"
    counts = (total["raw"]["rows"], total["raw"]["kept"], total["clean"]["kept"])
    yield "| all | " + " | ".join(f"{n:,}" for n in counts) + " |"
    yield from _layout()
    yield from _making(found)
    yield from _rights(found)


def _layout() -> Iterator[str]:
    yield "\n## Layout\n"
    yield "WebDataset tars `clean/<source>/<shard>.tar`, each with `key.jpg` (the image),"
    yield "`key.txt` (its best caption) and `key.json` (every kept caption with its scores, the URL"
    yield "and hash of the image, and the models). `clean/<source>/<shard>.parquet` is the ledger:"
    yield "one row for every input URL, with `verdict` and `reason`; nothing disappears silently.\n"
    yield "```python"
    yield "import webdataset"
    yield 'pairs = webdataset.WebDataset("00000.tar").decode("pil").to_tuple("jpg", "txt")'
    yield "```"


def _making(found: Mapping[str, Any]) -> Iterator[str]:
    yield "\n## How it was made\n"
    policies = [p["policy"] for p in found["provenance"]["policies"]]
    if policies:
        yield f"Selection policy: {', '.join(escaped(p) for p in policies)}.\n"
    for m in found["provenance"]["models"]:
        parts = [
            f"{label} `{m[name]}`"
            for label, name in (
                ("captioner", "captioner"),
                ("filter", "filter"),
                ("CLIP", "clip_model"),
            )
            if m[name]
        ]
        if parts:
            yield f"- {m['rows']:,} captions by weights with fingerprints: {', '.join(parts)}"
    yield "\n| score | origin | captions | p5 | median | p95 |"
    yield "|---|---|---:|---:|---:|---:|"
    for name in ("itm", "itc", "clip"):
        for origin, s in found["scores"][name]["by_origin"].items():
            p = s["percentiles"]
            values = " | ".join(formats.score(p[q]) for q in ("p5", "p50", "p95"))
            yield f"| {name.upper()} | {escaped(origin)} | {s['count']:,} | {values} |"
    yield "\nThe recipe is in `run.yaml`; all numbers are in `report/report.json`."


def _rights(found: Mapping[str, Any]) -> Iterator[str]:
    licences = found["licences"]
    yield "\n## Rights and limits\n"
    yield "The images belong to whoever made them; this corpus grants no rights to them."
    yield (
        f"{licences['rows_with_licence']:,} of {licences['rows_kept']:,} images came with a word "
        "on their licence."
    )
    for entry in licences["commonest"]:
        yield f"- {escaped(entry['licence'])}: {entry['rows']:,}"
    wishes = sum(licences["opt_outs"].values())
    yield f"\n{wishes:,} rows were left out because a site or a list asked for it."
    yield "Web captions may be wrong, offensive or personal; synthetic ones repeat the errors and"
    yield "biases of the model that wrote them, and a filter keeps some of both."


def escaped(text: str) -> str:
    """Return a text of strangers for Markdown, in which it means nothing but itself."""
    return _MARKDOWN.sub(r"\\\1", visible(text))


def croissant(found: Mapping[str, Any]) -> str:
    """Return the corpus's Croissant description: where its files are and what the ledger holds."""
    kept = found["headline"]["samples_kept"] or 0
    description = {
        "@context": _context(),
        "@type": "sc:Dataset",
        "conformsTo": _CROISSANT,
        "name": found["name"],
        "description": f"{kept:,} images with captions, chosen by captioning and filtering.",
        "license": "https://choosealicense.com/no-permission/",
        "url": _as_url(found["root"]),
        "datePublished": found["made_at"][:10],
        "version": "1.0.0",
        "citeAs": "Li et al., BLIP: Bootstrapping Language-Image Pre-training, ICML 2022",
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": _ROOT,
                "name": _ROOT,
                "description": "The folder of the corpus.",
                "contentUrl": _as_url(found["root"]),
                "encodingFormat": "inode/directory",
                # A folder has no hash; each shard's marker has those of its files.
                "sha256": "https://github.com/mlcommons/croissant/issues/80",
            },
            _file_set(_LEDGERS, "application/x-parquet", "clean/*/*.parquet"),
            _file_set(_TARS, "application/x-tar", "clean/*/*.tar"),
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "rows",
                "name": "rows",
                "description": "One row for every input URL, kept or not.",
                "field": [
                    {
                        "@type": "cr:Field",
                        "@id": f"rows/{name}",
                        "name": name,
                        "description": text,
                        "dataType": kind,
                        "source": {"fileSet": {"@id": _LEDGERS}, "extract": {"column": name}},
                    }
                    for name, kind, text in _FIELDS
                ],
            }
        ],
    }
    return json.dumps(description, ensure_ascii=True, indent=1) + "\n"


def _file_set(name: str, encoding: str, pattern: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        "containedIn": {"@id": _ROOT},
        "encodingFormat": encoding,
        "includes": pattern,
    }


def _as_url(root: str) -> str:
    return f"file://{root}" if root.startswith("/") else root


def _context() -> dict[str, Any]:
    """Return the vocabulary that Croissant 1.0 prescribes word for word."""
    cr = "http://mlcommons.org/croissant/"
    terms = (
        "citeAs column conformsTo equivalentProperty extract field fileProperty fileObject fileSet "
        "format includes isLiveDataset jsonPath key md5 parentField path recordSet references "
        "regex repeated replace samplingRate separator source subField transform"
    )
    return {
        "@language": "en",
        "@vocab": "https://schema.org/",
        "sc": "https://schema.org/",
        "cr": cr,
        "rai": f"{cr}RAI/",
        "dct": "http://purl.org/dc/terms/",
        **{term: f"cr:{term}" for term in terms.split()},
        "conformsTo": "dct:conformsTo",
        "data": {"@id": "cr:data", "@type": "@json"},
        "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
        "examples": {"@id": "cr:examples", "@type": "@json"},
    }
