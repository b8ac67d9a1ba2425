"""Starts the command line as `python -m pipeline`; the shebang of jobs/*.yaml comes through here too.

Python looks in the working directory first then, where a folder `models` may lie; `noisy-lambda` works beside one.
"""

import importlib.util
import sys
from pathlib import Path

from pipeline.cli import main


def in_the_way() -> Path | None:
    """The folder or file that would be imported as `models` though it is not ours."""
    spec = importlib.util.find_spec("models")
    if spec is None:
        return None
    places = [*(spec.submodule_search_locations or ()), *([spec.origin] if spec.origin else [])]
    found = Path(places[0])
    ours = Path(__file__).resolve().parents[1] / "models"
    return None if found.resolve() == ours else found


if __name__ == "__main__":
    if folder := in_the_way():
        print(
            f"error: {folder} would be imported in place of noisy-lambda's own package `models`; call `noisy-lambda` "
            "in place of `python -m pipeline`, or work in another folder",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.exit(main())
