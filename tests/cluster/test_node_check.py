"""What a machine lacks is known before work begins on it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.cluster import node_check
from pipeline.errors import ConfigError, DataError, OutputError
from pipeline.plan.context import check_machine
from pipeline.storage.node_cache import Cache
from tests.tiny import ROOT


def test_a_machine_like_the_drivers_lacks_nothing() -> None:
    here = node_check.software()
    assert here["Python"] == platform.python_version()
    assert "+" not in here["torch"] and here["timm"] == ""
    assert node_check.differs(here) == ""


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"Python": "3.2.1"}, f"it has Python {platform.python_version()}, and this job runs with 3.2.1; install"),
        ({"torch": "0.4"}, f"it has torch {importlib.metadata.version('torch')}, and this job runs with 0.4; install"),
        ({"timm": "", "no-such-thing": ""}, "no-such-thing is missing there; install this project there too"),
    ],
)
def test_what_differs_is_said(theirs: dict[str, str], said: str) -> None:
    assert node_check.differs(theirs).startswith(said)


def test_what_looks_at_a_machine_needs_nothing_of_ours_there(tmp_path: Path) -> None:
    """As Ray sends it: by value, to a Python that has no `pipeline`."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(node_check)
    (tmp_path / "look").write_bytes(cloudpickle.dumps(node_check._look))
    cloudpickle.unregister_pickle_by_value(node_check)
    code = "import json, pickle; print(json.dumps(pickle.load(open('look', 'rb'))({'torch': ''}, b'')))"
    for path, expected in (("", "noisy_lambda is missing there; install"), (str(ROOT), None)):
        found = subprocess.run(
            [sys.executable, "-S", "-c", f"import sys; sys.path += {_libraries()!r} + {[path]!r}; {code}"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if expected:
            assert json.loads(found.stdout)[1].startswith(expected), found.stderr
        else:
            assert "EOFError" in found.stderr  # it came to unpickle the check, which is empty here


def _libraries() -> list[str]:
    """Without what an editable installation adds: -S reads no .pth files."""
    return [path for path in sys.path if path.endswith("site-packages")]


def test_a_machine_must_see_output_shards_and_cache(tmp_path: Path) -> None:
    token = storage.write_token(str(tmp_path))
    shards, cache = tmp_path / "shards", Cache(str(tmp_path / "made" / "cache"), 1)
    shards.mkdir()
    check_machine(str(tmp_path), token, str(shards), cache)
    assert (tmp_path / "made" / "cache").is_dir() and not list((tmp_path / "made" / "cache").iterdir())
    with pytest.raises(OutputError, match="does not see the driver's files"):
        check_machine(str(tmp_path), "another", "", None)
    with pytest.raises(DataError, match=rf"does not see {shards}/gone, where the shards are; mount it"):
        check_machine(str(tmp_path), token, f"{shards}/gone", None)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"data.cache: {tmp_path}/file cannot hold copies of shards: "):
        check_machine(str(tmp_path), token, "", Cache(str(tmp_path / "file"), 1))
