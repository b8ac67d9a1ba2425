"""Defines what a tracker does for the runner: it mirrors the journals in the stage folders, which are the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

OURS = "noisy_lambda."  # begins the names of tags that are ours
COMMIT = "mlflow.source.git.commit"  # a tag, by MLflow's own name, which its pages show beside these alone:
SOURCE = {"mlflow.source.name": "noisy-lambda", "mlflow.source.type": "LOCAL"}


@dataclass(frozen=True)
class Dataset:
    """Data that a stage reads. `digest`: of what is in them, 36 digits at most; `where`: a pattern or a folder;
    `context`: what for; `facts`: numbers about them."""

    name: str
    digest: str
    where: str
    context: str
    facts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StageRecord:
    """A stage as a tracker sees it. `folder` holds the journal; the tracker keeps its run ids there too."""

    name: str  # "gen1-student"
    folder: str
    params: Mapping[str, Any] = field(default_factory=dict)  # identity settings
    tags: Mapping[str, str] = field(default_factory=dict)  # hashes of what goes in; execution settings of this attempt
    title: str = ""  # "gen1-student · lambda_resnet_small"; "": the name
    datasets: Sequence[Dataset] = ()


class Tracker(Protocol):
    """None of these raises or blocks for long, whatever the tracking server does."""

    def start_job(
        self, name: str, output: str, params: Mapping[str, Any], tags: Mapping[str, str], title: str = ""
    ) -> None:
        """`output`: the folder that keeps the run's id; `title`: what a person sees of it, "" for the name."""

    def start_stage(self, stage: StageRecord) -> None: ...

    def end_stage(
        self,
        stage: StageRecord,
        status: str,
        metrics: Mapping[str, float],
        artifacts: Sequence[str],
        model: str | None = None,
    ) -> None:
        """`status`: finished or failed. `artifacts`: files or folders to log. `model`: a stage folder whose
        weights and model.yaml are registered."""

    def add_figures(self, folder: str, figures: Mapping[str, float], temperature: float | None) -> None:
        """What is known of the model in a stage's folder since the stage ended; `temperature`: what makes its
        probabilities honest."""

    def end_job(
        self,
        status: str,
        metrics: Mapping[str, float],
        artifacts: Sequence[str],
        champion: str | None = None,
        note: str = "",
    ) -> None:
        """`champion`: the folder of the job's best model; `note`: what came out, in Markdown."""

    def close(self) -> None:
        """Send what is still to be sent, for at most a few seconds."""

    def unsent(self) -> list[str]:
        """After `close`: the names of the runs that the server has not got whole."""


class NullTracker:
    """Tracks nothing: `tracking.enabled: false`."""

    def start_job(
        self, name: str, output: str, params: Mapping[str, Any], tags: Mapping[str, str], title: str = ""
    ) -> None:
        pass

    def start_stage(self, stage: StageRecord) -> None:
        pass

    def end_stage(
        self,
        stage: StageRecord,
        status: str,
        metrics: Mapping[str, float],
        artifacts: Sequence[str],
        model: str | None = None,
    ) -> None:
        pass

    def add_figures(self, folder: str, figures: Mapping[str, float], temperature: float | None) -> None:
        pass

    def end_job(
        self,
        status: str,
        metrics: Mapping[str, float],
        artifacts: Sequence[str],
        champion: str | None = None,
        note: str = "",
    ) -> None:
        pass

    def close(self) -> None:
        pass

    def unsent(self) -> list[str]:
        return []
