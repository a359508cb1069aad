"""A real S3 API on a loopback port: moto's server, which counts requests and fails on demand.

moto looks and then writes without a lock; S3's conditional writes are atomic, so writes are serialised here.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

#: What moto accepts, and what the tests look for where it must not be.
ACCESS_KEY = "AKIATESTONLYNOTREAL1"
SECRET_KEY = "not-a-real-secret-0123456789"


@dataclass
class S3Double:
    """`requests` holds (method, path) of everything that was asked; the other fields disturb what follows."""

    endpoint: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    #: seconds that every transfer of a file's bytes takes
    transfer_seconds: float = 0.0
    #: how many requests fail with 503 from now on
    num_failures: int = 0
    #: how many exclusive writes are done but answered with 500, as when an answer is lost
    num_lost_answers: int = 0
    #: as servers that know no conditional write: the header is passed over
    ignores_conditions: bool = False

    #: every request is refused, as with credentials that do not suffice
    forbids: bool = False

    def transfers(self, method: str) -> list[str]:
        """Names of the parts that were written (PUT) or read (GET), in order."""
        return [path.rpartition("/")[2] for asked, path in self.requests if asked == method and "/files/" in path]

    def environment(self) -> dict[str, str]:
        """What a process needs to use it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        }

    def client(self) -> Any:
        """A plain client, to look at the bucket and to damage things."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )


@contextmanager
def running() -> Iterator[S3Double]:
    """Serve until the block ends."""
    double = S3Double()
    inner = DomainDispatcherApplication(create_backend_app)
    writing = threading.Lock()
    counting = threading.Lock()

    def application(environ: dict, start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        conditional = "HTTP_IF_NONE_MATCH" in environ
        with counting:
            double.requests.append((method, path))
            fails = double.num_failures > 0
            double.num_failures -= fails
            loses = conditional and not fails and double.num_lost_answers > 0
            double.num_lost_answers -= loses
        if double.forbids:
            text = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            start_response("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))])
            return [text]
        if fails:
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return [b""]
        if conditional and double.ignores_conditions:
            del environ["HTTP_IF_NONE_MATCH"]
        if "/files/" in path:
            time.sleep(double.transfer_seconds)
        # The body first: a client that was stopped in the middle of it must not hold up the others.
        chunked = environ.get("HTTP_TRANSFER_ENCODING") == "chunked"
        body = environ["wsgi.input"]
        environ["wsgi.input"] = io.BytesIO(
            body.read() if chunked else body.read(int(environ.get("CONTENT_LENGTH") or 0))
        )
        with writing:
            answer = list(inner(environ, (lambda *_: None) if loses else start_response))
        if loses:
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        return answer

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    double.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield double
    finally:
        server.shutdown()
        thread.join()
