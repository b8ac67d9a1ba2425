"""Ends a job: its numbers in summary.json, and everything worth seeing on one page.

report-1a2b3c4d/summary.json           {"job", "stages": [{"stage", "dir", "model", "top1", "top5", "ece", "parameters",
                                        "images_per_second", "slowest_round", "fastest_round"}, …], "audits",
                                        "gain_points", "seconds": {stage: of the run that finished it}, "report",
                                        "best": stage, "verdict": [sentence, …], "warnings": [sentence, …]}; with an
                                        early stop "stop": {"after_generation", …}
                                        of a job that only labels {"job", "labels": {"dir", "model", "shards", "failed",
                                        "images", "bad", "mean_confidence"}, "audits", "seconds", "report", "verdict"}
                                        of a job of detectors alone {"job", "detectors": [{"name", "stage", "model",
                                        "parameters", "body_parameters", "box_ap", "mask_ap", …}], "source", "seconds",
                                        "report", "verdict"}
report-1a2b3c4d/index.html             self-contained: opens from anywhere
report-1a2b3c4d/speed_accuracy.{csv,png}  accuracy_by_generation.png  learning_curves.png  accuracy_by_class.{csv,png}
report-1a2b3c4d/gen1-confidence.png    gen1-classes.png  gen1-reliability.png  gen1-threshold.png  …
report-1a2b3c4d/labels_by_class.csv    of a job that only labels: class, images, mean_confidence
"""

from __future__ import annotations

from typing import Any

from pipeline.plan import early_stop
from pipeline.plan.context import Context
from pipeline.plan.inputs import Inputs
from pipeline.plan.kind import Kind, Line
from pipeline.plan.stage import Result


def needs(line: Line, generation: int) -> tuple[str, ...]:
    return tuple(stage.name for stage in line.stages if stage.kind != "prepare")


def identity(inputs: Inputs) -> dict[str, Any]:
    made = {name: inputs.output(name) for name in inputs.stage.needs}
    stop = early_stop.find(inputs.job, inputs.done)
    return {"made": made, "name": inputs.job.name, **({"stop": stop.plain()} if stop else {})}


def run(context: Context) -> Result:
    from pipeline.report import assemble, detection, labels  # matplotlib takes a second

    if context.job.detects_only:
        return detection.assemble(context)
    return labels.assemble(context) if context.job.labels_only else assemble.assemble(context)


KIND = Kind("report", stages="report", needs=needs, identity=identity, run=run)
