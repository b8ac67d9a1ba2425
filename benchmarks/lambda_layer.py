"""Our lambda layer against timm's, lambda-networks' and the paper's pseudo-code, projections included.

    python -m benchmarks.lambda_layer
    python -m benchmarks.lambda_layer --shapes 256x14 512x7 --rounds 3 --threads 1      # about a minute
    python -m benchmarks.lambda_layer --device cuda --dtype bfloat16 --compile

Shapes are width × side of the bottlenecks: c2 to c5 of ResNet-50 at 224, and of LambdaResNet-152 at 288. Forward is
evaluation mode without gradients; forward+backward is training mode with the gradients of the weights and of the input.
Every layer runs in contiguous and in channels-last ("cl") memory and is entered with its better one; the best peer is
the fastest of them at that shape. Medians of alternating rounds; memory is the peak allocated during a call. Needs
torch and timm; lambda-networks joins where it is installed. Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.race import (
    FORMATS,
    GIB,
    Outcome,
    add_flags,
    autocast,
    cell,
    compare,
    free,
    mib,
    race,
    start,
    times,
    to_format,
)

SHAPES = ["64x56", "128x28", "256x14", "512x7", "64x72", "128x36", "256x18", "512x9"]
PASSES = {"forward": False, "forward+backward": True}
TEMPORARIES = 4
"""Copies of the embeddings that a training call holds at its peak: themselves, a permuted copy, the gradients of
both."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="WIDTHxSIDE")
    parser.add_argument("--layers", nargs="+", default=list(peers.LAYERS), choices=list(peers.LAYERS))
    parser.add_argument("--batch", type=int, default=16)
    add_flags(parser, rounds=7, slower=20)
    args = parser.parse_args()
    about = {"benchmark": "lambda_layer", **start(args), "batch": args.batch}
    names = [name for name in args.layers if name not in peers.missing()]
    rows = []
    print(f"{about}\n\n{header(names)}", flush=True)
    for shape in args.shapes:
        dim, side = (int(number) for number in shape.split("x"))
        for title, training in PASSES.items():
            outcomes = measure(names, dim, side, training, args)
            mine = [name + suffix for name in names if name == peers.OURS for suffix in FORMATS]
            result = compare(outcomes, mine, outcomes.keys() - {*mine})
            rows.append({"dim": dim, "side": side, "pass": title, **result})
            print(line(rows[-1], names, outcomes), flush=True)
            free(torch.device(args.device))
    print(f"\n{legend(args)}\n")
    print(json.dumps({**about, "rows": rows}))


def measure(names: list[str], dim: int, side: int, training: bool, args: argparse.Namespace) -> dict[str, Outcome]:
    """The outcomes of one shape and pass, by layer and format."""
    device, candidates, outcomes = torch.device(args.device), {}, {}
    itemsize = getattr(torch, args.dtype).itemsize
    for name in names:
        needed = TEMPORARIES * peers.embedding_bytes(name, side=side, itemsize=itemsize) / GIB
        for suffix, memory_format in FORMATS.items():
            if needed > args.max_gib:
                outcomes[name + suffix] = Outcome(note=f"needs {needed:.0f} GiB")
                continue
            layer = to_format(peers.build(name, dim, side=side), memory_format).to(device).train(training)
            if args.compile:
                layer.compile(dynamic=False)
            x = torch.randn(args.batch, dim, side, side, device=device).to(memory_format=memory_format)
            candidates[name + suffix] = call(layer, x, training, args)
    return outcomes | race(candidates, rounds=args.rounds, slower=args.slower, device=device)


def call(layer: nn.Module, x: Tensor, training: bool, args: argparse.Namespace) -> Callable[[], object]:
    if not training:
        return partial(forward, layer, x, args)
    return partial(forward_backward, layer, x.requires_grad_(), torch.randn_like(x), args)


@torch.no_grad()
def forward(layer: nn.Module, x: Tensor, args: argparse.Namespace) -> Tensor:
    with autocast(args):
        return layer(x)


def forward_backward(layer: nn.Module, x: Tensor, dy: Tensor, args: argparse.Namespace) -> tuple[Tensor, ...]:
    with autocast(args):
        y = layer(x)
    return torch.autograd.grad(y, [x, *layer.parameters()], dy.to(y.dtype))


def header(names: list[str]) -> str:
    columns = ["width, side", "pass", *(f"{name}, ms" for name in names)]
    columns += ["best peer", "best peer / ours", "ours, MiB", "best peer, MiB", "memory, ours / best peer"]
    return "| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|"


def line(row: dict[str, Any], names: list[str], outcomes: dict[str, Outcome]) -> str:
    cells = [f"{row['dim']}, {row['side']}", row["pass"], *(cell(outcomes, name) for name in names)]
    cells += [row["best_peer"] or "–", times(row["speed"])]
    cells += [mib(outcomes, row["ours"]), mib(outcomes, row["best_peer"]), times(row["memory"])]
    return "| " + " | ".join(cells) + " |"


def legend(args: argparse.Namespace) -> str:
    lines = [
        "cl: channels-last was its better format. k=16, h=4, scope 23, except the global context, which is the same"
        " function at sides 7 and 9 and sees (and computes) more at the others.",
        f"N× the fastest: over {args.slower:g}×, left out after single calls. "
        f"needs N GiB: over {args.max_gib:g} GiB for"
        f" {TEMPORARIES} copies of the n × m × k embeddings, not run.",
    ]
    if peers.missing():
        lines.append(f"Not installed: lambda-networks (pip install lambda-networks), so without {peers.missing()}.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
