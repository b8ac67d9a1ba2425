"""The command `export`: a trained model as a folder that other programs can use.

OUT/model.safetensors   OUT/model.yaml   OUT/model.onnx   OUT/README.md
OUT/model.int8.onnx (--int8)   OUT/config.json (timm models)
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path

from models.over_views import network_of
from pipeline import storage, weights
from pipeline.detection.card import is_detector
from pipeline.errors import ConfigError, OutputError
from pipeline.export import detector, model_card, onnx_file, quantised, timm_config
from pipeline.plan import best
from pipeline.plan.stage import CARD, DONE, WEIGHTS
from pipeline.predict import choose, onnx_network
from pipeline.predict.predictor import Model
from pipeline.printable import counted, shown

MAX_DROP = 0.5


def export(named: str, out: str | None = None, *, int8: bool = False, max_drop: float | None = None) -> int:
    """Export the model that `named` means to `predict`, and print what was checked; the exit status. `int8`: as 8-bit
    integers too, which may cost `max_drop` percentage points of validation top-1."""
    if max_drop is not None and not (int8 and 0 <= max_drop <= 100):
        raise ConfigError(f"--max-drop is {max_drop:g}; it takes 0 to 100 percentage points, and goes with --int8")
    if is_detector(named):
        if int8:
            raise ConfigError("--int8 is of classifiers; leave it out for a detector")
        return detector.export(named, out)
    allowed = (MAX_DROP if max_drop is None else max_drop) if int8 else None
    model = choose.find(named, lambda text: print(f"model: {shown(text)}", file=sys.stderr))
    if isinstance(model.module, onnx_network.OnnxNetwork):
        raise ConfigError(f"{storage.redact(named)} is an export already; name the stage's folder or its run")
    if out is None and named.startswith(choose.REGISTERED):
        raise ConfigError(f"{named} lies in MLflow; say by --out into which folder to write")
    files, difference, right = write(model, out or storage.join(model.folder, "export"), allowed)
    print(
        f"wrote {', '.join(files)} in {shown(out or storage.join(model.folder, 'export'))}; checked: onnxruntime's "
        f"logits of random images differ from torch's by at most {difference:.1e} of the largest"
    )
    if right:
        before, after = right.top1
        print(
            f"{quantised.NAME} has {after:.2f} % of {counted(int(right.images.sum()), 'validation image')} right, the "
            f"model itself {before:.2f} %"
        )
    return 0


def write(model: Model, out: str, max_drop: float | None) -> tuple[list[str], float, quantised.Right | None]:
    """Write the files of an export into `out`; their names, by how much ONNX and torch differ, and what the int8 model
    has right. OutputError: the folder is another model's. WeightsError: ONNX and torch disagree, or int8 costs too
    much; nothing is written."""
    _check(model, out)
    facts = model_card.facts_of(model.folder)
    images = None if max_drop is None else quantised.validation_of(facts, model.card.classes)
    temperature = best.temperature_of(model.folder) if model.card.temperature is None else model.card.temperature
    model = dataclasses.replace(model, card=dataclasses.replace(model.card, temperature=temperature))
    with tempfile.TemporaryDirectory() as folder:
        local = str(Path(folder, onnx_network.NAME))
        difference = onnx_file.write(model.module, model.card, local)
        small, right = str(Path(folder, quantised.NAME)), None
        if images and max_drop is not None:
            right = quantised.write(model, local, small, images, max_drop)
        config = None
        if model.card.architecture.startswith(timm_config.TIMM):
            config = timm_config.text_of(network_of(model.module), model.card, str(Path(folder, "timm")))
        made = {onnx_network.NAME: local} | ({quantised.NAME: small} if right else {})
        files = [WEIGHTS, CARD, *made, model_card.NAME, *([timm_config.NAME] if config else [])]
        parameters = weights.parameter_count(model.module)
        text = model_card.text_of(model, facts, parameters, files)
        weights.save_state(storage.join(out, WEIGHTS), network_of(model.module).state_dict())
        weights.write_card(out, model.card)
        for name, path in made.items():
            with storage.writing(storage.join(out, name)) as temporary:
                shutil.copyfile(path, temporary)
    if config:
        storage.write_bytes(storage.join(out, timm_config.NAME), config)
    readme = storage.join(out, model_card.NAME)
    if storage.exists(readme):
        print(f"{shown(readme)} is there already and stays as it is; delete it for a new one", file=sys.stderr)
        files.remove(model_card.NAME)
    else:
        storage.write_bytes(readme, text.encode())
    return files, difference, right


def _check(model: Model, out: str) -> None:
    """OutputError: the files of an export would overwrite others in `out`."""
    if storage.exists(storage.join(out, DONE)):
        raise OutputError(f"--out {storage.redact(out)} is the folder of a stage; name another one")
    readme = storage.join(out, model_card.NAME)
    if not storage.exists(readme):
        return
    if model.identity not in storage.read_bytes(readme).decode(errors="replace"):
        raise OutputError(
            f"{storage.redact(readme)} is there already, and not the card of this model; name another folder by --out, "
            "or delete it"
        )
