"""The examples of all pages, run as they stand against one real server on the miniature checkpoint."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.docs.pages import PAGES, RUN, SHOWN, SNIPPETS, Page, each_page
from tests.support.hosts import process
from tests.support.paths import CASES, CHECKPOINT

IMAGE = CASES / "rgb.jpg"
KEY = "sk-readme"


def examples() -> list[tuple[str, str]]:
    """What is run: each block of the pages once, in the order of the pages."""
    return list(dict.fromkeys(block for page in PAGES for block in page.blocks() if block[0] in RUN))


def example_name(example: tuple[str, str]) -> str:
    """Its page's folder and heading, and its language."""
    language, text = example
    page = next(page for page in PAGES if text in page.text)
    before = re.sub(r"(?ms)^```.*?^```$", "", page.text.partition(text)[0])
    heading = re.findall(r"(?m)^#+ (.+)$", before)[-1]
    return f"{page.path.removesuffix('README.md')}{heading}-{language}"


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
            yield Service(url, image_host, folder)
            running.popen.terminate()
            assert running.wait() == 0
    finally:
        images.shutdown()
        thread.join()
        images.server_close()


@pytest.mark.parametrize("example", examples(), ids=example_name)
def test_readme_examples_run(service: Service, example: tuple[str, str]) -> None:
    language, text = example
    ran = service.execute(language, text)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    if language == "bash":
        statuses = re.findall(r"^status=(\d+)$", ran.stderr, re.MULTILINE)
        assert statuses == ["200"] * len(re.findall(r"(?m)^\s*curl ", text)) != [], ran.stdout + ran.stderr
    assert ran.stdout or "-o photo.jpg" in text


def test_readme_example_that_fails_is_seen(service: Service) -> None:
    assert service.execute("bash", "curl http://localhost:6008/v1/models").returncode != 0
    assert service.execute("python", "import sys; sys.exit(3)").returncode == 3


def test_readme_example_that_talks_to_others_is_not_run(service: Service) -> None:
    with pytest.raises(AssertionError, match=r"talks to \{'example.org'\}"):
        service.execute("bash", "curl https://example.org/")


@each_page
def test_readme_fences_are_run_or_of_a_language_that_is_not(page: Page) -> None:
    assert {language for language, _ in page.blocks()} <= RUN | SHOWN | SNIPPETS
    assert page.text.count("```") == 2 * len(page.blocks())
    assert all("curl " in text for language, text in page.blocks() if language == "bash")
