"""A real S3-speaking server (moto) on a free port of this machine, with a place in front of it that
counts and disturbs.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BUCKET = "sweeps-of-tests"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
    "AWS_SECRET_ACCESS_KEY": "not-a-real-secret-but-long-enough",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class S3Server:
    """moto behind a WSGI application that keeps a list of requests and answers some with 500 or 503
    itself.
    """

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        self.host = "{}:{}".format(*self._moto.get_host_and_port())
        self.endpoint = f"http://{self.host}"
        self._inner, self._moto._server.app = self._moto._server.app, self
        self.requests: list[tuple[str, str]] = []
        self.failures = 0
        self.calm()

    def calm(self) -> None:
        """No more faults and waits."""
        self.fail_rate, self.delay_s, self.rng = 0.0, 0.0, random.Random(0)

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        if self.delay_s:
            time.sleep(self.delay_s)
        if self.rng.random() < self.fail_rate:
            self.failures += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(
                self.rng.choice(["500 Internal Server Error", "503 Slow Down"]),
                [("Content-Length", "0")],
            )
            return [b""]
        return self._inner(environ, start)

    def backend(self) -> Any:
        """moto's own dictionary of objects, for filling it without requests."""
        from moto.backends import get_backend

        return get_backend("s3")["123456789012"]["aws"]

    def keys(self, under: str) -> list[str]:
        """Keys below a folder of the bucket."""
        return sorted(
            key for key in list(self.backend().buckets[BUCKET].keys) if key.startswith(f"{under}/")
        )

    def stop(self) -> None:
        self._moto.stop()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server with one bucket, and the environment of its clients."""
    with pytest.MonkeyPatch.context() as patch:
        server = S3Server()
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.endpoint}.items():
            patch.setenv(name, value)
        if (
            BUCKET not in server.backend().buckets
        ):  # moto keeps its buckets for all servers of a process
            server.backend().create_bucket(BUCKET, "us-east-1")
        try:
            yield server
        finally:
            server.stop()
