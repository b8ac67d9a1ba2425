"""One training run in a process of its own: run_tiny.py DATA FOLDER CHANGES [STEP], under torchrun or not.

Prints the result as JSON. CHANGES: JSON of TrainSpec fields. STEP: kill -9 of the last rank at that step, once the
checkpoint before it is there. --terminate STEP: SIGTERM at that step, sent by rank 0. --record FOLDER: see tiny.record.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from pipeline.train.loop import run
from tests.train.tiny import die_at, make_spec, record, terminate_at

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("folder")
    parser.add_argument("changes", type=json.loads)
    parser.add_argument("kill", type=int, nargs="?")
    parser.add_argument("--terminate", type=int)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    spec = make_spec(args.data, args.folder, **args.changes)
    rank, last = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")) - 1
    if args.kill is not None and rank == last:
        saved = args.kill // spec.checkpoint_every * spec.checkpoint_every
        die_at(args.kill, once=Path(args.folder, f"checkpoints/step-{saved:06d}/manifest.json") if saved else None)
    if args.terminate is not None and rank == 0:
        terminate_at(args.terminate)
    if args.record:
        record(args.record)
    print(json.dumps(run(spec)))
