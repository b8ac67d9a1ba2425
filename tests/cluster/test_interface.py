"""The network interface on which workers of several machines meet, and the cause that is told when they do not."""

from __future__ import annotations

import psutil
import pytest

from pipeline.cluster import interface
from pipeline.cluster.inline import innermost


@pytest.fixture(autouse=True)
def none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(interface.VARIABLE, "")  # so that it is put back
    monkeypatch.delenv(interface.VARIABLE)


def named() -> str:
    import os

    return os.environ.get(interface.VARIABLE, "")


def test_every_address_of_this_machine_has_its_interface() -> None:
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            found = interface.interface_of(entry.address)
            assert entry.address in [other.address for other in psutil.net_if_addrs()[found]], (name, entry)
    assert interface.interface_of("192.0.2.77") == "" == interface.interface_of("")


def test_what_the_environment_names_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    interface.take("192.0.2.77")
    assert named() == ""
    interface.take("127.0.0.1")
    loopback = named()
    assert "127.0.0.1" in [entry.address for entry in psutil.net_if_addrs()[loopback]]
    monkeypatch.setenv(interface.VARIABLE, "eth7")
    interface.take("127.0.0.1")
    assert named() == "eth7"


def test_torchrun_on_one_machine_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    interface.take_torchruns()
    assert named() == ""


def test_the_way_to_another_machine_never_begins_at_the_loopback() -> None:
    """Debian's 127.0.1.1 is the first process's own name: then the way out counts."""
    assert interface.address_towards("127.0.1.1", "localhost", "no.such.name.invalid") == ""
    assert not interface.address_towards("127.0.1.1", interface.ELSEWHERE).startswith("127.")


def test_the_innermost_cause_is_told() -> None:
    gloo = RuntimeError("Gloo connectFullMesh failed with remote=[127.0.1.1]:4711")
    task = OSError("ray::worker() raised")
    task.cause = gloo  # type: ignore[attr-defined]
    controller = OSError("Training failed due to controller error")
    controller.controller_failure = task  # type: ignore[attr-defined]
    group = OSError("Training failed due to worker errors")
    group.worker_failures = {1: controller}  # type: ignore[attr-defined]
    outer = ValueError("outer")
    outer.__cause__ = group
    assert innermost(outer) == "RuntimeError: Gloo connectFullMesh failed with remote=[127.0.1.1]:4711"
    gloo.__cause__ = outer  # a circle ends
    assert innermost(outer)
    assert innermost(KeyError("alone")) == "KeyError: 'alone'"
