"""Looks up the shards and classes of a job, and freezes them at first use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

from pipeline import storage
from pipeline.config.settings import Job
from pipeline.data import corpus, corrections, shards
from pipeline.data.classes import read_classes
from pipeline.errors import ConfigError, DataError
from pipeline.plan import marking, mended
from pipeline.plan.adopted import classes_of
from pipeline.plan.stage import Done
from pipeline.printable import counted

TESTED = (("labelled",), "what models are tested on must not be trained on")
APART = {
    "validation": TESTED,
    "test": TESTED,
    "audit_only": (
        ("unlabelled", "labelled", "validation", "test"), "what is audited must be used for nothing else"
    ),
    "detection.validation": (("detection.train",), TESTED[1]),
    "detection.test": (("detection.train",), TESTED[1]),
}  # fmt: skip
"""The sources with which a source may not share a shard, and why; `evaluate.sets` are as the test shards are."""
SET = "evaluate.sets."
SCENES = "detection."


def set_source(name: str) -> str:
    """The source of an entry of `evaluate.sets`."""
    return f"{SET}{name}"


def setting_of(source: str) -> str:
    """The setting that holds a source's pattern."""
    if source.startswith(SCENES):
        return f"detection.data.{source.removeprefix(SCENES)}"
    return source if source.startswith(SET) else f"data.{source}"


def detection_sources_of(job: Job) -> tuple[str, ...]:
    """The sources of scenes, those that are trained on first."""
    if not job.detection.detectors:
        return ()
    names = ("train", "validation", *(("test",) if job.detection.data.test else ()))
    return tuple(f"{SCENES}{name}" for name in names)


def tested_scenes_of(job: Job) -> str:
    """The source that detectors are tested on in the end."""
    return detection_sources_of(job)[-1]


def indexed_of(job: Job) -> tuple[str, ...]:
    """The sources whose labels are known, which `index` reads."""
    return held_out_of(job) if job.labels_only else ("labelled", *held_out_of(job))


def held_out_of(job: Job) -> tuple[str, ...]:
    """Those of them that nothing may be trained on."""
    if job.labels_only:
        return tuple(source for source in ("validation", "audit_only") if getattr(job.data, source))
    return ("validation", "test", "audit_only") if job.generations and job.data.audit_only else ("validation", "test")


def audited_of(job: Job) -> tuple[str, ...]:
    """Those on which the labelling is audited: the test images are for the end."""
    return tuple(source for source in held_out_of(job) if source != "test")


def sources_of(job: Job) -> tuple[str, ...]:
    """All that some stage looks up; a job that measures has none."""
    if not job.classifies:
        return detection_sources_of(job)
    labelled = () if job.labels_only else ("labelled",)
    unlabelled = ("unlabelled",) if job.generations else ()
    return (*labelled, *unlabelled, *held_out_of(job), *map(set_source, job.evaluate.sets), *detection_sources_of(job))


class Corpora:
    """The job's shards and classes by source, looked up when first asked for; `done`: what is finished by then, among
    it the data that `prepare` writes. `write=False` (for `plan`) freezes nothing. `changes` gets a sentence for each
    listing that is another one than when it was frozen."""

    def __init__(self, job: Job, done: Mapping[str, Done], *, refreeze: bool = False, write: bool = True) -> None:
        self.job, self.done, self.refreeze, self.write = job, done, refreeze, write
        self.changes: list[str] = []
        self._found: dict[str, corpus.Corpus] = {}
        self._seen: corpus.Records = {}
        self._markings: dict[str, marking.Marking] = {}
        self._checked: set[str] = set()

    def root_of(self, source: str) -> str:
        """Where the pattern of a source starts; "" while the data is still to be written."""
        if not source.startswith(SCENES):
            return self.root
        prepared = self.done.get("detect-prepare")
        return self.job.detection.data.root or (prepared.folder if prepared else "")

    @property
    def root(self) -> str:
        """Where the patterns start, but those of scenes."""
        if self.job.data.root:
            return self.job.data.root
        return self.done["prepare"].folder if "prepare" in self.done else ""

    @property
    def found(self) -> Mapping[str, corpus.Corpus]:
        """Those that were looked up, by source."""
        return self._found

    def __getitem__(self, source: str) -> corpus.Corpus:
        """The frozen corpus of 'labelled', 'unlabelled', 'validation', 'test', 'audit_only' or a `set_source`."""
        if source not in self._found:
            pattern = self.pattern(source)
            if not pattern:
                raise DataError(
                    f"data.{source} is not set, but the job has {len(self.job.generations)} generations; "
                    f"set it to the pattern of the {source} shards"
                )
            empty = self.job.data.max_bad_shards if source == "unlabelled" else 0
            listing = shards.find_shards(pattern, source, self.root_of(source), max_empty=empty)
            where = self.where(source)
            self._check_apart(source, listing)
            frozen = corpus.freeze(
                self.job.output, listing, source, where, refreeze=self.refreeze, write=self.write, seen=self._seen
            )
            self.changes += frozen.changes
            if source == "unlabelled" and (found := mended.find(self.job.output, frozen, refreeze=self.refreeze)):
                frozen = corpus.take_in(
                    self.job.output, frozen, source, where, found, write=self.write, seen=self._seen
                )
                self.changes.append(
                    f"source '{source}': {', '.join(found)} {'was' if len(found) == 1 else 'were'} replaced since the "
                    "labelling, and will be labelled again"
                )
            self._found[source] = frozen
        return self._found[source]

    def check(self) -> None:
        """A mistake in a pattern shall not wait until the stage that needs it, behind hours of training. DataError."""
        for source in sources_of(self.job):
            if source not in self._checked and self.root_of(source):
                self.check_source(source)
                self._checked.add(source)

    def check_source(self, source: str) -> None:
        """DataError: the shards of a source are not there, or are none."""
        allowed = self.job.data.max_bad_shards if source == "unlabelled" else 0
        shards.check_heads(self[source].shards, allowed)
        if source.startswith(SET):
            self.marking(source)

    def marking(self, source: str) -> marking.Marking:
        """How answers to the images of a `set_source` are marked. DataError: a mistake in what its entry says."""
        if source not in self._markings:
            entry = self.job.evaluate.sets[source.removeprefix(SET)]
            self._markings[source] = marking.read(
                source, entry, self[source].shards, self.classes, self._classes_path, self.root
            )
        return self._markings[source]

    def meanings(self, sources: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Of those with a class list of their own, what its indexes are among the job's classes."""
        found = {source: self.marking(source).meaning for source in sources if source.startswith(SET)}
        return {source: meaning for source, meaning in found.items() if meaning is not None}

    def where(self, source: str) -> str:
        """The pattern of a source that has one, from the root on."""
        pattern = self.pattern(source) or ""
        return pattern if storage.is_url(pattern) else storage.join(self.root_of(source), pattern)

    def pattern(self, source: str) -> str | None:
        """What the job has for a source."""
        if source.startswith(SET):
            return self.job.evaluate.sets[source.removeprefix(SET)].shards
        of_scenes = source.startswith(SCENES)
        data: object = self.job.detection.data if of_scenes else self.job.data
        found: str | None = getattr(data, source.removeprefix(SCENES))
        return found

    def _check_apart(self, source: str, listing: list[shards.Shard]) -> None:
        """No shard that models are tested on is trained on too, and what only the audit may see belongs to nothing
        else."""
        others, why = APART.get(source, TESTED if source.startswith(SET) else ((), ""))
        for other in (other for other in others if other in sources_of(self.job)):
            known = {shard.path for shard in self[other].shards}
            shared = [shard.name for shard in listing if shard.path in known]
            if shared:
                raise DataError(
                    f"{setting_of(source)} and {setting_of(other)} both match {counted(len(shared), 'shard')}, the "
                    f"first is {shared[0]}; {why}: narrow one of the patterns"
                )

    @cached_property
    def corrections(self) -> corrections.Corrections:
        """What people say of single samples. DataError: a mistake in the file, or a shard that there is not."""
        if not self.job.corrections:
            return corrections.NONE
        found = corrections.read(self.job.corrections, self.classes)
        # What only labels selects nothing, which is where corrected pseudo-labels come in.
        used = [name for name in sources_of(self.job) if not (self.job.labels_only and name == "unlabelled")]
        for source in found.sources:
            if source in used:
                found.check_shards(source, [shard.name for shard in self[source].shards])
            else:
                self.changes.append(
                    f"corrections: {found.count(source):,} of source '{source}' have no effect, for this job does not "
                    "train or test on it"
                )
        return found

    @property
    def _classes_path(self) -> str:
        path = self.job.data.classes
        return path if storage.is_url(path) or path.startswith("/") else storage.join(self.root, path)

    @cached_property
    def detection_classes(self) -> list[str]:
        """Class names of scenes, in index order."""
        return read_classes(self.root_of(f"{SCENES}train"))

    @cached_property
    def classes(self) -> list[str]:
        """Class names in index order; of a job that only labels those of the weights, where these have a model.yaml."""
        path = self._classes_path
        given = classes_of(self.job.teacher.checkpoint) if self.job.labels_only else None
        if given is None:
            return read_classes(path)
        # Class indexes in shards mean the list beside them.
        if indexed_of(self.job) and storage.exists(path) and read_classes(path) != given:
            raise ConfigError(
                f"{storage.redact(path)} lists other classes than the model.yaml of teacher.checkpoint; audit on "
                "shards of the same class list in the same order, or drop data.validation and data.audit_only"
            )
        return given
