"""Whole networks: our builder against the same architecture with each peer's layer inside.

    python -m benchmarks.lambda_resnet
    python -m benchmarks.lambda_resnet --models lambda_resnet_50 --batch 2 --rounds 2 --threads 1
    python -m benchmarks.lambda_resnet --compare --batch 2 --rounds 3        # against EfficientNet-B7 and ViT-L/16
    python -m benchmarks.lambda_resnet --device cuda --dtype bfloat16 --compile --batch 128

A training step is forward, cross-entropy, backward and an SGD step with momentum; inference is evaluation mode without
gradients. Every network runs in contiguous and in channels-last ("cl") memory and is entered with its better one. A
peer's layer of stride 2 is followed by the 3×3 average pool that ours ends with. Medians of alternating rounds; memory
is the peak allocated during a step, above weights and momentum. --compare takes lambda_resnet_152 at 288 against timm's
tf_efficientnet_b7 at 600 and vit_large_patch16_384, all in channels-last, beside the ratios that the paper gives for
8 TPUv3 cores (table 5); its training steps hold 5 GiB of weights and momentum and B7's 3.7 GiB per image. Needs torch
and timm; lambda-networks joins where it is installed. Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
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
from models import LambdaLayer, create_model

MODELS = ["hybrid_resnet_50_ccll", "hybrid_resnet_50_llll", "lambda_resnet_50"]
PASSES = {"inference": False, "training step": True}
CLASSES = 1000

COMPARED = {"lambda_resnet_152": 288, "tf_efficientnet_b7": 600, "vit_large_patch16_384": 384}
PAPER = {"inference": [6.2, 9.5], "training step": [9.5, 9.0]}
"""images/s of the first of COMPARED over those of the others, in the paper."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="names of models.create_model")
    parser.add_argument("--layers", nargs="+", default=list(peers.LAYERS), choices=list(peers.LAYERS))
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=list(PASSES))
    parser.add_argument("--compare", action="store_true", help="lambda_resnet_152 against EfficientNet-B7 and ViT-L/16")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    add_flags(parser, rounds=5, slower=4)
    args = parser.parse_args()
    about = {"benchmark": "lambda_resnet", **start(args), "batch": args.batch}
    print(f"{about}\n", flush=True)
    rows = against_others(args) if args.compare else against_peers(args)
    print(json.dumps({**about, "rows": rows}))


def against_peers(args: argparse.Namespace) -> list[dict[str, Any]]:
    names = [name for name in args.layers if name not in peers.missing()]
    columns = ["model, size", "pass", *(f"{name}, images/s" for name in names)]
    columns += ["best peer", "ours / best peer", "ours, MiB", "best peer, MiB", "memory, ours / best peer"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)
    rows = []
    for model in args.models:
        for title in args.passes:
            outcomes = measure_layers(model, names, PASSES[title], args)
            mine = [peers.OURS + suffix for suffix in FORMATS]
            row = {
                "model": model,
                "size": args.size,
                "pass": title,
                **compare(outcomes, mine, outcomes.keys() - {*mine}),
            }
            cells = [f"{model}, {args.size}", title, *(cell(outcomes, name, images(args.batch)) for name in names)]
            cells += [row["best_peer"] or "–", times(row["speed"])]
            cells += [mib(outcomes, row["ours"]), mib(outcomes, row["best_peer"]), times(row["memory"])]
            print("| " + " | ".join(cells) + " |", flush=True)
            rows.append(row)
            free(torch.device(args.device))
    print(
        f"\ncl: channels-last was its better format. N× the fastest: over {args.slower:g}×, left out after single "
        "calls."
        f" needs N GiB: over {args.max_gib:g} GiB for n × m × k embeddings, not run. The global context sees, and"
        " computes, more than the scope where 2·side − 1 exceeds it."
    )
    if peers.missing():
        print(f"Not installed: lambda-networks (pip install lambda-networks), so without {peers.missing()}.")
    print()
    return rows


def measure_layers(model: str, names: list[str], training: bool, args: argparse.Namespace) -> dict[str, Outcome]:
    """The outcomes of one network and pass, by layer inside and format."""
    device, candidates, outcomes = torch.device(args.device), {}, {}
    for name in names:
        for suffix, memory_format in FORMATS.items():
            network = create_model(model, CLASSES)
            sides = lambda_sides(network, args.size)
            needed = embedding_gib(name, network, sides, training, getattr(torch, args.dtype).itemsize)
            if needed > args.max_gib:
                outcomes[name + suffix] = Outcome(note=f"needs {needed:.0f} GiB")
                continue
            put_inside(name, network, sides)
            candidates[name + suffix] = call(network, args.size, memory_format, training, args)
    return outcomes | race(candidates, rounds=args.rounds, slower=args.slower, device=device)


def lambda_sides(network: nn.Module, size: int) -> dict[str, tuple[int, int]]:
    """Side of the map that enters and of the one that leaves each lambda layer of a network, by its name."""
    sides = {}

    def note(name: str, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        sides[name] = (inputs[0].shape[-1], output.shape[-1])

    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, LambdaLayer)]
    hooks = [layer.register_forward_hook(partial(note, name)) for name, layer in layers]
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return sides


def lambda_layer(network: nn.Module, path: str) -> LambdaLayer:
    layer = network.get_submodule(path)
    assert isinstance(layer, LambdaLayer)
    return layer


def put_inside(name: str, network: nn.Module, sides: Mapping[str, tuple[int, int]]) -> None:
    """Replaces every lambda layer of a network by the peer's of that name, pooled where ours pools."""
    if name == peers.OURS:
        return
    for path, (side, out) in sides.items():
        layer = lambda_layer(network, path)
        peer = peers.build(name, layer.h * layer.v, side=side, k=layer.k, h=layer.h, r=layer.r or 2 * side - 1)
        network.set_submodule(path, peer if out == side else nn.Sequential(peer, nn.AvgPool2d(3, 2, 1)))


def embedding_gib(
    name: str, network: nn.Module, sides: Mapping[str, tuple[int, int]], training: bool, itemsize: int
) -> float:
    """About what the n × m × k embeddings take at the peak: in training those of all layers and a permuted copy, with
    the gradients of the largest; else the largest and its copy."""
    each = [
        peers.embedding_bytes(name, side=side, k=lambda_layer(network, path).k, itemsize=itemsize)
        for path, (side, _) in sides.items()
    ] or [0]
    return 2 * (training * sum(each) + max(each)) / GIB


def against_others(args: argparse.Namespace) -> list[dict[str, Any]]:
    import timm

    rows = []
    first, *others = COMPARED
    columns = ["pass", "model, size", "images/s", "MiB", f"{first} is faster by", "on 8 TPUv3 cores (paper)"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)
    for title in args.passes:
        candidates = {}
        for name, size in COMPARED.items():
            network = create_model(name, CLASSES) if name == first else timm.create_model(name, num_classes=CLASSES)
            candidates[name] = call(network, size, torch.channels_last, PASSES[title], args)
        device = torch.device(args.device)
        outcomes = race(candidates, rounds=args.rounds, slower=math.inf, device=device)
        ratios = {first: ("1", "1")}
        for other, paper in zip(others, PAPER[title], strict=True):
            row = compare(outcomes, [first], [other])
            rows.append({"pass": title, "other": other, "paper": paper, **row})
            ratios[other] = (times(row["speed"]), f"{paper}×")
        for name, size in COMPARED.items():
            speed = cell(outcomes, name, images(args.batch))
            cells = [title, f"{name}, {size}", speed, mib(outcomes, name), *ratios[name]]
            print("| " + " | ".join(cells) + " |", flush=True)
        free(device)
    print()
    return rows


def call(
    network: nn.Module, size: int, memory_format: torch.memory_format, training: bool, args: argparse.Namespace
) -> Callable[[], object]:
    """One training step, or one inference, of a network on random images."""
    device = torch.device(args.device)
    network = to_format(network, memory_format).to(device).train(training)
    if args.compile:
        network.compile(dynamic=False)
    x = torch.randn(args.batch, 3, size, size, device=device).to(memory_format=memory_format)
    if not training:
        return partial(inference, network, x, args)
    labels = torch.randint(CLASSES, (args.batch,), device=device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    return partial(training_step, network, optimizer, x, labels, args)


@torch.no_grad()
def inference(network: nn.Module, x: Tensor, args: argparse.Namespace) -> Tensor:
    with autocast(args):
        return network(x)


def training_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor, args: argparse.Namespace
) -> None:
    with autocast(args):
        loss = F.cross_entropy(network(x), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def images(batch: int) -> Callable[[float], str]:
    return lambda seconds: f"{batch / seconds:.2f}"


if __name__ == "__main__":
    main()
