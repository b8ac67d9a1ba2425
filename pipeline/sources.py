"""The shards and classes of a job, frozen at first use."""

from __future__ import annotations

from functools import cached_property

from pipeline import storage
from pipeline.data import corpus, shards
from pipeline.data.classes import read_classes
from pipeline.errors import DataError
from pipeline.settings import Job


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
            if source == "audit_only":
                self._check_apart(listing)
            frozen = corpus.freeze(self.job.output, listing, source, where, refreeze=self.refreeze, write=self.write)
            self.changes += frozen.changes
            self.found[source] = frozen
        return self.found[source]

    def _check_apart(self, audit_only: list[shards.Shard]) -> None:
        """No shard that only the audit may see belongs to another source."""
        for source in ("unlabelled", "labelled", "validation", "test"):
            others = {shard.path for shard in self[source].shards}
            shared = [shard.name for shard in audit_only if shard.path in others]
            if shared:
                raise DataError(
                    f"data.audit_only and data.{source} both match {len(shared)} shards, the first is {shared[0]}; "
                    "what is audited must be used for nothing else: narrow one of the patterns"
                )

    @cached_property
    def classes(self) -> list[str]:
        """Class names in index order."""
        path = self.job.data.classes
        path = path if storage.is_url(path) or path.startswith("/") else storage.join(self.root, path)
        return read_classes(path)
