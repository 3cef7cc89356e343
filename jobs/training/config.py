"""What a recipe's `training` section may say; `jobs.training.plan` fills in what the papers say.

Light on purpose: a recipe is read by commands that never train.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.loading.config import SourceConfig

Stage = Literal["med", "captioner", "filter", "stage1", "stage2"]
STAGES: tuple[Stage, ...] = get_args(Stage)
CORPUS_TOKENIZER = "corpus"
TRAINED = "trained"
_MODELS = ("start_from", "text_model", "image_encoder", "llm")

_FROZEN = ConfigDict(frozen=True, extra="forbid")
_Positive = Annotated[int, Field(ge=1)]
_Rate = Annotated[float, Field(gt=0, le=1)]
_NotNegative = Annotated[float, Field(ge=0)]


class StageConfig(BaseModel):
    """How one stage is trained; what is left out is as the paper had it for the preset."""

    model_config = _FROZEN

    preset: str | None = Field(
        default=None,
        description="Named sizes of the model; left out: 'base' for BLIP, begun from "
        "bert-base-uncased, and 'blip2-opt-2.7b' for BLIP-2.",
    )
    sources: dict[str, SourceConfig] | None = Field(
        default=None,
        description="Sources to train on and their shares; left out: what the paper trained on.",
    )
    global_batch_size: _Positive | None = Field(
        default=None, description="Pairs an optimizer step sees, over all workers."
    )
    micro_batch_size: _Positive | None = Field(
        default=None,
        description="Pairs that go through the model at a time on one worker; the rest of its "
        "share is accumulated. Left out: its whole share; where min_workers lets workers be lost, "
        "what every number of them can cut its share into.",
    )
    num_steps: _Positive | None = Field(default=None, description="Optimizer steps.")
    num_epochs: _Positive | None = Field(
        default=None, description="Epochs, where num_steps is left out."
    )
    schedule: Literal["warmup_cosine", "epoch_cosine", "epoch_decay"] | None = Field(
        default=None, description="How the learning rate moves."
    )
    peak_rate: _Rate | None = Field(default=None, description="The highest learning rate.")
    floor_rate: _NotNegative | None = Field(default=None, description="The last learning rate.")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Steps to the peak rate."
    )
    weight_decay: _NotNegative | None = Field(default=None, description="AdamW's.")
    beta2: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="AdamW's second beta."
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Largest norm of the gradient; the papers do not clip."
    )
    max_tokens: Annotated[int, Field(ge=4, le=512)] | None = Field(
        default=None, description="Longest text, special tokens included; all are padded to it."
    )
    image_size_px: _Positive | None = Field(
        default=None, description="Side of the images that the model sees."
    )
    augmentation: Literal["resize", "crop", "crop_randaugment"] | None = Field(
        default=None,
        description="What is done to images: 'crop' flips too, so captions that say left or right "
        "ask for 'resize'. Left out: crop for BLIP-2, with RandAugment for BLIP.",
    )
    start_from: str | None = Field(
        default=None,
        description="Hugging Face model to start from, a folder or a name on the hub; left out: "
        "the export of the stage before, or random weights for the first.",
    )
    text_model: str | None = Field(
        default=None,
        description="BERT to start from, a folder or a name on the hub, for med and stage1.",
    )
    image_encoder: str | None = Field(
        default=None,
        description="Image encoder to start from, which stage1 keeps frozen: 'random', 'trained' "
        "(med's), a folder of an image encoder or of a Blip model, or a file of EVA-CLIP, CLIP or "
        "DeiT as LAVIS and BLIP have it.",
    )
    num_frozen_layers: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Blocks of the image encoder of med that do not learn."
    )
    llm: str | None = Field(
        default=None,
        description="Frozen language model of stage2, a folder or a name on the hub; left out: "
        "the preset's.",
    )
    has_llm_dropout: bool = Field(
        default=True, description="Whether the frozen LLM's dropout is active, as in the paper."
    )
    shards_llm: bool = Field(
        default=False,
        description="Whether each worker of stage2 keeps only its share of the frozen LLM, for one "
        "that does not fit a device; layers are put together as they are computed.",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="Of the text stack or Q-Former; left out: the preset's."
    )
    queue_size: _Positive | None = Field(
        default=None, description="Momentum queue of med and filter, a multiple of the batch."
    )

    def content(self) -> dict[str, Any]:
        """Return what decides the weights: all but how batches and the frozen LLM are cut.

        Files are called by their names: what is in them has a fingerprint of its own, and where
        they lie, which may be elsewhere tomorrow, decides nothing.
        """
        how = {"micro_batch_size", "shards_llm"}
        content = self.model_dump(mode="json", exclude=how, exclude_none=True)
        return content | {key: _called(content[key]) for key in _MODELS if key in content}


class WorkersConfig(BaseModel):
    """Who trains: one process, or a group of workers that Ray Train keeps alive."""

    model_config = _FROZEN

    num_workers: _Positive = Field(
        default=1, description="Workers to train with; 1 trains in this process, without Ray."
    )
    min_workers: _Positive | None = Field(
        default=None, description="Go on with so few when nodes are lost; left out: num_workers."
    )
    has_gpu: bool | None = Field(
        default=None, description="Whether a worker takes a GPU; left out: where there is one."
    )
    cpus_per_worker: Annotated[float, Field(gt=0)] = Field(
        default=1, description="CPUs that Ray reserves for a worker."
    )
    max_failures: Annotated[int, Field(ge=-1)] = Field(
        default=3, description="Restarts of the group before giving up; -1: no limit."
    )

    @model_validator(mode="after")
    def _is_a_range(self) -> "WorkersConfig":
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is above num_workers")
        return self

    @property
    def possible(self) -> range:
        """Every number of workers that training may go on with."""
        return range(self.min_workers or self.num_workers, self.num_workers + 1)


class WatchConfig(BaseModel):
    """What is written down about training, and how often; decides no weight."""

    model_config = _FROZEN

    log_every_steps: _Positive = Field(default=50, description="Steps that one record averages.")
    checkpoint_every_steps: _Positive = Field(default=1000, description="Steps to a checkpoint.")
    keep_checkpoints: _Positive = Field(
        default=2, description="Newest checkpoints to keep, beside the best."
    )
    probe_every_steps: Annotated[int, Field(ge=0)] = Field(
        default=1000, description="Steps to a look at held-out samples; 0: never."
    )
    num_probe_samples: Annotated[int, Field(ge=2)] = Field(
        default=256, description="Held-out samples that probes look at."
    )
    alarm_after_steps: Annotated[int, Field(ge=0)] = Field(
        default=1000, description="Steps before what has not been learned becomes an alarm."
    )
    has_tensorboard: bool = Field(default=True, description="Write TensorBoard's event files.")
    wandb_project: str | None = Field(default=None, description="Log to this project of wandb.")
    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Of one worker's device, for MFU; left out: by its name."
    )


class TrainingConfig(BaseModel):
    """The section `training` of a recipe."""

    model_config = _FROZEN

    tokenizer: str = Field(
        default="bert-base-uncased",
        description="BERT tokenizer of MED and Q-Former, a folder or a name on the hub; 'corpus' "
        "makes one of the words of the corpus.",
    )
    revisions: dict[str, str] = Field(
        default_factory=dict,
        description="Commit, tag or branch of each model on the hub that is named here, by its "
        "name; left out: its main branch, which may be another one another day.",
    )
    vocabulary_size: Annotated[int, Field(ge=256, le=1_000_000)] = Field(
        default=8192, description="Most words of a tokenizer made of the corpus."
    )
    med_data: Literal["raw", "clean"] = Field(
        default="raw",
        description="What med, captioner and filter train on: the corpus as it came, which is all "
        "there is before captioner and filter are trained, or the cleaned one.",
    )
    held_out_share: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        default=0.001, description="Share of the images that no stage trains on; probes see them."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Of the forward pass; weights are float32. auto: bfloat16 on a GPU.",
    )
    is_compiled: bool = Field(default=False, description="Whether torch.compile makes the model.")
    checkpoints_activations: bool = Field(
        default=False,
        description="Compute MED's image encoder and the language model twice instead of storing "
        "what they compute.",
    )
    num_loader_workers: Annotated[int, Field(ge=0)] = Field(
        default=2, description="Processes that decode images for each training worker."
    )
    cache_folder: str | None = Field(
        default=None, description="Local folder for shards of a corpus on object storage."
    )
    num_at_once: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1,
        description="Trainings at a time that do not need each other, each in a process of its "
        "own on this machine: captioner beside filter, the arms of an ablation. For models so "
        "small that one processor is enough for each; they share the threads there are, whose "
        "number decides how sums are rounded and nothing else.",
    )
    workers: WorkersConfig = Field(default_factory=WorkersConfig, description="Who trains.")
    watch: WatchConfig = Field(default_factory=WatchConfig, description="What is written down.")
    med: StageConfig = Field(
        default_factory=StageConfig,
        description="Pretraining of the mixture of encoder-decoder (BLIP).",
    )
    captioner: StageConfig = Field(
        default_factory=StageConfig, description="Fine-tuning of CapFilt's captioner."
    )
    filter: StageConfig = Field(
        default_factory=StageConfig, description="Fine-tuning of CapFilt's filter."
    )
    stage1: StageConfig = Field(
        default_factory=StageConfig,
        description="BLIP-2's first stage: image encoder and Q-Former. "
        "`capfilt run` trains it when a recipe has this section.",
    )
    stage2: StageConfig = Field(
        default_factory=StageConfig,
        description="BLIP-2's second stage: Q-Former and language model. "
        "`capfilt run` trains it when a recipe has this section.",
    )

    def of(self, stage: Stage) -> StageConfig:
        """Return the section of one stage, with the paper's model where it names none."""
        section: StageConfig = getattr(self, stage)
        if section.preset is not None:
            return section
        text_model = section.text_model
        if stage in ("med", "stage1") and section.start_from is None:
            text_model = text_model or "bert-base-uncased"
        preset = "base" if is_med(stage) else "blip2-opt-2.7b"
        return section.model_copy(update={"preset": preset, "text_model": text_model})

    def content(self) -> dict[str, Any]:
        """Return what decides the weights of all stages."""
        return {stage: self.stage_content(stage) for stage in STAGES}

    def stage_content(self, stage: Stage) -> dict[str, Any]:
        """Return what decides the weights of one stage, beside its data and where it starts."""
        shared = {"tokenizer", "held_out_share", "precision"}
        if self.tokenizer == CORPUS_TOKENIZER:
            shared |= {"vocabulary_size"}
        if is_med(stage):
            shared |= {"med_data"}
        own = self.model_dump(mode="json", include=shared) | {"tokenizer": _called(self.tokenizer)}
        return own | self.of(stage).content()


def _called(model: str) -> str:
    """Return a model's name: of a path or an address the last part, on the hub all of it."""
    return model.rstrip("/").rpartition("/")[2] if model[:1] in "/." or "://" in model else model


def is_med(stage: Stage) -> bool:
    """Say whether a stage is one of BLIP's; the others are BLIP-2's."""
    return stage in ("med", "captioner", "filter")
