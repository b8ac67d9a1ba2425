"""Makes the page of a run that is not finished: what its finished stages have left, and how the others stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.plan import best
from pipeline.plan.context import Context
from pipeline.report import assemble, audit, fonts, generation, page, verdict
from pipeline.report.page import Page, State


def render(context: Context, states: Sequence[State], training: Mapping[str, str]) -> bytes:
    """The page as UTF-8. `context.needs`: what is done; `states`: of all stages; `training`: the folders of the
    training stages that have begun."""
    done = context.needs
    selected = any(stage.kind == "select" and stage.name in done for stage in context.stages)
    names, lacking = fonts.in_plots(context.corpora.classes if selected else [])
    sections = []
    for number in range(1, len(context.job.generations) + 1):
        if all(f"gen{number}-{kind}" in done for kind in ("audit", "label", "select")):
            audited = audit.summary(context, number)
            sections.append(generation.section(context, number, audited, names, lambda _: None))
    found = best.find(done)
    models = sum(stage.model for stage in done.values())
    return page.render(
        Page(
            context.job.name,
            0,
            [],
            assemble.learning_curves(training),
            sections,
            assemble.finished(context),
            command=assemble.command(context),
            verdict=[verdict.so_far(found.model.name, found.top1, models)] if found else [],
            warnings=[lacking] if lacking else [],
            unfinished=states,
        )
    )
