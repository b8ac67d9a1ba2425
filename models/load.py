"""Loads weights into a model, with errors that name what does not fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

SHOWN = 5


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies `state` into `model`, or raises a ValueError and changes nothing.

    The error lists the names that are missing in the state, those that are unknown to the model, and those whose shape
    differs, with the expected and the found shape.
    """
    expected = model.state_dict()
    problems = []
    for names, text in (
        ([name for name in expected if name not in state], "missing"),
        ([name for name in state if name not in expected], "unexpected"),
        (
            [
                f"{name} (expected {list(expected[name].shape)}, found {list(state[name].shape)})"
                for name in expected
                if name in state and expected[name].shape != state[name].shape
            ],
            "of another shape",
        ),
    ):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            problems.append(f"{text}: {', '.join(names[:SHOWN])}{more}")
    if problems:
        raise ValueError(f"the weights do not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(state)
