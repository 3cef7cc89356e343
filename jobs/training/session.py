"""What one rank has open while it trains, and how it takes up where another left off."""

import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from jobs.checkpoint import Checkpoints, Manifest, Snapshot, take_snapshot
from jobs.errors import UserError
from jobs.progress import Meter, stage_meter
from jobs.training.build import Built, Workshop, build
from jobs.training.context import TrainContext
from jobs.training.data import MicroBatches, cut, num_pairs, open_loader, open_tokenizer
from jobs.training.exports import ExportCard, read_card, write_export
from jobs.training.job import TrainingJob
from jobs.training.plan import Plan, plan_stage
from jobs.training.shard import check_sharding, gather_llm, shard_llm
from jobs.training.step import Precision, StepOptions, Stepper
from jobs.training.watch import TrainingWatch
from model.weight_files import CheckpointError
from pipeline.loader import Loader, LoaderError
from pipeline.runfile import FingerprintError, check_same
from pipeline.store import Store


@dataclass(frozen=True, slots=True)
class Session:
    """A stage on one rank, from its data to its weights."""

    job: TrainingJob
    context: TrainContext
    store: Store
    plan: Plan
    pieces: MicroBatches
    loader: Loader
    built: Built
    stepper: Stepper
    checkpoints: Checkpoints
    content: dict[str, Any]  # all that decides the weights
    is_sharded: bool = False  # each rank holds a part of the language model

    def resume(self) -> Manifest | None:
        """Load the newest checkpoint, if there is one, and return it.

        Raises UserError for one of another recipe, corpus or architecture.
        """
        manifest = self.checkpoints.latest()
        if manifest is None:
            return None
        where = self.checkpoints.path(manifest.step)
        try:
            check_same(manifest.content, self.content)
            objective = self.built.objective
            self.checkpoints.load(
                manifest,
                self.stepper.model,
                self.stepper.optimizer,
                self.built.frozen,
                objective.frozen,
            )
            self.loader.load_state_dict(manifest.state["loader"])
        except FingerprintError as error:
            changed = [
                f"  {key}: {old!r} then, {new!r} now"
                for key, (old, new) in error.differences.items()
            ]
            problem = "\n".join(["it was trained differently:", *changed])
            raise self._cannot_go_on(where, problem) from error
        except (CheckpointError, LoaderError) as error:
            raise self._cannot_go_on(where, str(error)) from error
        return manifest

    def _cannot_go_on(self, where: str, problem: str) -> UserError:
        return UserError(
            f"checkpoint {where}: {problem}\nTo go on from it, give back what it was made with; to "
            f"begin anew, delete {self.store.full(self.job.folder)}"
        )

    def snapshot(self, step: int, watch: TrainingWatch) -> Snapshot | None:
        """Copy this moment, on rank 0; every rank has to call it.

        Raises DivergedError rather than copy weights that are not finite.
        """
        self.stepper.guard.check()
        state = {"loader": self.loader.state_dict(), "watch": watch.state()}
        if not self.context.is_main:
            return None
        return take_snapshot(
            self.stepper.model,
            self.stepper.optimizer,
            self.built.objective.frozen,
            step=step,
            content=self.content,
            frozen=self.built.frozen,
            state=state,
            score=watch.score,
        )

    def finished(self) -> ExportCard | None:
        """Return the card of an export that this very training made already."""
        card = read_card(self.store, self.job.stage)
        return card if card is not None and card.content == self.content else None

    def hand_over(self, watch: TrainingWatch) -> ExportCard | None:
        """Write the export on rank 0; every rank returns its card once it is there.

        A language model in shards is put together for it: this is the last that is done.
        """
        if self.is_sharded:
            gather_llm(self.built.objective.model, self.context)
        if self.context.is_main:
            facts = {
                "step": self.plan.num_steps,
                "content": self.content,
                "losses": watch.losses,
                "probes": watch.probes,
                "numbers": self.built.objective.numbers(),
            }
            write_export(self.store, self.job.stage, facts, self.built.objective.export)
        self.context.wait_for_all()
        return read_card(self.store, self.job.stage)

    def meter(self, resumed: int) -> AbstractContextManager[Meter]:
        """Return the progress meter of the stage; one rank shows it."""
        if not self.context.is_main:
            return nullcontext(_Silent())
        total = self.plan.num_steps
        return stage_meter(self.job.stage, total, unit="steps", resumed=resumed, stream=sys.stderr)


class _Silent:
    def advance(self, done: int, kept: int) -> None:
        """Say nothing: another rank does."""


def open_session(job: TrainingJob, context: TrainContext, stack: ExitStack) -> Session:
    """Open all that a rank trains with; `stack` closes it.

    Raises UserError, before any step, for whatever is missing or does not fit.
    """
    check_sharding(job)
    plan = plan_stage(job.stage, job.section, num_pairs(job))
    pieces = cut(job, plan.global_batch_size, context)
    store = job.open_store()
    tokenizer = open_tokenizer(job, context)
    precision = Precision.of(job.config.precision, context.device)
    shop = Workshop(
        job=job,
        store=store,
        tokenizer=tokenizer,
        global_batch_size=plan.global_batch_size,
        micro_batch_size=pieces.size,
        contrast_size=pieces.size * context.world_size,
        image_dtype=precision.dtype,
        llm_dtype=None if context.device.type == "cuda" else torch.float32,
        keep_open=stack,
    )
    try:
        built = build(shop)
        loader = stack.enter_context(open_loader(job, plan.global_batch_size, context, pieces))
        options = StepOptions(
            precision=precision,
            clip_norm=job.section.clip_norm,
            seed=job.seed,
            is_compiled=job.config.is_compiled,
        )
        is_sharded = job.section.shards_llm and shard_llm(built.objective.model, context)
        stepper = Stepper(built.objective, plan, context, options)
    except (CheckpointError, ValueError) as error:
        raise UserError(f"{job.stage}: {error}") from error
    keep = job.config.watch.keep_checkpoints
    checkpoints = Checkpoints(store, f"{job.folder}/checkpoints", keep=keep)
    return Session(
        job=job,
        context=context,
        store=store,
        plan=plan,
        pieces=pieces,
        loader=loader,
        built=built,
        stepper=stepper,
        checkpoints=stack.enter_context(checkpoints),
        content=_content(job, plan, loader, built),
        is_sharded=is_sharded,
    )


def _content(job: TrainingJob, plan: Plan, loader: Loader, built: Built) -> dict[str, Any]:
    position = loader.state_dict()
    return {
        "stage": job.stage,
        "recipe": job.config.stage_content(job.stage),
        "steps": {"global_batch_size": plan.global_batch_size, "num_steps": plan.num_steps},
        "loader": loader.config.content(),
        "data": position["data"],
        "origins": dict(built.origins),
        "frozen": dict(built.frozen),
    }
