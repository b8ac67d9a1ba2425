"""Shared by all tests: one embedded Ray for the session, the test data, and the number of skipped tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import flaky_proxy

# The tests compare with the CPU's arithmetic, to the bit or nearly so: on a machine with GPUs they run without them.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

ROOT = Path(__file__).resolve().parents[1]


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
