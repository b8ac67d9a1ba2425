"""Chooses the images that are most worth a look, from what the stages of a job and its folds left.

Four groups, each ordered by how much it matters: doubtful labels, validation images on which the best model confidently
disagrees, unlabelled images between two classes, and those to which two teachers give different ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pipeline import graph, storage
from pipeline.config.settings import Job
from pipeline.data.index_files import rows_path
from pipeline.data.label_files import file_name
from pipeline.data.shards import Shard
from pipeline.plan import best
from pipeline.plan.corpora import Corpora
from pipeline.plan.stage import EVALUATION, Done, read_json_file
from pipeline.review import doubtful, unlabelled
from pipeline.review.items import Rows, Wanted
from pipeline.stages import fold

LABELLED, VALIDATION, UNLABELLED, DISAGREED = "labelled", "validation", "unlabelled", "disagreements"
GROUPS = {
    LABELLED: "Labels that may be wrong",
    VALIDATION: "Validation images on which the best model disagrees",
    UNLABELLED: "Unlabelled images between two classes",
    DISAGREED: "Unlabelled images on which two teachers disagree",
}
PAIRS = 3  # of classes whose labels are most often doubted, that are named


@dataclass(frozen=True)
class Chosen:
    """What there is to show of a group, and how it was found, in a line."""

    group: str
    line: str
    wanted: list[Wanted] = field(default_factory=list)


class Sources:
    """The finished stages of a job, its shards and class names. UserError: what is wrong with its data."""

    def __init__(self, job: Job, folds: int) -> None:
        self.job, self.folds = job, folds
        self.looks = graph.look(job)
        if problem := next((look.problem for look in self.looks if look.problem), None):
            raise problem
        self.done: dict[str, Done] = {look.stage.name: look.done for look in self.looks if look.done}
        self.corpora = Corpora(job, self.done, write=False)

    @property
    def classes(self) -> list[str]:
        return self.corpora.classes

    def teacher_of(self, label: str) -> str:
        """The stage whose model wrote the label files of a stage."""
        return next(look.stage.needs[-1] for look in self.looks if look.stage.name == label)

    def folded(self) -> list[Done]:
        """The folds; they are done."""
        return [look.done for look in graph.look(self.job, self.folds) if look.stage.kind == "fold" and look.done]


def choose(sources: Sources, most: int) -> list[Chosen]:
    """Up to `most` images in all: as many of each group, what one lacks going to the others."""
    corrections = sources.corpora.corrections
    known = {
        (s, shard, index) for s, shards in corrections.sources.items() for shard in shards for index in shards[shard]
    }
    found = [finder(sources, most + len(known)) for finder in (labelled, validation, between, disagreed)]
    for one in found:  # an image is shown once, in the first group that has it, and not again once it is corrected
        one.wanted[:] = [w for w in one.wanted if (w.shard.source, w.shard.name, w.index) not in known]
        known |= {(w.shard.source, w.shard.name, w.index) for w in one.wanted}
    parts = shares([len(one.wanted) for one in found], most)
    return [dataclasses.replace(one, wanted=one.wanted[:part]) for one, part in zip(found, parts, strict=True)]


def shares(there: Sequence[int], most: int) -> list[int]:
    """How many of each group are shown: equally many, where there are so many; what is over goes to the first."""
    taken = [0] * len(there)
    while most > 0 and (short := [n for n, number in enumerate(there) if taken[n] < number]):
        each = max(1, most // len(short))
        for n in short:
            part = min(each, there[n] - taken[n], most)
            taken[n] += part
            most -= part
    return taken


def labelled(sources: Sources, most: int) -> Chosen:
    if not sources.folds:
        return Chosen(LABELLED, "left out: labels are doubted by models that have not seen them (--folds)")
    shards = {shard.name: shard for shard in sources.corpora[LABELLED].shards}
    rows = [
        Rows(LABELLED, done.name, shards[name], answers, indexed)
        for done in sources.folded()
        for name, (indexed, answers) in zip(
            done.info["held_out"], fold.answered(done.folder, done.info["held_out"]), strict=True
        )
    ]
    found, names = _doubtful(rows, sources.classes), sources.classes
    why = "a teacher that never saw this label says {guess} ({sure}), and {given} ({own})"
    pairs = ", ".join(f"{names[a]} → {names[b]} ({number:,})" for a, b, number in found.confused(PAIRS))
    line = f"{len(found.row):,} of {found.images:,} labels are doubtful"
    return Chosen(LABELLED, f"{line}, most often {pairs}" if pairs else line, _doubted(found, rows, names, most, why))


def validation(sources: Sources, most: int) -> Chosen:
    chosen = best.find(sources.done)
    if "evaluate" not in sources.done or chosen is None:
        return Chosen(VALIDATION, "left out: no model is evaluated yet (run the job)")
    evaluated, model = sources.done["evaluate"], chosen.model.name
    looked = {row["stage"] for row in read_json_file(evaluated, EVALUATION)["models"] if "validation" in row}
    if model not in looked:
        return Chosen(VALIDATION, "left out: an earlier version evaluated the models (run the job again)")
    folder, index = storage.join(evaluated.folder, VALIDATION, model), sources.done["index"].folder
    rows = [
        Rows(
            VALIDATION,
            model,
            shard,
            storage.join(folder, file_name(shard.name)),
            rows_path(index, VALIDATION, shard.name),
        )
        for shard in sources.corpora[VALIDATION].shards
    ]
    found = _doubtful(rows, sources.classes)
    line = f"{model} confidently disagrees with {len(found.row):,} of {found.images:,} labels"
    why = f"{model}, the best model, says {{guess}} ({{sure}}), and {{given}} ({{own}})"
    return Chosen(VALIDATION, line, _doubted(found, rows, sources.classes, most, why))


def between(sources: Sources, most: int) -> Chosen:
    labels = _label_stages(sources)
    if not labels:
        return Chosen(UNLABELLED, "left out: no teacher has labelled them yet")
    by, names = sources.teacher_of(labels[-1].name), sources.classes
    rows = [Rows(UNLABELLED, by, shard, path) for shard, path in _files(sources, labels[-1])]
    found = unlabelled.close((one.labelled for one in rows), most)

    def why(one: Wanted) -> str:
        (a, sure_a), (b, sure_b) = one.said[:2]
        return f"{by} wavers between {names[a]} ({percent(sure_a)}) and {names[b]} ({percent(sure_b)})"

    line = f"the smallest margins among {found.images:,} images, by {by}"
    return Chosen(UNLABELLED, line, [dataclasses.replace(w, why=why(w)) for w in _wanted(rows, found.file, found.row)])


def disagreed(sources: Sources, most: int) -> Chosen:
    labels = _label_stages(sources)[-2:]
    if len(labels) < 2:
        return Chosen(DISAGREED, "left out: there is one teacher, not two")
    first, second = (sources.teacher_of(stage.name) for stage in labels)
    before, after = (dict(_by_name(_files(sources, stage))) for stage in labels)
    shards = [shard for shard, _ in _files(sources, labels[1]) if shard.name in before]
    old = [Rows(DISAGREED, first, shard, before[shard.name]) for shard in shards]
    new = [Rows(DISAGREED, second, shard, after[shard.name]) for shard in shards]
    found = unlabelled.disagreements(((a.labelled, b.labelled) for a, b in zip(old, new, strict=True)), most)
    names = sources.classes

    def say(one: Wanted) -> str:
        return f"{one.by} says {names[one.said[0][0]]} ({percent(one.said[0][1])})"

    both = zip(_wanted(old, found.file, found.row), _wanted(new, found.file, found.row), strict=True)
    wanted = [dataclasses.replace(b, why=f"{say(a)}, {say(b)}") for a, b in both]
    return Chosen(DISAGREED, f"{first} and {second} disagree on {found.images:,} images", wanted)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _doubtful(rows: Sequence[Rows], classes: Sequence[str]) -> doubtful.Doubtful:
    return doubtful.find([(one.indexed or "", one.labelled) for one in rows], len(classes))


def _doubted(found: doubtful.Doubtful, rows: Sequence[Rows], names: Sequence[str], most: int, why: str) -> list[Wanted]:
    """The first of what was found, with the reason in words."""
    wanted = []
    for number, one in enumerate(_wanted(rows, found.file[:most], found.row[:most])):
        sure = dict(one.said).get(int(found.guess[number]), 0.0)
        words = {"guess": names[found.guess[number]], "sure": percent(sure)}
        words |= {"given": names[found.given[number]], "own": percent(float(found.own[number]))}
        wanted.append(dataclasses.replace(one, why=why.format(**words)))
    return wanted


def _wanted(rows: Sequence[Rows], file: Iterable[int], row: Iterable[int]) -> list[Wanted]:
    """In this order, each file read once."""
    places = [(int(f), int(r)) for f, r in zip(file, row, strict=True)]
    of: dict[int, list[int]] = {}
    for number, place in places:
        of.setdefault(number, []).append(place)
    found = {(n, r): one for n, taken in of.items() for r, one in zip(taken, rows[n].wanted(taken), strict=True)}
    return [found[place] for place in places]


def _label_stages(sources: Sources) -> list[Done]:
    return [sources.done[look.stage.name] for look in sources.looks if look.stage.kind == "label" and look.done]


def _files(sources: Sources, label: Done) -> list[tuple[Shard, str]]:
    """The unlabelled shards that a stage labelled, with its files."""
    failed = set(label.info["failed"])
    return [
        (shard, storage.join(label.folder, file_name(shard.name)))
        for shard in sources.corpora[UNLABELLED].shards
        if shard.name not in failed
    ]


def _by_name(files: Iterable[tuple[Shard, str]]) -> Iterable[tuple[str, str]]:
    return ((shard.name, path) for shard, path in files)
