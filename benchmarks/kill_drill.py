"""Labelling, killed with -9 at random moments and run again, until as many kills as asked for; then the rows are
compared.

    python -m benchmarks.kill_drill [--kills 30] [--cluster inline]   # the whole process: a quarter of an hour
    python -m benchmarks.kill_drill --cluster embedded --kills 12     # of Ray: the driver, an actor, the raylet, or all

Generated shards are labelled once undisturbed. Then each drill starts afresh, is killed at a moment drawn uniformly
from the undisturbed time (start of the process to the end of the stage), and is run again, and killed again, until it
ends. Every shard must then have exactly one label file, with rows bitwise equal to those of the undisturbed run. Prints
a line a drill; the last one is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

CLASSES = 10
SHARDS, IMAGES = 100, 60  # of each shard
JOB = {
    "name": "drill",
    "cluster": "inline",
    "tracking": {"enabled": False},
    "teacher": {"model": "lambda_resnet_cifar_14", "resolution": 32, "duration": "1st", "warmup": "0st", "batch": 16},
    "student": {"model": "lambda_resnet_cifar_14", "resolution": 32, "duration": "1st", "warmup": "0st", "batch": 16},
    "label": {"batch": 30},
    "select": {"threshold": 0.0},
    "generations": [{}],
    "workers": {"threads": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--cluster", default="inline", choices=["inline", "embedded"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        data = Path(folder, "data")
        write_shards(data)
        job = Path(folder, "job.yaml")
        job.write_text(yaml.safe_dump({**JOB, "cluster": args.cluster, "data": {"root": str(data)}}))
        first = Path(folder, "undisturbed")
        run(job, first).communicate()  # the teacher, which all runs share
        for stage in [
            *first.glob("gen1-label-*"),
            *first.glob("gen1-s*"),
            *first.glob("evaluate-*"),
            *first.glob("report-*"),
        ]:
            shutil.rmtree(stage)
        teacher = Path(folder, "teacher")
        shutil.copytree(first, teacher)
        start = time.monotonic()
        wait_for_labels(run(job, first), first)
        undisturbed = time.monotonic() - start
        expected = rows_of(first)
        assert sum(table.num_rows for table in expected.values()) == SHARDS * IMAGES
        print(f"undisturbed: {undisturbed:.1f} s, {len(expected)} files", flush=True)

        kills: list[tuple[str, int]] = []  # what was killed, label files by then
        drills = runs = 0
        while len(kills) < args.kills:
            drills += 1
            out = Path(folder, f"drill-{drills}")
            shutil.copytree(teacher, out)
            before = len(kills)
            while not finished(out):
                runs += 1
                process = run(job, out)
                moment = time.monotonic() + draw.uniform(0, undisturbed)
                while time.monotonic() < moment and process.poll() is None and not finished(out):
                    time.sleep(0.002)
                files = len(label_files(out))
                if process.poll() is None and not finished(out):
                    kills.append((kill(process, args.cluster, draw), files))
                    if kills[-1][0] not in ("driver", "all"):
                        wait_for_labels(process, out)  # it shall survive that, or end and be run again
                    end(process)
                elif process.poll() is None:
                    end(process)
            found = rows_of(out)
            assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
            differing = [name for name, table in found.items() if not table.equals(expected[name])]
            assert not differing, differing
            mine = [f"{what} at {files} files" for what, files in kills[before:]]
            print(f"drill {drills}: {', '.join(mine) or 'not killed'}; {len(found)} files equal", flush=True)
            shutil.rmtree(out)
    result = {
        "cluster": args.cluster,
        "kills": len(kills),
        "between_first_and_last_file": sum(0 < files < SHARDS for _, files in kills),
        "killed": dict(Counter(what for what, _ in kills)),
        "drills": drills,
        "runs": runs,
        "undisturbed_seconds": round(undisturbed, 1),
        "rows": SHARDS * IMAGES,
        "rows_equal": True,
    }
    print(json.dumps(result))


def write_shards(data: Path) -> None:
    data.mkdir()
    names = [str(number) for number in range(CLASSES)]
    (data / "classes.json").write_text(json.dumps(names))
    pixels = np.random.default_rng(0)
    shards = [("labelled-000", 32), ("val-000", 32), ("test-000", 32)]
    for name, count in shards + [(f"unlabelled-{number:03d}", IMAGES) for number in range(SHARDS)]:
        with tarfile.open(data / f"{name}.tar", "w") as tar:
            for number in range(count):
                image = io.BytesIO()
                Image.fromarray(pixels.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(image, "PNG")
                members = {"png": image.getvalue()}
                if not name.startswith("unlabelled"):
                    members["cls"] = str(number % CLASSES).encode()
                for suffix, content in members.items():
                    info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def run(job: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "pipeline", "run", str(job), f"output={out}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def finished(out: Path) -> bool:
    return any(out.glob("gen1-label-*/done.json"))


def label_files(out: Path) -> list[Path]:
    return [path for path in out.glob("gen1-label-*/*.parquet") if not path.name.startswith(".")]


def rows_of(out: Path) -> dict[str, pa.Table]:
    return {path.name: pq.read_table(path).replace_schema_metadata(None) for path in label_files(out)}


def wait_for_labels(process: subprocess.Popen, out: Path) -> None:
    while process.poll() is None and not finished(out):
        time.sleep(0.01)
    end(process)


def end(process: subprocess.Popen) -> None:
    """Nothing of it lives on, so that the next run has the machine to itself."""
    stop(family(process))
    process.wait()


def kill(process: subprocess.Popen, cluster: str, draw: random.Random) -> str:
    """SIGKILL to the process, or to a part of its Ray; what was killed."""
    driver, *below = family(process)
    victims = {"all": [driver, *below]}
    if cluster == "embedded":
        victims["driver"] = [driver]
        for what, mark in (("actor", "ray::"), ("raylet", "/raylet/raylet")):
            found = [each for each in below if mark in command_of(each) and "IDLE" not in command_of(each)]
            if found:
                victims[what] = [draw.choice(found)]
    what = draw.choice(sorted(victims))
    stop(victims[what])
    return what


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """The process and its descendants; none once it has ended."""
    try:
        driver = psutil.Process(process.pid)
        return [driver, *driver.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def stop(processes: list[psutil.Process]) -> None:
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def command_of(process: psutil.Process) -> str:
    """The program: the first word of the command line, which Ray's workers rename themselves to."""
    try:
        return " ".join(process.cmdline()[:1])
    except psutil.Error:
        return ""


if __name__ == "__main__":
    main()
