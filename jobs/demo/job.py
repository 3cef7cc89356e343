"""`capfilt demo`: build the synthetic web, serve it, run the job, compare with the truth."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from enum import Enum
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import torch

from jobs.ablate import Ablation, arm_root, arm_tasks, conclude, write_ablation
from jobs.demo.behaviours import Delivery
from jobs.demo.judge import HEADER, FilterQuality, exact_share, judge_filter
from jobs.demo.noise import Noise
from jobs.demo.plan import PlannedImage, WebConfig
from jobs.demo.web import SyntheticWeb, build_web
from jobs.errors import UserError
from jobs.evaluate import read_captions
from jobs.evaluation.config import ARMS
from jobs.progress import stage_meter
from jobs.recipe import Recipe, load_recipe
from jobs.summary import SOME_FAILED, RunSummary
from jobs.training.config import Stage
from jobs.training.side_by_side import Task, side_by_side
from jobs.whole import Figures, make_corpus, train_blip2
from pipeline.corpus import Corpus
from pipeline.download import STAGE
from pipeline.report.build import build_report
from pipeline.verify import Severity, verify

_QUICK_STEPS = {"med": 150, "captioner": 60, "filter": 60, "stage1": 60, "stage2": 40}
_FULL_SEEDS = 3
_SHOWN = ("TR@1", "IR@1", "CIDEr", "exact")


class Extent(Enum):
    """How much of the job there is."""

    QUICK = "a smaller web, fewer steps, no comparison"
    USUAL = "two arms of the comparison, one seed"
    FULL = "all four arms, three seeds"


@dataclass(frozen=True, slots=True)
class SourceResult:
    """What became of one source's rows, beside what the truth says should become of them."""

    source: str
    num_rows: int
    num_kept: int
    num_dropped: int
    num_failed: int
    num_obtainable: int
    """Rows whose image a careful client can get and should keep."""
    num_surprises: int
    """Rows kept that should not be, or the other way round."""
    num_noisy: int
    """Kept rows whose caption does not fit the image; what the filter is to find."""


@dataclass(frozen=True, slots=True)
class DemoSummary:
    """The small table at the end of the demo."""

    root: str
    run: RunSummary
    sources: tuple[SourceResult, ...]
    num_faults: int
    filter: dict[str, FilterQuality]
    proof: Ablation | None
    report: str | None

    @property
    def exit_code(self) -> int:
        """0 when every shard is there and whole."""
        return self.run.exit_code or (SOME_FAILED if self.num_faults else 0)

    def to_json(self) -> dict[str, Any]:
        """Return the table for machines."""
        return {
            "root": self.root,
            "run": self.run.to_json(),
            "sources": {
                each.source: {
                    name: getattr(each, name) for name in each.__slots__ if name != "source"
                }
                for each in self.sources
            },
            "faults": self.num_faults,
            "filter": {name: asdict(each) for name, each in self.filter.items()},
            "models": self.run.models,
            "proof": None if self.proof is None else self.proof.to_json(),
            "report": self.report,
        }

    def text(self) -> str:
        """Return the table for people."""
        if self.run.is_stopped or self.run.failures:
            lines = [f"failed {name}: {why}" for name, why in self.run.failures.items()]
            return "\n".join([*lines, "not finished; to continue, give the same command again"])
        header = f"{'source':<8}{'rows':>7}{'kept':>7}{'dropped':>9}{'failed':>8}{'noisy':>8}"
        rows = [
            f"{each.source:<8}{each.num_rows:>7,}{each.num_kept:>7,}{each.num_dropped:>9,}"
            f"{each.num_failed:>8,}{each.num_noisy / max(each.num_kept, 1):>8.1%}"
            for each in self.sources
        ]
        surprises = sum(each.num_surprises for each in self.sources)
        obtainable = sum(each.num_obtainable for each in self.sources)
        return "\n".join(
            [
                header,
                *rows,
                "",
                f"{obtainable:,} rows could be had; {surprises:,} rows ended otherwise than the "
                "web's truth says.",
                "noisy: kept captions that do not fit their image, which the filter is to find.",
                "",
                HEADER,
                *(each.text(name) for name, each in self.filter.items()),
                "right: all that a caption states is true of its picture; wrong found: how many of",
                "the wrong ones are dropped; drops right: how many of those dropped are wrong.",
                *self._models(),
                "",
                f"{self.num_faults:,} faults in the corpus (capfilt verify {self.root})",
                f"the report: {self.report}",
            ]
        )

    def _models(self) -> Iterator[str]:
        """Yield what was learned: by the same small model on each arm, and by BLIP-2."""
        if self.proof is not None:
            yield from ("", "The same small model trained on each, equal steps:")
            yield self.proof.text(_SHOWN)
        if self.run.models:
            yield from ("", "BLIP-2 on the clean corpus:")
        for stage, figures in self.run.models.items():
            found = (f"{name} {figures[name]:.3f}" for name in _SHOWN if name in figures)
            yield f"{stage:<11}{', '.join(found)}"
        yield "exact: captions of unseen pictures that name every object and state nothing wrong."


def run_demo(
    folder: Path,
    *,
    should_stop: Callable[[], bool],
    extent: Extent = Extent.USUAL,
    seed: int = 0,
) -> DemoSummary:
    """Run the whole job below `folder` and return what it came to; continues where it stopped.

    A full demo goes on from a usual one in the same folder.

    Raises UserError when the folder holds a demo of another size, or the port is taken.
    """
    folder, is_quick = folder.absolute(), extent is Extent.QUICK
    web = _build(folder / "web", WebConfig.quick(seed) if is_quick else WebConfig(seed=seed))
    # Models this small lose by sharing their work, and with one thread the same seed gives the same
    # weights on machines of any size.
    torch.set_num_threads(1)
    recipe = demo_recipe(folder / "corpus", web, extent)
    with ExitStack() as served:
        try:
            served.enter_context(web.serve())
        except OSError as error:  # of starting it alone: a full disk is another matter
            raise UserError(
                f"the demo's web cannot be served on port {web.port}: {error}; stop what listens "
                f"there, or delete {folder} to begin anew on another port"
            ) from error
        done = make_corpus(recipe, should_stop, command="capfilt demo")
    if done.exit_code:
        return DemoSummary(recipe.root, done, (), 0, {}, None, None)
    learned = _learn(recipe, should_stop, is_quick=is_quick)
    if learned is None:
        return DemoSummary(recipe.root, replace(done, is_stopped=True), (), 0, {}, None, None)
    models, proof = learned
    return _summarise(recipe, replace(done, models=models), proof, web.truth())


def _learn(
    recipe: Recipe, should_stop: Callable[[], bool], *, is_quick: bool
) -> tuple[dict[Stage, Figures], Ablation | None] | None:
    """Train BLIP-2 and, beside it, the arms of the proof, all on what the corpus became."""
    assert recipe.training is not None
    tasks: dict[str, Task[Any]] = {"blip2": partial(train_blip2, recipe)}
    if not is_quick:
        tasks |= arm_tasks(recipe)
    found = side_by_side(tasks, recipe.training.num_at_once, should_stop)
    if found is None:
        return None
    models, *figures = found
    return models, None if is_quick else conclude(recipe, figures)


def _summarise(
    recipe: Recipe, done: RunSummary, proof: Ablation | None, truth: dict[str, PlannedImage]
) -> DemoSummary:
    """Judge by the truth, and write the report."""
    corpus = Corpus(recipe.root)
    if proof is not None:
        proof = _with_exact(recipe, proof, truth)
        write_ablation(corpus, proof)
    return DemoSummary(
        root=corpus.root,
        run=replace(done, models=_models(recipe, done, truth)),
        sources=_compare(recipe, corpus, truth),
        num_faults=sum(fault.severity is Severity.FAULT for fault in verify(corpus)),
        filter=judge_filter(corpus, truth, recipe.select.itm_threshold if recipe.select else 0.5),
        proof=proof,
        report=build_report(corpus).page,
    )


def _models(
    recipe: Recipe, done: RunSummary, truth: dict[str, PlannedImage]
) -> dict[Stage, Figures]:
    return {
        stage: figures | {"exact": _exact(recipe, recipe.root, stage, truth)}
        for stage, figures in done.models.items()
    }


def _with_exact(recipe: Recipe, proof: Ablation, truth: dict[str, PlannedImage]) -> Ablation:
    stage = recipe.ablation.stage
    values = {
        each.arm: tuple(
            _exact(recipe, arm_root(recipe, each.arm, seed), stage, truth) for seed in proof.seeds
        )
        for each in proof.results
    }
    return proof.with_figure("exact", values)


def _exact(recipe: Recipe, root: str, stage: Stage, truth: dict[str, PlannedImage]) -> float:
    """Return the share of exact captions of the model that a stage trained below `root`."""
    assert recipe.evaluation is not None
    said = read_captions(Corpus(root).store, stage)
    return exact_share(said, Corpus(recipe.root), recipe.evaluation.source, truth)


def demo_recipe(root: Path, web: SyntheticWeb, extent: Extent = Extent.USUAL) -> Recipe:
    """Return the embedded recipe for a web that was built: its lists, its port.

    A quick one trains for fewer steps, after which the models know little.
    """
    lists = {name: getattr(web.lists, name) for name in ("laion", "cc3m", "human", "test")}
    overrides = [f"sources.{name}.paths=[{str(path)!r}]" for name, path in lists.items()]
    seed = web.config.seed
    num_seeds = _FULL_SEEDS if extent is Extent.FULL else 1
    overrides += [f"seed={seed}", f"ablation.seeds={list(range(seed, seed + num_seeds))}"]
    overrides += [f"root={str(root)!r}", f"fetch.allowed_ports=[{web.port}]"]
    weights = str(files("jobs") / "demo" / "encoder_weights")
    overrides += [f"training.{stage}.image_encoder={weights!r}" for stage in ("med", "stage1")]
    overrides += [f"training.stage2.llm={str(files('jobs') / 'demo' / 'llm_weights')!r}"]
    if extent is Extent.FULL:
        overrides.append(f"ablation.arms={list(ARMS)}")
    if extent is Extent.QUICK:
        overrides += [f"training.{stage}.num_steps={n}" for stage, n in _QUICK_STEPS.items()]
    return load_recipe(str(files("jobs") / "recipes" / "demo.yaml"), overrides)


def _build(folder: Path, config: WebConfig) -> SyntheticWeb:
    total = config.num_web + config.num_human + config.num_test
    try:
        with stage_meter("web", total, unit="images", stream=sys.stderr) as meter:
            return build_web(folder, config, on_progress=lambda done, of: meter.advance(1, 1))
    except ValueError as error:
        raise UserError(str(error)) from error


def _compare(
    recipe: Recipe, corpus: Corpus, truth: dict[str, PlannedImage]
) -> tuple[SourceResult, ...]:
    return tuple(_compare_source(corpus, each.name, truth) for each in recipe.sources)


def _compare_source(corpus: Corpus, source: str, truth: dict[str, PlannedImage]) -> SourceResult:
    tally: Counter[str] = Counter()
    for record in corpus.shards(STAGE, source):
        with corpus.open(record, "parquet") as stream:
            rows = pq.read_table(stream, columns=["url", "verdict"]).to_pylist()
        for row in rows:
            planned = truth[urlsplit(row["url"]).path]
            is_obtainable = planned.delivery in (Delivery.YES, Delivery.RETRY)
            is_kept = row["verdict"] == "kept"
            tally[row["verdict"]] += 1
            tally["obtainable"] += is_obtainable
            tally["surprises"] += is_kept != is_obtainable
            tally["noisy"] += is_kept and planned.noise not in (Noise.FULL, Noise.TERSE)
    return SourceResult(
        source=source,
        num_rows=tally["kept"] + tally["dropped"] + tally["failed"],
        num_kept=tally["kept"],
        num_dropped=tally["dropped"],
        num_failed=tally["failed"],
        num_obtainable=tally["obtainable"],
        num_surprises=tally["surprises"],
        num_noisy=tally["noisy"],
    )
