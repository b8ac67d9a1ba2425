"""Makes the training targets of rows: hard labels with smoothing, or the teacher's probabilities at a temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data import label_files
from pipeline.loading.training_rows import TrainingRows


@dataclass(frozen=True)
class SoftTargets:
    """How targets are made: label smoothing where the label is hard, temperature where it is soft.

    Hard labels are the labelled source's, and with `hard_pseudo` the pseudo source's most probable classes too.
    """

    smoothing: float = 0.0
    temperature: float = 1.0
    hard_pseudo: bool = False

    def are_soft(self, source: str) -> bool:
        return source == "pseudo" and not self.hard_pseudo

    def make(
        self, source: str, rows: Sequence[tuple[TrainingRows, int]], classes: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(targets float32 [b, classes], hard labels int64 [b], -1 where soft) of (rows of a shard, row) each.

        The loss is linear in its targets: an image weighs what they sum to.
        """
        if self.are_soft(source) and rows:
            top = np.stack([of.classes[row] for of, row in rows])
            probs = np.stack([of.probs[row] for of, row in rows])
            targets = label_files.spread_targets(top, probs, classes, temperature=self.temperature)
            hard = np.full(len(rows), -1, np.int64)
        else:
            hard = np.array([of.label[row] for of, row in rows], np.int64)
            targets = np.full((len(rows), classes), self.smoothing / classes, np.float32)
            targets[np.arange(len(rows)), hard] += 1 - self.smoothing
        return targets * np.array([of.weight[row] for of, row in rows], np.float32)[:, None], hard
