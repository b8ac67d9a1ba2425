"""Describes one generation: what its labelling and selection did, in facts and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.data.samples import SKIPPED
from pipeline.data.shards import Shard, bad_counts
from pipeline.plan.context import Context
from pipeline.plan.stage import SELECTION, read_json_file
from pipeline.printable import counted
from pipeline.report import audit, bad_samples, noise_levels, plots, samples, verdict
from pipeline.report.contact_sheet import contact_sheet, thumbnail
from pipeline.report.page import Bad, Picture, Section
from pipeline.report.samples import Found


def section(
    context: Context,
    number: int,
    audited: Mapping[str, Any],
    drawn: Sequence[str],
    progress: Callable[[int], None],
) -> Section:
    """Generation `number`, from 1; `audited`: its entry in the report's summary (audit.summary); `drawn`: the class
    names as plots can show them."""
    label, select = (context.needs[f"gen{number}-{kind}"].folder for kind in ("label", "select"))
    settings = context.job.generations[number - 1].select
    corpus, names = context.corpora["unlabelled"].shards, context.corpora.classes
    chosen = read_json_file(context.needs[f"gen{number}-select"], SELECTION)
    kept = chosen["kept_per_class"]
    shown = samples.shown_classes(kept)
    found = samples.scan(label, select, corpus, shown, chosen.get("corrected", {}), progress)
    teacher, student = (plots.label_of(number - 1), plots.label_of(number))
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
            plots.classes(drawn, chosen["available"], kept, chosen["copies_per_class"], settings.per_class, number),
            f"Samples per class before and after balancing in generation {number}",
            f"Images at or above the threshold by the label that {who} gave, and what {student} learns from{wanted}.",
        ),
        *audit.pictures(context, number, chosen, who),
    ]
    titles = ("Most confident", "Least confident kept"), ("Most confident dropped", "Least confident")
    sheets = []
    for extremes, sides, what in (
        (found.kept, titles[0], "Kept images: look for mistakes on the right."),
        (found.dropped, titles[1], "Dropped images: look for losses on the left."),
    ):
        if extremes.most:
            rows = samples.contact_rows(extremes, label, corpus, names, shown)
            caption = f"{what} {_some(shown, names)} as {who} labelled it, with the confidence."
            sheets.append(contact_sheet(rows, sides, caption))
    seen = bad_samples.look_at(found.bad, corpus)
    facts = _facts(found, chosen, settings, len(corpus)) | audit.facts(audited)
    lead = audit.sentence(audited, who)
    advice = verdict.of_selection(audited, kept, names)
    grids = noise_levels.grids(audit.read(context, number), names)
    return Section(number, teacher, student, lead, facts, pictures, advice, sheets, *bad_of(found, seen, corpus), grids)


def _some(shown: Sequence[int], names: Sequence[str]) -> str:
    return "Each class" if len(shown) == len(names) else f"{len(shown)} of {counted(len(names), 'class')}, each"


def _facts(found: Found, chosen: Mapping[str, Any], settings: Any, shards: int) -> dict[str, str]:
    labelled = chosen["labelled"]
    share = f" ({100 * chosen['confident'] / labelled:.0f} %)" if labelled else ""
    facts = {"unlabelled images": f"{sum(found.statuses.values()):,}", "shards": f"{shards:,}"}
    if "corrected" in chosen:
        facts["corrected by people"] = f"{sum(chosen['corrected'].values()):,}"
    if found.statuses[SKIPPED]:
        facts["not kept before, skipped"] = f"{found.statuses[SKIPPED]:,}"
    bad = bad_counts(dict(found.statuses.most_common()))
    facts["bad samples"] = (
        ", ".join(f"{number:,} {status.replace('_', ' ')}" for status, number in bad.items()) or "none"
    )
    if found.missing:
        facts["shards without labels"] = f"{len(found.missing):,}"
    rule = "sure enough for max_noise" if settings.threshold is None else f"confidence ≥ {settings.threshold:g}"
    facts[rule] = f"{chosen['confident']:,}{share}"
    if chosen["excluded"]:
        facts["copies of held-out images"] = f"{chosen['excluded']:,} dropped"
    facts["kept"] = f"{chosen['kept']:,}"
    if settings.per_class:
        facts["kept, with copies"] = f"{chosen['copies']:,}"
        facts["wanted per class"] = f"{settings.per_class:,}"
    if chosen["empty"]:
        facts["classes without an image"] = f"{len(chosen['empty']):,}"
    return facts


def bad_of(found: Found, seen: Sequence[bad_samples.Shown], corpus: Sequence[Shard]) -> tuple[list[Bad], str]:
    """What is wrong with which shards and samples, and a title that says how many there are."""
    total = sum(bad_counts(found.statuses).values())
    listed = [Bad(shard, "all", why) for shard, why in found.missing]
    listed += [Bad(shard, "its end", why) for shard, why in found.damaged]
    title = ", ".join(
        counted(number, f"bad {name}") for number, name in ((len(listed), "shard"), (total, "sample")) if number
    )
    listed = listed[: samples.BAD_SHOWN]
    for one in seen:
        image = thumbnail(one.picture) if one.picture else b""
        why = one.sample.status.replace("_", " ")
        listed.append(Bad(corpus[one.sample.shard].name, one.sample.key, why, one.start, image))
    return listed, title if len(seen) >= total else f"{title}: the first of them"
