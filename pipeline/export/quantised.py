"""Quantises an exported ONNX model to 8-bit integers, and refuses where that costs too much accuracy.

Weights and activations of convolutions and linear layers, per channel, by onnxruntime's static quantisation (QDQ); the
ranges of the activations are those of validation images, and all validation images say what was lost.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.images import BadImage
from pipeline.errors import ConfigError, DataError, WeightsError
from pipeline.export.model_card import Facts
from pipeline.plan.corpora import Corpora
from pipeline.predict import inputs, onnx_network, table
from pipeline.predict.predictor import Model, Predictor
from pipeline.printable import counted

NAME = "model.int8.onnx"
CALIBRATED_ON = 512  # images whose activations give the ranges
OPERATORS = ["Conv", "Gemm"]
WORST = 3
Images = Callable[[], Iterator[inputs.Wanted]]


@dataclass(frozen=True)
class Right:
    """Of each class the validation images int64 [classes], and those that each model has right."""

    images: npt.NDArray[np.int64]
    before: npt.NDArray[np.int64]
    after: npt.NDArray[np.int64]

    @property
    def top1(self) -> tuple[float, float]:
        """In percent, before and after."""
        total = max(1, int(self.images.sum()))
        return 100 * float(self.before.sum()) / total, 100 * float(self.after.sum()) / total


def validation_of(facts: Facts, classes: Sequence[str]) -> Images:
    """The validation images of the model's job, with their classes. ConfigError: they are not known here."""
    if facts.job is None:
        raise ConfigError(
            "--int8 needs the validation images that the model was chosen by, and they are not known here; name a "
            "stage's folder, or a run, whose shards are where its job.yaml says"
        )
    found = Corpora(facts.job, facts.done, write=False)["validation"].shards

    def again() -> Iterator[inputs.Wanted]:
        damages: list[str] = []
        yield from inputs.of_shards(found, damages, classes, remote=True)
        if damages:
            raise DataError(damages[0])

    return again


def write(model: Model, path: str, to: str, images: Images, max_drop: float) -> Right:
    """Quantise the ONNX file at `path` into the local file `to`. WeightsError: it has over `max_drop` percentage points
    less of the validation images right."""
    import onnx
    from onnxruntime.quantization import QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = str(Path(to).with_suffix(".prepared.onnx"))
    with _quiet():
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared, to, _Reader(model, images), quant_format=QuantFormat.QDQ, per_channel=True,
            op_types_to_quantize=OPERATORS,
        )  # fmt: skip
    made = onnx.load(to)
    del made.metadata_props[:]
    for key, value in onnx_network.metadata_of(model.card).items():
        made.metadata_props.add(key=key, value=value)
    onnx.save(made, to)
    small = Model(to, onnx_network.load(to)[0], model.card, 1.0, "")
    right = _compare(model, small, images)
    before, after = right.top1
    if before - after > max_drop:
        raise WeightsError(
            f"int8 has {after:.2f} % of {counted(int(right.images.sum()), 'validation image')} right, "
            f"{before - after:.2f} points less than the {before:.2f} % before, and --max-drop allows {max_drop:g}; "
            f"the worst classes: {_worst(right, model.card.classes)}; nothing was written: export without --int8, or "
            "allow more"
        )
    return right


class _Reader:
    """Hands images to onnxruntime's calibration, one at a time."""

    def __init__(self, model: Model, images: Images) -> None:
        self._views = self._normalised(Predictor([model], device="cpu"), images)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._views, None)

    def _normalised(self, predictor: Predictor, images: Images) -> Iterator[dict[str, Any]]:
        for one in islice(images(), CALIBRATED_ON):
            with contextlib.suppress(DataError, BadImage):  # what is damaged counts nowhere
                yield {"images": predictor.transform(one.picture)[None].numpy()}


def _compare(model: Model, small: Model, images: Images) -> Right:
    classes = len(model.card.classes)
    right = Right(*(np.zeros(classes, np.int64) for _ in range(3)))
    for hits, one in ((right.before, model), (right.after, small)):
        for wanted, said in table.answered(Predictor([one], device="cpu"), images()):
            if wanted.truth is None or said.problem:
                continue
            hits[wanted.truth] += said.label == model.card.classes[wanted.truth]
            if one is model:
                right.images[wanted.truth] += 1
    return right


def _worst(right: Right, classes: Sequence[str]) -> str:
    lost = (right.before - right.after) / np.maximum(right.images, 1)
    worst = [int(number) for number in np.argsort(-lost, kind="stable")[:WORST] if lost[number] > 0]
    return ", ".join(
        f"{classes[n]} ({right.after[n]} of {right.images[n]} right instead of {right.before[n]})" for n in worst
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what onnxruntime says about its own steps, by way of the root logger, to which it adds a handler."""

    def not_theirs(record: logging.LogRecord) -> bool:
        return "onnxruntime" not in record.pathname

    root = logging.getLogger()
    handlers = list(root.handlers)
    root.addFilter(not_theirs)
    try:
        yield
    finally:
        root.removeFilter(not_theirs)
        root.handlers[:] = handlers
