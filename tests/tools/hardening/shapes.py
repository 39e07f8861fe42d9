"""What the checks of the HTTP edge send: forms of a header that name no right key, and shapes of a request that are no HTTP."""

from __future__ import annotations

from tests.tools.hardening.wire import KEY

_NON_ASCII = "schlüssel".encode()

# Header lines without the one right key, each form sent as a whole request.
WRONG_KEYS: dict[str, tuple[bytes, ...]] = {
    "no header": (),
    "an empty value": (b"Authorization:",),
    "white space": (b"Authorization:  \t ",),
    "the scheme alone": (b"Authorization: Bearer",),
    "the scheme and a space": (b"Authorization: Bearer ",),
    "the scheme and tabs": (b"Authorization: Bearer\t\t",),
    "another key": (b"Authorization: Bearer wrong",),
    "its first characters": (b"Authorization: Bearer sk-tes",),
    "one character": (b"Authorization: Bearer s",),
    "one character more": (b"Authorization: Bearer sk-test2",),
    "one character before": (b"Authorization: Bearer xsk-test",),
    "in capitals": (b"Authorization: Bearer SK-TEST",),
    "with its name": (b"Authorization: Bearer test:sk-test",),
    "its name": (b"Authorization: Bearer test",),
    "the setting": (b"Authorization: Bearer test:sk-test,",),
    "with a comma": (b"Authorization: Bearer sk-test,",),
    "twice in one": (b"Authorization: Bearer sk-test sk-test",),
    "two in a list": (b"Authorization: Bearer sk-test, Bearer sk-test",),
    "in quotes": (b'Authorization: Bearer "sk-test"',),
    "as a parameter": (b"Authorization: Bearer token=sk-test",),
    "a colon for the space": (b"Authorization: Bearer:sk-test",),
    "a tab for the space": (b"Authorization: Bearer\tsk-test",),
    "no space": (b"Authorization: Bearersk-test",),
    "no scheme": (b"Authorization: sk-test",),
    "Basic": (b"Authorization: Basic c2stdGVzdA==",),
    "Basic with a colon": (b"Authorization: Basic OnNrLXRlc3Q=",),
    "Basic with the bare key": (b"Authorization: Basic sk-test",),
    "Digest": (b'Authorization: Digest username="sk-test"',),
    "Token": (b"Authorization: Token sk-test",),
    "a scheme that ends in Bearer": (b"Authorization: XBearer sk-test",),
    "a scheme in letters that look alike": ("Authorization: Веаrеr sk-test".encode(),),
    "no UTF-8": (b"Authorization: Bearer \xff\xfe",),
    "UTF-8": (b"Authorization: Bearer " + _NON_ASCII,),
    "the key and a broken byte": (b"Authorization: Bearer sk-test\xff",),
    "the key behind a no-break space": (b"Authorization: Bearer \xc2\xa0sk-test",),
    "in percent": (b"Authorization: Bearer %73k-test",),
    "in base64": (b"Authorization: Bearer c2stdGVzdA==",),
    "the hash of nothing": (b"Authorization: Bearer e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",),
    "8,000 characters": (b"Authorization: Bearer " + b"k" * 8000,),
    "a star": (b"Authorization: Bearer *",),
    "null": (b"Authorization: Bearer null",),
    "two headers": (KEY, KEY),
    "two headers, one wrong": (KEY, b"Authorization: Bearer wrong"),
    "two headers, one empty": (b"Authorization:", KEY),
    "Proxy-Authorization": (b"Proxy-Authorization: Bearer sk-test",),
    "X-Api-Key": (b"X-Api-Key: sk-test",),
    "a cookie": (b"Cookie: Authorization=Bearer sk-test; api_key=sk-test",),
    "X-Forwarded-Authorization": (b"X-Forwarded-Authorization: Bearer sk-test",),
}

RIGHT_KEYS: dict[str, tuple[bytes, ...]] = {
    "as documented": (KEY,),
    "a small scheme": (b"Authorization: bearer sk-test",),
    "a scheme in capitals": (b"Authorization: BEARER sk-test",),
    "a small name": (b"authorization: Bearer sk-test",),
    "two spaces": (b"Authorization: Bearer  sk-test",),
    "white space behind": (b"Authorization: Bearer sk-test \t",),
}

_BODY = b'{"input":"a"}'
_HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: test\r\n" + KEY + b"\r\n"
_SIZED = b"Content-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
_CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(_BODY), _BODY)
_CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


def _length(value: bytes) -> bytes:
    return _HEAD + b"Content-Length: " + value + b"\r\n\r\n" + _BODY


def _coded(value: bytes, name: bytes = b"Transfer-Encoding:") -> bytes:
    return _HEAD + name + value + b"\r\n\r\n" + _CHUNKS


def _field(line: bytes) -> bytes:
    return _HEAD + line + b"\r\n" + _SIZED


def _chunks(data: bytes) -> bytes:
    return _HEAD + _CHUNKED + data


# What two servers in a row may read in two ways, or no server at all. Each is sent with a whole second request behind it.
SMUGGLED: dict[str, bytes] = {
    # Two lengths
    "length, then chunked": _HEAD + b"Content-Length: 6\r\n" + _CHUNKED + b"0\r\n\r\nX",
    "chunked, then length": _HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\n",
    "length 0 and chunked": _HEAD + b"Content-Length: 0\r\n" + _CHUNKED + _CHUNKS,
    "two lengths": _HEAD + b"Content-Length: 13\r\nContent-Length: 14\r\n\r\n" + _BODY,
    "one length twice": _HEAD + b"Content-Length: 13\r\nContent-Length: 13\r\n\r\n" + _BODY,
    "a list of lengths": _length(b"13, 13"),
    # Lengths that are none
    "length -1": _length(b"-1"),
    "length +13": _length(b"+13"),
    "length 0xd": _length(b"0xd"),
    "length 1_3": _length(b"1_3"),
    "length 1 3": _length(b"1 3"),
    "length 13.0": _length(b"13.0"),
    "an empty length": _length(b""),
    "a length of 23 digits": _length(b"9" * 23),
    "a space before its colon": _HEAD + b"Content-Length : 13\r\n\r\n" + _BODY,
    # Transfer codings
    "chunked twice": _coded(b" chunked, chunked"),
    "two lines of chunked": _HEAD + b"Transfer-Encoding: chunked\r\n" + _CHUNKED + _CHUNKS,
    "chunked, identity": _coded(b" chunked, identity"),
    "identity": _coded(b" identity"),
    "identity and a length": _HEAD + b"Transfer-Encoding: identity\r\n" + _SIZED,
    "gzip alone": _coded(b" gzip"),
    "xchunked": _coded(b" xchunked"),
    "an empty coding": _coded(b""),
    "chunked behind a vertical tab": _coded(b" \x0bchunked"),
    "chunked in quotes": _coded(b' "chunked"'),
    "chunked on a folded line": _coded(b"\r\n chunked"),
    "a space before the colon of chunked": _coded(b" chunked", b"Transfer-Encoding :"),
    "chunked in HTTP/1.0": _coded(b" chunked").replace(b"HTTP/1.1", b"HTTP/1.0"),
    # Chunks
    "chunk size 0xd": _chunks(b"0xd\r\n" + _BODY + b"\r\n0\r\n\r\n"),
    "chunk size -d": _chunks(b"-d\r\n" + _BODY + b"\r\n0\r\n\r\n"),
    "chunk size +d": _chunks(b"+d\r\n" + _BODY + b"\r\n0\r\n\r\n"),
    "chunk size zz": _chunks(b"zz\r\n" + _BODY + b"\r\n0\r\n\r\n"),
    "no chunk size": _chunks(b"\r\n" + _BODY + b"\r\n0\r\n\r\n"),
    "a chunk size of 19 digits": _chunks(b"f" * 19 + b"\r\n" + _BODY + b"\r\n0\r\n\r\n"),
    "a space before the chunk size": _chunks(b" d\r\n" + _BODY + b"\r\n0\r\n\r\n"),
    "a space behind the chunk size": _chunks(b"d \r\n" + _BODY + b"\r\n0\r\n\r\n"),
    "a bare LF behind the chunk size": _chunks(b"d\n" + _BODY + b"\r\n0\r\n\r\n"),
    "a bare LF in a chunk's extension": _chunks(b"d;a\nb\r\n" + _BODY + b"\r\n0\r\n\r\n"),
    "a NUL in a chunk's extension": _chunks(b"d;\x00\r\n" + _BODY + b"\r\n0\r\n\r\n"),
    "no line end behind a chunk": _chunks(b"d\r\n" + _BODY + b"0\r\n\r\n"),
    "a chunk longer than its size": _chunks(b"c\r\n" + _BODY + b"\r\n0\r\n\r\n"),
    "bare LFs behind the last chunk": _chunks(b"d\r\n" + _BODY + b"\r\n0\n\n"),
    "a length in the trailer": _chunks(b"d\r\n" + _BODY + b"\r\n0\r\nContent-Length: 5\r\n\r\n"),
    "a trailer without a colon": _chunks(b"d\r\n" + _BODY + b"\r\n0\r\ntrailer\r\n\r\n"),
    "a NUL in the trailer": _chunks(b"d\r\n" + _BODY + b"\r\n0\r\nX: \x00\r\n\r\n"),
    # Field lines
    "a folded line": _field(b"X-A: b\r\n c"),
    "a folded line before the first": _HEAD.replace(b"Host", b" Host") + _SIZED,
    "a bare LF": _HEAD + b"X-A: b\n" + _SIZED,
    "bare LFs alone": (_HEAD + _SIZED).replace(b"\r\n", b"\n"),
    "a bare CR": _field(b"X-A: b\rTransfer-Encoding: chunked"),
    "two CRs": _field(b"X-A: b\r"),
    "a NUL in a value": _field(b"X-A: \x00"),
    "a NUL in a name": _field(b"X-\x00A: b"),
    "no colon": _field(b"X-A"),
    "no name": _field(b": b"),
    "a space in a name": _field(b"X A: b"),
    "a parenthesis in a name": _field(b"X(A): b"),
    "a name that is not ASCII": _field(b"X-\xe9: b"),
    "a value of 20,000 bytes": _field(b"X-A: " + b"a" * 20_000),
    "a name of 20,000 bytes": _field(b"a" * 20_000 + b": a"),
    "40,000 fields": _field(b"\r\n".join(b"X-%d: a" % number for number in range(40_000))),
    "no host": _HEAD.replace(b"Host: test\r\n", b"") + _SIZED,
    "two hosts": _field(b"Host: other"),
    # Request lines
    "HTTP/1.2": (_HEAD + _SIZED).replace(b"HTTP/1.1", b"HTTP/1.2"),
    "HTTP/1.11": (_HEAD + _SIZED).replace(b"HTTP/1.1", b"HTTP/1.11"),
    "HTTP/3.0": (_HEAD + _SIZED).replace(b"HTTP/1.1", b"HTTP/3.0"),
    "http/1.1": (_HEAD + _SIZED).replace(b"HTTP/1.1", b"http/1.1"),
    "HTTP/0.9": b"GET /health/live\r\n",
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a path of 20,000 bytes": b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: test\r\n\r\n",
    "a space in the path": _HEAD.replace(b"/v1/", b"/v1 /") + _SIZED,
    "a tab behind the method": _HEAD.replace(b"POST ", b"POST\t") + _SIZED,
    "a space before the method": b" " + _HEAD + _SIZED,
    "a NUL in the path": _HEAD.replace(b"/v1/", b"/\x00v1/") + _SIZED,
    "TLS": bytes.fromhex("16030100a5010000a10303") + bytes(60),
}
