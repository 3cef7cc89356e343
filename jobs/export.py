"""`capfilt export`: a trained model as others load it, with a card that says how it was made."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jobs.corpus_root import open_corpus
from jobs.errors import UserError
from jobs.evaluate import RESULT
from jobs.training.blip import CAPTIONER_FOLDER, FILTER_FOLDER
from jobs.training.blip2 import LAVIS_FILE
from jobs.training.config import Stage
from jobs.training.exports import ExportCard, opened_export, read_card, stage_folder
from model.checkpoints import load_captioner, load_filter, load_stage1, load_stage2
from model.lavis_files import save_med, save_stage1, save_stage2
from model.names.blip import CAPTIONER_BLIP, FILTER_BLIP
from pipeline.sample import canonical_json

Format = Literal["hf", "lavis"]
_CLASSES = {
    "med": "BlipForConditionalGeneration and BlipForImageTextRetrieval",
    "captioner": "BlipForConditionalGeneration",
    "filter": "BlipForImageTextRetrieval",
    "stage1": "Blip2ForImageTextRetrieval",
    "stage2": "Blip2ForConditionalGeneration",
}
_TITLES = {
    "med": "BLIP, pretrained",
    "captioner": "BLIP captioner",
    "filter": "BLIP filter (image-text matching)",
    "stage1": "BLIP-2, stage 1 (Q-Former)",
    "stage2": "BLIP-2, stage 2 (Q-Former with a frozen language model)",
}


def export(root: str, stage: Stage, target: Path, format: Format) -> list[str]:
    """Write a trained stage to a new folder; return the names of its files.

    `hf` is what transformers' from_pretrained loads, `lavis` one file with LAVIS's names (BLIP's
    repository's for BLIP). Raises UserError.
    """
    store = open_corpus(root).store
    card = read_card(store, stage)
    if card is None:
        raise UserError(
            f"{store.full(stage_folder(stage))}/export is not there: train it first "
            f"(capfilt pretrain RECIPE --stage {stage})"
        )
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty; name a new folder")
    target.mkdir(parents=True, exist_ok=True)
    with opened_export(store, stage, card) as folder:
        if format == "hf":
            _refuse_strangers(folder, stage)
            shutil.copytree(folder, target, dirs_exist_ok=True)
        else:
            _to_lavis(folder, stage, target)
    text = model_card(card, format, store.read(f"{stage_folder(stage)}/{RESULT}"))
    (target / "README.md").write_text(text, encoding="utf-8")
    return sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file())


def model_card(card: ExportCard, format: Format, evaluation: bytes | None) -> str:
    """Return a model card in the Hugging Face form, from what the training left."""
    stage = card.stage
    loads = (
        f"Load it with transformers' {_CLASSES[stage]}.from_pretrained."
        if format == "hf"
        else "One safetensors file with the names of LAVIS (BLIP's repository for BLIP)."
    )
    figures = "".join(
        f"| {name} | {value:.4f} |\n" for name, value in {**card.losses, **card.probes}.items()
    )
    parts = [
        "---\nlibrary_name: transformers\ntags: [blip, image-to-text, capfilt]\n---\n",
        f"# {_TITLES[stage]}\n\nTrained with capfilt for {card.step:,} steps. {loads}\n",
        f"## At the end of training\n\n| | |\n|---|---|\n{figures}",
    ]
    if evaluation is not None:
        parts.append(f"## Evaluation\n\n```json\n{_without_captions(evaluation)}\n```\n")
    made_of = canonical_json(card.content, indent=1)
    parts.append(f"## Made with\n\n```json\n{made_of}\n```\n")
    return "\n".join(parts)


def _without_captions(evaluation: bytes) -> str:
    found: dict[str, Any] = json.loads(evaluation)
    found.pop("captions", None)
    return canonical_json(found, indent=1)


def _refuse_strangers(folder: Path, stage: str) -> None:
    """Raise UserError for a model that transformers has no class for."""
    if (folder / LAVIS_FILE).is_file():
        raise UserError(
            f"transformers has no class for this {stage}: its image encoder is not EVA-CLIP's; "
            "use --to lavis"
        )
    for path in folder.rglob("config.json"):
        vision = json.loads(path.read_text(encoding="utf-8")).get("vision_config", {})
        if vision.get("stem_widths"):
            raise UserError(
                f"transformers has no class for this {stage}: its image encoder has convolutions "
                "in front (as in the demo); use --to lavis, or a preset of the papers"
            )


def _to_lavis(folder: Path, stage: Stage, target: Path) -> None:
    if (folder / LAVIS_FILE).is_file():
        shutil.copy(folder / LAVIS_FILE, target / LAVIS_FILE)
        return
    write: dict[Stage, Callable[[], None]] = {
        "captioner": lambda: save_med(load_captioner(folder), target / LAVIS_FILE, CAPTIONER_BLIP),
        "filter": lambda: save_med(load_filter(folder), target / LAVIS_FILE, FILTER_BLIP),
        "stage1": lambda: save_stage1(load_stage1(folder), target / LAVIS_FILE, with_frozen=True),
        "stage2": lambda: save_stage2(load_stage2(folder), target / LAVIS_FILE),
    }
    if stage == "med":
        captioner, matcher = folder / CAPTIONER_FOLDER, folder / FILTER_FOLDER
        save_med(load_captioner(captioner), target / "captioner.safetensors", CAPTIONER_BLIP)
        save_med(load_filter(matcher), target / "filter.safetensors", FILTER_BLIP)
        return
    write[stage]()
