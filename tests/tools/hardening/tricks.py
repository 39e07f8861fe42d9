"""Tricks to have a server fetch from where it must not, and the names that they need. Nothing here dials anything."""

from __future__ import annotations

from dataclasses import dataclass

from tests.tools.hardening.namespace import DEAD, PUBLIC, PUBLIC_6, Answer

# A public host, and one that is private and exempt, on this port alone.
HOST = "public.test"
EXEMPT, EXEMPT_ADDRESS = "exempt.test", "10.9.9.9"
ALLOWED_HOSTS = f"{EXEMPT}:80"
# A proxy of the environment, which is to be passed over.
PROXY = "10.66.66.66"


@dataclass(frozen=True, slots=True)
class Trick:
    """A URL; with `hops` the first host redirects to the first of them, that one to the next, and so on. `OWN` in either is
    the server's port."""

    url: str
    hops: tuple[str, ...] = ()
    status: int = 302


LITERALS = (
    "127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1", "0x7f.0x0.0x0.0x1", "0177.0.0.1", "017700000001",
    "127.000.000.001", "127.255.255.254", "127.0.0.1.", "0.0.0.0", "0", "10.0.0.1", "167772161", "172.16.0.1", "192.168.0.1",
    "0xc0a80001", "100.100.100.200", "169.254.169.254", "2852039166", "0251.0376.0251.0376", "169.254.43518", "198.18.0.1",
    "192.0.0.192", "203.0.113.1", "168.63.129.16", "192.88.99.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "\uff11\uff12\uff17.0.0.1", "127\u30020\u30020\u30021", "\u2460\u2461\u2466.\u24ea.\u24ea.\u2460",
    "\u0661\u0662\u0667.\u0660.\u0660.\u0661", "127%2e0%2e0%2e1", "%31%32%37.0.0.1",
)  # fmt: skip

LITERALS_6 = (
    "::1", "0:0:0:0:0:0:0:1", "::", "::ffff:127.0.0.1", "::ffff:a9fe:a9fe", "::ffff:0:127.0.0.1", "::127.0.0.1", "::a00:1",
    "64:ff9b::169.254.169.254", "64:ff9b:1::10.0.0.1", "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:80ff:fffe", "fe80::1%25lo",
    "fe80::1%lo", "fe80::5efe:10.0.0.1%lo", "fd00:ec2::254", "fec0::1", "ff02::1", "100::1", "2001:db8::1", "4000::1",
    "::ffff:10.0.0.1%25lo",
)  # fmt: skip

# Each of a host of its own, so that nothing is known of it from before.
PRIVATE_NAMES: dict[str, tuple[str, ...]] = {
    "inside.test": ("10.0.0.1",),
    "metadata.google.internal": ("169.254.169.254",),
    "metadata": ("169.254.169.254",),
    "kubernetes.default.svc": ("10.96.0.1",),
    "host.docker.internal": ("172.17.0.1",),
    "127.0.0.1.nip.test": ("127.0.0.1",),
    "zero.test": ("0.0.0.0",),
    "six.test": ("fd00::1",),
    "loop.six.test": ("::1",),
    "any.six.test": ("::",),
    "mapped.test": ("::ffff:10.0.0.1",),
    "nat64.test": ("64:ff9b::7f00:1",),
    "6to4.test": ("2002:a00:1::",),
    "xn--bcher-kva.test": ("10.0.0.2",),
    f"{EXEMPT}.evil.test": ("10.0.0.3",),
    f"x.{EXEMPT}": ("10.0.0.4",),
}
MIXED_NAMES: dict[str, tuple[str, ...]] = {
    "first.mixed.test": (PUBLIC, "10.1.0.1"),
    "last.mixed.test": ("10.1.0.2", PUBLIC),
    "six.mixed.test": (PUBLIC, "::1"),
    "dead.mixed.test": (DEAD, "10.1.0.3", "fd00::3"),
    "many.mixed.test": ("127.0.0.1", PUBLIC_6, "169.254.169.254", PUBLIC, "fd00::4"),
}
HOSTS: dict[str, tuple[str, ...]] = {HOST: (PUBLIC,), EXEMPT: (EXEMPT_ADDRESS,)}

URLS = (
    "http://inside.test./x", "http://INSIDE.test/x", "http://localhost/x", "http://localhost./x", "http://b\u00fccher.test/x",
    "http://public.test@127.0.0.1/x", "http://public.test:80@127.0.0.1/x", "http://127.0.0.1\\@public.test/x",
    "http://public.test\\@127.0.0.1/x", "http://127.0.0.1#@public.test/x", "http://127.0.0.1?@public.test/x",
    "http://127.0.0.1%00.public.test/x", "http://127.0.0.1\t/x", "ht\ntp://127.0.0.1/x", "http://127.0.0.1\r\nHost: x/x",
    "\u00a0http://127.0.0.1/x", "http:\\\\127.0.0.1\\x", "http:/127.0.0.1/x", "http:///127.0.0.1/x", "HTTP://127.0.0.1/x",
    "http://127.0.0.1:6379/%0d%0aFLUSHALL", "http://127.0.0.1:0022/x", "https://127.0.0.1/x", "https://169.254.169.254/x",
    "http://127.0.0.1:OWN/v1/models", "http://localhost:OWN/v1/models", f"http://{EXEMPT}@10.0.0.1/x",
    f"http://{EXEMPT}:8080/x", f"http://{EXEMPT_ADDRESS}/x",
)  # fmt: skip

SCHEMES = (
    "file:///etc/passwd", "ftp://127.0.0.1:22/x", "gopher://127.0.0.1:6379/_INFO", "dict://127.0.0.1:6379/info",
    "ldap://127.0.0.1:8080/x", "unix:///run/docker.sock", "http+unix://127.0.0.1/x", "data:text/html,http://127.0.0.1/x",
    "url:http://127.0.0.1/x", "jar:http://127.0.0.1!/x",
)  # fmt: skip

REDIRECTS = tuple(
    Trick(f"http://{HOST}/", (target,), status)
    for status, target in (
        (301, "http://169.254.169.254/x"), (302, "http://169.254.169.254/x"), (303, "http://169.254.169.254/x"),
        (307, "http://169.254.169.254/x"), (308, "http://169.254.169.254/x"), (302, "//127.0.0.1/x"), (302, "//[::1]/x"),
        (302, "http://2130706433/x"), (302, "http://[::ffff:7f00:1]/x"), (302, "http://\uff11\uff12\uff17.0.0.1/x"),
        (302, "http://inside.test/x"), (302, "https://inside.test/x"), (302, "http://inside.test:6379/x"),
        (302, "http://dead.mixed.test:8080/x"), (302, "http://public.test@127.0.0.1/x"), (302, "\\\\127.0.0.1\\x"),
        (302, "/\\127.0.0.1/x"), (302, "http://127.0.0.1:OWN/v1/models"), (302, "file:///etc/passwd"),
        (302, "ftp://127.0.0.1:22/x"), (302, "gopher://127.0.0.1:6379/_INFO"),
    )
)  # fmt: skip

CHAINS = (
    Trick(f"http://{HOST}/", ("/", "/", "http://127.0.0.1/x")),
    Trick(f"http://{HOST}/", ("/", "/", "/", "http://127.0.0.1/x")),
    Trick(f"http://{HOST}/", ("http://inside.test/", f"http://{HOST}/x")),
    Trick(f"http://{EXEMPT}/", ("http://inside.test/x",)),
    Trick(f"http://{EXEMPT}/", ("http://10.0.0.1/x",)),
    Trick(f"http://{EXEMPT}/", (f"http://{EXEMPT}:8080/x",)),
    Trick(f"http://{EXEMPT}/", ("https://169.254.169.254/x",)),
    Trick(f"http://{HOST}/", (f"http://{EXEMPT}/", "http://inside.test/x")),
)

TRICKS = (
    *(Trick(f"http://{host}/x") for host in LITERALS),
    *(Trick(f"http://[{host}]/x") for host in LITERALS_6),
    *(Trick(f"http://{host}/x") for host in (*PRIVATE_NAMES, *MIXED_NAMES)),
    *map(Trick, URLS),
    *map(Trick, SCHEMES),
    *REDIRECTS,
    *CHAINS,
)


def answers() -> dict[str, Answer]:
    """What the name server says: it orders nothing."""
    return {name: _of(addresses) for name, addresses in (PRIVATE_NAMES | MIXED_NAMES | HOSTS).items()}


def _of(addresses: tuple[str, ...]) -> Answer:
    kinds = {kind: [address for address in addresses if (":" in address) == (kind == "AAAA")] for kind in ("A", "AAAA")}
    return lambda kind, _: kinds[kind]
