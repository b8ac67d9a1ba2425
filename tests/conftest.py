"""How the tests are run, and what they share.

`make test` runs them in two processes of one thread each (pytest-xdist, `-n 2`); a plain `pytest FILE` runs
in one, and every test is the same in both. A file is one group, so what a module builds is built once; the files that
start Ray are one group, so are those that talk to the S3 server, and those of the pair of gloo workers: each of the
three exists in one process.
The groups that take longest come first (`LONGEST`), or one process would end alone with them.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import flaky_proxy

if TYPE_CHECKING:
    from tests import small

# Before torch is imported, here or in a process that a test starts: where tests run side by side, a test that takes all
# cores takes them from another, and tiny tensors are quicker on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The tests compare with the CPU's arithmetic, to the bit or nearly so: on a machine with GPUs they run without them.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

ROOT = Path(__file__).resolve().parents[1]
SHARED = {"embedded_ray": "ray", "ray_head": "ray", "S3": "s3", "gloo_pair": "gloo"}
"""Words in a test file, and the group that it belongs to for them."""
LONGEST = ("ray", "tests/test_pipeline.py")


@functools.cache
def group_of(path: str) -> str:
    """The group of a test file; one with none of the words is a group of its own."""
    words = set(re.findall(r"\w+", (ROOT / path).read_text()))
    return next((group for word, group in SHARED.items() if word in words), path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest groups first."""
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(group_of(item.nodeid.partition("::")[0]), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What `--dist loadgroup` does by marks; with pytest 9.2, pytest-xdist 3.8 does not see them."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.partition("::")[0])

    config.option.loadscopereorder = False
    return Groups(config, log)


@pytest.fixture(scope="session")
def embedded_ray() -> Iterator[Any]:
    """An OnRay on an embedded Ray that all tests share (it takes seconds to start); started by its first use."""
    from pipeline.cluster.on_ray import OnRay

    cluster = OnRay("embedded", cpus=4)
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real test data (NOISY_LAMBDA_TEST_DATA, default ../shared/data); skips where there is none."""
    path = Path(os.environ.get("NOISY_LAMBDA_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no test data at {path} (NOISY_LAMBDA_TEST_DATA)")
    return path


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> small.Store:
    """Small jobs that are done, made once for all processes of this run of the tests."""
    from tests import small

    base = tmp_path_factory.getbasetemp()
    return small.Store((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "worlds")


@dataclass(frozen=True)
class S3:
    """A real S3 endpoint (moto's server) with one bucket, behind a proxy that can break things."""

    proxy: flaky_proxy.Proxy
    bucket: str  # s3://…

    def put(self, name: str, data: bytes) -> str:
        """Write an object; its URL."""
        import fsspec

        url = f"{self.bucket}/{name}"
        fsspec.filesystem("s3").pipe_file(url, data)
        return url

    def upload(self, path: Path | str, name: str) -> str:
        return self.put(name, Path(path).read_bytes())


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """One server for all tests; every client finds it by the environment, as users do."""
    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    proxy = flaky_proxy.Proxy(*server.get_host_and_port())
    environment = {
        "AWS_ENDPOINT_URL_S3": proxy.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",  # what is tested is our patience, not botocore's
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("test-bucket")
        yield S3(proxy, "s3://test-bucket")
    proxy.close()
    server.stop()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without the long waits between them."""
    from pipeline.storage import remote_file

    monkeypatch.setattr(remote_file, "FIRST_WAIT", 0.001)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = len(terminalreporter.stats.get("skipped", []))
    terminalreporter.write_line(f"skipped tests: {skipped}")
