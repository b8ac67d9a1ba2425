"""DDP and FSDP: the same numbers as one worker alone, with no more messages than needed, from and to the same state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from pipeline import weights
from pipeline.cluster.world import World
from pipeline.errors import ConfigError
from pipeline.train import checkpoint, parallel
from pipeline.train.loop import run
from pipeline.train.optim import create_optimizer, set_learning_rate
from tests.train.test_resume import command, execute
from tests.train.tiny import CLASSES, SIZE, VIT, die_at, difference, make_spec, without_noise

SHORT = without_noise(steps=6, checkpoint_every=3, warmup=1, clip=0.5)
ALONE = World(0, 1, torch.device("cpu"))


def network() -> nn.Module:
    torch.manual_seed(0)
    return weights.build_model("timm/vit_tiny_patch16_224", CLASSES, VIT)


def images(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return model(inputs).square().sum()


def trained(
    world: World, kind: str, optimizer: str = "sgd", **options: bool
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Three updates of two micro-batches of three images each, shared out among the workers."""
    model = network()
    wrapped = parallel.wrap(model, world, kind, **options)
    updates = create_optimizer(model, optimizer, weight_decay=0.01, momentum=0.9)
    set_learning_rate(updates, 0.01)
    for step in range(3):
        micro = [images(6, seed=10 * step + part)[world.rank :: world.size] for part in range(2)]
        with parallel.no_sync(wrapped):
            loss_of(wrapped, micro[0]).backward()
        loss_of(wrapped, micro[1]).backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(world.size)  # the sum over workers, of which the wrapper takes the mean
        parallel.clip(model, 5.0)
        updates.step()
        updates.zero_grad(set_to_none=True)
    return model, updates


def sharing() -> nn.Module:
    """Its last stage's lambda layers share one table of embeddings."""
    torch.manual_seed(0)
    model = weights.build_model("lambda_resnet_small", CLASSES, {"share_embeddings": True, "lambdas": {4: "all"}})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return model


def worker(rank: int, data: Path, folder: Path) -> dict[str, object]:
    """All that the tests below need from two workers."""
    world = World(rank, 2, torch.device("cpu"))
    found: dict[str, object] = {}

    for name, kind, optimizer, options in (
        ("ddp", "ddp", "sgd", {}),
        ("static", "ddp", "sgd", {"static_graph": True}),
        ("fsdp", "fsdp", "sgd", {}),
        ("fsdp-adamw", "fsdp", "adamw", {}),
        ("fsdp-lamb", "fsdp", "lamb", {}),
    ):
        model, updates = trained(world, kind, optimizer, **options)
        state = parallel.state_of(model, updates)
        if rank == 0:
            torch.save(state, folder / f"{name}.pt")
        elif kind == "fsdp":
            found[f"{name}-gathered"] = any(isinstance(value, torch.Tensor) for value in state[0].values())

    # Micro-batches but the last send nothing: what each worker holds then is its own.
    for kind in parallel.KINDS:
        model = network()
        wrapped = parallel.wrap(model, world, kind)
        with parallel.no_sync(wrapped):
            loss_of(wrapped, images(4)[rank::2]).backward()
        found[f"{kind}-own"] = [None if p.grad is None else float(p.grad.norm()) for p in model.parameters()]

    # Frozen parameters, and a moving average that is split up alike.
    model, copied = network(), network()
    model.blocks.requires_grad_(False)
    parallel.split(copied, world, "fsdp")
    wrapped = parallel.wrap(model, world, "fsdp")
    loss_of(wrapped, images(4)[rank::2]).backward()
    torch._foreach_lerp_(parallel.parts(copied), parallel.parts(model), 0.5)
    found["held"] = sum(part.numel() for part in parallel.parts(model))
    found["frozen"] = [name for name, p in model.named_parameters() if p.grad is None]

    # Validation: the workers call the module a different number of times.
    for module in (copied, model):
        with torch.no_grad(), parallel.whole(module):
            answers = [module(images(2)) for _ in range(1 + 2 * rank)]
        found[f"whole-{'copy' if module is copied else 'model'}"] = [answer.tolist() for answer in answers]
    loss_of(wrapped, images(4)[rank::2]).backward()  # training goes on
    found["held after"] = sum(part.numel() for part in parallel.parts(model))

    # One worker's state into two that share it.
    model = network()
    wrapped = parallel.wrap(model, world, "fsdp")
    updates = create_optimizer(model, "sgd", weight_decay=0.01, momentum=0.9)
    one = torch.load(folder / "one.pt", weights_only=True)
    parallel.load_state_of(model, updates, *one)
    back = parallel.state_of(model, updates)
    if rank == 0:
        torch.save(back, folder / "back.pt")

    # Blocks that share embeddings: gathered with their stage; where somebody else split them, a sentence.
    model = sharing()
    wrapped = parallel.wrap(model, world, "fsdp")
    loss_of(wrapped, images(4)).backward()
    found["shared"] = [float(p.grad.full_tensor().norm()) for p in model.parameters()]
    model = sharing()
    for block in model.stages[2]:
        fully_shard(block)
    fully_shard(model)
    try:
        model(images(4))
    except ValueError as error:
        found["refused"] = str(error)

    # The loop itself: DDP and FSDP, the latter from one worker's checkpoint and to one worker.
    found["loop"] = run(make_spec(data, folder / "ddp-run", **SHORT))
    found["loop-fsdp"] = run(make_spec(data, folder / "fsdp-run", parallel="fsdp", **SHORT))
    found["loop-from-one"] = run(make_spec(data, folder / "one-then-fsdp", parallel="fsdp", **SHORT))
    die_at(4, "raise")
    try:
        run(make_spec(data, folder / "fsdp-then-one", parallel="fsdp", **SHORT))
    except InterruptedError:
        found["died"] = True
    return found


@pytest.fixture(scope="module")
def two(data, gloo_pair, tmp_path_factory):
    """(folder that two workers filled, what each of them found)"""
    folder = tmp_path_factory.mktemp("two")
    torch.save(parallel.state_of(*trained(ALONE, "ddp")), folder / "one.pt")
    cut_short(data, folder / "one-then-fsdp")
    return folder, gloo_pair.call(worker, data, folder)


def cut_short(data: Path, folder: Path) -> None:
    """One worker's run that ends at step 4, with a checkpoint of step 3."""
    die_at(4, "raise")
    try:
        with pytest.raises(InterruptedError):
            run(make_spec(data, folder, **SHORT))
    finally:
        die_at(-1)


def read(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict]:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def flat(state: dict) -> dict[str, torch.Tensor]:
    """The tensors of an optimizer's state by parameter and name."""
    return {
        f"{number}.{name}": value
        for number, slots in state["state"].items()
        for name, value in slots.items()
        if isinstance(value, torch.Tensor)
    }


@pytest.mark.parametrize("name", ["ddp", "static", "fsdp", "fsdp-adamw", "fsdp-lamb"])
def test_workers_do_what_one_does(two, name):
    optimizer = name.partition("-")[2] or "sgd"
    ours, theirs = read(two[0], name), parallel.state_of(*trained(ALONE, "ddp", optimizer))
    # AdamW divides a gradient by its own size, also one that is nothing but rounding.
    assert difference(ours[0], theirs[0]) < (1e-4 if optimizer == "adamw" else 1e-6)
    assert difference(flat(ours[1]), flat(theirs[1])) < 1e-5
    assert [group["params"] for group in ours[1]["param_groups"]] == [g["params"] for g in theirs[1]["param_groups"]]


def test_fsdp_leaves_each_worker_its_part_and_gathers_on_the_first_alone(two):
    _, (first, second) = two
    total = sum(p.numel() for p in network().parameters())
    assert first["held"] + second["held"] == total
    assert (first["held after"], second["held after"]) == (first["held"], second["held"])
    assert second["fsdp-gathered"] is False
    assert first["frozen"] == second["frozen"] == [n for n, _ in network().named_parameters() if n.startswith("blocks")]


def test_fsdp_gathers_shared_embeddings_or_says_what_to_do(two):
    _, (first, second) = two
    model = sharing()
    loss_of(model, images(4)).backward()
    alone = [float(p.grad.norm()) for p in model.parameters()]
    assert first["shared"] == second["shared"] == pytest.approx(alone, rel=1e-4, abs=1e-6)
    assert "let one fully_shard hold both layers" in first["refused"]


def test_micro_batches_but_the_last_send_nothing(two):
    _, (first, second) = two
    assert first["ddp-own"] != pytest.approx(second["ddp-own"], rel=1e-3)
    assert set(first["fsdp-own"]) == set(second["fsdp-own"]) == {None}  # the parts get theirs when all is sent


def test_workers_may_validate_a_different_number_of_batches(two):
    _, (first, second) = two
    for name in ("whole-copy", "whole-model"):
        expected = network().eval()(images(2)) if name == "whole-copy" else network()(images(2))
        assert len(first[name]) == 1 and len(second[name]) == 3
        for answer in [*first[name], *second[name]]:
            assert torch.allclose(torch.tensor(answer), expected, atol=1e-6)


def test_state_moves_between_one_worker_and_two(two):
    folder, _ = two
    back, one = read(folder, "back"), read(folder, "one")
    assert difference(back[0], one[0]) == 0
    assert difference(flat(back[1]), flat(one[1])) == 0
    model = network()
    updates = create_optimizer(model, "sgd", weight_decay=0.01, momentum=0.9)
    parallel.load_state_of(model, updates, *read(folder, "fsdp"))
    assert difference(parallel.state_of(model)[0], read(folder, "fsdp")[0]) == 0


def test_runs_with_fsdp_are_runs_with_ddp_on_any_number_of_workers(data, two, tmp_path):
    folder, (first, second) = two
    result = run(make_spec(data, tmp_path, **SHORT))
    run(make_spec(data, folder / "fsdp-then-one", **SHORT))
    assert first["died"] and second["died"]
    expected = weights.read_state(f"{tmp_path}/model.safetensors")
    for name in ("ddp-run", "fsdp-run", "one-then-fsdp", "fsdp-then-one"):
        assert difference(weights.read_state(f"{folder / name}/model.safetensors"), expected) < 1e-5, name
    for name in ("loop", "loop-fsdp", "loop-from-one"):
        assert first[name] == second[name]
        assert first[name]["count"] == result["count"] == 30
        assert first[name]["loss"] == pytest.approx(result["loss"], abs=1e-5)
    assert checkpoint.load(str(folder / "fsdp-run"), 6).state["world_size"] == 2


def test_one_worker_is_left_as_it_is():
    model = network()
    assert parallel.wrap(model, ALONE, "fsdp") is model
    with parallel.no_sync(model), parallel.whole(model):
        loss_of(model, images(2)).backward()
    norms = []
    for most in (1e9, 1e-3):
        parallel.clip(model, most)
        norms.append(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()])))
    assert norms[1] <= 1.001e-3 < norms[0]


def test_an_unknown_kind_is_named():
    with pytest.raises(ConfigError, match=r"parallel is 'zero3'; allowed are ddp, fsdp"):
        parallel.wrap(network(), ALONE, "zero3")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"static_graph": True}, {"parallel": "fsdp"}], ids=["ddp", "static", "fsdp"])
def test_a_compiled_network_is_the_same_on_two_workers(data, tmp_path, changes):
    settings = without_noise(steps=4, checkpoint_every=2, warmup=1, accumulate=2)
    run(make_spec(data, tmp_path / "eager", **settings))
    done = execute(command(data, tmp_path / "compiled", {**settings, **changes, "compile": True}, workers=2))
    assert done.returncode == 0, done.stderr
    found, expected = (weights.read_state(f"{tmp_path / name}/model.safetensors") for name in ("compiled", "eager"))
    assert difference(found, expected) < 1e-4
