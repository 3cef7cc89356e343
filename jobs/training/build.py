"""A stage's model as training starts it: built by its preset, begun from what came before.

Every weight has a known origin: an export of the stage before, a folder or file that the recipe
names, or the seed.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from jobs.checkpoint import fingerprint_folder, fingerprint_tensors
from jobs.errors import UserError
from jobs.training.blip import CAPTIONER_FOLDER, FILTER_FOLDER, CaptionerObjective, MedObjective
from jobs.training.blip2 import LAVIS_FILE, Stage1Objective
from jobs.training.config import TRAINED, Stage
from jobs.training.data import image_size
from jobs.training.exports import opened_export, read_card
from jobs.training.job import TrainingJob
from jobs.training.objectives import Objective
from jobs.training.plan import blip2_preset, med_preset
from jobs.training.stage2 import build_stage2
from jobs.training.texts import TextTokenizer, fingerprint_tokenizer
from jobs.training.towers import load_tower
from model.capfilt import MedCaptioner, MedFilter, load_part
from model.checkpoints import load_captioner, load_filter, load_stage1
from model.lavis_files import stage1_weights
from model.med_pretraining import FILTER_FINE_TUNING, MedObjectives, MedPretraining
from model.names.vision import CLIP_VIT, EVA_VIT
from model.presets import Blip2Preset, MedPreset
from model.stage1 import Stage1
from model.vision import FrozenImageEncoder
from model.weight_files import load_strictly, read_weights
from pipeline.loading.draws import hash63
from pipeline.model_configs import ModelConfig
from pipeline.models import ModelError, resolve_model
from pipeline.store import Store

# What no export of MED holds, and training starts anew.
_STARTS_ANEW = {
    r"momentum\..*": "follows the encoders it starts as",
    r"queue\..*": "filled by the first steps",
    r"temperature": "from the export's card, or the paper's",
}
_BEFORE: Mapping[Stage, Stage] = {"captioner": "med", "filter": "med", "stage2": "stage1"}
_MAX_TOKENS: Mapping[Stage, int] = {"med": 30, "captioner": 40, "filter": 35}  # BLIP, as released
_MAX_TOKENS_BLIP2 = 32


@dataclass(frozen=True, slots=True)
class Built:
    """An objective, where its weights began, and what of it is frozen, by fingerprint."""

    objective: Objective
    origins: dict[str, str] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Beginning:
    """The folder that a stage begins from, its fingerprint, and learned constants beside it."""

    folder: Path
    fingerprint: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Workshop:
    """What building a stage's model asks for."""

    job: TrainingJob
    store: Store
    tokenizer: TextTokenizer
    global_batch_size: int
    micro_batch_size: int
    contrast_size: int  # pairs of all ranks that go through the model together
    image_dtype: torch.dtype  # of a frozen image encoder
    llm_dtype: torch.dtype | None  # None: the preset's
    keep_open: ExitStack  # closes the folders that weights were read from

    @property
    def max_tokens(self) -> int:
        """The length that every text is padded to."""
        paper = _MAX_TOKENS.get(self.job.stage, _MAX_TOKENS_BLIP2)
        return self.job.section.max_tokens or paper

    @property
    def alarm_after(self) -> int:
        """Steps before which what is not learned is no alarm."""
        return self.job.config.watch.alarm_after_steps

    def beginning(self) -> Beginning | None:
        """Return what the stage begins from, None for random weights. Raises UserError."""
        stage, given = self.job.stage, self.job.section.start_from
        if given is not None:
            folder = _resolved(self.job, given, f"training.{stage}.start_from")
            return Beginning(folder, fingerprint_folder(folder))
        return self.export_of(_BEFORE[stage]) if stage in _BEFORE else None

    def export_of(self, stage: Stage) -> Beginning:
        """Return an earlier stage's export, checked. Raises UserError that says what to run."""
        card = read_card(self.store, stage)
        if card is None:
            raise UserError(
                f"{self.job.stage} begins from {stage}, and {self.job.root} has no finished {stage}"
                f": run `capfilt pretrain RECIPE --stage {stage}` first, or name a folder in "
                f"training.{self.job.stage}.start_from"
            )
        theirs = card.content.get("origins", {}).get("tokenizer")
        ours = fingerprint_tokenizer(self.tokenizer)
        if theirs not in (None, ours):
            raise UserError(
                f"{self.job.stage} begins from {stage}, which was trained with another tokenizer "
                f"(fingerprint {theirs}, now {ours}); set training.tokenizer to that of {stage}"
            )
        folder = self.keep_open.enter_context(opened_export(self.store, stage, card))
        return Beginning(folder, card.fingerprint, card.numbers)


def build(shop: Workshop) -> Built:
    """Return a stage's objective with its first weights, the same on every rank.

    Raises UserError or CheckpointError for weights that are missing or of another model.
    """
    torch.manual_seed(hash63("first weights", shop.job.seed, shop.job.stage))
    makers: Mapping[Stage, Callable[[Workshop], Built]] = {
        "med": _build_med,
        "captioner": _build_captioner,
        "filter": _build_filter,
        "stage1": _build_stage1,
        "stage2": _build_stage2,
    }
    built = makers[shop.job.stage](shop)
    return replace(
        built, origins=built.origins | {"tokenizer": fingerprint_tokenizer(shop.tokenizer)}
    )


def _med_preset(shop: Workshop) -> MedPreset:
    section = shop.job.section
    preset = med_preset(shop.job.stage, section).with_vocabulary(shop.tokenizer.num_plain)
    bert = preset.med.bert
    if section.dropout is not None:
        bert = replace(bert, dropout=section.dropout)
    objectives = preset.objectives
    if section.queue_size is not None:
        objectives = replace(objectives, queue_size=section.queue_size)
    size = image_size(shop.job)
    checkpoints = shop.job.config.checkpoints_activations
    return replace(
        preset,
        vision=replace(preset.vision, image_size=size, checkpoint_activations=checkpoints),
        med=replace(preset.med, bert=bert),
        objectives=objectives,
        fine_tuned_image_size=size,
    )


def _build_med(shop: Workshop) -> Built:
    preset, section = _med_preset(shop), shop.job.section
    model = preset.pretraining()
    origins = {}
    if (begun := shop.beginning()) is not None:
        folders = begun.folder / FILTER_FOLDER, begun.folder / CAPTIONER_FOLDER
        weights = load_filter(folders[0]).state_dict() | load_captioner(folders[1]).state_dict()
        load_strictly(model, weights, may_lack=_STARTS_ANEW, source=str(begun.folder))
        origins["start"] = begun.fingerprint
    if section.text_model is not None and begun is None:
        weights, origins["text_model"] = _bert(shop.job, section.text_model)
        model.text.load_bert(weights)
    if section.image_encoder is not None and begun is None:
        origins["image_encoder"] = load_tower(model.image_encoder, section.image_encoder)
    return _med(shop, model, origins)


def _build_filter(shop: Workshop) -> Built:
    preset, begun = _med_preset(shop), shop.beginning()
    assert begun is not None, "the filter always begins from something"
    objectives: MedObjectives = replace(
        FILTER_FINE_TUNING,
        joint_width=preset.objectives.joint_width,
        queue_size=preset.objectives.queue_size,
        momentum=preset.objectives.momentum,
    )
    vision = preset.vision
    folder = _part_of(begun, FILTER_FOLDER)
    part = MedFilter(vision, preset.med, joint_width=objectives.joint_width)
    load_part(part, load_filter(folder).state_dict())
    model = MedPretraining(vision, preset.med, objectives)
    load_strictly(model, part.state_dict(), may_lack=_STARTS_ANEW, source=str(folder))
    if (temperature := begun.numbers.get("temperature")) is not None:
        nn.init.constant_(model.temperature, temperature)
    return _med(shop, model, {"start": begun.fingerprint})


def _part_of(begun: Beginning, name: str) -> Path:
    """Return the folder of one model: of MED's export, or the one that was named."""
    part = begun.folder / name
    return part if part.is_dir() else begun.folder


def _med(shop: Workshop, model: MedPretraining, origins: dict[str, str]) -> Built:
    model.image_encoder.freeze(shop.job.section.num_frozen_layers)
    model.reset_momentum()
    model.queue.require_divisible(shop.global_batch_size)
    objective = MedObjective(
        model,
        shop.tokenizer,
        max_tokens=shop.max_tokens,
        batch_size=shop.micro_batch_size,
        alarm_after=shop.alarm_after,
    )
    return Built(objective, origins)


def _build_captioner(shop: Workshop) -> Built:
    preset, begun = _med_preset(shop), shop.beginning()
    assert begun is not None, "the captioner always begins from something"
    folder = (
        begun.folder / CAPTIONER_FOLDER if shop.job.section.start_from is None else begun.folder
    )
    model = MedCaptioner(preset.vision, preset.med)
    load_part(model, load_captioner(folder).state_dict())
    model.image_encoder.freeze(shop.job.section.num_frozen_layers)
    objective = CaptionerObjective(
        model, shop.tokenizer, max_tokens=shop.max_tokens, alarm_after=shop.alarm_after
    )
    return Built(objective, {"start": begun.fingerprint})


def _blip2_preset(shop: Workshop) -> Blip2Preset:
    section = shop.job.section
    preset = blip2_preset(shop.job.stage, section).with_vocabulary(shop.tokenizer.num_plain)
    qformer = preset.stage1.qformer
    if section.dropout is not None:
        qformer = replace(qformer, dropout=section.dropout)
    return replace(
        preset,
        vision=replace(preset.vision, image_size=image_size(shop.job)),
        stage1=replace(preset.stage1, qformer=qformer),
    )


def _build_stage1(shop: Workshop) -> Built:
    preset, section = _blip2_preset(shop), shop.job.section
    model = preset.build_stage1(image_dtype=shop.image_dtype)
    origins = {}
    if (begun := shop.beginning()) is not None:
        load_strictly(model, stage1_of(begun.folder, preset), source=str(begun.folder))
        origins["start"] = begun.fingerprint
    else:
        if section.text_model is not None:
            weights, origins["text_model"] = _bert(shop.job, section.text_model)
            model.qformer.load_bert(weights)
        _load_frozen_tower(shop, model)
    objective = Stage1Objective(
        model,
        shop.tokenizer,
        max_tokens=shop.max_tokens,
        contrast_size=shop.contrast_size,
        alarm_after=shop.alarm_after,
    )
    return Built(objective, origins, {"image_encoder": _fingerprint(model.image_encoder)})


def _load_frozen_tower(shop: Workshop, model: Stage1) -> None:
    name = shop.job.section.image_encoder
    if name is None:
        raise UserError(
            "stage1 reads a frozen image encoder: set training.stage1.image_encoder to a file of "
            "EVA-CLIP or CLIP, a folder, 'trained' (that of med) or 'random'"
        )
    assert isinstance(model.image_encoder, FrozenImageEncoder)
    if name == TRAINED:
        name = str(shop.export_of("med").folder / CAPTIONER_FOLDER)
    load_tower(model.image_encoder, name)


def _build_stage2(shop: Workshop) -> Built:
    preset, begun = _blip2_preset(shop), shop.beginning()
    assert begun is not None, "stage 2 always begins from something"
    weights = stage1_of(begun.folder, preset)
    objective, origins, frozen = build_stage2(
        shop.job,
        preset,
        weights,
        image_dtype=shop.image_dtype,
        llm_dtype=shop.llm_dtype,
        max_tokens=shop.max_tokens,
    )
    return Built(objective, origins | {"start": begun.fingerprint}, frozen)


def stage1_of(folder: Path, preset: Blip2Preset) -> dict[str, Tensor]:
    """Return a stage 1's weights under our names, of a folder of transformers or of LAVIS."""
    if (folder / LAVIS_FILE).is_file():
        tower = CLIP_VIT if preset.vision.has_norm_before else EVA_VIT
        return stage1_weights(folder / LAVIS_FILE, tower=tower)
    return dict(load_stage1(folder).state_dict())


def _bert(job: TrainingJob, name: str) -> tuple[dict[str, Tensor], str]:
    """Return the weights of a BERT and their fingerprint. Raises UserError."""
    folder = _resolved(job, name, "text_model")
    return read_weights(folder), fingerprint_folder(folder, lambda n: n.endswith(".safetensors"))


def _resolved(job: TrainingJob, name: str, key: str) -> Path:
    """Return a folder, or that of a name on the hub. Raises UserError that names the key."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return resolve_model(ModelConfig(name=name, revision=job.config.revisions.get(name)))
    except ModelError as error:
        raise UserError(f"{key} = {name!r}: {error}") from error


def _fingerprint(module: nn.Module) -> str:
    return fingerprint_tensors(module.state_dict().items())
