"""Finding, checking and downloading checkpoints, from a fake hub on loopback; nothing else is connected to."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from models.base import ModelLoadError
from models.checkpoints.complete import check_complete
from models.checkpoints.download import find_or_download
from tests.support.paths import CHECKPOINT, ROOT
from tests.support.waiting import wait_until

MODEL_ID = "someone/some-embedding"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"


def safetensors(payload: bytes = b"\x01\x02\x03\x04" * 4) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(payload)], "data_offsets": [0, len(payload)]}}).encode()
    return len(header).to_bytes(8, "little") + header + payload


def repository() -> dict[str, bytes]:
    return {
        "README.md": b"# a model\n",
        "config.json": b'{"model_type": "qwen3_vl"}',
        "chat_template.jinja": b"{{ messages }}",
        "merges.txt": b"a b\n",
        "model.safetensors": safetensors(os.urandom(50_000)),
        "pytorch_model.bin": b"\x80\x02 a pickle",
        "training_args.bin": b"\x80\x02 another",
        "model.pt": b"\x80\x02 another",
        "modeling_custom.py": b"raise SystemExit",
        "modules.json": b"[]",
        "1_Pooling/config.json": b"{}",
        "onnx/model.onnx": b"onnx",
        "onnx/config.json": b"{}",
        "scripts/embed.py": b"raise SystemExit",
        "tokenizer.json": b'{"version": "1.0"}',
    }


NEEDED = {
    "config.json", "chat_template.jinja", "merges.txt", "model.safetensors", "modules.json", "1_Pooling/config.json",
    "tokenizer.json",
}  # fmt: skip


class FakeHub:
    """The part of the hub's HTTP API that huggingface_hub needs to list and download one repository."""

    def __init__(self) -> None:
        self.files = repository()
        self.commit = COMMIT
        self.served: dict[str, bytes] = {}  # bodies that differ from what the listing says
        self.api_status = 200
        self.most_listings = 9  # listings of a commit before the hub fails
        self.file_status: dict[str, int] = {}
        self.without_hashes = False
        self.cut_off: str | None = None
        self.stalled_on: str | None = None
        self.stalled, self.release = threading.Event(), threading.Event()
        self.fetched: Counter[str] = Counter()
        self.tokens: set[str | None] = set()
        self.asked: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.tokens.add(self.headers["Authorization"])
                path = unquote(urlsplit(self.path).path)
                if path.startswith("/api/"):
                    hub.asked.append(path)
                    listings = sum("/tree/" in asked for asked in hub.asked)
                    status = 500 if "/tree/" in path and listings > hub.most_listings else hub.api_status
                    self.answer(status, json.dumps(hub.listing(path) if status == 200 else {}).encode())
                else:
                    self.send_file(path.split(f"/resolve/{hub.commit}/", 1)[1])

            def send_file(self, name: str) -> None:
                body = hub.served.get(name, hub.files[name])
                if self.command == "GET":
                    hub.fetched[name] += 1
                    if hub.file_status.get(name):
                        return self.answer(hub.file_status[name], b"")
                if self.command == "GET" and name in (hub.cut_off, hub.stalled_on):
                    self.start(200, len(body), name)
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                    if name == hub.stalled_on:
                        hub.stalled.set()
                        hub.release.wait(60)
                    return None
                self.start(200, len(body), name)
                if self.command == "GET":
                    self.wfile.write(body)
                return None

            def start(self, status: int, length: int, name: str | None = None) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                if name:
                    self.send_header("X-Repo-Commit", hub.commit)
                    self.send_header("ETag", f'"{hub.etag(name)}"')
                self.end_headers()

            def answer(self, status: int, body: bytes) -> None:
                self.start(status, len(body))
                if self.command == "GET":
                    self.wfile.write(body)

        return Handler

    def etag(self, name: str) -> str:
        data = self.files[name]
        if name.endswith((".safetensors", ".bin", "tokenizer.json")):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def listing(self, path: str) -> object:
        if "/tree/" in path:
            return [self.entry(name) for name in self.files]
        return {"id": MODEL_ID, "modelId": MODEL_ID, "sha": self.commit, "siblings": [self.sibling(name) for name in self.files]}

    def entry(self, name: str) -> dict[str, object]:
        """Return a file of the listing of a commit. Without hashes it has zeros, since huggingface_hub needs some."""
        entry = {"type": "file", "path": name, "size": len(self.files[name]), "oid": "0" * 40}
        if self.without_hashes:
            return entry
        if len(self.etag(name)) == 64:
            return entry | {"lfs": {"oid": self.etag(name), "size": entry["size"], "pointerSize": 130}}
        return entry | {"oid": self.etag(name)}

    def sibling(self, name: str) -> dict[str, object]:
        """Return a file of the description of the repository."""
        entry: dict[str, object] = {"rfilename": name, "size": len(self.files[name])}
        if self.without_hashes:
            return entry
        if len(self.etag(name)) == 64:
            return entry | {"blobId": "0" * 40, "lfs": {"sha256": self.etag(name), "size": entry["size"], "pointerSize": 130}}
        return entry | {"blobId": self.etag(name)}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    fake = FakeHub()
    thread = threading.Thread(target=fake.server.serve_forever, args=(0.02,))
    thread.start()
    yield fake
    fake.release.set()
    fake.server.shutdown()
    fake.server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def loopback_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "models" / "some-embedding"


@pytest.fixture
def found(tmp_path: Path) -> Path:
    """A whole checkpoint that exists."""
    folder = tmp_path / "found"
    for name in NEEDED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(repository()[name])
    return folder


def download(path: Path, hub: FakeHub, *, allow_pickle: bool = False) -> Path:
    return find_or_download(path, MODEL_ID, may_download=True, allow_pickle=allow_pickle, endpoint=hub.url, token="hf_secret")


def refusal(path: Path, hub: FakeHub | None = None, endpoint: str = "http://127.0.0.1:1", may_download: bool = True) -> str:
    with pytest.raises(ModelLoadError) as caught:
        find_or_download(path, MODEL_ID, may_download=may_download, endpoint=hub.url if hub else endpoint, token="hf_secret")
    message = str(caught.value)
    assert "\n" not in message
    assert "hf_secret" not in message
    return message


def names_ways_out(message: str, path: Path) -> bool:
    commands = f"`hf download {MODEL_ID} --local-dir {path}`", f"`modelscope download --model {MODEL_ID} --local_dir {path}`"
    return all(way in message for way in (*commands, "MODEL_PATH", "`make demo`"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# A checkpoint that exists


def test_complete_folder_is_taken_without_network(found: Path) -> None:
    closed = "http://127.0.0.1:1"
    assert find_or_download(found, MODEL_ID, may_download=True, endpoint=closed) == found
    assert find_or_download(CHECKPOINT, MODEL_ID, may_download=False, endpoint=closed) == CHECKPOINT


def test_complete_folder_may_have_sharded_weights(found: Path) -> None:
    shard(found, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    check_complete(found, allow_pickle=False)


def shard(folder: Path, names: list[str]) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    index = {"weight_map": {f"w{number}": name for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in names:
        (folder / name).write_bytes(safetensors())


def truncate(file: Path, by: int = 1) -> None:
    file.write_bytes(file.read_bytes()[:-by])


def lose_a_shard(folder: Path) -> None:
    shard(folder, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    (folder / "model-00002-of-00002.safetensors").unlink()


def cut_a_shard(folder: Path) -> None:
    shard(folder, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    truncate(folder / "model-00002-of-00002.safetensors")


def lose_the_index(folder: Path) -> None:
    shard(folder, ["model-00001-of-00002.safetensors"])
    (folder / "model.safetensors.index.json").unlink()


def leave_incomplete(folder: Path) -> None:
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / ".cache/huggingface/download/x.incomplete").write_bytes(b"part")


def leave_modelscope_part(folder: Path) -> None:
    (folder / "._____temp").mkdir()
    (folder / "._____temp/model.safetensors").write_bytes(b"part")


def dangling_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "blobs" / "gone")


def tail_of_zeros(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes() + b"\0")


def put(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def lose(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: truncate(folder / name)


WEIGHTS = "model.safetensors"
BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lose("config.json"), "config.json is missing"),
    "half a config": (cut("config.json"), "config.json is not JSON"),
    "no weights": (lose(WEIGHTS), "the weights (model.safetensors) are missing"),
    "no tokenizer": (lose("tokenizer.json"), "the tokenizer (tokenizer.json) is missing"),
    "half a tokenizer": (cut("tokenizer.json"), "tokenizer.json is not JSON"),
    "an empty template": (put("chat_template.jinja", b""), "chat_template.jinja is empty"),
    "a lost shard": (lose_a_shard, "model-00002-of-00002.safetensors is missing"),
    "a cut shard": (cut_a_shard, "model-00002-of-00002.safetensors is"),
    "a lost index": (lose_the_index, "model.safetensors.index.json is missing"),
    "an empty index": (put(f"{WEIGHTS}.index.json", b"{}"), "model.safetensors.index.json names no weights"),
    "an index beside": (put(f"{WEIGHTS}.index.json", b'{"weight_map": {"a": "b.safetensors"}}'), "b.safetensors is missing"),
    "empty weights": (put(WEIGHTS, b""), "model.safetensors is empty"),
    "six bytes": (put(WEIGHTS, b"\1\0\0\0\0\0"), "model.safetensors is cut off"),
    "one byte short": (cut(WEIGHTS), "its header says"),
    "cut in the header": (put(WEIGHTS, safetensors()[:20]), "model.safetensors is cut off"),
    "longer than it says": (tail_of_zeros, "its header says"),
    "another format": (put(WEIGHTS, b"\2\0\0\0\0\0\0\0[]"), "model.safetensors has no readable header"),
    "an LFS pointer": (put(WEIGHTS, LFS_POINTER), "model.safetensors is a git-LFS pointer"),
    "a pointer for a tokenizer": (put("tokenizer.json", LFS_POINTER), "tokenizer.json is a git-LFS pointer"),
    "a link to nothing": (dangling_weights, "model.safetensors is missing"),
    "a part of a download": (leave_incomplete, "x.incomplete"),
    "a part on top": (put("model.incomplete", b"part"), "model.incomplete"),
    "a part from ModelScope": (leave_modelscope_part, "._____temp"),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_incomplete_folder_is_refused_and_never_touched(kind: str, found: Path, hub: FakeHub) -> None:
    break_it, named = BREAKS[kind]
    break_it(found)
    before = content(found)
    message = refusal(found, hub)
    assert named in message
    assert "never downloaded over" in message and names_ways_out(message, found)
    assert content(found) == before
    assert not hub.tokens, "the hub was asked"
    assert sorted(entry.name for entry in found.parent.iterdir()) == ["found"]


def test_incomplete_folder_has_its_faults_named_at_once(found: Path) -> None:
    (found / "config.json").unlink()
    (found / "model.safetensors").unlink()
    message = refusal(found)
    assert "config.json is missing" in message and "(model.safetensors) are missing" in message


def test_incomplete_folder_with_many_faults_is_one_short_line(found: Path) -> None:
    shard(found, [f"model-{number}.safetensors" for number in range(40)])
    for file in found.glob("model-*.safetensors"):
        file.unlink()
    message = refusal(found)
    assert "35 more" in message and len(message) < 1200


def test_pickled_weights_are_taken_only_if_allowed(found: Path) -> None:
    (found / "model.safetensors").unlink()
    with zipfile.ZipFile(found / "pytorch_model.bin", "w") as archive:
        archive.writestr("data.pkl", b"pickle" * 100)
    assert "ALLOW_PICKLE" in refusal(found)
    check_complete(found, allow_pickle=True)
    truncate(found / "pytorch_model.bin", by=30)
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin is cut off"):
        check_complete(found, allow_pickle=True)


def test_pickled_weights_beside_safetensors_may_be_broken(found: Path) -> None:
    (found / "pytorch_model.bin").write_bytes(b"PK broken")
    check_complete(found, allow_pickle=True)


def test_path_that_is_a_file_is_refused(tmp_path: Path, hub: FakeHub) -> None:
    (tmp_path / "file").write_text("x")
    assert "not a folder" in refusal(tmp_path / "file", hub)


def test_path_that_is_a_dangling_link_is_refused(tmp_path: Path, hub: FakeHub) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert "does not exist" in refusal(tmp_path / "link", hub)
    assert not hub.tokens


def test_path_that_is_missing_is_refused_without_a_model_id(path: Path, hub: FakeHub) -> None:
    message = refusal(path, hub, may_download=False)
    assert str(path) in message and "MODEL_ID" in message and names_ways_out(message, path)
    assert not hub.tokens and not path.parent.exists()


# The download


def test_download_fetches_what_is_needed_from_one_commit(path: Path, hub: FakeHub) -> None:
    assert download(path, hub) == path
    assert content(path) == {name: hub.files[name] for name in NEEDED}
    assert set(hub.fetched) == NEEDED, "more was fetched than is needed"
    assert hub.tokens == {"Bearer hf_secret"}
    listing = f"/api/models/{MODEL_ID}"
    assert hub.asked[0] == listing and set(hub.asked[1:]) == {f"{listing}/tree/{COMMIT}"}, "all is of the commit asked for first"
    assert {entry.name for entry in path.parent.iterdir()} <= {path.name, f".{path.name}.lock"}


def test_download_fills_an_empty_folder(path: Path, hub: FakeHub) -> None:
    path.mkdir(parents=True)
    download(path, hub)
    assert (path / "model.safetensors").exists()


def test_download_returns_a_relative_path_as_given(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert download(Path("./models/x"), hub) == Path("./models/x")
    check_complete(tmp_path / "models" / "x", allow_pickle=False)


def test_download_of_shards_needs_all_of_them(path: Path, hub: FakeHub) -> None:
    del hub.files["model.safetensors"]
    hub.files["model.safetensors.index.json"] = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    hub.files |= {"model-1.safetensors": safetensors(), "model-2.safetensors": safetensors()}
    download(path, hub)
    del hub.files["model-2.safetensors"]
    hub.commit = "1" * 40
    message = refusal(path.with_name("other"), hub)
    assert "holds no whole model" in message and "model-2.safetensors is missing" in message
    assert not path.with_name("other").exists()


def test_download_of_names_that_look_like_patterns(path: Path, hub: FakeHub) -> None:
    hub.files["odd[1].json"] = b"{}"
    download(path, hub)
    assert (path / "odd[1].json").exists()


def test_download_has_pickles_only_if_allowed_and_needed(path: Path, hub: FakeHub) -> None:
    download(path, hub, allow_pickle=True)
    assert not (path / "pytorch_model.bin").exists(), "safetensors are enough"
    shutil.rmtree(path)
    del hub.files["model.safetensors"]
    assert "ALLOW_PICKLE" in refusal(path, hub)
    hub.commit = "1" * 40
    download(path, hub, allow_pickle=True)
    assert set(content(path)) == NEEDED - {"model.safetensors"} | {"pytorch_model.bin"}


@pytest.mark.parametrize("allowed", [True, False], ids=["allowed", "not allowed"])
def test_download_has_a_pickled_layer_only_if_allowed(path: Path, hub: FakeHub, allowed: bool) -> None:
    """The transformer's own weights are safetensors, and those of a dense layer are not."""
    layer = {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    hub.files |= {
        "modules.json": json.dumps([layer]).encode(),
        "2_Dense/config.json": b"{}",
        "2_Dense/pytorch_model.bin": b"\x80",
    }
    if allowed:
        download(path, hub, allow_pickle=True)
        assert set(content(path)) == NEEDED | {"2_Dense/config.json", "2_Dense/pytorch_model.bin"}
    else:
        with pytest.raises(ModelLoadError, match=r"2_Dense: the weights .* It has pickled ones.*ALLOW_PICKLE=true allows"):
            download(path, hub)
        del hub.files["2_Dense/pytorch_model.bin"]
        hub.commit = "1" * 40
        assert "ALLOW_PICKLE" not in refusal(path, hub)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_download_of_another_size_is_refused(name: str, path: Path, hub: FakeHub) -> None:
    hub.served[name] = hub.files[name] + b" "
    message = refusal(path, hub)
    assert f"{name} is {len(hub.files[name]) + 1} bytes long instead of {len(hub.files[name])}" in message
    assert not path.exists()


@pytest.mark.parametrize(("name", "kind"), [("model.safetensors", "sha256"), ("config.json", "git hash")])
def test_download_of_another_content_is_refused_and_fetched_again(name: str, kind: str, path: Path, hub: FakeHub) -> None:
    body = hub.files[name]
    hub.served[name] = body.replace(b"qwen3_vl", b"qwen9_vl") if name == "config.json" else body[:-1] + bytes([body[-1] ^ 1])
    message = refusal(path, hub)
    assert f"{name} has another {kind}" in message
    assert not path.exists()
    hub.served.clear()
    download(path, hub)
    assert content(path)[name] == body
    assert hub.fetched[name] == 2 and hub.fetched["tokenizer.json"] == 1, "only the wrong file is fetched again"


@pytest.mark.usefixtures("no_waiting")
def test_download_takes_its_place_only_once_its_hashes_are_compared(path: Path, hub: FakeHub) -> None:
    """The hub fails after all files have come. Nothing takes its place then, and the next start downloads nothing again."""
    hub.most_listings = 1
    message = refusal(path, hub)
    assert "answered 500" in message and "next start goes on" in message
    assert set(hub.fetched) == NEEDED and not path.exists()
    hub.most_listings = 9
    download(path, hub)
    assert content(path) == {name: hub.files[name] for name in NEEDED}
    assert set(hub.fetched.values()) == {1}


def test_download_from_a_mirror_without_hashes_is_checked_by_size(
    path: Path, hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    hub.without_hashes = True
    download(path, hub)
    assert "no hash for model.safetensors" in caplog.text


def test_download_resumes_with_a_new_commit(path: Path, hub: FakeHub) -> None:
    hub.file_status["model.safetensors"] = 500
    refusal(path, hub)
    hub.file_status.clear()
    hub.commit = "1" * 40
    hub.files["config.json"] = b'{"model_type": "qwen3_vl", "new": true}'
    del hub.files["modules.json"]
    download(path, hub)
    assert content(path) == {name: hub.files[name] for name in NEEDED - {"modules.json"}}


@pytest.mark.usefixtures("no_waiting")
def test_download_resumes_after_breaking_off(path: Path, hub: FakeHub) -> None:
    hub.cut_off = "model.safetensors"
    message = refusal(path, hub)
    assert "broke off" in message and "next start goes on" in message and names_ways_out(message, path)
    assert not path.exists()
    hub.cut_off = None
    download(path, hub)
    assert content(path)["model.safetensors"] == hub.files["model.safetensors"]
    assert hub.fetched["config.json"] == 1, "what had come was fetched again"


def test_download_resumes_after_a_kill(path: Path, hub: FakeHub) -> None:
    hub.stalled_on = "model.safetensors"
    code = (
        "import sys; from pathlib import Path; from models.checkpoints.download import find_or_download as find; "
        "find(Path(sys.argv[1]), sys.argv[2], may_download=True, endpoint=sys.argv[3], token='hf_secret')"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(path.parent / "cache")}
    arguments = [sys.executable, "-c", code, str(path), MODEL_ID, hub.url]
    with subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL, env=environment) as process:
        try:
            assert hub.stalled.wait(90)
            wait_until(lambda: sum(hub.fetched.values()) == len(NEEDED), "a request for every file")
            wait_until(lambda: len(content(hidden(path)).keys() & NEEDED) == len(NEEDED) - 1, "every file but one")
        finally:
            process.send_signal(signal.SIGKILL)
    assert not path.exists()
    assert list(hidden(path).rglob("*.incomplete")), "the test did not reach what it tests"
    hub.stalled_on = None
    hub.release.set()
    download(path, hub)
    assert content(path) == {name: hub.files[name] for name in NEEDED}
    assert hub.fetched["model.safetensors"] == 2 and hub.fetched["config.json"] <= 2
    assert not hidden(path).exists()


def hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.downloading")


def test_download_by_two_at_once_happens_once(path: Path, hub: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    hub.stalled_on = "model.safetensors"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(download, path, hub)
        assert hub.stalled.wait(90)
        hub.stalled_on = None
        second = pool.submit(download, path, hub)
        wait_until(lambda: "Another process downloads" in caplog.text, "the second one at the lock")
        hub.release.set()
        assert first.result(60) == second.result(60) == path
    assert hub.fetched["config.json"] == 1


@pytest.mark.parametrize("status", [401, 403])
def test_hub_that_refuses_is_named_with_its_status(status: int, path: Path, hub: FakeHub) -> None:
    hub.api_status = status
    message = refusal(path, hub)
    assert f"({status})" in message and "HF_TOKEN" in message and names_ways_out(message, path)
    assert not path.exists()


def test_hub_that_does_not_know_the_model_is_named(path: Path, hub: FakeHub) -> None:
    hub.api_status = 404
    message = refusal(path, hub)
    assert MODEL_ID in message and "404" in message and names_ways_out(message, path)


@pytest.mark.parametrize("status", [500, 503])
def test_hub_that_fails_is_named_with_its_status(status: int, path: Path, hub: FakeHub) -> None:
    hub.api_status = status
    message = refusal(path, hub)
    assert f"answered {status}" in message and names_ways_out(message, path)


def test_hub_that_is_unreachable_is_named_without_its_password(path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        message = refusal(path, endpoint=f"http://user:hf_secret@127.0.0.1:{closed.getsockname()[1]}")
    assert "127.0.0.1" in message and "cannot be reached" in message and names_ways_out(message, path)
    assert not path.exists()


def test_model_id_that_is_none_is_refused(path: Path, hub: FakeHub) -> None:
    with pytest.raises(ModelLoadError, match="MODEL_ID 'a/b/c' is not the name"):
        find_or_download(path, "a/b/c", may_download=True, endpoint=hub.url)
    assert not hub.tokens


def test_disk_that_is_too_small_is_noticed_before_the_download(path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(path.parent.parent)
    monkeypatch.setattr("models.checkpoints.download.shutil.disk_usage", lambda _: usage._replace(free=10))
    message = refusal(path, hub)
    assert "the disk is full" in message
    assert not hub.fetched


def test_disk_that_fills_up_ends_the_download(path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    assert "the disk is full" in refusal(path, hub)
    assert not path.exists()


def test_path_whose_parent_cannot_be_made_is_refused(tmp_path: Path, hub: FakeHub) -> None:
    (tmp_path / "file").write_text("x")
    assert "cannot hold a model" in refusal(tmp_path / "file" / "model", hub)


def test_path_that_is_a_mount_point_is_refused_before_the_download(
    path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.checkpoints.download.os.path.ismount", lambda _: True)
    assert "mount its parent folder" in refusal(path, hub)
    assert not hub.tokens
