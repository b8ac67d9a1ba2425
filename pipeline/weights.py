"""Builds models, and keeps them as files: `model.safetensors` beside `model.yaml`, which says what they are.

Nothing is ever unpickled.

model.yaml names the architecture, its overrides, the classes in index order and the test view (size, crop,
interpolation, mean, std): all that is needed to build the model and to feed it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from models.over_views import answering, check_views
from pipeline import storage
from pipeline.data.images import View
from pipeline.errors import ConfigError, OutputError, RemoteError, WeightsError
from pipeline.plan.stage import CARD, WEIGHTS, check_file, read_done

WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
ENSEMBLE = "ensemble"  # an architecture in model.yaml, with `overrides: {members: [{architecture, overrides}, …]}`


@dataclass(frozen=True)
class Card:
    """What model.yaml says. `mean` and `std` per channel in 0..1 units; `size` in pixels per side."""

    architecture: str
    classes: list[str]
    size: int
    crop: float
    interpolation: str
    mean: list[float]
    std: list[float]
    overrides: dict[str, Any] = field(default_factory=dict)
    temperature: float | None = None  # of an export: what makes the probabilities honest
    test_views: list[str] = field(default_factory=list)  # over which answers are averaged (models.over_views)

    def view(self) -> View:
        return View(self.size, self.crop, self.interpolation, tuple(self.mean), tuple(self.std))

    def looks(self) -> dict[str, Any]:
        """All that decides what it sees of an image, as plain data."""
        return dataclasses.asdict(self.view()) | ({"test_views": list(self.test_views)} if self.test_views else {})


def card_of(
    architecture: str,
    overrides: Mapping[str, Any],
    classes: Sequence[str],
    view: View,
    test_views: Sequence[str] = (),
) -> Card:
    """What model.yaml will say of a model that looks at images like this."""
    mean, std = list(view.mean), list(view.std)
    shown = view.size, view.crop, view.interpolation, mean, std
    return Card(architecture, list(classes), *shown, dict(overrides), test_views=list(test_views))


def build_model(
    name: str, num_classes: int, overrides: Mapping[str, Any] | None = None, pretrained: bool = False
) -> nn.Module:
    """The architecture with new weights: one of ours, or timm's under timm/<name>. ConfigError for an unknown name."""
    overrides = dict(overrides or {})
    if name == ENSEMBLE:
        members = overrides.get("members") or []
        return Ensemble(build_model(one["architecture"], num_classes, one["overrides"]) for one in members)
    if name.startswith("timm/"):
        return _build_timm(name.removeprefix("timm/"), num_classes, overrides, pretrained)
    import models

    if pretrained:
        raise ConfigError(no_published_weights(name))
    try:
        return models.create_model(name, num_classes=num_classes, **overrides)
    except ValueError as error:
        if name in models.list_models():
            raise ConfigError(f"model '{name}': {error}") from error
        import timm

        timms = f"; timm's is written timm/{name}" if timm.is_model(name.split(".")[0]) else ""
        raise ConfigError(f"{error}{timms}") from error


def is_published(name: str) -> bool:
    """Whether timm knows of weights for a model."""
    import timm

    try:
        config = timm.get_pretrained_cfg(name.removeprefix("timm/")) if name.startswith("timm/") else None
    except RuntimeError:  # no such tag
        return False
    return bool(config and config.has_weights)


def no_published_weights(name: str) -> str:
    return f"model '{name}' has no published weights; set pretrained: false or a file, or name a timm/<name> model"


def _hub_name(name: str) -> str:
    """Where timm's published weights of a model lie on their hub."""
    import timm

    config = timm.get_pretrained_cfg(name)
    return str((config and config.hf_hub_id) or f"timm/{name}")


def _build_timm(name: str, num_classes: int, overrides: dict[str, Any], pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), 3, 0.5)
        raise ConfigError(
            f"timm has no model '{name}'; did you mean {', '.join(close) or 'one of timm.list_models()'}?"
        )
    if pretrained and not is_published(f"timm/{name}"):
        raise ConfigError(no_published_weights(f"timm/{name}"))
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **overrides)
    except OSError as error:
        raise ConfigError(
            f"cannot fetch the published weights of 'timm/{name}': {str(error).splitlines()[0][:200]}; download "
            f"model.safetensors of {_hub_name(name)} where there is a network, save it where you run this as "
            "weights.safetensors, and set pretrained: weights.safetensors"
        ) from error
    except (TypeError, RuntimeError) as error:
        raise ConfigError(f"model 'timm/{name}' does not take {overrides}: {str(error).splitlines()[0]}") from error


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@contextlib.contextmanager
def telling_full_disks() -> Iterator[None]:
    """What the two libraries raise where a file cannot be written, as the OSError that it is."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error).rpartition(": ")[2]) from error
    except RuntimeError as error:
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def save_state(path: str, state: Mapping[str, torch.Tensor]) -> None:
    """Write a state dict as safetensors, whole or not at all. OutputError: it cannot be written."""
    from safetensors.torch import save_file

    # Contiguous copies: safetensors refuses strided and shared storage, and channels-last weights are strided.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    try:
        with storage.writing(path) as temporary, telling_full_disks():
            save_file(plain, temporary)
    except RemoteError:  # says itself what failed
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write {storage.redact(path)}: {(error.strerror or str(error)).lower()}; "
            "make room there and run again"
        ) from error


def read_state(path: str) -> dict[str, torch.Tensor]:
    """The state dict of a .safetensors file."""
    from safetensors.torch import load

    try:
        data = storage.read_bytes(path)
        if storage.name(path) == WEIGHTS:
            _check_recorded(path, data)
        state = load(data)
    except FileNotFoundError as error:
        raise WeightsError(
            f"no weights at {storage.redact(path)}; name a stage folder with {WEIGHTS} or a .safetensors file"
        ) from error
    except OutputError:
        raise
    except Exception as error:  # safetensors has its own error types for each kind of damage
        raise WeightsError(f"{storage.redact(path)} is not a safetensors file: {error}") from error
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise WeightsError(
            f"{storage.redact(path)} holds values that are no numbers (NaN or infinite) in {len(broken)} of its "
            f"{len(state)} tensors, such as {broken[0]}: its training had diverged; name weights from before that"
        )
    return state


def shapes_of(path: str) -> dict[str, list[int]]:
    """Names and shapes of the tensors in a .safetensors file; of a local one nothing but its header is read."""
    from safetensors import SafetensorError, safe_open

    if storage.is_url(path) or not storage.exists(path):
        return {name: list(tensor.shape) for name, tensor in read_state(path).items()}
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{storage.redact(path)} is not a safetensors file: {error}") from error


def without_prefix(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
    """(the state dict as the network itself names it, what torch.compile and DistributedDataParallel had put before all
    of its names)."""
    prefix = ""
    while found := next((one for one in WRAPPERS if state and all(name.startswith(one) for name in state)), ""):
        state, prefix = {name.removeprefix(found): tensor for name, tensor in state.items()}, prefix + found
    return state, prefix


def _check_recorded(path: str, data: bytes) -> None:
    """OutputError where a finished stage's file is not what that stage left."""
    name = storage.name(path)
    if done := read_done(path.removesuffix(name).rstrip("/")):
        check_file(done, name, hashlib.sha256(data).hexdigest())


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Put a state dict into a model; a WeightsError names the parameter, the expected and the found shape."""
    from models import load_weights

    try:
        load_weights(model, state)
    except ValueError as error:
        raise WeightsError(
            f"{storage.redact(source)}: {error}; name the architecture that the weights were trained with"
        ) from error


def write_card(folder: str, card: Card) -> None:
    import yaml

    said = {
        name: value
        for name, value in dataclasses.asdict(card).items()
        if name not in ("temperature", "test_views") or value not in (None, [])
    }
    text = yaml.safe_dump(said, sort_keys=False, allow_unicode=True)
    storage.write_bytes(storage.join(folder, CARD), text.encode())


def read_card(folder: str) -> Card:
    import yaml

    path = storage.join(folder, CARD)
    try:
        data = storage.read_bytes(path)
        _check_recorded(path, data)
        card = Card(**yaml.safe_load(data))
        check_views(card.test_views)
        return card
    except FileNotFoundError as error:
        raise WeightsError(
            f"{storage.redact(folder)} has no {CARD}; name a folder that a training stage wrote"
        ) from error
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise WeightsError(f"{storage.redact(path)} is not a model card: {error}") from error


def load_model(folder: str) -> tuple[nn.Module, Card]:
    """The trained model of a stage folder, in eval mode on the CPU, and its card; with `test_views` it answers over
    them (models.over_views)."""
    card = read_card(folder)
    model = build_model(card.architecture, len(card.classes), card.overrides)
    path = storage.join(folder, WEIGHTS)
    load_state(model, read_state(path), path)
    return answering(model, card.test_views).eval(), card


class Ensemble(nn.Module):
    """Logits of images [b, 3, s, s]: the logarithm of the members' mean probability, so that softmax gives that
    mean."""

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        each = torch.stack([member(x).float().log_softmax(1) for member in self.members])
        return each.logsumexp(0) - math.log(len(self.members))


def joined_states(states: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The state dict of an ensemble of members with these."""
    return {f"members.{number}.{name}": value for number, state in enumerate(states) for name, value in state.items()}
