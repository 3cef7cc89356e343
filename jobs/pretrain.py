"""Training, in order: open, resume, step by step, write down, hand over. One loop for all stages.

MED pretraining, the fine-tuning of captioner and filter, and both stages of BLIP-2 differ by their
objective (`jobs.training.objectives`) and their plan, and by nothing here.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from jobs.errors import RunError, UserError
from jobs.training.context import TrainContext, this_process
from jobs.training.data import check_workers, held_out, on_device
from jobs.training.exports import ExportCard, read_card
from jobs.training.gates import DivergedError
from jobs.training.job import TrainingJob
from jobs.training.logs import MetricsLog, open_sinks
from jobs.training.objectives import Batch
from jobs.training.pace import Pace, counted_tflops
from jobs.training.probes import probe
from jobs.training.session import Session, open_session
from jobs.training.watch import Probe, TrainingWatch


def pretrain(job: TrainingJob, should_stop: Callable[[], bool]) -> ExportCard | None:
    """Train a stage with the workers that its recipe asks for; return its export's card.

    None when it was stopped first; the same call goes on from there. Raises UserError for what is
    missing or does not fit, before any step, and RunError, which says where, for a loss that is not
    finite.
    """
    try:
        return _pretrain(job, should_stop)
    except DivergedError as error:
        raise RunError(f"{job.root}/{job.folder}: {error}") from error


def _pretrain(job: TrainingJob, should_stop: Callable[[], bool]) -> ExportCard | None:
    if job.config.workers.num_workers == 1:
        return train(this_process(), job, should_stop=should_stop)
    check_workers(job)
    from jobs.training.ray_train import train_on_ray  # only here: Ray takes seconds to import

    train_on_ray(job, os.environ.get("RAY_ADDRESS"))
    card = read_card(job.open_store(), job.stage)
    if card is None:
        raise UserError(f"{job.stage} ended without an export; see the workers' log")
    return card


def train(
    context: TrainContext,
    job: TrainingJob,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    probe_with: Probe = probe,
) -> ExportCard | None:
    """Train a stage as one rank, in this process or among others; return its export's card.

    Kill it anywhere: called again, at this or another world size, it ends with the same weights.
    """
    with ExitStack() as stack:
        session = open_session(job, context, stack)
        if (card := session.finished()) is not None:
            return card
        manifest = session.resume()
        first = 0 if manifest is None else manifest.step
        watch = _open_watch(session, first, stack, probe_with)
        if manifest is not None:
            watch.restore(manifest.state["watch"])
        meter = stack.enter_context(session.meter(first))
        probes = []
        if context.is_main or session.is_sharded:  # a model in shards takes all ranks to compute
            probes = held_out(job, session.built.objective, context.device)
        for step in range(first, session.plan.num_steps):
            _one_step(session, watch, step, is_first=step == first)
            _after_step(session, watch, step + 1, probes)
            meter.advance(1, 1)
            if _is_stopped(session, step + 1, should_stop):
                _save(session, watch, step + 1)
                return None
        session.checkpoints.wait()
        return session.hand_over(watch)


def _open_watch(session: Session, first: int, stack: ExitStack, probe_with: Probe) -> TrainingWatch:
    """Clear away what was after the step that training goes on from; open the log."""
    job, context, config = session.job, session.context, session.job.config.watch
    log = None
    if context.is_main:
        session.checkpoints.discard_after(first if first else -1)
        sinks = open_sinks(session.store, job.folder, config, f"{job.root}/{job.stage}")
        opened = MetricsLog(session.store, job.folder, resumed_at=first, sinks=sinks)
        log = stack.enter_context(opened)
    batch = session.plan.global_batch_size
    pace = Pace(
        context.device,
        batch,
        session.pieces.count,
        num_workers=context.world_size,
        peak_tflops=config.peak_tflops,
    )
    return TrainingWatch(session.built.objective, context, pace, log, probe_with)


def _one_step(session: Session, watch: TrainingWatch, step: int, *, is_first: bool) -> None:
    def batches() -> Iterator[Batch]:
        for _ in range(session.pieces.count):
            loaded = next(session.loader)
            objective, device = session.built.objective, session.context.device
            yield on_device(session.loader, loaded, objective, device)

    def update() -> None:
        watch.see(session.stepper.update(step, batches(), session.pieces))

    if is_first and not session.job.config.is_compiled:
        watch.pace.step_tflops = counted_tflops(update)
    else:
        update()


def _after_step(session: Session, watch: TrainingWatch, done: int, probes: list[Batch]) -> None:
    """Probe, record and save where it is due after so many steps."""
    config = session.job.config.watch
    if _is_due(session, done, config.probe_every_steps):
        watch.look(probes)
    if _is_due(session, done, config.log_every_steps):
        session.stepper.guard.check()
        watch.record(done, session.plan.schedule(done - 1), session.loader.take_timing())
    if _is_due(session, done, config.checkpoint_every_steps):
        _save(session, watch, done)


def _is_due(session: Session, done: int, every: int) -> bool:
    return every > 0 and (done % every == 0 or done == session.plan.num_steps)


def _save(session: Session, watch: TrainingWatch, done: int) -> None:
    snapshot = session.snapshot(done, watch)
    if snapshot is not None:
        watch.flush()
        session.checkpoints.save(snapshot)


def _is_stopped(session: Session, done: int, should_stop: Callable[[], bool]) -> bool:
    """Say whether to stop here; several ranks ask each other only now and then."""
    if session.context.world_size > 1 and done % session.job.config.watch.log_every_steps:
        return False
    return session.context.agree(should_stop())
