"""Writes a network as ONNX: a dynamic batch, its card in the file's metadata, and the same answers as torch's."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import numpy as np
import torch

from pipeline.errors import UserError, WeightsError
from pipeline.predict import onnx_network
from pipeline.weights import Card

TOLERANCE = 1e-3  # of logits of order one, fp32 on two different runtimes
BATCHES = (1, 2, 5)
INPUT = "images: float32 [batch, 3, size, size], RGB from 0 to 1, minus mean, divided by std; logits: [batch, classes]"


def write(model: torch.nn.Module, card: Card, path: str) -> float:
    """Write the local file `path`; the largest difference to torch's logits on random images, relative to the largest
    logit. WeightsError: ONNX and torch disagree."""
    needs_packages()
    import onnx

    example = torch.randn(2, 3, card.size, card.size)  # a batch of one would be taken for a constant
    with quiet():
        program = torch.onnx.export(
            model.eval().cpu(),
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    made = program.model_proto
    without_traces(made.graph)
    made.doc_string = INPUT
    for key, value in onnx_network.metadata_of(card).items():
        made.metadata_props.add(key=key, value=value)
    onnx.save(made, path)
    return _difference(model, card, path)


def needs_packages() -> None:
    """UserError: those that write ONNX are not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            "ONNX export needs packages that are not installed; run `pip install 'noisy-lambda[export]'`"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torch's exporter says of its own insides; all else is heard."""

    def ours(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Evaluation failed: ")  # a constant that stays an operation

    folding = logging.getLogger("onnxscript.optimizer._constant_folding")
    folding.addFilter(ours)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.|onnxscript\.|copyreg")
            yield
    finally:
        folding.removeFilter(ours)


def without_traces(graph: object) -> None:
    """Take out what the exporter notes of each node's code: a quarter of a small file, and paths of this machine."""
    parts = ("node", "value_info", "input", "output", "initializer")
    for one in [graph, *(entry for part in parts for entry in getattr(graph, part))]:
        del one.metadata_props[:]  # type: ignore[attr-defined]


def _difference(model: torch.nn.Module, card: Card, path: str) -> float:
    again = onnx_network.load(path)[0]
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch in BATCHES:
        images = torch.randn(batch, 3, card.size, card.size, generator=generator)
        with torch.inference_mode():
            expected, found = model(images).numpy(), again(images).numpy()
        difference = float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))
        if not difference < TOLERANCE:
            raise WeightsError(
                f"the exported ONNX model differs from torch by {difference:.2g} on random input (batch {batch}), more "
                f"than {TOLERANCE}; nothing was written"
            )
        largest = max(largest, difference)
    return largest
