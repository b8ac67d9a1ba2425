"""One training run in a process of its own: run_tiny.py DATA FOLDER CHANGES [STEP], under torchrun or not.

Prints the result as JSON. CHANGES: JSON of TrainSpec fields. STEP: kill -9 of the last rank at that step.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from pipeline.train.loop import run
from tests.train.tiny import die_at, make_spec

if __name__ == "__main__":
    data, folder, changes, *step = sys.argv[1:]
    if step and os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1):
        die_at(int(step[0]))
    print(json.dumps(run(make_spec(Path(data), folder, **json.loads(changes)))))
