"""Mirrors the journals into MLflow: one parent run per job, one child run per stage.

The runner says which stages begin and end; a background thread does the rest. Once a second it compares what
MLflow should hold with what it holds and sends the difference, so a dead server only means that there is more
to send later: in this process, or in the next run of the job. What is remembered where:

- `mlflow.json` in the folder of the job and of each stage: the run's id, and the end that MLflow knows of.
- the run itself: the last step of every metric, so that nothing is sent twice, whoever is killed when.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline import storage
from pipeline.printable import counted
from pipeline.tracking.connection import Connection
from pipeline.tracking.contract import StageRecord
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.runs import End, Run, is_sqlite, load_state, milliseconds, save_state, shown, store_uri

POLL_SECONDS = 1.0
SYSTEM_SECONDS = 5.0
RETRY_SECONDS = 30.0  # at most, between two attempts at a server that does not answer
SERVER_PATIENCE_SECONDS = 10.0
SQLITE_PATIENCE_SECONDS = 60.0  # it cannot be dead, but creating it is slow on a busy machine
ATTEMPTS = 3  # at a run that fails although the server answers


class MlflowTracker:
    """A tracker (see contract.py) that mirrors into the store at `uri` (see runs.store_uri).

    `end_stage` is also right for a stage that was done before: what MLflow already has is not sent again, and
    where there is nothing to send at all, mlflow is not even imported. `warn` is called, from any thread, once at most
    for what MLflow does not take, where a damaged store was set aside, and for what earlier runs had left to be sent.
    """

    def __init__(self, output: str, *, warn: Callable[[str], None], uri: str | None = None) -> None:
        self.uri = store_uri(output, uri)
        self.warn = warn
        self.warned = False
        self.connection = Connection(self.uri, warn)
        self.mirror = Mirror(self.connection)
        self.parent: Run | None = None
        self.stages: list[Run] = []
        self.lock = threading.Lock()
        self.wake = threading.Event()
        self.closing = False
        self.began = time.time()
        self.complete = self.answered = True  # the last time that something was sent
        self.champion: str | None = None
        self.pause = POLL_SECONDS
        self.samples: list[tuple[Run, int, dict[str, float]]] = []
        self.sampled = -math.inf
        self.thread = threading.Thread(target=self._work, name="to-mlflow", daemon=True)

    # What the runner calls: nothing here reads, writes or waits, but for close.

    def start_job(
        self, name: str, output: str, params: Mapping[str, Any], tags: Mapping[str, str], title: str = ""
    ) -> None:
        self.parent = Run(name, output, None, params, tags, title=title)
        self.thread.start()

    def start_stage(self, stage: StageRecord) -> None:
        self._run_of(stage, begun=True)
        self.wake.set()

    def end_stage(
        self,
        stage: StageRecord,
        status: str,
        metrics: Mapping[str, float],
        artifacts: Sequence[str],
        model: str | None = None,
    ) -> None:
        run = self._run_of(stage, begun=False)
        run.title = stage.title or stage.name
        run.end = End(status, dict(metrics), tuple(artifacts), model)
        self.wake.set()

    def add_figures(self, folder: str, figures: Mapping[str, float], temperature: float | None) -> None:
        for run in self.stages:
            if run.folder == folder:
                run.temperature, run.figures = temperature, dict(figures)
        self.wake.set()

    def end_job(
        self,
        status: str,
        metrics: Mapping[str, float],
        artifacts: Sequence[str],
        champion: str | None = None,
        note: str = "",
    ) -> None:
        self.champion = champion
        if self.parent:
            self.parent.figures, self.parent.pages, self.parent.note = dict(metrics), tuple(artifacts), note
            self.parent.end = End(status)
            self.wake.set()

    def close(self) -> None:
        """Send what is still to be sent; give up where MLflow has taken nothing for ten seconds. What has begun
        and not ended becomes KILLED. Says how many records earlier runs had left."""
        patience = SQLITE_PATIENCE_SECONDS if is_sqlite(self.uri) else SERVER_PATIENCE_SECONDS
        if not self.thread.is_alive():
            return
        unfinished = [run for run in self.stages if run.begun and run.end is None]
        for run in unfinished:
            run.end = End("killed")
        if self.parent and self.parent.end is None and any(run.begun for run in self.stages):
            self.parent.end = End("killed")
        self.connection.took()
        self.closing = True
        self.wake.set()
        while self.thread.is_alive() and self.connection.silent_for() < patience:
            self.thread.join(0.1)
        if self.thread.is_alive():
            self._warn(f"it took nothing for {patience:.0f} s")
        if number := sum(run.late for run in self.stages):
            given_up = any(run.failures >= ATTEMPTS for run in self.stages)
            there = self.complete and not given_up and not self.thread.is_alive()
            self.warn(
                f"MLflow at {shown(self.uri)} lacked {counted(number, 'record')} of earlier runs; "
                + ("it has them all now" if there else "what of them is still missing is sent by the next run")
            )

    def unsent(self) -> list[str]:
        """By what MLflow itself said last; what it has lost since then it gets again too."""
        runs = [*self.stages, *([self.parent] if self.parent else [])]
        return [run.name for run in runs if (run.begun or run.end) and not self._has_ended(run)]

    def _has_ended(self, run: Run) -> bool:
        try:
            state = run.state or load_state(run, shown(self.uri))
        except Exception:  # the output is out of reach
            return False
        return run.end is not None and state["ended"] == run.end.status and run.failures < ATTEMPTS

    def _run_of(self, stage: StageRecord, begun: bool) -> Run:
        """The run of a stage; a stage that begins again after its end gets a new one."""
        with self.lock:
            known = [run for run in self.stages if run.folder == stage.folder]
            if known and not (begun and known[0].end):
                return known[0]
            run = Run(stage.name, stage.folder, self.parent, stage.params, stage.tags, begun)
            run.title, run.datasets = stage.title or stage.name, stage.datasets
            self.stages = [other for other in self.stages if other not in known] + [run]
            return run

    # The background thread.

    def _work(self) -> None:
        quiet_until = 0.0
        while True:
            self.wake.wait(POLL_SECONDS)
            self.wake.clear()
            closing, failed = self.closing, False
            try:
                self._sample()
                if closing or time.monotonic() >= quiet_until:
                    self.answered, self.complete = True, False
                    self.complete = self._send_all()
                    self.pause = POLL_SECONDS if self.complete else min(2 * self.pause, RETRY_SECONDS)
                    quiet_until = 0.0 if self.complete else time.monotonic() + self.pause
            except Exception as error:  # whatever happens here must not matter to the pipeline
                self._warn(error)
                failed = True
            # What failed although the server answers is sent again, ATTEMPTS times at most.
            if closing and (self.complete or failed or not self.answered):
                return

    def _send_all(self) -> bool:
        """Bring every run up to date; False if something is left because MLflow did not take it."""
        complete = True
        with self.lock:
            stages, runs = self.stages, [*self.stages, *([self.parent] if self.parent else [])]
        last = [run for run in stages if run.end and run.end.model][-1:]
        for run in runs:
            try:
                self._send(run, run.end, last=run in last)
                self._add(run)
            except Exception as error:
                self._warn(error)
                complete = False
                self._ask_again(runs)
                self.answered = self.connection.answers()
                if not self.answered:
                    return False
                run.failures += 1
                run.done = run.failures >= ATTEMPTS
        return complete

    def _ask_again(self, runs: list[Run]) -> None:
        """Ask MLflow anew what it has: an answer may have got lost on its way, or a store have been made anew."""
        self.connection.forget()
        for run in runs:
            run.run_id, run.position = None, 0
            if run.done and run.failures < ATTEMPTS:
                run.done = run.begun = False

    def _add(self, run: Run) -> None:
        """What is known of a model or of the job since its run has ended, and whether it is the best: nothing that
        MLflow has."""
        if run.failures >= ATTEMPTS:
            return
        told = run.told
        if run.done and any(told.values()) and run.state.get("told") != told:
            self.mirror.add(run, told)
        if run.done and run.folder == self.champion and not run.state.get("champion"):
            for other in self.stages:
                if other.state.get("champion"):
                    save_state(other, champion=False)
            self.mirror.crown(run)
            save_state(run, champion=True)

    def _send(self, run: Run, end: End | None, last: bool) -> None:
        if run.done or not (run.begun or end):
            return
        if not run.state:
            run.state = load_state(run, shown(self.uri))
        if not run.begun and end and run.state["ended"] == end.status and self.connection.holds(run):
            run.done = True
            return
        self.mirror.resume(run)
        if run.parent:
            self.mirror.send_journal(run, whole=end is not None, began=self.began)
        mine = [(at, values) for owner, at, values in self.samples if owner is run]
        self.mirror.send_samples(run, mine)
        self.samples = [sample for sample in self.samples if sample[0] is not run]
        if end:
            self.mirror.finish(run, end, last)

    def _sample(self) -> None:
        """Measure the driver's machine for the stage that runs now."""
        running = [run for run in self.stages if run.begun and run.run_id and not run.end]
        if running and time.monotonic() - self.sampled >= SYSTEM_SECONDS:
            self.sampled = time.monotonic()
            self.samples.append((running[-1], milliseconds(), self.connection.sample()))
            del self.samples[:-1000]

    def _warn(self, reason: object) -> None:
        if not self.warned:
            self.warned = True
            text = storage.redact(" ".join(str(reason).split()))
            self.warn(
                f"MLflow at {shown(self.uri)} does not take what is sent to it ({text[:200]}); the work "
                "goes on, and what is missing is sent when it answers again, in this run or the next"
            )
