"""The S3 server of the store's tests."""

from __future__ import annotations

import pytest

from tests.s3_server import s3_server


@pytest.fixture(scope="session")
def s3_running():
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_running):
    s3_running.calm()
    s3_running.requests.clear()
    s3_running.failures = 0
    yield s3_running
    s3_running.calm()
