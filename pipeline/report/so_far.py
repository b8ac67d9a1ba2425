"""Makes the page of a run that is not finished: what its finished stages have left, and how the others stand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from pipeline.plan import best
from pipeline.plan.context import Context
from pipeline.report import assemble, audit, fonts, generation, page, verdict
from pipeline.report.page import Page, State


def render(context: Context, states: Sequence[State], training: Mapping[str, str]) -> bytes:
    """The page as UTF-8. `context.needs`: what is done; `states`: of all stages; `training`: the folders of the
    training stages that have begun."""
    done = context.needs
    selected = [n for n in range(1, len(context.job.generations) + 1) if f"gen{n}-select" in done]
    drawn, lacking = fonts.in_plots(context.corpora.classes if selected else [])
    sections = [generation.section(context, n, audit.summary(context, n), drawn, lambda _: None) for n in selected]
    if "evaluate" in done:
        content = assemble.page_of(context, assemble.tested(context), sections)
        return page.render(dataclasses.replace(content, unfinished=states))
    found = best.find(done)
    models = sum(stage.model for stage in done.values())
    content = Page(
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
    return page.render(content)
