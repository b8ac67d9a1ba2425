"""The command line: `noisy-lambda COMMAND …`; `python -m noisy_lambda` and, in the repository, `python -m pipeline` are
the same.

The functions of the commands are in pipeline.commands and prepare_commands. Exit status: 0 done, 1
failed (a bug, with its traceback; or a failed submitted job), 2 a user's mistake (one sentence), 3 a submitted job was
stopped, 130 interrupted (Ctrl-C), 141 nobody reads what is printed (`| head`), 143 ended by SIGTERM.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pipeline import commands, prepare_commands, secrets_file
from pipeline.errors import RemoteError, UserError
from pipeline.printable import shown


def main(arguments: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal, pipe or file that cannot show every character
            stream.reconfigure(errors="backslashreplace")
    args = _parse(arguments)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        secrets_file.load()
        return command(args)
    except (UserError, RemoteError) as error:
        print(f"error: {shown(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted; run the same command to continue", file=sys.stderr)
        return 130
    except SystemExit:
        print("stopped; run the same command to continue", file=sys.stderr)
        raise


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """key=value may follow options, where argparse looks for no more of them."""
    top = parser()
    args, rest = top.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(args, "settings")]
    if unknown:
        option = re.fullmatch(r"--([a-z_.]+)(=.*)?", unknown[0]) if hasattr(args, "settings") else None
        after = unknown[1] if len(unknown) > 1 and not unknown[1].startswith("-") else "…"
        meant = f"; a setting is written {option[1]}{option[2] or f'={after}'}, without dashes" if option else ""
        top.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
    if rest:
        args.settings = [*args.settings, *rest]
    return args


def parser() -> argparse.ArgumentParser:
    """The whole command line; a test pins it."""
    top = argparse.ArgumentParser(
        prog="noisy-lambda",
        description="Noisy Student training of LambdaResNets, from shards to a speed-accuracy plot.",
    )
    top.add_argument("--version", action=_Version, nargs=0, help="show the version and end")
    names = top.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = names.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    def add_job(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = add(name, command, text)
        sub.add_argument(
            "job",
            metavar="JOB",
            help="a job file, a shipped job such as noisy_student, or a run's folder (its last settings)",
        )
        sub.add_argument(
            "settings",
            metavar="key=value",
            nargs="*",
            default=[],
            help="settings over the job file's, such as seed=1 or teacher.lr=0.2",
        )
        return sub

    add("jobs", commands.jobs, "list the jobs that come with noisy-lambda")
    init_ = add("init", commands.init, "look at a folder of photos or shards, and write a first job for it")
    init_.add_argument("folder", metavar="FOLDER", help="photos in class sub-folders, or shards")
    init_.add_argument("--out", metavar="JOB.yaml", help="the job to write (default: FOLDER's name, in this folder)")
    run_ = add_job("run", commands.run, "run every stage of a job that is not done")
    run_.add_argument("--refreeze", action="store_true", help="accept changed listings of the shards as a new corpus")
    run_.add_argument("--json", action="store_true", help="print the summary as a last line of JSON on a terminal too")
    plan_ = add_job("plan", commands.plan, "show the stages of a job, what is done and what would run")
    plan_.add_argument("--measure", action="store_true", help="time training here, for 20 seconds, to tell how long")
    add_job("status", commands.status, "show how far a job is, also while it runs")
    add_job("report", commands.report, "write a report of what there is of a job that is not finished")
    review_ = add_job(
        "review", commands.review, "show the images most worth a look, for people to correct their labels"
    )
    review_.add_argument(
        "--folds", type=int, help="doubt labels too: train the teacher's recipe so many times, each on the other folds"
    )
    review_.add_argument("--images", type=int, default=200, help="that are shown, at most (default: 200)")
    sweep_ = add_job("sweep", commands.sweep, "train a job with several values of its settings, and rank them")
    sweep_.add_argument("--plan", action="store_true", help="show what each combination would run, and end")
    submit_ = add_job("submit", commands.submit, "submit a job to a Ray cluster and follow its log")
    submit_.add_argument(
        "--address", help="of the cluster's dashboard, such as http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS)"
    )
    submit_.add_argument(
        "--working-dir", help="folder to upload as the job's working directory (default: none, the head's own)"
    )
    submit_.add_argument(
        "--env", metavar="NAME", action="append", default=[],
        help="variable of this shell that the job gets too, readable for all who use the cluster; may be repeated",
    )  # fmt: skip
    submit_.add_argument(
        "--secrets", metavar="PATH", help="file on each of the cluster's machines with lines NAME=value for the job"
    )
    submit_.add_argument("--no-wait", action="store_true", help="return once the job is accepted")
    clean_ = add_job("clean", commands.clean, "list the stage folders that a job no longer uses")
    clean_.add_argument("--sweeps", action="store_true", help="also those that only sweeps use")
    clean_.add_argument("--yes", action="store_true", help="delete them")
    ui_ = add_job("ui", commands.ui, "open MLflow on a job's run")
    ui_.add_argument("--port", type=int, default=5000, help="on 127.0.0.1 (default: 5000)")
    export_ = add(
        "export", commands.export, "write a trained model as safetensors, model.yaml and ONNX, with a model card"
    )
    export_.add_argument(
        "model", metavar="MODEL", help="a stage's folder, a run (its best model) or models:/NAME@champion"
    )
    export_.add_argument("--out", help="where to write (default: `export` in the stage's folder)")
    export_.add_argument("--int8", action="store_true", help="write an ONNX of 8-bit integers too (model.int8.onnx)")
    export_.add_argument("--max-drop", type=float, help="points of validation top-1 that it may cost (default: 0.5)")
    _add_predict(add("predict", commands.predict, "say what images show, by a trained model"))
    _add_prepare(add("prepare", prepare_commands.prepare, "write images as WebDataset shards"))
    _add_reshard(add("reshard", prepare_commands.reshard, "shuffle the samples of all shards over new ones"))
    return top


class _Version(argparse.Action):
    """Looks it up when it is asked for: a copy of the repository that is not installed has none."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import importlib.metadata

        try:
            print(f"noisy-lambda {importlib.metadata.version('noisy-lambda')}")
        except importlib.metadata.PackageNotFoundError:
            print("noisy-lambda, not installed")
        parser.exit()


def _add_predict(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="a stage's folder, an export, a run (its best model) or models:/NAME@champion; several answer together",
    )
    sub.add_argument("input", metavar="INPUT", help="an image, a folder, a .csv or .parquet table of paths, or shards")
    sub.add_argument(
        "--out",
        help="a .csv or .parquet file; of shards also a folder, of one label file a shard (default: the screen)",
    )
    sub.add_argument("--contact-sheet", metavar="FILE", help="a .png or .jpg: the images with class and confidence")
    sub.add_argument("--top", type=int, default=5, help="classes an image, the most probable (default: 5)")
    sub.add_argument("--raw", action="store_true", help="probabilities as the network gives them, not calibrated")
    sub.add_argument("--column", default="path", help="of a table: where the paths stand (default: path)")
    sub.add_argument("--batch", type=int, default=64, help="images in a forward batch (default: 64)")
    sub.add_argument("--device", default="auto", help="cpu, cuda or auto (default: a GPU where there is one)")
    sub.add_argument("--cluster", help="of shards into a folder: embedded or HOST:PORT of Ray (default: this process)")


def _add_prepare(sub: argparse.ArgumentParser) -> None:
    kinds = sub.add_subparsers(metavar="WHAT", required=True, dest="what")
    digits = kinds.add_parser("digits", help="scikit-learn's handwritten digits: labelled, unlabelled, val, test")
    digits.add_argument("--seed", type=int, default=0, help="draws the labelled images (default: 0)")
    digits.add_argument("--labels-per-class", type=int, default=5, help="(default: 5)")
    folder = kinds.add_parser("folder", help="a folder of class sub-folders, or of unlabelled images")
    folder.add_argument("source", metavar="DIR", help="the folder; its sub-folders are the classes")
    folder.add_argument(
        "--split-off",
        metavar="SHARES",
        help="shares of each class for validation and test shards, such as validation=0.15,test=0.15",
    )
    table = kinds.add_parser("table", help="Parquet or CSV files of image paths, or of images, and labels")
    table.add_argument(
        "source",
        metavar="PATTERN",
        help="a file, a folder of .parquet files or a glob; paths in it start at its folder",
    )
    table.add_argument("--image", default="path", help="column of image paths, or of images (default: path)")
    table.add_argument("--label", default="label", help="column of class names (default: label)")
    table.add_argument("--label-is", choices=("name", "index"), default="name", help="what it holds (default: name)")
    table.add_argument(
        "--where", metavar="CONDITION", action="append", default=[], help="of rows, such as 'width>=64'; may come again"
    )
    _add_cluster(table)
    scenes = kinds.add_parser("scenes", help="digits on canvases, to learn detection from: train, val, test")
    scenes.add_argument("--seed", type=int, default=0, help="draws the training scenes (default: 0)")
    coco = kinds.add_parser("coco", help="images with boxes and masks, as a COCO annotation file lists them")
    coco.add_argument("source", metavar="ANNOTATIONS", help="the .json file of instances")
    coco.add_argument("--images", metavar="DIR", required=True, help="the folder in which its file names lie")
    for kind in (digits, folder, table, scenes, coco):
        kind.add_argument("--out", required=True, help="folder for the shards")
    for kind in (folder, table):
        kind.add_argument("--split", default="labelled", help="first part of the shard names (default: labelled)")
        kind.add_argument("--unlabelled", action="store_true", help="write no labels")
    coco.add_argument("--split", default="train", help="first part of the shard names: train, val or test")
    for kind in (folder, table, coco):
        kind.add_argument("--seed", type=int, default=0, help="draws the order of the images (default: 0)")
        kind.add_argument("--max-bad", type=float, default=0.1, help="share of bad pictures allowed (default: 0.1)")
        kind.add_argument("--shard-images", type=int, default=10_000, help="most images in a shard (default: 10000)")
        kind.add_argument("--shard-bytes", type=int, default=1 << 30, help="most bytes in a shard (default: 1 GiB)")
        kind.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="(default: all cores)")


def _add_reshard(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", metavar="SOURCE", help="the shards: a glob, braces, a folder or a list file")
    sub.add_argument("--out", required=True, help="folder for the new shards")
    sub.add_argument("--shards", type=int, required=True, metavar="N", help="how many to write")
    sub.add_argument("--seed", type=int, default=0, help="draws where each sample goes (default: 0)")
    sub.add_argument("--split", help="first part of the new names (default: that of the old ones)")
    sub.add_argument("--labels", metavar="RUN", help="output of a run whose labels of these shards are carried over")
    _add_cluster(sub)


def _add_cluster(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--cluster", nargs="?", const="auto", metavar="WHERE",
        help="work on Ray: embedded or HOST:PORT (without WHERE: RAY_ADDRESS, else embedded; default: this process)",
    )  # fmt: skip
