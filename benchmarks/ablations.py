"""What each part of jobs/cifar10.yaml contributes: its first student, trained again with one thing changed.

    python -m benchmarks.ablations data.root=FOLDER

All variants share the teacher and, where they can, the label and selection files of one seed of
`python -m benchmarks.seeds cifar10`, whose folder they are run in; each has as many steps, of as many images, as the
first student. The smaller student alone starts from new weights, since the teacher's do not fit it. Stop it anywhere;
it continues. Prints a table and, last, one JSON line. Top-1 in %, of one seed: differences below a point mean little.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.seeds import ROOT, run

FIRST = "generations=[{student: {model: lambda_resnet_cifar_14}}]"
VARIANTS: dict[str, list[str]] = {
    "as it is": [],
    "no noise on the student": [
        "student.augment=''", "student.crop_scale=[1.0, 1.0]", "student.crop_ratio=[1.0, 1.0]", "student.flip=0.0",
        "student.dropout=0.0", "student.stochastic_depth=0.0", "student.crop=1.0",  # it has seen whole images
    ],
    "soft labels": ["student.labels=soft"],
    "no filter": ["select.threshold=0.0", "select.per_class=2000"],
    "no balancing": ["select.per_class=null"],
    "ratio 1": ["student.batch=64", "student.unlabelled_ratio=1.0"],
    "ratio 7": ["student.batch=16", "student.unlabelled_ratio=7.0"],
    # what more steps alone do for the teacher
    "no pseudo-labels": ["student.batch=128", "student.unlabelled_ratio=0.0"],
    "student smaller than the teacher": ["generations=[{student: {model: lambda_resnet_medium, init: scratch}}]"],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="key=value for all, as with benchmarks.seeds")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "cifar10_seeds")
    args = parser.parse_args()
    found = {}
    print("| variant | teacher | student | gain |\n|---|---|---|---|")
    for name in args.only:
        (teacher, student), _ = run("cifar10", args.seed, args.output, [FIRST, *args.settings, *VARIANTS[name]])
        found[name] = 100 * student["top1"]
        gain = 100 * (student["top1"] - teacher["top1"])
        print(f"| {name} | {100 * teacher['top1']:.2f} | {found[name]:.2f} | {gain:+.2f} |", flush=True)
    print(json.dumps({"seed": args.seed, "top1_percent": found}))


if __name__ == "__main__":
    main()
