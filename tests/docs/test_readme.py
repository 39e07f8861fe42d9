"""Both READMEs against the service: every example runs, every table says what the code says."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from prometheus_client.metrics import MetricWrapperBase

from app.dialects.contract import Fault
from app.dialects.openai import error_detail
from app.dialects.registry import DIALECTS
from app.engine.metrics import Metrics
from app.errors import TABLE
from app.http.routes import routes
from app.settings import SETTINGS
from tests.support.hosts import Process, process
from tests.support.paths import CHECKPOINT, ROOT

CONFORMANCE = ROOT / "tests" / "conformance"
IMAGE = CONFORMANCE / "cases" / "rgb.jpg"
KEY = "sk-readme"

RUN = {"bash", "python"}
# Configuration, replies, and commands that start or install something: not meant to be run here.
SHOWN = {"console", "ini", "nginx", "yaml", "json", "text"}
# Run by `make clients`, each in the environment of the package that it imports: see tests/tools/clients/.
SNIPPETS = {"py"}
# Prose in a fence, in the language of the page.
TRANSLATED = {"text"}


@dataclass(frozen=True)
class Readme:
    """A page, and the headings under which its tables stand."""

    name: str
    settings: str
    routes: str
    errors: str
    metrics: str

    @property
    def text(self) -> str:
        return (ROOT / self.name).read_text(encoding="utf-8")

    def blocks(self) -> list[tuple[str, str]]:
        """(language, content) of every fence, in order; one inside a list loses its indent."""
        found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", self.text, re.MULTILINE | re.DOTALL)
        return [(language, re.sub(rf"(?m)^{indent}", "", content)) for indent, language, content in found]

    def prose(self) -> str:
        """The page without its fences."""
        return re.sub(r"^( *)```.*?^\1```$", "", self.text, flags=re.MULTILINE | re.DOTALL)

    def table(self, heading: str) -> list[list[str]]:
        """The cells of every table row between a heading and the next of its level or above; heads and rules left out."""
        start = re.search(rf"^(#+) {re.escape(heading)}$", self.prose(), re.MULTILINE)
        assert start, f"{self.name} has no heading {heading!r}"
        section = re.split(rf"(?m)^#{{1,{len(start[1])}}} ", self.prose()[start.end() :])[0]
        lines = [line for line in section.splitlines() if line.startswith("|")]
        heads = {index - 1 for index, line in enumerate(lines) if set(line) <= set("|-: ")}
        rows = [line for index, line in enumerate(lines) if index not in heads and index - 1 not in heads]
        return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


PAGES = (
    Readme("README.md", "Settings", "Routes", "Errors", "Metrics"),
    Readme("README.zh-CN.md", "配置项", "路由", "错误", "指标"),
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def bare(cell: str) -> str:
    """What a cell holds; a dash is nothing."""
    return "" if cell == "–" else cell.strip("`")


# --- the examples ------------------------------------------------------------------------------------------------------------


def examples() -> list[tuple[str, str]]:
    """What is run: each block of either page once, in the order of the page."""
    return list(dict.fromkeys(block for page in PAGES for block in page.blocks() if block[0] in RUN))


def example_name(example: tuple[str, str]) -> str:
    heading = "start"
    for page in PAGES:
        before, found, _ = page.text.partition(example[1])
        if found:
            heading = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```$", "", before))[-1]
            break
    return f"{example[0]}-{heading}"


class ImageHandler(BaseHTTPRequestHandler):
    """Every path is the one image."""

    def do_GET(self) -> None:
        body = IMAGE.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@dataclass(frozen=True)
class Service:
    """A running server with the conformance checkpoint, a host of images, and a folder to run examples in."""

    running: Process
    url: str
    image_host: str
    folder: Path

    def localised(self, example: str) -> str:
        """The example with nothing but the loopback to talk to."""
        text = example.replace("http://localhost:6008", self.url)
        text = re.sub(r"https://qianwen-res\.oss-cn-beijing\.aliyuncs\.com(?=/)", f"http://{self.image_host}", text)
        hosts = {urlsplit(url).hostname for url in re.findall(r"\w+://[^\s\"'`\\)]+", text)}
        assert hosts <= {"127.0.0.1"}, f"an example talks to {hosts}"
        return text

    def execute(self, language: str, example: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "BASE_URL": self.url,
            "API_KEY": KEY,
            # Where curl finds its .curlrc.
            "HOME": str(self.folder),
            "NO_PROXY": "*",
        }
        text = self.localised(example)
        command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-W", "error", "-c", text]
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("examples")
    (folder / "config.env").write_text(f"API_KEY={KEY}\n")
    shutil.copy(IMAGE, folder / "photo.jpg")
    # Every curl says its status at the end of standard error, and fails for an error.
    (folder / ".curlrc").write_text('silent\nfail-with-body\nwrite-out = "%{stderr}status=%{http_code}\\n"\n')
    images = ThreadingHTTPServer(("127.0.0.1", 0), ImageHandler)
    thread = threading.Thread(target=images.serve_forever)
    thread.start()
    image_host = f"127.0.0.1:{images.server_port}"
    settings = {"API_KEY": KEY, "MODEL_PATH": str(CHECKPOINT), "DEVICE": "cpu", "IMAGE_URL_ALLOWED_HOSTS": image_host}
    try:
        with process("app", **settings) as running:
            url = f"http://127.0.0.1:{running.port()}"
            running.until_status("ok")
            yield Service(running, url, image_host, folder)
            running.popen.terminate()
            assert running.wait() == 0
    finally:
        images.shutdown()
        thread.join()
        images.server_close()


@pytest.mark.parametrize("example", examples(), ids=example_name)
def test_the_example_runs(service: Service, example: tuple[str, str]) -> None:
    language, text = example
    ran = service.execute(language, text)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    if language == "bash":
        statuses = re.findall(r"^status=(\d+)$", ran.stderr, re.MULTILINE)
        assert statuses == ["200"] * len(re.findall(r"(?m)^\s*curl ", text)) != [], ran.stdout + ran.stderr
    assert ran.stdout or "-o photo.jpg" in text


def test_an_example_that_fails_is_seen(service: Service) -> None:
    assert service.execute("bash", "curl http://localhost:6008/v1/models").returncode != 0
    assert service.execute("python", "import sys; sys.exit(3)").returncode == 3


def test_an_example_that_talks_to_others_is_not_run(service: Service) -> None:
    with pytest.raises(AssertionError, match=r"talks to \{'example.org'\}"):
        service.execute("bash", "curl https://example.org/")


@each_page
def test_every_fence_is_either_run_or_of_a_language_that_is_not(page: Readme) -> None:
    assert {language for language, _ in page.blocks()} <= RUN | SHOWN | SNIPPETS
    assert page.text.count("```") == 2 * len(page.blocks())
    assert all("curl " in text for language, text in page.blocks() if language == "bash")


def test_both_pages_have_the_same_blocks() -> None:
    english, chinese = ([block for block in page.blocks() if block[0] not in TRANSLATED] for page in PAGES)
    assert english == chinese
    assert [language for language, _ in PAGES[0].blocks()] == [language for language, _ in PAGES[1].blocks()]


def test_both_pages_have_the_same_structure() -> None:
    english, chinese = (re.findall(r"(?m)^(#+) ", page.prose()) for page in PAGES)
    assert english == chinese
    english, chinese = (re.findall(r"(?m)^\|", page.prose()) for page in PAGES)
    assert len(english) == len(chinese)


# --- the tables --------------------------------------------------------------------------------------------------------------


def default_of(key: str, cell: str) -> object:
    """The value that a default in the table stands for; one that names another setting follows it."""
    if cell in SETTINGS:
        return SETTINGS[cell].default
    return SETTINGS[key].parse(cell)


@each_page
def test_the_settings_are_those_of_the_service(page: Readme) -> None:
    table = {bare(name): bare(default) for name, default, _ in page.table(page.settings)}
    assert len(page.table(page.settings)) == len(table)
    assert sorted(table) == sorted(SETTINGS)
    assert {key: default_of(key, cell) for key, cell in table.items()} == {key: row.default for key, row in SETTINGS.items()}
    example = dict(re.findall(r"(?m)^([A-Z_]+)=(.*)$", (ROOT / "config.env.example").read_text()))
    assert {key: table[key] for key in example} == example


@each_page
def test_the_routes_are_those_of_the_service(page: Readme) -> None:
    served = {(row.method, row.path.replace("{id:.+}", "{id}"), not row.public) for row in routes(DIALECTS)}
    yes = {"yes": True, "no": False, "要": True, "不要": False}
    assert {(bare(method), bare(path), yes[key]) for method, path, key, _ in page.table(page.routes)} == served


Error = tuple[int, str, str]


@cache
def router_errors(url: str) -> frozenset[Error]:
    """What aiohttp refuses before any table is asked: path, method, Expect."""

    async def ask() -> frozenset[Error]:
        from aiohttp import ClientSession

        seen = set()
        async with ClientSession(url) as session:
            for method, path, headers in (
                ("GET", "/nowhere", {}),
                ("DELETE", "/health", {}),
                ("GET", "/health", {"Expect": "wonders"}),
            ):
                async with session.request(method, path, headers=headers) as reply:
                    error = (await reply.json())["error"]
                    seen.add((reply.status, error["type"], error["code"] or ""))
        return frozenset(seen)

    return asyncio.run(ask())


@each_page
def test_the_errors_are_those_of_the_service(page: Readme, service: Service) -> None:
    table = {(row.status, error_detail(Fault(row.status, "")).type, row.code or "") for row in TABLE.values()}
    shown = [(int(status), bare(kind), bare(code)) for status, kind, code, _ in page.table(page.errors)]
    assert len(shown) == len(set(shown))
    assert set(shown) == table | router_errors(service.url)


@each_page
def test_the_metrics_are_those_of_the_service(page: Readme) -> None:
    # A counter has _total in the text format alone.
    suffix = {"counter": "_total"}
    served = set()
    for metric in (value for value in vars(Metrics()).values() if isinstance(value, MetricWrapperBase)):
        (family,) = metric.describe()
        labels = f"{{{','.join(metric._labelnames)}}}" if metric._labelnames else ""
        served.add((family.name + suffix.get(family.type, "") + labels, family.type))
    kinds = {"计数器": "counter", "直方图": "histogram", "瞬时值": "gauge"}
    assert {(bare(name), kinds.get(kind, kind)) for name, kind, _ in page.table(page.metrics)} == served


# --- what the pages point to -------------------------------------------------------------------------------------------------


@each_page
def test_what_is_named_is_there(page: Readme) -> None:
    for path in re.findall(r"`((?:app|scheduler|models|tests)/[\w/]+(?:\.py|/))`", page.prose()):
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"\]\(([^)\s]+)\)", page.prose()))
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"(?m)^#+ (.+)$", page.prose())}
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in slugs, target
        elif not target.startswith("https://"):
            assert (ROOT / target).exists(), target
    (other,) = (name for name in ("README.md", "README.zh-CN.md") if name != page.name)
    assert other in targets
