"""An S3-speaking server on loopback, whose requests can be made to fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kr_ray.runs import storage

BUCKET = "bucket"
UNAVAILABLE = "503 Service Unavailable"
SECRET = "a-secret-that-must-not-travel"


class Store:
    """The server's application: moto's, behind a door that can be shut for the next `failures` requests."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app

        self._moto = DomainDispatcherApplication(create_backend_app)
        self.failures, self.status = 0, UNAVAILABLE
        self.before_next_get: Callable[[], Any] | None = None

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if self.failures > 0:
            self.failures -= 1
            start_response(self.status, [("Content-Length", "0")])
            return [b""]
        if self.before_next_get and environ["REQUEST_METHOD"] == "GET":
            act, self.before_next_get = self.before_next_get, None
            act()
        return self._moto(environ, start_response)


@contextmanager
def running_store() -> Iterator[Store]:
    """A server with an empty bucket, which the environment names for the length of the block."""
    import boto3
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, type: str, message: str, *arguments: Any) -> None:
            pass

    store = Store()
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        storage._filesystem.cache_clear()  # of another server
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        try:
            yield store
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
            storage._filesystem.cache_clear()
