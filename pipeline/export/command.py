"""The command `export`: a trained model as a folder that other programs can use.

OUT/model.safetensors   OUT/model.yaml   OUT/model.onnx   OUT/README.md   OUT/config.json (timm models)
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path

from pipeline import storage, weights
from pipeline.errors import ConfigError, OutputError
from pipeline.export import model_card, onnx_file, timm_config
from pipeline.plan import best
from pipeline.plan.stage import CARD, DONE, WEIGHTS
from pipeline.predict import choose, onnx_network
from pipeline.predict.predictor import Model
from pipeline.printable import shown


def export(named: str, out: str | None = None) -> int:
    """Export the model that `named` means to `predict`, and print what was checked; the exit status."""
    model = choose.find(named, lambda text: print(f"model: {shown(text)}", file=sys.stderr))
    if isinstance(model.module, onnx_network.OnnxNetwork):
        raise ConfigError(f"{storage.redact(named)} is an export already; name the stage's folder or its run")
    if out is None and named.startswith(choose.REGISTERED):
        raise ConfigError(f"{named} lies in MLflow; say by --out into which folder to write")
    files, difference = write(model, out or storage.join(model.folder, "export"))
    print(
        f"wrote {', '.join(files)} in {shown(out or storage.join(model.folder, 'export'))}; checked: onnxruntime's "
        f"logits of random images differ from torch's by at most {difference:.1e} of the largest"
    )
    return 0


def write(model: Model, out: str) -> tuple[list[str], float]:
    """Write the files of an export into `out`; their names, and by how much ONNX and torch differ. OutputError: the
    folder is another model's. WeightsError: ONNX and torch disagree; nothing is written."""
    _check(model, out)
    temperature = best.temperature_of(model.folder) if model.card.temperature is None else model.card.temperature
    model = dataclasses.replace(model, card=dataclasses.replace(model.card, temperature=temperature))
    with tempfile.TemporaryDirectory() as folder:
        local = str(Path(folder, onnx_network.NAME))
        difference = onnx_file.write(model.module, model.card, local)
        config = None
        if model.card.architecture.startswith(timm_config.TIMM):
            config = timm_config.text_of(model.module, model.card, str(Path(folder, "timm")))
        files = [WEIGHTS, CARD, onnx_network.NAME, model_card.NAME, *([timm_config.NAME] if config else [])]
        parameters = weights.parameter_count(model.module)
        text = model_card.text_of(model, model_card.facts_of(model.folder), parameters, files)
        weights.save_state(storage.join(out, WEIGHTS), model.module.state_dict())
        weights.write_card(out, model.card)
        with storage.writing(storage.join(out, onnx_network.NAME)) as temporary:
            shutil.copyfile(local, temporary)
    if config:
        storage.write_bytes(storage.join(out, timm_config.NAME), config)
    readme = storage.join(out, model_card.NAME)
    if storage.exists(readme):
        print(f"{shown(readme)} is there already and stays as it is; delete it for a new one", file=sys.stderr)
        files.remove(model_card.NAME)
    else:
        storage.write_bytes(readme, text.encode())
    return files, difference


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
