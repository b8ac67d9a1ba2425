"""Teacher, control and students of a job over several seeds.

    python -m benchmarks.seeds digits                      # 5 seeds, which also draw the labels; 10 minutes
    python -m benchmarks.seeds cifar10 data.root=FOLDER    # 3 seeds of jobs/cifar10.yaml

Runs the job and its control (the last student's architecture, noise and number of steps on the labels alone) for each
seed, one after another, without Ray and tracking, under torchrun where it trains with several processes. Stop it
anywhere; it continues. `key=value` go to both jobs. Prints a table and, last, one JSON line. Accuracies are of the test
images, which nothing was tuned on; minutes are those of all stages, of a stage that was killed only since it went on.
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

from pipeline.config.load import load_job

ROOT = Path(__file__).resolve().parents[1]
SETS = {"digits": ("noisy_student", "digits_control", range(5)), "cifar10": ("cifar10", "cifar10_control", range(3))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=list(SETS))
    parser.add_argument("settings", nargs="*", help="key=value for both jobs")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 to 4 of digits, 0 to 2 of cifar10")
    parser.add_argument("--output", type=Path, help="default: runs/<set>_seeds")
    args = parser.parse_args()
    job, control, usual = SETS[args.set]
    seeds = args.seeds or list(usual)
    output = args.output or ROOT / "runs" / f"{args.set}_seeds"
    columns: dict[str, list[float]] = {}
    for seed in seeds:
        students, minutes = run(job, seed, output, args.settings)
        alone, more = run(control, seed, output, args.settings)
        row = {"teacher": students[0]["top1"], "control": alone[0]["top1"]}
        row |= {stage["stage"].replace("-", " "): stage["top1"] for stage in students[1:]}
        row = {name: 100 * accuracy for name, accuracy in row.items()} | {"minutes": minutes + more}
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.2f}" for name, value in row.items()), flush=True)
    show(seeds, columns)


def run(job: str, seed: int, output: Path, settings: Sequence[str]) -> tuple[list[dict[str, Any]], float]:
    """What the evaluation of one job found for each model, and the minutes that its stages took."""
    path = str(ROOT / "jobs" / f"{job}.yaml")
    where = [f"seed={seed}", f"output={output / f'{job}-{seed}'}", "cluster=inline", "tracking.enabled=false"]
    processes = load_job(path, [*where, *settings]).workers.train
    torchrun = ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    command = [sys.executable, "-m", *torchrun, "pipeline", "run", path, *where, *settings]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    summary = json.loads(done.stdout.splitlines()[-1])
    return summary["stages"], sum(summary["seconds"].values()) / 60


def show(seeds: Sequence[int], columns: dict[str, list[float]]) -> None:
    print("\n| seed | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for number, seed in enumerate(seeds):
        print(f"| {seed} | " + " | ".join(f"{values[number]:.2f}" for values in columns.values()) + " |")
    spread = {name: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for name, v in columns.items()}
    print("| mean ± std | " + " | ".join(f"{mean:.2f} ± {std:.2f}" for mean, std in spread.values()) + " |")
    mean = {name: round(value, 3) for name, (value, _) in spread.items()}
    print(json.dumps({"seeds": list(seeds), "seen": columns, "mean": mean}))


if __name__ == "__main__":
    main()
