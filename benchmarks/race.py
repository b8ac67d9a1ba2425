"""One race: candidates that do the same work take turns, the hopeless ones are left out and named."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import math
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from models.measure import alternate, peak_bytes

GIB, MIB = 2**30, 2**20
FORMATS = {"": torch.contiguous_format, " cl": torch.channels_last}
"""Memory formats of input and weights, by what the tables append to a name."""


@dataclass(frozen=True)
class Outcome:
    """What a candidate did: median seconds of a call and its peak of allocated bytes, or why there are none."""

    seconds: float | None = None
    bytes: int | None = None
    note: str = ""


def race(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, slower: float, device: torch.device
) -> dict[str, Outcome]:
    """Times candidates in alternating rounds. One that runs out of memory, or takes over `slower` times the
    fastest in a first round of single calls, is left out, and its outcome says so."""
    probes = alternate(candidates, rounds=1, seconds=0, device=device)
    fastest = min(probes.values(), default=math.inf)
    outcomes = {}
    for name, seconds in probes.items():
        if math.isinf(seconds):
            outcomes[name] = Outcome(note="out of memory")
        elif seconds > slower * fastest:
            outcomes[name] = Outcome(note=f"{seconds / fastest:.0f}× the fastest")
    kept = {name: call for name, call in candidates.items() if name not in outcomes}
    for name, seconds in alternate(kept, rounds=rounds, device=device).items():
        outcomes[name] = Outcome(seconds, peak_bytes(kept[name], device))
    return {name: outcomes[name] for name in candidates}


def fastest(outcomes: Mapping[str, Outcome], names: Iterable[str]) -> str | None:
    """The name of least median time; None where none of them was timed."""
    timed = {name: outcomes[name].seconds for name in names if name in outcomes and outcomes[name].seconds}
    return min(timed, key=lambda name: timed[name] or 0.0) if timed else None


def compare(outcomes: Mapping[str, Outcome], ours: Iterable[str], peers: Iterable[str]) -> dict[str, Any]:
    """Our fastest against the peers' fastest: names, seconds, bytes; `speed` = theirs / ours in time, `memory` =
    ours / theirs in peak bytes. What could not be measured is None."""
    us, them = fastest(outcomes, ours), fastest(outcomes, peers)
    row: dict[str, Any] = {"ours": us, "best_peer": them, "speed": None, "memory": None}
    row["outcomes"] = {name: asdict(outcome) for name, outcome in outcomes.items()}
    if us and them:
        mine, theirs = outcomes[us], outcomes[them]
        row["speed"] = round((theirs.seconds or 0) / (mine.seconds or 1), 3)
        row["memory"] = round((mine.bytes or 0) / theirs.bytes, 3) if theirs.bytes else None
    return row


def to_format(module: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """The weights of 2-d convolutions in that format; Module.to would refuse the 3-d ones of the peers."""
    for each in module.modules():
        if isinstance(each, nn.Conv2d):
            each.to(memory_format=memory_format)
    return module


def add_flags(parser: argparse.ArgumentParser, *, rounds: int, slower: float) -> None:
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each candidate; the median counts")
    parser.add_argument("--slower", type=float, default=slower, help="leave out what takes this many times the fastest")
    parser.add_argument("--max-gib", type=float, default=12, help="leave out what needs more memory for embeddings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="by autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile for every candidate")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())


def start(args: argparse.Namespace) -> dict[str, Any]:
    """Applies the flags of `add_flags`; returns what every result is to be read with: device, settings, versions."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.compile:
        torch._dynamo.config.recompile_limit = 1000  # every candidate and shape is a graph of its own
    versions: dict[str, str | None] = {}
    for package in ("torch", "timm", "lambda-networks"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
    settings = {key: getattr(args, key) for key in ("threads", "dtype", "compile", "rounds")}
    return {"device": name, **settings, "versions": versions}


def autocast(args: argparse.Namespace) -> torch.autocast:
    dtype = getattr(torch, args.dtype)
    return torch.autocast(torch.device(args.device).type, dtype, enabled=dtype != torch.float32)


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def cell(outcomes: Mapping[str, Outcome], name: str, show: Callable[[float], str] = milliseconds) -> str:
    """A candidate's better format for a table, or why there is none."""
    formats = [name + suffix for suffix in FORMATS if name + suffix in outcomes]
    best = fastest(outcomes, formats)
    if best is None:
        return outcomes[formats[0]].note
    return show(outcomes[best].seconds or math.inf) + best.removeprefix(name)


def times(ratio: float | None) -> str:
    """A ratio for a table."""
    return "–" if ratio is None else f"{ratio:.2f}×"


def mib(outcomes: Mapping[str, Outcome], name: str | None) -> str:
    """Peak memory for a table."""
    return f"{(outcomes[name].bytes or 0) / MIB:.1f}" if name else "–"


def free(device: torch.device) -> None:
    """Between races: forget compiled graphs and give cached memory back."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
