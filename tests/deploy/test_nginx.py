"""deploy/nginx-site.conf by nginx itself, before running servers on the loopback."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from app.http.server import KEEPALIVE_S
from app.settings import DEFAULTS
from scheduler.scheduler import MIN_STALL_SECONDS
from tests.support.hosts import Process, post, process
from tests.support.paths import ROOT
from tests.support.programs import certificate, edited, free_port, listens, program, run, running, until

pytestmark = pytest.mark.deploy

SITE = (ROOT / "deploy" / "nginx-site.conf").read_text()
# With what is commented out in it.
WITH_PAGES = edited(SITE, {r"^    #(location .*)$": r"    \1"})
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "s": 1}
# The least that nginx needs around a site; two workers, as a real one has several.
MAIN = """
{user}
worker_processes 2;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections 256; }}
http {{
    client_body_temp_path {folder}/bodies;
    proxy_temp_path {folder}/proxied;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""


def directive(name: str) -> int:
    """The one value of a directive that is a number of bytes or seconds."""
    (value,) = set(re.findall(rf"(?m)^\s*{name} (\d+)([kms]?);", SITE))
    return int(value[0]) * UNITS[value[1]]


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Proxy:
    """nginx with the site, and a client that trusts its certificate alone."""

    folder: Path
    port: int = 0
    certificate: tuple[Path, Path] | None = None

    def write(self, replicas: Sequence[int], site: str = SITE) -> Path:
        """Its configuration before these ports, and the certificate. What it listens on and where its files are is changed."""
        if not self.certificate:
            self.certificate = certificate(self.folder, "DNS:embed.example.org")
        self.port = free_port()
        server = re.search(r"(?m)^ +server 127\.0\.0\.1:6008(.*;)$", site)
        assert server
        changed = {
            r"^ +server 127\.0\.0\.1:6008.*;$": "".join(f"    server 127.0.0.1:{port}{server[1]}\n" for port in replicas),
            r"listen 443 ssl;": f"listen 127.0.0.1:{self.port} ssl;",
            r"(ssl_certificate +)\S+;": rf"\1{self.certificate[0]};",
            r"(ssl_certificate_key +)\S+;": rf"\1{self.certificate[1]};",
            r"access_log \S+ embedding;": f"access_log {self.folder}/access.log embedding;",
        }
        (self.folder / "site.conf").write_text(edited(site, changed))
        (self.folder / "nginx.conf").write_text(MAIN.format(folder=self.folder, user="user root;" if os.geteuid() == 0 else ""))
        return self.folder / "nginx.conf"

    @property
    def log(self) -> str:
        return (self.folder / "error.log").read_text()

    @contextmanager
    def connect(self) -> Iterator[ssl.SSLSocket]:
        context = ssl.create_default_context(cafile=self.folder / "cert.pem")
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=30) as sock,
            context.wrap_socket(sock, server_hostname="embed.example.org") as secure,
        ):
            yield secure

    def send(self, *pieces: bytes) -> Reply:
        """The reply to these bytes, which may come before all of them are sent."""
        with self.connect() as sock:
            try:
                for piece in pieces:
                    sock.sendall(piece)
            except (BrokenPipeError, ConnectionResetError):
                pass
            response = HTTPResponse(sock, method=pieces[0].partition(b" ")[0].decode())
            response.begin()
            return Reply(response.status, dict(response.getheaders()), response.read())

    def get(self, path: str, method: str = "GET") -> Reply:
        return self.send(f"{method} {path} HTTP/1.1\r\nHost: embed.example.org\r\n\r\n".encode())


def padded(size: int) -> bytes:
    """A request of so many bytes that is good: `user` is read and logged nowhere."""
    head, tail = b'{"input": "a text", "user": "', b'"}'
    return head + b"x" * (size - len(head) - len(tail)) + tail


@contextmanager
def nginx(proxy: Proxy, replicas: Sequence[int], site: str = SITE) -> Iterator[Proxy]:
    config = proxy.write(replicas, site)
    command = (program("nginx"), "-p", str(proxy.folder), "-c", str(config), "-g", "daemon off;")
    with running(*command, log=proxy.folder / "output") as popen:
        until(lambda: listens(proxy.port) or popen.poll() is not None, "nginx listens")
        assert popen.poll() is None, (proxy.folder / "output").read_text() + proxy.log
        yield proxy


@contextmanager
def two_replicas() -> Iterator[list[Process]]:
    """Two servers; they go on listening for a while once they drain."""
    drains = {"DRAIN_GRACE_S": "300", "SHUTDOWN_TIMEOUT_S": "300"}
    with process(**drains) as one, process(**drains) as other:
        one.until_status("ok")
        other.until_status("ok")
        yield [one, other]


@pytest.fixture
def folder(tmp_path: Path) -> Proxy:
    return Proxy(tmp_path)


@pytest.fixture
def replicas() -> Iterator[list[Process]]:
    """For a test that ends one."""
    with two_replicas() as started:
        yield started


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """nginx before two replicas that stay."""
    with two_replicas() as started, nginx(Proxy(tmp_path_factory.mktemp("nginx")), [one.port() for one in started]) as proxy:
        yield proxy


def test_nginx_takes_the_site(folder: Proxy) -> None:
    for site in (SITE, WITH_PAGES):
        said = run(program("nginx"), "-t", "-p", str(folder.folder), "-c", str(folder.write([6008], site)))
        assert "test is successful" in said
        assert "[warn]" not in said and "[emerg]" not in said


def test_its_limits_fit_those_of_the_service() -> None:
    assert DEFAULTS.max_request_bytes < directive("client_max_body_size") <= DEFAULTS.max_request_bytes + (1 << 20)
    assert directive("client_header_timeout") == DEFAULTS.header_timeout_s
    assert directive("client_body_timeout") == DEFAULTS.body_timeout_s
    assert directive("proxy_read_timeout") > DEFAULTS.request_timeout_s + MIN_STALL_SECONDS
    assert directive("keepalive_timeout") < KEEPALIVE_S
    # What is not large fits into the buffer, or it would be written to disk.
    assert directive("client_body_buffer_size") >= 10**6


def test_a_request_goes_through(proxy: Proxy) -> None:
    reply = proxy.send(post(b'{"input": ["a", "b"]}', "X-Request-Id: mine"))
    assert reply.status == 200 and len(reply.json()["data"]) == 2
    assert reply.headers["X-Request-Id"] == "mine" and "Server-Timing" in reply.headers
    line = re.compile(r'"POST /v1/embeddings HTTP/1.1" 200 \d+ [\d.]+s 127\.0\.0\.1:\d+ 200 [\d.]+ mine$', re.MULTILINE)
    # Written once the client has its reply.
    until(lambda: line.search((proxy.folder / "access.log").read_text()) is not None, "it is in the log")


@pytest.mark.parametrize("size", [999_999, 1_000_000, DEFAULTS.max_request_bytes])
def test_a_body_of_every_size_goes_through(proxy: Proxy, size: int) -> None:
    reply = proxy.send(post(padded(size)))
    assert reply.status == 200 and len(reply.json()["data"]) == 1
    assert "temporary file" not in proxy.log


def test_a_body_of_unknown_length_goes_through(proxy: Proxy) -> None:
    body = padded(3_000_000)
    reply = proxy.send(post(None, "Transfer-Encoding: chunked"), b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
    assert reply.status == 200
    assert "temporary file" not in proxy.log


def test_a_body_that_is_too_large_is_refused_in_json(proxy: Proxy) -> None:
    by_the_server = proxy.send(post(padded(DEFAULTS.max_request_bytes + 1)))
    assert by_the_server.status == 413 and f"{DEFAULTS.max_request_bytes:,} bytes" in by_the_server.json()["error"]["message"]
    assert "X-Request-Id" in by_the_server.headers
    by_nginx = proxy.send(post(padded(directive("client_max_body_size") + 1)))
    assert by_nginx.status == 413 and by_nginx.json()["error"]["type"] == "invalid_request_error"
    assert by_nginx.headers["Content-Type"] == "application/json"


def test_a_wrong_key_is_refused_before_a_large_body_is_sent(proxy: Proxy) -> None:
    reply = proxy.send(post(None, "Content-Length: 20000000", key="sk-wrong"), b'{"input": "')
    assert reply.status == 401 and reply.json()["error"]["code"] == "invalid_api_key"


def test_what_a_replica_that_drains_refuses_the_next_one_takes(folder: Proxy, replicas: list[Process]) -> None:
    # For longer than 5 s, as the last request may come that late.
    site = edited(SITE, {r"fail_timeout=5s": "fail_timeout=300s"})
    with nginx(folder, [replica.port() for replica in replicas], site) as proxy:
        replicas[0].popen.terminate()
        until(lambda: "draining" in replicas[0].stderr, "draining")
        assert replicas[0].request("/v1/embeddings", {"input": "a"})[0] == 503
        assert [proxy.send(post(b'{"input": "a"}')).status for _ in range(20)] == [200] * 20
        # By now it is passed over, so that a large body, which cannot be sent twice, meets the other.
        assert proxy.send(post(padded(2_000_000))).status == 200
        assert proxy.get("/health/ready").status == 200


def test_what_meets_a_replica_that_is_gone_the_next_one_takes(folder: Proxy, replicas: list[Process]) -> None:
    with nginx(folder, [replica.port() for replica in replicas]) as proxy:
        replicas[1].popen.kill()
        replicas[1].wait()
        assert [proxy.send(post(b'{"input": "a"}')).status for _ in range(20)] == [200] * 20


def test_without_a_replica_the_answer_is_json(folder: Proxy) -> None:
    with nginx(folder, [free_port(), free_port()]) as proxy:
        for body in (b'{"input": "a"}', padded(2_000_000)):
            reply = proxy.send(post(body))
            assert reply.status == 503 and reply.json()["error"]["type"] == "service_unavailable"
            assert int(reply.headers["Retry-After"]) > 0
        assert proxy.get("/health/ready").status == 503


@pytest.mark.parametrize(
    "path", ["/", "/metrics", "/health", "/health/live", "/docs", "/docs/docs.css", "/openapi.json", "/v2/x"]
)
def test_what_is_not_listed_is_closed(proxy: Proxy, path: str) -> None:
    reply = proxy.get(path)
    assert reply.status == 404 and reply.json()["error"]["code"] == "not_found"
    assert b"embedding_" not in reply.body


def test_the_pages_open_with_their_line(folder: Proxy, replicas: list[Process]) -> None:
    with nginx(folder, [replica.port() for replica in replicas], WITH_PAGES) as proxy:
        for path in ("/", "/docs", "/assets/docs/docs.css", "/assets/playground/playground.js", "/openapi.json"):
            assert proxy.get(path).status == 200
        assert b"embedding_ready 1.0" in proxy.get("/metrics").body
        assert proxy.get("/health").status == 404


def test_other_paths_of_the_api_go_through(proxy: Proxy) -> None:
    assert proxy.get("/v1/models").status == 401
    assert proxy.get("/health/ready", "HEAD").status == 200
