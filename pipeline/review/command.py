"""Runs `noisy-lambda review`: chooses images, and writes the page and Label Studio's files beside the stages.

<output>/review/index.html  label_studio.json  label_studio.xml
"""

from __future__ import annotations

from pipeline import storage
from pipeline.config.settings import Job
from pipeline.errors import ConfigError, DataError
from pipeline.plan.stage import REVIEW, Done
from pipeline.progress import console, safe
from pipeline.review import choose, items, label_studio, page

PAGE, TASKS, INTERFACE = "index.html", "label_studio.json", "label_studio.xml"


def check(job: Job, folds: int | None, images: int) -> None:
    """ConfigError: what is asked for cannot be done."""
    if job.measure.models:
        raise ConfigError("a job with measure.models has no images to review; give one that trains")
    if job.detects_only:
        raise ConfigError(
            "a job with detectors alone has no labelled images to review; give one that trains classifiers"
        )
    if images < 1:
        raise ConfigError(f"--images is {images}; give at least 1")
    if folds is not None and folds < 2:
        raise ConfigError(f"--folds is {folds}; give at least 2, or leave it out to look at other images only")
    if folds and job.teacher.checkpoint:
        raise ConfigError(
            "--folds trains the teacher's recipe on parts of the labelled images, but teacher.checkpoint adopts "
            "weights and has none; leave --folds out, or give a job with a recipe (teacher.checkpoint=null)"
        )


def review(job: Job, *, folds: int | None, images: int) -> None:
    """Write the pages and say where they are; the folds are done. DataError: there is nothing to show."""
    out = console()
    sources = choose.Sources(job, folds or 0)
    if "index" not in sources.done and not folds:
        raise DataError(
            f"nothing of {job.name} in {storage.redact(job.output)} is finished that could be reviewed; run the job, "
            "or begin with --folds 2, which needs no finished run"
        )
    chosen = choose.choose(sources, images)
    for one in chosen:
        shown = f", {len(one.wanted):,} shown" if one.wanted else ""
        out.print(f"{one.group:<14} {safe(one.line)}{shown}", soft_wrap=True)
    if not folds and not job.teacher.checkpoint:
        out.print(f"! {safe(_price(job, sources.done.get('gen0-teacher')))}", soft_wrap=True)
    wanted = [one for part in chosen for one in part.wanted]
    if not wanted:
        out.print("nothing to show")
        return
    found = items.read(wanted, sources.corpora.root)
    groups = {part.group: (choose.GROUPS[part.group], part.line) for part in chosen if part.wanted}
    paths = [storage.join(job.output, REVIEW, name) for name in (PAGE, TASKS, INTERFACE)]
    storage.write_bytes(paths[0], page.render(job.name, job.output, sources.classes, groups, found, job.corrections))
    storage.write_bytes(paths[1], label_studio.tasks(found, sources.classes))
    storage.write_bytes(paths[2], label_studio.interface(sources.classes))
    out.print(f"\npage          {storage.redact(paths[0])}", soft_wrap=True)
    out.print(f"Label Studio  {storage.redact(paths[1])}, {storage.redact(paths[2])}", soft_wrap=True)


def _price(job: Job, teacher: Done | None) -> str:
    """What doubtful labels would cost."""
    text = (
        f"--folds 2 finds labels that may be wrong: it trains the teacher's recipe ({job.teacher.model}, "
        f"{job.teacher.duration}) twice, each time on one half of the labelled images, and compares what it says of "
        "the other half with the labels"
    )
    if teacher is None or "seconds" not in teacher.info:
        return text
    part = 1.0 if job.teacher.duration.endswith("st") else 0.5  # an epoch of half the images has half the steps
    seconds = 2 * part * float(teacher.info["seconds"])
    time = f"{seconds / 60:,.0f} minutes" if seconds > 90 else f"{seconds:.0f} s"
    return f"{text}; about {time}, by the time that the teacher took here"
