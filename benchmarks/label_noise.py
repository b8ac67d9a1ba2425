"""Compares the share of wrong labels that an audit states with the one that is measured on images it has not seen.

    python -m benchmarks.label_noise runs/cifar10                     # of every generation of a finished run
    python -m benchmarks.label_noise runs/cifar10 --max-noise 0.02

The audited images of each generation are divided in two, many times: thresholds are chosen on one half, as
`select.max_noise` does, and the labels that they let through are counted on the other. Half of the images tell less
than all of them, so a run states narrower intervals; and what is measured has chance of its own, which is no fault of
what was stated. Prints, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from pipeline import graph, storage
from pipeline.config.load import load_job
from pipeline.data.index_files import rows_path
from pipeline.data.label_files import file_name
from pipeline.labelling import audit, calibration, label_noise
from pipeline.plan.corpora import Corpora, audited_of
from pipeline.plan.stage import AUDIT, JOB, Done, read_json_file


def answers(run: str) -> dict[str, tuple[calibration.Answers, np.ndarray, int]]:
    """{audit: (what was said of the images, the confidence of each, classes)} of a run's finished audits."""
    job = load_job(storage.join(run, JOB), [f"output={run}"])
    done: dict[str, Done] = {look.stage.name: look.done for look in graph.look(job) if look.done}
    corpora = Corpora(job, done, write=False)
    found = {}
    for name in (name for name in done if name.endswith("-audit")):
        files = [
            (
                rows_path(done["index"].folder, source, shard.name),
                storage.join(done[name].folder, file_name(f"{source}/{shard.name}")),
            )
            for source in audited_of(job)
            for shard in corpora[source].shards
        ]
        said, _ = audit.join(files, len(corpora.classes))
        figures = read_json_file(done[name], AUDIT)
        temperature = figures["temperature"] if figures["calibrate"] else 1.0
        found[name] = said, calibration.confidence_at(said, temperature), len(corpora.classes)
    return found


def compare(
    said: calibration.Answers, confidence: np.ndarray, classes: int, most: float, seed: int
) -> tuple[list[bool], list[float | None]]:
    """Whether each class's measured noise lies in the stated interval (of classes of which both halves keep some), and
    (stated, measured) noise of all that is kept."""
    first = np.random.default_rng(seed).permutation(len(said.truth)) % 2 == 0
    found = label_noise.estimate(said.predicted[first], said.correct[first], confidence[first], classes)
    level = found.describe(found.choose(most), chosen=True)
    least = np.array([2.0 if one is None else one for one in level["thresholds"]], np.float32)
    kept = ~first & (confidence >= least[said.predicted])
    counts = np.bincount(said.predicted[kept], minlength=classes)
    wrong = np.bincount(said.predicted[kept & ~said.correct], minlength=classes)
    inside = [level["low"][c] <= wrong[c] / counts[c] <= level["high"][c] for c in np.flatnonzero(counts)]
    stated = label_noise.in_all(level, counts.tolist())["noise"]
    return inside, [stated, float(wrong.sum() / counts.sum()) if counts.any() else None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the output of a finished run")
    parser.add_argument("--max-noise", type=float, default=0.05)
    parser.add_argument("--splits", type=int, default=20)
    args = parser.parse_args()
    result = {}
    for name, (said, confidence, classes) in answers(args.run.rstrip("/")).items():
        halves = [compare(said, confidence, classes, args.max_noise, seed) for seed in range(args.splits)]
        inside = [one for part, _ in halves for one in part]
        both = np.array([noise for _, noise in halves if None not in noise], float).reshape(-1, 2)
        result[name] = {
            "images": len(said.truth),
            "classes_inside": float(np.mean(inside)) if inside else None,
            "stated": float(both[:, 0].mean()) if len(both) else None,
            "measured": float(both[:, 1].mean()) if len(both) else None,
        }
        print(f"{name}: {json.dumps(result[name])}")
    print(json.dumps({"run": args.run, "max_noise": args.max_noise, "splits": args.splits, "audits": result}))


if __name__ == "__main__":
    main()
