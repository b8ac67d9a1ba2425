"""Describes one generation: what its labelling and selection did, in facts and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.data.samples import SKIPPED
from pipeline.data.shards import Shard, bad_counts
from pipeline.plan.context import Context
from pipeline.plan.stage import SELECTION, read_json_file
from pipeline.report import audit, bad_samples, plots, samples
from pipeline.report.contact_sheet import contact_sheet
from pipeline.report.page import Picture, Section
from pipeline.report.plots import Model
from pipeline.report.samples import Extremes, Found


def section(
    context: Context,
    models: Sequence[Model],
    number: int,
    audited: Mapping[str, Any],
    progress: Callable[[int], None],
) -> Section:
    """Generation `number`, from 1; `audited`: its entry in the report's summary (audit.summary)."""
    label, select = (context.needs[f"gen{number}-{kind}"].folder for kind in ("label", "select"))
    settings = context.job.generations[number - 1].select
    corpus, names = context.corpora["unlabelled"].shards, context.corpora.classes
    chosen = read_json_file(context.needs[f"gen{number}-select"], SELECTION)
    kept = chosen["kept_per_class"]
    found = samples.scan(label, select, corpus, samples.shown_classes(kept), progress)
    teacher, student = models[number - 1].label, models[number].label
    who = teacher if number > 1 else "the teacher"
    wanted = f"; the dashed line is the {settings.per_class:,} wanted of each" if settings.per_class else ""
    pictures = [
        Picture(
            f"gen{number}-confidence.png",
            plots.confidence(
                chosen["histogram"], chosen["kept_histogram"], chosen["confident"], settings.threshold, number
            ),
            f"Histogram of the confidence of generation {number}'s labels",
            f"How sure {who} was of its label for each unlabelled image, and which images were kept.",
        ),
        Picture(
            f"gen{number}-classes.png",
            plots.classes(names, chosen["available"], kept, chosen["copies_per_class"], settings.per_class, number),
            f"Samples per class before and after balancing in generation {number}",
            f"Images at or above the threshold by the label that {who} gave, and what {student} learns from{wanted}.",
        ),
        *audit.pictures(context, number, chosen, who),
    ]
    sheets = (
        (found.kept, "contact", "kept", ("Most confident", "Least confident kept"), "look for mistakes on the right"),
        (
            found.dropped,
            "dropped",
            "dropped",
            ("Most confident dropped", "Least confident"),
            "look for losses on the left",
        ),
    )
    for extremes, name, word, titles, advice in sheets:
        rows = samples.contact_rows(extremes, label, corpus, names)
        if rows:
            png = contact_sheet(rows, number, titles)
            caption = f"{_some(extremes, kept)} as {who} labelled it, with the confidence: {advice}."
            pictures.append(
                Picture(
                    f"gen{number}-{name}.png", png, f"Contact sheet of generation {number}'s {word} images", caption
                )
            )
    shown = bad_samples.look_at(found.bad, corpus)
    if shown:
        caption = (
            "What could not be labelled, the first of it: what can be seen, or how the file begins, and the reason."
        )
        png = bad_samples.bad_sheet(shown, number)
        pictures.append(Picture(f"gen{number}-bad.png", png, f"Bad samples of generation {number}", caption))
    facts = _facts(found, chosen, settings, len(corpus)) | audit.facts(audited)
    lead = audit.sentence(audited, who)
    return Section(number, teacher, student, lead, facts, pictures, *bad_of(found, shown, corpus))


def _some(extremes: Extremes, kept_per_class: Sequence[int]) -> str:
    classes = sum(count > 0 for count in kept_per_class)
    shown = len(extremes.most)
    return "Each class" if shown == classes else f"{shown} of {classes:,} classes"


def _facts(found: Found, chosen: Mapping[str, Any], settings: Any, shards: int) -> dict[str, str]:
    labelled = chosen["labelled"]
    share = f" ({100 * chosen['confident'] / labelled:.0f} %)" if labelled else ""
    facts = {"unlabelled images": f"{sum(found.statuses.values()):,}", "shards": f"{shards:,}"}
    if found.statuses[SKIPPED]:
        facts["not kept before, skipped"] = f"{found.statuses[SKIPPED]:,}"
    bad = bad_counts(dict(found.statuses.most_common()))
    facts["bad samples"] = (
        ", ".join(f"{number:,} {status.replace('_', ' ')}" for status, number in bad.items()) or "none"
    )
    if found.missing:
        facts["shards without labels"] = f"{len(found.missing):,}"
    facts[f"confidence ≥ {settings.threshold:g}"] = f"{chosen['confident']:,}{share}"
    if chosen["excluded"]:
        facts["copies of held-out images"] = f"{chosen['excluded']:,} dropped"
    facts["kept"] = f"{chosen['kept']:,}"
    if settings.per_class:
        facts["kept, with copies"] = f"{chosen['copies']:,}"
        facts["wanted per class"] = f"{settings.per_class:,}"
    if chosen["empty"]:
        facts["classes without an image"] = f"{len(chosen['empty']):,}"
    return facts


def bad_of(
    found: Found, shown: Sequence[bad_samples.Shown], corpus: Sequence[Shard]
) -> tuple[list[tuple[str, str, str, str]], str]:
    """What is wrong with which shards and samples, and a title that says how many there are."""
    total = sum(bad_counts(found.statuses).values())
    listed = [(shard, "all", why, "") for shard, why in found.missing] + [
        (shard, "its end", why, "") for shard, why in found.damaged
    ]
    title = ", ".join(
        f"{number:,} bad {name}{'s' if number > 1 else ''}"
        for number, name in ((len(listed), "shard"), (total, "sample"))
        if number
    )
    listed = listed[: samples.BAD_SHOWN]
    listed += [(corpus[s.sample.shard].name, s.sample.key, s.sample.status, s.start) for s in shown]
    return listed, title if len(shown) >= total else f"{title}: the first of them"
