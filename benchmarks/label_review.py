r"""Flips labels on purpose, and counts which of them `noisy-lambda review --folds` finds, beside cleanlab.

    python -m benchmarks.label_review cifar10 data.root=FOLDER cluster=inline workers.train=1 teacher.duration=1500st \
        teacher.warmup=100st

Writes the job's labelled shards again, with a tenth of the labels (`.cls` members that hold class indexes) replaced by
another class drawn at random; runs the review, and cleanlab on the same probabilities; and writes what a person would
who looks at every doubtful image and never errs. Stop it anywhere; it continues. Prints, last, one JSON line.

    <output>/shards/            the shards with wrong labels
    <output>/review/            the run folder of the review
    <output>/corrections.csv    the right labels of what was found
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np

from pipeline.config.load import load_job
from pipeline.config.settings import Job
from pipeline.data import label_files
from pipeline.data.corrections import COLUMNS
from pipeline.data.shards import find_shards
from pipeline.labelling import audit
from pipeline.review import choose, doubtful, items
from pipeline.stages import fold

Labels = dict[tuple[str, str], tuple[int, int]]
"""{(shard, key): (true class, label)}"""
FIRST = (50, 100, 200, 400)  # of the doubtful labels, by rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("settings", nargs="*", help="key=value")
    parser.add_argument("--share", type=float, default=0.1, help="of the labels that is flipped (default: 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="draws which, and to what (default: 0)")
    parser.add_argument("--folds", type=int, default=2, help="(default: 2)")
    parser.add_argument("--output", type=Path, default=Path("runs/label_review"), help="(default: runs/label_review)")
    args = parser.parse_args()
    output = args.output.absolute()
    labels = flip(load_job(args.job, args.settings), output / "shards", args.share, args.seed)
    settings = [*args.settings, f"data.labelled={output}/shards/*.tar", f"output={output}/review", "generations=[]"]
    words = ["review", args.job, *settings, "--folds", str(args.folds)]
    subprocess.run([sys.executable, "-m", "pipeline", *words], check=True)
    sources = choose.Sources(load_job(args.job, settings), args.folds)
    print(json.dumps({"share": args.share, "seed": args.seed, **measure(sources, labels, output / "corrections.csv")}))


def flip(job: Job, out: Path, share: float, seed: int) -> Labels:
    """Write the labelled shards with wrong labels, unless they are there."""
    known = out / "labels.json"
    if known.exists():
        return {(shard, key): (true, given) for shard, key, true, given in json.loads(known.read_text())}
    shards = find_shards(job.data.labelled, "labelled", job.data.root)
    members = [(shard.name, m.name, int(data)) for shard in shards for m, data in _texts(shard.path)]
    classes = max(true for _, _, true in members) + 1
    rng = random.Random(seed)
    wrong = set(rng.sample(range(len(members)), round(share * len(members))))
    given = {
        (shard, name): rng.choice([c for c in range(classes) if c != true]) if number in wrong else true
        for number, (shard, name, true) in enumerate(members)
    }
    for shard in shards:
        path = out / shard.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(shard.path) as source, tarfile.open(path, "w") as target:
            for member in source:
                file = source.extractfile(member)
                data = file.read() if file else b""
                if (shard.name, member.name) in given:
                    data = str(given[shard.name, member.name]).encode()
                    member.size = len(data)
                target.addfile(member, io.BytesIO(data))
    found = [(shard, name.removesuffix(".cls"), true, given[shard, name]) for shard, name, true in members]
    known.write_text(json.dumps(found))
    return {(shard, key): (true, now) for shard, key, true, now in found}


def _texts(path: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path) as tar:
        return [(m, file.read()) for m in tar if m.name.endswith(".cls") and (file := tar.extractfile(m))]


def measure(sources: choose.Sources, labels: Labels, corrections: Path) -> dict[str, object]:
    """Precision and recall of what is found, cleanlab's too; writes the corrections."""
    found = items.read(choose.labelled(sources, len(labels)).wanted, sources.corpora.root)
    truth = [labels[one.wanted.shard.name, one.wanted.key] for one in found]
    wrong = np.array([true != given for true, given in truth])
    flipped = sum(true != given for true, given in labels.values())
    rows = [
        (
            one.wanted.shard.source,
            one.wanted.shard.name,
            one.wanted.index,
            one.wanted.key,
            sources.classes[true],
            one.sha256,
        )
        for one, (true, given) in zip(found, truth, strict=True)
        if true != given
    ]
    with corrections.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    print(f"{len(found)} of {len(labels)} labels are doubtful, {wrong.sum()} of the {flipped} flipped ones among them")
    for first in (*(n for n in FIRST if n < len(found)), len(found)):
        hits = int(wrong[:first].sum())
        print(f"the first {first:5}: precision {100 * hits / first:5.1f} %, recall {100 * hits / flipped:5.1f} %")
    return {
        "labels": len(labels),
        "flipped": flipped,
        "doubtful": len(found),
        "found": len(rows),
        "precision": len(rows) / max(1, len(found)),
        "recall": len(rows) / flipped,
        "beside_cleanlab": beside_cleanlab(sources),
    }


def beside_cleanlab(sources: choose.Sources) -> dict[str, object]:
    """Whether both find the same labels in the same order, and the seconds of each; ours reads the files, too."""
    from cleanlab.filter import find_label_issues

    files = [pair for done in sources.folded() for pair in fold.answered(done.folder, done.info["held_out"])]
    classes = len(sources.classes)
    start = time.perf_counter()
    ours = doubtful.find(files, classes)
    between = time.perf_counter()
    read = [audit.aligned(*pair) for pair in files]
    given = np.concatenate([known["label"].to_numpy() for known, _ in read])
    said = [(audit.lists(rows, "classes"), audit.lists(rows, "probs")) for _, rows in read]
    probs = np.concatenate([label_files.spread_targets(*pair, classes) for pair in said]).astype(np.float64)
    begin = time.perf_counter()
    theirs = find_label_issues(
        given, probs, filter_by="confident_learning", return_indices_ranked_by="normalized_margin", n_jobs=1
    )
    end = time.perf_counter()
    starts = np.cumsum([0, *(len(known) for known, _ in read)])
    return {
        "same": bool(np.array_equal(starts[ours.file] + ours.row, theirs)),
        "seconds": round(between - start, 3),
        "cleanlab_seconds": round(end - begin, 3),
    }


if __name__ == "__main__":
    main()
