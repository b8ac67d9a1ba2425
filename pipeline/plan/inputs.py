"""Gathers what decides the work of a stage: its settings, and the identities of what was made before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config.pretrained import weights_file
from pipeline.config.settings import MAX_IMAGE_GB, Generation, Job
from pipeline.config.settings_train import Train
from pipeline.errors import WeightsError
from pipeline.plan.corpora import Corpora
from pipeline.plan.stage import CARD, WEIGHTS, Done, Stage


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


def checkpoint_sha256(source: str) -> str | dict[str, str]:
    """Identity of an entry of `teacher.checkpoint`. WeightsError: there is nothing."""
    path, card = adopted_files(source)
    if not source.endswith(".safetensors") and not storage.is_url(source) and Path(source).is_file():
        raise WeightsError(
            f"teacher.checkpoint: {source} is no .safetensors file; other formats can run code when they are opened, "
            "so convert it once: python -c \"import torch, safetensors.torch as s; d = torch.load('FILE', "
            "weights_only=True); s.save_file(d.get('state_dict', d), 'weights.safetensors')\""
        )
    if not storage.exists(path):
        raise WeightsError(
            f"teacher.checkpoint: there is nothing at {storage.redact(path)}; name a stage folder with {WEIGHTS} "
            f"and {CARD}, or a .safetensors file"
        )
    found = storage.sha256(path)
    return {"weights": found, "card": storage.sha256(card)} if card and storage.exists(card) else found


def pretrained_sha256(source: str, stage: str) -> str:
    """Identity of the weights that a training's `pretrained` names. WeightsError: there are none."""
    path = weights_file(source)
    if not storage.exists(path):
        raise WeightsError(
            f"{stage}: pretrained names {storage.redact(source)}, and there is no {storage.redact(path)}; name a stage "
            "folder or a .safetensors file"
        )
    return storage.sha256(path)


def adopted_files(source: str) -> tuple[str, str | None]:
    """The weights that an entry of `teacher.checkpoint` names, and where the model.yaml would be that says what they
    are: weights of another name than a stage gives them have none."""
    path = source if source.endswith(".safetensors") else storage.join(source, WEIGHTS)
    folder = path.removesuffix(WEIGHTS)
    return path, f"{folder}{CARD}" if storage.name(path) == WEIGHTS else None
