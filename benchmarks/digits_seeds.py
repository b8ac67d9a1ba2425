"""Teacher, control and students of the digits demo over several seeds, which also draw the labelled images.

    python -m benchmarks.digits_seeds [--seeds 0 1 2 3 4] [--output runs/digits_seeds]

Runs jobs/noisy_student.yaml and jobs/digits_control.yaml (the last student's architecture, noise and number of steps on the labels
alone) for each seed, one after another, without Ray and tracking. Stop it anywhere; it continues. Prints a table and, last, one
JSON line. Accuracies are of the 450 test images; nothing was tuned on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="The digits demo over several seeds, with its labels-only control.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "digits_seeds")
    args = parser.parse_args()
    columns: dict[str, list[float]] = {}
    for seed in args.seeds:
        students = run("noisy_student", seed, args.output)["stages"]
        control = run("digits_control", seed, args.output)["stages"]
        row = {"teacher": students[0]["top1"], "control": control[0]["top1"]}
        row |= {stage["stage"].replace("-", " "): stage["top1"] for stage in students[1:]}
        for name, accuracy in row.items():
            columns.setdefault(name, []).append(100 * accuracy)
        print(
            f"seed {seed}: " + ", ".join(f"{name} {100 * accuracy:.2f}" for name, accuracy in row.items()), flush=True
        )
    show(args.seeds, columns)


def run(job: str, seed: int, output: Path) -> dict[str, Any]:
    """The summary of one job, from the last line that `run` prints."""
    settings = [f"seed={seed}", f"output={output / f'{job}-{seed}'}", "cluster=inline", "tracking.enabled=false"]
    command = [sys.executable, "-m", "pipeline", "run", f"jobs/{job}.yaml", *settings]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def show(seeds: Sequence[int], columns: dict[str, list[float]]) -> None:
    print("\n| seed | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for number, seed in enumerate(seeds):
        print(f"| {seed} | " + " | ".join(f"{values[number]:.2f}" for values in columns.values()) + " |")
    spread = {name: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for name, v in columns.items()}
    print("| mean ± std | " + " | ".join(f"{mean:.2f} ± {std:.2f}" for mean, std in spread.values()) + " |")
    print(
        json.dumps(
            {"seeds": list(seeds), "top1_percent": columns, "mean": {n: round(m, 3) for n, (m, _) in spread.items()}}
        )
    )


if __name__ == "__main__":
    main()
