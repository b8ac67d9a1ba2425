"""Runs a compose file without Docker: each container as a machine in namespaces (namespaces.py), with this machine's
software in place of images.

Honoured: include, anchors, ${NAME}, ${NAME:-…} and ${NAME:?…}, command, environment, depends_on with its conditions,
healthcheck's test, shm_size, restart, named volumes, scale, and service names as host names.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from tests.ops.namespaces import Machine, Network, wait_until
from tests.tiny import ROOT

VARIABLE = re.compile(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}")


def load(path: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """The whole file as Docker would have it; ValueError with the file's own words where a variable is missing."""

    def value(match: re.Match[str]) -> str:
        found, how, words = variables.get(match[1], ""), match[2], match[3]
        if not found and how == ":?":
            raise ValueError(f"{match[1]} is missing: {words}")
        return found or (words if how == ":-" else "")

    loaded: dict[str, Any] = yaml.safe_load(VARIABLE.sub(value, path.read_text()))
    for included in loaded.pop("include", []):
        below = load(path.parent / included, variables)
        for part, entries in below.items():
            if isinstance(entries, dict):
                loaded[part] = {**entries, **loaded.get(part, {})}
    return loaded


def example(path: Path) -> dict[str, str]:
    """The variables of a .env file."""
    lines = [line for line in path.read_text().splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


class Stack:
    """The containers of a compose file, up on entry. `replaced`: commands for services whose images are others'."""

    def __init__(
        self,
        compose: Mapping[str, Any],
        folder: Path,
        root: Path,
        replaced: Mapping[str, str],
        scale: Mapping[str, int],
    ) -> None:
        self.services: dict[str, dict[str, Any]] = compose["services"]
        self.folder, self.replaced = folder, replaced
        self.units = {
            name if number == 0 else f"{name}{number + 1}": name
            for name in self.services
            if not self.services[name].get("profiles")
            for number in range(scale.get(name, 1))
        }
        self.network = Network(folder, list(self.units))

    def __getitem__(self, unit: str) -> Machine:
        return self.network[unit]

    def __enter__(self) -> Stack:
        self.network.__enter__()
        try:
            waiting = dict(self.units)
            while waiting:
                ready = [unit for unit, service in waiting.items() if self._may_start(service)]
                for unit in ready:
                    self._start(unit, waiting.pop(unit))
                if not ready:
                    one = next(iter(waiting.values()))
                    wait_until(lambda: any(self._may_start(s) for s in waiting.values()), 900, f"what {one} depends on")
            for unit in self.units:
                wait_until(lambda unit=unit: self.healthy(unit), 900, f"{unit} to be healthy")  # type: ignore[misc]
        except BaseException:
            self.network.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.network.__exit__(kind, error, trace)

    def execute(self, unit: str, *words: str, seconds: float = 1800) -> subprocess.CompletedProcess[str]:
        """As `docker compose exec`."""
        return self[unit].call(*words, cwd="/app", seconds=seconds)

    def healthy(self, unit: str) -> bool:
        test = self.services[self.units[unit]].get("healthcheck", {}).get("test")
        return bool(self[unit].init) and (not test or self.execute(unit, *test[1:], seconds=120).returncode == 0)

    def _may_start(self, service: str) -> bool:
        needs = self.services[service].get("depends_on", {})
        return all(
            self._fulfils(unit, how["condition"])
            for other, how in needs.items()
            for unit, its in self.units.items()
            if its == other
        )

    def _fulfils(self, unit: str, condition: str) -> bool:
        if condition == "service_healthy":
            return self.healthy(unit)
        if condition == "service_completed_successfully":
            ended = self[unit].folder / "status"
            return ended.exists() and ended.read_text().strip() == "0"
        return bool(self[unit].init)

    def _start(self, unit: str, service: str) -> None:
        settings, machine = self.services[service], self[unit]
        place = machine.folder / "app"  # the image's /app, with the checkout's files
        place.mkdir(parents=True)
        for path in ROOT.iterdir():
            if path.name not in ("runs", ".git"):
                (place / path.name).symlink_to(path)
        binds = {"/app": str(place)}
        for volume in settings.get("volumes", []):
            name, inside = volume.split(":")
            made = self.folder / "volumes" / name
            made.mkdir(parents=True, exist_ok=True)
            binds[inside] = str(made)
        machine.binds, machine.shm = binds, str(settings.get("shm_size", "64m")).removesuffix("b")
        machine.environment |= {name: str(value) for name, value in (settings.get("environment") or {}).items()}
        command = self.replaced.get(service) or shlex.join(shlex.split(settings["command"]))
        once = f"{command}; rc=$?; echo $rc > {machine.folder}/status"
        restart = settings.get("restart", "no")
        again = {"unless-stopped": "true", "on-failure": "[ $rc != 0 ]"}.get(restart, "false")
        machine.start(f"while :; do {once}; {again} || break; sleep 1; done", cwd="/app")
