"""Gathers what decides the work of a stage: its settings, and the identities of what was made before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.config.settings import MAX_IMAGE_GB, Generation, Job
from pipeline.config.settings_train import Train
from pipeline.errors import ConfigError
from pipeline.plan.corpora import Corpora
from pipeline.plan.stage import Done, Stage


@dataclass(frozen=True)
class Inputs:
    """What a stage's identity is made of; what it needs is done."""

    job: Job
    stage: Stage
    done: Mapping[str, Done]
    corpora: Corpora

    @property
    def image_limit(self) -> dict[str, float]:
        """`data.max_image_gb` where it is not what it was before it was a setting."""
        limit = self.job.data.max_image_gb
        return {} if limit == MAX_IMAGE_GB else {"max_image_gb": limit}

    def corrections(self, *sources: str) -> dict[str, Any]:
        """Identity of the corrections of some sources, where there are any."""
        found = {source: digest for source in sources if (digest := self.corpora.corrections.digest(source))}
        return {"corrections": found} if found else {}

    @property
    def classes(self) -> list[str]:
        return self.corpora.classes

    @property
    def generation(self) -> Generation:
        """The settings of the stage's generation, from 1."""
        return self.job.generations[self.stage.generation - 1]

    @property
    def content(self) -> Mapping[str, str]:
        """Identity of what `index` found in each source, whatever the time stamps of its shards."""
        found: Mapping[str, str] = self.done["index"].info["content"]
        return found

    def output(self, stage: str) -> str:
        """Identity of what a stage made."""
        return self.done[stage].output

    @property
    def before(self) -> Done:
        """The model that the stage works on."""
        return self.done[self.stage.needs[-1]]

    @property
    def model(self) -> Any:
        return model_identity(self.before)

    @property
    def prepared(self) -> str | None:
        """Identity of the data that the job wrote itself, if it did and the stage needs them."""
        return self.done["prepare"].output if "prepare" in self.stage.needs else None


def model_identity(made: Done) -> Any:
    """What a model answers depends on: its weights, and how it looks at images (which stages did not always record)."""
    return {"weights": made.output, "view": made.info["view"]} if "view" in made.info else made.output


def training_of(job: Job, stage: Stage) -> Train:
    """The settings of the training of a stage's generation: the teacher's or its student's."""
    return job.generations[stage.generation - 1].student if stage.generation else job.teacher


def temperature_of(job: Job, stage: Stage, done: Mapping[str, Done]) -> float:
    """What divides the logits of a label stage with `calibrate`: what its audit found, or, without one (the job only
    labels), what was known of the weights that were given. ConfigError: nothing was."""
    audit = f"gen{stage.generation}-audit"
    found: float | None = done[audit if audit in stage.needs else stage.needs[-1]].info.get("temperature")
    if found is None:
        raise ConfigError(
            f"label.calibrate is true, but no run has measured how sure {storage.redact(str(job.teacher.checkpoint))} "
            "may be; give labelled shards to measure it on (data.validation), or drop label.calibrate"
        )
    return found
