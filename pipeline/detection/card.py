"""Says what a detector is: `detector.yaml` beside its weights, all that is needed to build it and to feed it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from pipeline import storage
from pipeline.errors import WeightsError

CARD = "detector.yaml"


@dataclass(frozen=True)
class DetectorCard:
    """`mean` and `std` per channel in 0..1; for the others see the settings of a detector."""

    model: str
    classes: list[str]
    canvas: int
    fpn: int
    head: int
    anchor: float
    proposals: int
    regions: int
    mean: list[float]
    std: list[float]
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean colour, 0 … 255: what is around an image."""
        red, green, blue = (round(255 * value) for value in self.mean)
        return red, green, blue


def write_card(folder: str, card: DetectorCard) -> None:
    import yaml

    text = yaml.safe_dump(dataclasses.asdict(card), sort_keys=False, allow_unicode=True)
    storage.write_bytes(storage.join(folder, CARD), text.encode())


def read_card(folder: str) -> DetectorCard:
    """WeightsError: the folder holds no detector."""
    import yaml

    path = storage.join(folder, CARD)
    try:
        return DetectorCard(**yaml.safe_load(storage.read_bytes(path)))
    except FileNotFoundError as error:
        raise WeightsError(
            f"{storage.redact(folder)} has no {CARD}; name a folder that a detector was trained in"
        ) from error
    except (TypeError, yaml.YAMLError) as error:
        raise WeightsError(f"{storage.redact(path)} is not a detector's card: {error}") from error


def is_detector(name: str) -> bool:
    """Whether a name is that of a folder with a detector."""
    return storage.exists(storage.join(name.rstrip("/"), CARD))
