"""The shards and classes of a job, frozen at first use."""

from __future__ import annotations

from functools import cached_property

from pipeline import storage
from pipeline.config.settings import Job
from pipeline.data import corpus, shards
from pipeline.data.classes import read_classes
from pipeline.errors import DataError

TESTED = (("labelled",), "what models are tested on must not be trained on")
APART = {
    "validation": TESTED,
    "test": TESTED,
    "audit_only": (
        ("unlabelled", "labelled", "validation", "test"), "what is audited must be used for nothing else"
    ),
}  # fmt: skip
"""The sources with which a source may not share a shard, and why."""


class Sources:
    """The job's shards and classes, looked up when first asked for (after `prepare`), frozen at first use."""

    def __init__(self, job: Job, root: str, refreeze: bool = False, write: bool = True) -> None:
        self.job, self.root, self.refreeze, self.write = job, root, refreeze, write
        self.changes: list[str] = []
        self.found: dict[str, corpus.Corpus] = {}

    def __getitem__(self, source: str) -> corpus.Corpus:
        """The frozen corpus of 'labelled', 'unlabelled', 'validation' or 'test'."""
        if source not in self.found:
            pattern = getattr(self.job.data, source)
            if not pattern:
                raise DataError(
                    f"data.{source} is not set, but the job has {len(self.job.generations)} generations; "
                    f"set it to the pattern of the {source} shards"
                )
            empty = self.job.data.max_bad_shards if source == "unlabelled" else 0
            listing = shards.find_shards(pattern, source, self.root, max_empty=empty)
            where = pattern if storage.is_url(pattern) else storage.join(self.root, pattern)
            self._check_apart(source, listing)
            frozen = corpus.freeze(self.job.output, listing, source, where, refreeze=self.refreeze, write=self.write)
            self.changes += frozen.changes
            self.found[source] = frozen
        return self.found[source]

    def _check_apart(self, source: str, listing: list[shards.Shard]) -> None:
        """No shard that models are tested on is trained on too, and what only the audit may see belongs to nothing else."""
        others, why = APART.get(source, ((), ""))
        for other in others:
            known = {shard.path for shard in self[other].shards}
            shared = [shard.name for shard in listing if shard.path in known]
            if shared:
                raise DataError(
                    f"data.{source} and data.{other} both match {len(shared)} shards, the first is {shared[0]}; {why}: "
                    "narrow one of the patterns"
                )

    @cached_property
    def classes(self) -> list[str]:
        """Class names in index order."""
        path = self.job.data.classes
        path = path if storage.is_url(path) or path.startswith("/") else storage.join(self.root, path)
        return read_classes(path)
