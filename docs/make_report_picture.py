"""Makes docs/report.png, and writes the demo's output into README.md and docs/results.md, all from one run.

    python docs/make_report_picture.py                                        # runs the demo first: two minutes
    python docs/make_report_picture.py runs/noisy_student/report-1a2b3c4d     # of a run that has finished

Needs Chromium or Chrome: on the PATH, or named by the variable CHROMIUM. The picture holds the accuracies that it shows
as a text chunk of the PNG (`top1`), so that a test can compare it with the README. The duration that docs/results.md
names before the output is the only thing left to write by hand.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console

from pipeline import graph
from pipeline.config.load import load_job
from pipeline.progress import Screen, results_table

ROOT = Path(__file__).resolve().parents[1]
JOB = ROOT / "jobs" / "noisy_student.yaml"
PICTURE = ROOT / "docs" / "report.png"
WIDTH, HEIGHT = 1240, 1550  # down to the learning curves
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MARK = "<!-- the demo's output: docs/make_report_picture.py writes it -->\n"
SHOWN = ("gen0-teacher", "gen1-label", "gen1-student")
"""The stages whose lines the README has room for."""


def main(arguments: Sequence[str]) -> None:
    browser = find_browser()
    if arguments:
        make(Path(arguments[0]), browser)
        return
    with tempfile.TemporaryDirectory() as folder:
        make(run_demo(f"{folder}/runs/noisy_student"), browser)


def make(report: Path, browser: str) -> None:
    if not (report / "index.html").exists():
        sys.exit(f"there is no index.html in {report}; name the report-… folder of a finished run of {JOB.name}")
    summary = json.loads((report / "summary.json").read_text())
    lines, table = output_of(report.parent, summary)
    take_picture(browser, report / "index.html", accuracies(summary))
    whole = [*lines, "", *table]
    replace_block(ROOT / "docs" / "results.md", whole)
    replace_block(ROOT / "README.md", shortened(lines, table))
    print("\n".join(whole))


def find_browser() -> str:
    names = [os.environ["CHROMIUM"]] if os.environ.get("CHROMIUM") else BROWSERS
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        sys.exit(
            f"found no browser to take the picture with ({', '.join(names)}); install chromium, or name one by "
            "CHROMIUM=/path/to/chromium"
        )
    return found


def run_demo(output: str) -> Path:
    """The report's folder of a new run. The command is the README's, but for the place of its output."""
    command = [sys.executable, "-m", "pipeline", "run", str(JOB), f"output={output}"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Path(json.loads(done.stdout.splitlines()[-1])["report"]).parent


def output_of(run: Path, summary: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What `run` printed: a line of every stage, as the stages' done.json have it, and the table of results."""
    looks = graph.look(load_job(str(run / "job.yaml"), [f"output={run}"]))
    unfinished = [look.stage.name for look in looks if look.done is None]
    if unfinished:
        sys.exit(f"{unfinished[0]} of the run in {run} is not done; run {JOB.name} to its end first")

    def show(console: Console) -> None:
        screen = Screen(console, str(run), summary["job"], [look.stage.name for look in looks])
        for look in looks:
            assert look.done
            seconds, line = look.done.info["seconds"], str(look.done.info.get("line", ""))
            screen.line(look.stage.name, "finished", f"{seconds:6.1f} s  {line}")

    lines = [line.replace(f"{run}/", f"runs/{summary['job']}/") for line in printed(show)]
    return lines, printed(lambda console: console.print(results_table(summary)))


def printed(show: Callable[[Console], None]) -> list[str]:
    text = io.StringIO()
    show(Console(file=text, highlight=False, width=120))
    return [line.rstrip() for line in text.getvalue().splitlines()]


def shortened(lines: Sequence[str], table: Sequence[str]) -> list[str]:
    return [*(line for line in lines if line.split()[1] in SHOWN), "…", *table[1:]]  # without the table's title


def accuracies(summary: dict[str, Any]) -> str:
    return " ".join(f"{100 * stage['top1']:.2f}" for stage in summary["stages"])


def take_picture(browser: str, page: Path, top1: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder, "shot.png")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/user"]
        what = [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}", page.resolve().as_uri()]
        done = subprocess.run([browser, *options, *what], capture_output=True, text=True, check=False)
        if not shot.exists():
            last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
            sys.exit(f"{browser} took no picture of {page}: {last}")
        facts = PngInfo()
        facts.add_text("top1", top1)
        picture = Image.open(shot).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        picture.save(PICTURE, optimize=True, pnginfo=facts)


def replace_block(file: Path, lines: Sequence[str]) -> None:
    """Put the lines between the fences that follow MARK."""
    block = "\n".join(lines)
    pattern = re.compile(f"({re.escape(MARK)}```\n).*?(\n```\n)", re.DOTALL)
    text, count = pattern.subn(lambda found: f"{found[1]}{block}{found[2]}", file.read_text())
    assert count == 1, f"{file} has {count} places for the demo's output"
    file.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
