"""Teacher, control and students of a job over several seeds.

    python -m benchmarks.seeds digits                      # 5 seeds, which also draw the labels; 10 minutes
    python -m benchmarks.seeds cifar10 data.root=FOLDER    # 3 seeds of jobs/cifar10.yaml
    python -m benchmarks.seeds robustness_digits           # the same models on corrupted images, from the same folder
    python -m benchmarks.seeds robustness_cifar10 data.root=FOLDER

Runs the job and its control (the last student's architecture, noise and number of steps on the labels alone) for each
seed, one after another, without Ray and tracking, under torchrun where it trains with several processes. Stop it
anywhere; it continues, and the robustness ones continue what the others left. `key=value` go to both jobs. Prints
tables and, last, one JSON line. Accuracies and errors are of the test images, which nothing was tuned on; corruption
errors, of the control too, are those against the teacher of the same seed. Minutes are those of all stages, of a stage
that was killed only since it went on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.load import load_job
from pipeline.corruption import errors

ROOT = Path(__file__).resolve().parents[1]
SEEDS = {"digits": range(5), "cifar10": range(3)}
JOBS = {"digits": ("noisy_student", "digits_control"), "cifar10": ("cifar10", "cifar10_control")}
CORRUPTED = "robustness_"
FIGURES = {"clean error": "clean_error", "corrupted error": "mean_error", "mCE": "mce", "relative mCE": "relative_mce"}
Columns = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=[*JOBS, *(CORRUPTED + name for name in JOBS)])
    parser.add_argument("settings", nargs="*", help="key=value for both jobs")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 to 4 of digits, 0 to 2 of cifar10")
    parser.add_argument("--output", type=Path, help="default: runs/digits_seeds or runs/cifar10_seeds")
    args = parser.parse_args()
    data, spoilt = args.set.removeprefix(CORRUPTED), args.set.startswith(CORRUPTED)
    seeds = args.seeds or list(SEEDS[data])
    output = args.output or ROOT / "runs" / f"{data}_seeds"
    tables: dict[str, Columns] = {}
    for seed in seeds:
        for title, row in (robustness if spoilt else accuracies)(data, seed, output, args.settings).items():
            for name, value in row.items():
                tables.setdefault(title, {}).setdefault(name, []).append(value)
            shown = ", ".join(f"{name} {value:.2f}" for name, value in row.items())
            print(f"seed {seed}, {title}: {shown}", flush=True)
    means = {title: show(title, seeds, columns) for title, columns in tables.items()}
    seen, mean = (tables, means) if spoilt else (tables["top-1"], means["top-1"])
    print(json.dumps({"seeds": seeds, "seen": seen, "mean": mean}))


def accuracies(data: str, seed: int, output: Path, settings: Sequence[str]) -> dict[str, dict[str, float]]:
    """Top-1 in percent of teacher, control and students, and minutes."""
    job, control = JOBS[data]
    students, minutes = run(job, seed, output, settings)
    alone, more = run(control, seed, output, settings)
    row = {"teacher": students[0]["top1"], "control": alone[0]["top1"]}
    row |= {stage["stage"].replace("-", " "): stage["top1"] for stage in students[1:]}
    return {"top-1": {name: 100 * accuracy for name, accuracy in row.items()} | {"minutes": minutes + more}}


def robustness(data: str, seed: int, output: Path, settings: Sequence[str]) -> dict[str, dict[str, float]]:
    """By name of the figure what teacher, control and students have of it."""
    job, control = JOBS[data]
    said = load_job(str(ROOT / "jobs" / f"{CORRUPTED}{data}.yaml"), [f"output={output}", *settings]).evaluate.robustness
    how = f"evaluate.robustness={json.dumps(dataclasses.asdict(said))}"
    students = corrupted(run_job(f"{CORRUPTED}{data}", output / f"{job}-{seed}", seed, settings))
    alone = corrupted(run_job(control, output / f"{control}-{seed}", seed, [*settings, how]))
    teacher = next(iter(students.values()))
    models = {"teacher": teacher, "control": alone["gen0-teacher"]}
    models |= {stage.replace("-", " "): model for stage, model in list(students.items())[1:]}
    found = {name: errors.summary(model, teacher) for name, model in models.items()}
    nothing = float("nan")  # where the teacher makes no mistake
    return {
        title: {name: nothing if one[key] is None else one[key] for name, one in found.items()}
        for title, key in FIGURES.items()
    }


def corrupted(summary: dict[str, Any]) -> dict[str, errors.Errors]:
    """Errors of each model of a run."""
    if "robustness" not in summary:
        sys.exit(f"{summary['report']} is of an earlier version, which did not name its robustness: delete its folder")
    rows = json.loads(Path(summary["robustness"]).read_text())["models"]
    return {
        row["stage"]: errors.Errors(
            row["clean_error"] / 100, {name: [error / 100 for error in some] for name, some in row["errors"].items()}
        )
        for row in rows
    }


def run(job: str, seed: int, output: Path, settings: Sequence[str]) -> tuple[list[dict[str, Any]], float]:
    """What the evaluation of one job found for each model, and the minutes that its stages took."""
    summary = run_job(job, output / f"{job}-{seed}", seed, settings)
    return summary["stages"], sum(summary["seconds"].values()) / 60


def run_job(job: str, output: Path, seed: int, settings: Sequence[str]) -> dict[str, Any]:
    """The summary of a job that was run, or that had been."""
    path = str(ROOT / "jobs" / f"{job}.yaml")
    where = [f"seed={seed}", f"output={output}", "cluster=inline", "tracking.enabled=false"]
    processes = load_job(path, [*where, *settings]).workers.train
    torchrun = ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    command = [sys.executable, "-m", *torchrun, "pipeline", "run", path, *where, *settings]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def show(title: str, seeds: Sequence[int], columns: Columns) -> dict[str, float]:
    """Print a table; the means."""
    print(f"\n{title}\n\n| seed | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for number, seed in enumerate(seeds):
        print(f"| {seed} | " + " | ".join(f"{values[number]:.2f}" for values in columns.values()) + " |")
    spread = {name: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for name, v in columns.items()}
    print("| mean ± std | " + " | ".join(f"{mean:.2f} ± {std:.2f}" for mean, std in spread.values()) + " |")
    return {name: round(value, 3) for name, (value, _) in spread.items()}


if __name__ == "__main__":
    main()
