"""Measures detectors as COCO does: average precision and recall of boxes and masks, by faster-coco-eval.

Images, annotations and categories are numbered anew from 1 for that: COCO's code takes an annotation whose id is 0 for
none, and one of two with the same id for the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.detection import masks
from pipeline.detection.scene import Scene

KINDS = {"box": "bbox", "mask": "segm"}
FIGURES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip
"""Of COCO's summary, in its order: AP over IoU 0.50 … 0.95, recall with 1, 10 and 100 answers an image."""


@dataclass(frozen=True)
class Found:
    """What a detector found: class name, confidence, box x, y, width, height and mask, in the image's pixels."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: str


Answers = Sequence[Sequence[Found]]


def measure(scenes: Sequence[Scene], answers: Answers, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{box, mask: {each of FIGURES, `per_class`: {name: AP}, `curve`: precision at recall 0, 0.01 … 1, by class, at IoU
    0.5}}, as fractions; None for what no object defines."""
    if len(scenes) != len(answers):
        raise AssertionError(f"{len(answers)} answers for {len(scenes)} images")
    masks.library()  # which says how to get it
    from faster_coco_eval import COCO, COCOeval_faster

    truth = truth_of(scenes, classes)
    found: dict[str, dict[str, Any]] = {}
    for kind, name in KINDS.items():
        coco = COCO(truth, print_function=_quiet)
        results = results_of(scenes, answers, classes, kind)
        evaluation = COCOeval_faster(coco, coco.loadRes(results), name, print_function=_quiet)
        evaluation.run()
        precision = evaluation.eval["precision"].reshape(10, 101, len(classes), 4, 3)[:, :, :, 0, 2]
        found[kind] = {
            **{figure: _defined(value) for figure, value in zip(FIGURES, evaluation.stats, strict=False)},
            "per_class": {name: _mean(precision[:, :, number]) for number, name in enumerate(classes)},
            "curve": {
                name: [round(float(value), 4) for value in precision[0, :, number]]
                for number, name in enumerate(classes)
                if (precision[0, :, number] > -1).all()
            },
        }
    return found


def truth_of(scenes: Sequence[Scene], classes: Sequence[str]) -> dict[str, Any]:
    """The objects as a COCO data set, all numbers from 1."""
    number = {name: place for place, name in enumerate(classes, 1)}
    annotations: list[dict[str, Any]] = []
    for image, scene in enumerate(scenes, 1):
        for thing in scene.things:
            code = {"size": [scene.height, scene.width], "counts": thing.mask}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": number[thing.name],
                    "bbox": list(thing.box),
                    "area": thing.area,
                    "iscrowd": int(thing.crowd),
                    "segmentation": code,
                }
            )
    return {
        "info": {},
        "images": [{"id": n, "height": s.height, "width": s.width} for n, s in enumerate(scenes, 1)],
        "annotations": annotations,
        "categories": [{"id": place, "name": name} for name, place in number.items()],
    }


def results_of(scenes: Sequence[Scene], answers: Answers, classes: Sequence[str], kind: str) -> list[dict[str, Any]]:
    """The answers as COCO results; those of masks have no box, whose area would be taken for the mask's."""
    number = {name: place for place, name in enumerate(classes, 1)}
    return [
        {
            "image_id": image,
            "category_id": number[found.name],
            "score": found.score,
            **(
                {"bbox": list(found.box)}
                if kind == "box"
                else {"segmentation": {"size": [scene.height, scene.width], "counts": found.mask}}
            ),
        }
        for image, (scene, answer) in enumerate(zip(scenes, answers, strict=True), 1)
        for found in answer
    ]


def _defined(value: float) -> float | None:
    return None if value < 0 else float(value)


def _mean(precision: np.ndarray) -> float | None:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None


def _quiet(*_: object) -> None:
    pass
