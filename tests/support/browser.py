"""Headless Chromium on a page of ours: what is on it, what it asked for, and what it complained of."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from tests.support.programs import program

T = TypeVar("T")

# Nothing but the page: no updates, no lists, no other host even by name.
FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--no-first-run",
    # A page that scrolls smoothly moves away from under a click.
    "--force-prefers-reduced-motion",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)

# The contrast of every text on the page with what is behind it, by WCAG 2: [ratio, least that it may be, text], worst first.
CONTRASTS = """
const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
function rgba(colour) {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
  return [r, g, b, a / 255];
}
const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
function luminance(colour) {
  const [r, g, b] = colour.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function ground(element) {
  if (!element) return [255, 255, 255];
  const own = rgba(getComputedStyle(element).backgroundColor);
  return own[3] === 1 ? own.slice(0, 3) : over(own, ground(element.parentElement));
}
function opacity(element) {
  return element ? Number(getComputedStyle(element).opacity) * opacity(element.parentElement) : 1;
}
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  const element = node.parentElement;
  const text = node.textContent.trim();
  if (!text || !element.checkVisibility() || element.closest("script, noscript, .unseen, :disabled")) continue;
  const style = getComputedStyle(element);
  const behind = ground(element);
  const ink = rgba(style.color);
  ink[3] *= opacity(element);
  const [low, high] = [luminance(behind), luminance(over(ink, behind))].sort((a, b) => a - b);
  const large = parseFloat(style.fontSize) >= (style.fontWeight >= 700 ? 18.66 : 24);
  found.push([(high + 0.05) / (low + 0.05), large ? 3 : 4.5, text]);
}
return found.sort((a, b) => a[0] - b[0]);
"""


@dataclass
class Browser:
    """One tab. `driver` is there for what has no word here."""

    driver: webdriver.Chrome

    def open(self, url: str) -> None:
        """A page, with nothing left of an earlier one: neither what was kept nor what was complained of."""
        self.driver.get(url)
        self.driver.execute_script("localStorage.clear()")
        self.driver.get("about:blank")
        self.complaints()
        self.requested()
        self.driver.get(url)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.one(selector).text

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def in_module(self, name: str, body: str) -> Any:
        """What `body`, in which `it` is one of the page's modules, returns."""
        script = f"""
            const done = arguments[0];
            import("/assets/playground/{name}").then((it) => {{ {body} }}).then(done, (error) => done({{error: String(error)}}));
        """
        return self.driver.execute_async_script(script)

    def until(self, condition: Callable[[], T], seconds: float = 90.0) -> T:
        """What `condition` returns once that is true."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, f"not so after {seconds} s: {self.text('body')}"
            time.sleep(0.05)
        return value

    def press(self, selector: str, *keys: str) -> None:
        self.one(selector).send_keys(*keys)

    def write(self, selector: str, text: str) -> None:
        """Type into a field that is emptied first. Characters beyond the BMP, which no driver types, are set instead."""
        field = self.one(selector)
        self.until(field.is_displayed)
        field.clear()
        if max(map(ord, text), default=0) < 0x10000:
            field.send_keys(text)
        else:
            self.run("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", field, text)

    def drop(self, selector: str, *files: Path) -> None:
        """Drag files from outside onto the middle of an element: the browser's own events, which pages cannot make."""
        element = self.one(selector)
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        box = self.run("return arguments[0].getBoundingClientRect().toJSON()", element)
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for event in ("dragEnter", "dragOver", "drop"):
            self.driver.execute_cdp_cmd("Input.dispatchDragEvent", {"type": event, **place, "data": data})

    def show_as(self, width: int, theme: str = "light") -> None:
        """A viewport of this width, and the system's theme."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def contrasts(self) -> list[tuple[float, float, str]]:
        return [tuple(row) for row in self.run(CONTRASTS)]

    def complaints(self) -> list[str]:
        """Errors and warnings of the console since the last call, violations of the policy among them."""
        entries = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def requested(self) -> list[str]:
        """The URLs asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def check_quiet(self, own: str, refused: tuple[int, ...] = ()) -> None:
        """Nothing was complained of but replies with these statuses (0: no reply), and no other host was asked for anything."""
        # A complaint comes a little after its cause.
        self.driver.execute_async_script("setTimeout(arguments[0], 150)")
        statuses = "|".join(map(str, refused))
        expected = rf"the server responded with a status of ({statuses})\b" + ("|net::ERR_CONNECTION_" if 0 in refused else "")
        complaints = [message for message in self.complaints() if not re.search(expected, message)]
        assert not complaints, complaints
        hosts = {urlsplit(url).netloc for url in self.requested() if not url.startswith(("data:", "blob:", "about:"))}
        assert hosts == {urlsplit(own).netloc}, hosts


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser of its own, which ends with the context."""
    browser, driver = program("chromium"), program("chromedriver", "apt-get install chromium-driver")
    options = webdriver.ChromeOptions()
    # Both are named to selenium, which would download what it has to look for.
    options.binary_location = browser
    for flag in FLAGS:
        options.add_argument(flag)
    if os.geteuid() == 0:
        # Its sandbox refuses root, which a container's tests often are.
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        # The driver is on loopback.
        patch.setenv("NO_PROXY", "*")
        patch.setenv("no_proxy", "*")
        started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        started.set_script_timeout(90)
        try:
            yield Browser(started)
        finally:
            started.quit()
