"""Checks of the HTTP edge: who is let in, what is no HTTP, and who sends too slowly."""

from __future__ import annotations

import collections
import http.client
import json

from tests.hardening.board import Outcome, Site, check
from tests.hosts import Process


def without_auth() -> None:
    """without the check of the key."""
    from app import auth

    auth.check_key = lambda headers, keys: "anyone"


AUTHORIZATION_FORMS: tuple[tuple[bytes, ...], ...] = (
    (),
    (b"",),
    (b"Bearer",),
    (b"Bearer ",),
    (b"Bearer wrong",),
    (b"Bearer sk-tes",),
    (b"Bearer sk-test2",),
    (b"Bearer test:sk-test",),
    (b"Bearer SK-TEST",),
    (b"Bearer \xff\xfe",),
    (b"Basic c2stdGVzdA==",),
    (b"sk-test",),
    (b"Bearer sk-test", b"Bearer sk-test"),
)


@check("auth", f"{len(AUTHORIZATION_FORMS)} forms of the header", "401 in JSON", without_auth)
def auth(site: Site) -> Outcome:
    server = site.fake()
    seen = collections.Counter(ask(server, form) for form in AUTHORIZATION_FORMS)
    return Outcome(set(seen) == {"401 JSON"}, ", ".join(f"{count} x {what}" for what, count in sorted(seen.items())))


def ask(server: Process, values: tuple[bytes, ...]) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", server.port(), timeout=10)
    connection.putrequest("POST", "/v1/embeddings")
    for value in values:
        connection.putheader("Authorization", value)
    connection.putheader("Content-Length", "2")
    connection.endheaders(b"{}")
    reply = connection.getresponse()
    body = reply.read()
    connection.close()
    is_json = reply.headers.get_content_type() == "application/json" and "error" in json.loads(body)
    return f"{reply.status} {'JSON' if is_json else repr(body)}"
