"""Watches training: averages, alarms, probes and pace, into one record every so many steps."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from jobs.training.context import TrainContext
from jobs.training.gates import Gates
from jobs.training.logs import MetricsLog
from jobs.training.objectives import Batch, Objective
from jobs.training.pace import Pace
from jobs.training.probes import probe, score_of
from jobs.training.step import Window
from pipeline.loader import LoaderTiming

_log = logging.getLogger(__name__)
Probe = Callable[[Objective, Sequence[Batch]], dict[str, float]]


class TrainingWatch:
    """Collects what happens between two records; rank 0 writes them.

    Its memory goes into checkpoints, so that a resumed run writes the records of an undisturbed
    one, apart from pace.
    """

    def __init__(
        self,
        objective: Objective,
        context: TrainContext,
        pace: Pace,
        log: MetricsLog | None,
        probe_with: Probe = probe,
    ) -> None:
        """`log` is None on all ranks but the first."""
        self._objective = objective
        self._context = context
        self.pace = pace
        self._log = log
        self._probe = probe_with
        self._gates = Gates(objective.expected)
        self._window = Window(context)
        self._told: set[str] = set()
        self._new_probes: dict[str, float] = {}  # that no record tells of yet
        self.probes: dict[str, float] = {}
        self.losses: dict[str, float] = {}

    @property
    def score(self) -> float | None:
        """What the best checkpoint is chosen by: the last probe, higher is better."""
        return score_of(self.probes)

    def see(self, losses: Mapping[str, Tensor]) -> None:
        """Count a step, without waiting for the device."""
        self._window.add(losses)

    def look(self, batches: Sequence[Batch]) -> None:
        """Probe the model on held-out batches; ranks without any go on to wait for the others."""
        if batches:
            self.probes = self._new_probes = self._probe(self._objective, batches)

    def record(self, step: int, rate: float, timing: LoaderTiming) -> None:
        """Write a record of the steps since the last one; every rank has to call it."""
        self.losses = self._window.means()
        if self._log is None:
            return
        numbers = self.losses | self._objective.numbers()
        alarms = self._gates.judge(step, numbers | self._new_probes)
        for alarm in alarms:
            if alarm.name not in self._told:
                _log.warning("step %d: %s: %s", step, alarm.name, alarm.advice)
        self._told = {alarm.name for alarm in alarms}
        record: dict[str, Any] = {"step": step, "rate": rate, **numbers}
        if self._new_probes:
            record["probe"], self._new_probes = self._new_probes, {}
        record["alarms"] = {alarm.name: alarm.advice for alarm in alarms}
        self._log.write(record | {"pace": self.pace.numbers(timing)})

    def flush(self) -> None:
        """Make the records visible, before a checkpoint that goes on from them."""
        if self._log is not None:
            self._log.flush()

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes; every rank has to call it."""
        window = self._window.state()
        return {
            "window": window,
            "gates": dict(self._gates.held),
            "probes": self.probes,
            "new_probes": self._new_probes,
            "losses": self.losses,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as the run whose state this is."""
        self._window.restore(state["window"])
        self._gates.held = dict(state["gates"])
        self.probes = dict(state["probes"])
        self._new_probes = dict(state["new_probes"])
        self.losses = dict(state["losses"])
