"""A whole job in seconds: the digits at 8 pixels, a teacher and two students of a few steps each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
JOB = """
name: tiny
cluster: inline
prepare: {dataset: digits}
workers: {threads: 1}
teacher: &net
  model: lambda_resnet_tiny
  overrides: {depths: [1, 1, 1], widths: [8, 8, 16]}
  resolution: 8
  crop: 1.0
  mean: [0.5, 0.5, 0.5]
  std: [0.5, 0.5, 0.5]
  duration: 12st
  warmup: 2st
  batch: 16
  optimizer: adamw
  lr: 0.01
  lr_images: 0
  ema: 0.5
  augment: ""
  crop_scale: [0.8, 1.0]
  flip: 0.0
  evaluate_every: 0st
  checkpoint_every: 2st
student:
  <<: *net
  dropout: 0.1
  unlabelled_ratio: 1.0
label: {batch: 128}
select: {threshold: 0.0, per_class: 40}
generations:
  - student: {}
  - student: {overrides: {depths: [1, 1, 2], widths: [8, 8, 16]}}
evaluate: {batch: 64, speed_seconds: 0.01}
tracking: {enabled: false}
"""


def write_job(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(JOB)
    return path


def command(job: Path, *settings: str, verb: str = "run") -> list[str]:
    return [sys.executable, "-m", "pipeline", verb, str(job), *settings]


def run(job: Path, *settings: str, verb: str = "run", **env: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    environment = {**os.environ, **env}
    return subprocess.run(
        command(job, *settings, verb=verb), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


FORKS = multiprocessing.get_context("forkserver")
"""Processes forked from one that has nothing but our imports: a new one takes seconds to import them."""
FORKS.set_forkserver_preload(["tests.imported"])


def start(job: Path, *settings: str, err: Path | str = os.devnull) -> BaseProcess:
    """`python -m pipeline run JOB SETTINGS`, begun in a process and a process group of its own; standard error to a
    file."""
    process = FORKS.Process(target=_run, args=(["run", str(job), *settings], dict(os.environ), str(err)))
    process.start()
    return process


def _run(words: list[str], environment: dict[str, str], err: str) -> None:
    from pipeline import cli

    os.setsid()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background shell ignores it, and so does the fork server
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    with open(os.devnull, "w") as nothing, open(err, "w") as errors:  # noqa: PTH123
        os.dup2(nothing.fileno(), 1)
        os.dup2(errors.fileno(), 2)
    sys.exit(cli.main(words))
