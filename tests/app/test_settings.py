from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.process import tame_threads
from app.settings import SETTINGS, ApiKey, Loaded, Settings, SettingsError, load_settings
from tests.support.paths import ROOT

EXAMPLE = ROOT / "config.env.example"
# Keys of torch and of the Hub that the example shows: they are exported, not read.
FOREIGN = {"CUDA_VISIBLE_DEVICES", "HF_TOKEN", "HF_ENDPOINT"}

Load = Callable[..., Settings]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without our keys, and put back afterwards: load_settings exports."""
    before = dict(os.environ)
    for key in {*SETTINGS, *FOREIGN}:
        monkeypatch.delenv(key, raising=False)
    yield
    monkeypatch.undo()
    for key in os.environ.keys() - before.keys():
        del os.environ[key]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """load(file text, KEY=value in the environment, ...), with a key so that API_KEY is no problem."""

    def load(text: str = "", api_key: str = "secret", **environment: str) -> Settings:
        for key, value in {"API_KEY": api_key, **environment}.items():
            monkeypatch.setenv(key, value)
        file = tmp_path / "config.env"
        file.write_text(text)
        return Read(load_settings(file))

    return load


class Read:
    """What was loaded, with its settings' fields as its own."""

    def __init__(self, loaded: Loaded) -> None:
        self.settings, self.warnings, self.may_download = loaded.settings, loaded.warnings, loaded.may_download

    def __getattr__(self, name: str) -> Any:
        return getattr(self.settings, name)


def problems(load: Load, text: str = "", **environment: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(text, **environment)
    return caught.value.problems


# --- the example, the table and the defaults do not drift apart --------------------------------------------------------------


def example_lines() -> list[tuple[bool, str, str]]:
    """(commented out, key, value) of every setting in the example."""
    matches = re.findall(r"^(# )?([A-Z][A-Z0-9_]*)=(.*)$", EXAMPLE.read_text(), re.MULTILINE)
    return [(bool(comment), key, value) for comment, key, value in matches]


def test_example_names_exactly_the_settings() -> None:
    keys = [key for _, key, _ in example_lines()]
    assert len(keys) == len(set(keys))
    assert set(keys) == {*SETTINGS, *FOREIGN}


def test_every_field_is_a_setting_or_derived() -> None:
    assert {row.field for row in SETTINGS.values()} - {""} == {field.name for field in dataclasses.fields(Settings)}
    assert all(row.help for row in SETTINGS.values())


def test_example_as_it_stands_is_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "k")
    assert load_settings(EXAMPLE).settings == Settings(api_keys=(ApiKey("key-1", b"k"),))
    assert not FOREIGN & os.environ.keys()


def test_every_value_in_the_example_is_the_default_commented_out_or_not(load: Load) -> None:
    text = "".join(f"{key}={value}\n" for _, key, value in example_lines() if key not in FOREIGN)
    settings = load(text)
    assert settings.settings == Settings(api_keys=settings.api_keys)


def test_nothing_set_is_the_defaults(load: Load) -> None:
    settings = load()
    assert settings.settings == Settings(api_keys=(ApiKey("key-1", b"secret"),))


def test_defaults_are_as_documented() -> None:
    defaults = {key: row.default for key, row in SETTINGS.items()}
    assert defaults == {
        "API_KEY": (),
        "PORT": 6008,
        "MODEL_NAME": "Qwen3-VL-Embedding-2B",
        "MODEL_PATH": Path("./models/Qwen3-VL-Embedding-2B"),
        "DEVICE": "cuda",
        "EMBEDDING_DIMENSION": 2560,
        "MAX_IMAGE_SIZE": 512,
        "MAX_IMAGE_WIDTH": 512,
        "MAX_IMAGE_HEIGHT": 512,
        "LOG_LEVEL": "INFO",
        "LOG_FORMAT": "text",
        "HOST": "0.0.0.0",
        "AUTH_DISABLED": False,
        "MODEL_ID": "Qwen/Qwen3-VL-Embedding-2B",
        "DTYPE": "auto",
        "BACKEND": "packed",
        "COMPILE": "auto",
        "MAX_BATCH_SIZE": 256,
        "MAX_BATCH_TOKENS": None,
        "MAX_BATCH_WAIT_MS": 0,
        "MAX_QUEUE_SIZE": 8192,
        "VECTOR_CACHE_MB": 0,
        "MAX_INPUTS_PER_REQUEST": 2048,
        "MAX_INPUT_TOKENS": 8192,
        "MAX_REQUEST_BYTES": 32 * 1024 * 1024,
        "MAX_BYTES_IN_FLIGHT": 4 * 1024**3,
        "MAX_IMAGE_BYTES": 20 * 1024 * 1024,
        "MAX_IMAGE_PIXELS": 50_000_000,
        "IMAGE_FETCH_TIMEOUT_S": 10,
        "IMAGE_URL_ALLOWED_HOSTS": frozenset(),
        "REQUEST_TIMEOUT_S": 60,
        "HEADER_TIMEOUT_S": 15,
        "BODY_TIMEOUT_S": 30,
        "SHUTDOWN_TIMEOUT_S": 75,
        "DRAIN_GRACE_S": 0,
        "WORKER_STALL_S": None,
        "CORS_ORIGINS": (),
        "PLAYGROUND": True,
        "ALLOW_PICKLE": False,
    }


# --- values ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("PORT", "0", 0),
        ("PORT", "65535", 65535),
        ("MODEL_NAME", "name with spaces / ü", "name with spaces / ü"),
        ("MODEL_PATH", "/data/model", Path("/data/model")),
        ("DEVICE", "cpu", "cpu"),
        ("DEVICE", "auto", "auto"),
        ("DEVICE", "cuda:3", "cuda:3"),
        ("EMBEDDING_DIMENSION", "64", 64),
        ("EMBEDDING_DIMENSION", "Native", None),
        ("LOG_LEVEL", "debug", "DEBUG"),
        ("HOST", "::1", "::1"),
        ("AUTH_DISABLED", "True", True),
        ("ALLOW_PICKLE", "1", True),
        ("ALLOW_PICKLE", "off", False),
        ("MODEL_ID", "gpt2", "gpt2"),
        ("DTYPE", "BFloat16", "bfloat16"),
        ("MAX_BATCH_TOKENS", "1_024", 1024),
        ("MAX_BATCH_TOKENS", "auto", None),
        ("MAX_BATCH_WAIT_MS", "2.5", 2.5),
        ("MAX_REQUEST_BYTES", "1000", 1000),
        ("MAX_REQUEST_BYTES", "3 KiB", 3072),
        ("MAX_IMAGE_BYTES", "2mib", 2 << 20),
        ("MAX_IMAGE_BYTES", "1GiB", 1 << 30),
        ("REQUEST_TIMEOUT_S", ".5", 0.5),
        ("DRAIN_GRACE_S", "0", 0.0),
        ("WORKER_STALL_S", "7", 7.0),
        ("WORKER_STALL_S", "auto", None),
        (
            "IMAGE_URL_ALLOWED_HOSTS",
            "Minio, 10.0.0.1:9000,[::1]:80,[FE80::1],",
            {"minio", "10.0.0.1:9000", "[::1]:80", "[fe80::1]"},
        ),
        ("CORS_ORIGINS", "*", ("*",)),
        ("CORS_ORIGINS", "https://A.example, http://b:3000", ("https://a.example", "http://b:3000")),
    ],
)
def test_accepted(load: Load, key: str, text: str, value: Any) -> None:
    read = getattr(load(**{key: text}), SETTINGS[key].field)
    assert read == value
    assert type(read) is (frozenset if isinstance(value, set) else type(value))


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("PORT", "6008.0"),
        ("PORT", "٦٠٠٨"),
        ("PORT", "1KiB"),
        ("PORT", "9" * 5000),
        ("MODEL_NAME", "a\x1bb"),
        ("DEVICE", "gpu"),
        ("DEVICE", "cuda:"),
        ("DEVICE", "cuda:-1"),
        ("EMBEDDING_DIMENSION", "0"),
        ("EMBEDDING_DIMENSION", "auto"),
        ("EMBEDDING_DIMENSION", "65537"),
        ("MAX_IMAGE_SIZE", "-1"),
        ("MAX_IMAGE_WIDTH", "wide"),
        ("LOG_LEVEL", "loud"),
        ("HOST", "http://localhost"),
        ("AUTH_DISABLED", "perhaps"),
        ("MODEL_ID", "a/b/c"),
        ("MODEL_ID", "../b"),
        ("DTYPE", "int8"),
        ("MAX_BATCH_SIZE", "0"),
        ("MAX_BATCH_TOKENS", "0"),
        ("MAX_BATCH_WAIT_MS", "-1"),
        ("MAX_QUEUE_SIZE", "0"),
        ("VECTOR_CACHE_MB", "-1"),
        ("VECTOR_CACHE_MB", "0.5"),
        ("MAX_REQUEST_BYTES", "32MB"),
        ("MAX_REQUEST_BYTES", "1.5MiB"),
        ("MAX_IMAGE_PIXELS", "1MiB"),
        ("REQUEST_TIMEOUT_S", "0"),
        ("REQUEST_TIMEOUT_S", "nan"),
        ("REQUEST_TIMEOUT_S", "inf"),
        ("REQUEST_TIMEOUT_S", "1e3"),
        ("BODY_TIMEOUT_S", "9" * 400),
        ("DRAIN_GRACE_S", "-0.1"),
        ("WORKER_STALL_S", "never"),
        ("IMAGE_URL_ALLOWED_HOSTS", "http://minio"),
        ("IMAGE_URL_ALLOWED_HOSTS", "::1"),
        ("IMAGE_URL_ALLOWED_HOSTS", "minio:0"),
        ("IMAGE_URL_ALLOWED_HOSTS", "minio:65536"),
        ("CORS_ORIGINS", "example.org"),
        ("CORS_ORIGINS", "https://example.org/"),
    ],
)
def test_refused_by_name_with_the_value(load: Load, key: str, text: str) -> None:
    [problem] = problems(load, **{key: text})
    assert problem.startswith(f"{key} must be ")
    assert problem.endswith(f", not {text!r}")


def test_the_rule_is_in_the_message(load: Load) -> None:
    assert problems(load, PORT="x") == ["PORT must be a whole number from 0 to 65535, not 'x'"]
    assert problems(load, PORT="1", EMBEDDING_DIMENSION="x") == [
        "EMBEDDING_DIMENSION must be a whole number from 1 to 65536, or native, not 'x'"
    ]


def test_all_problems_at_once_from_file_and_environment(load: Load) -> None:
    with pytest.raises(SettingsError) as caught:
        load("PORT=x\nDTYPE=y\nHOST=127.0.0.1\n", api_key="", LOG_LEVEL="z")
    assert {problem.split()[0] for problem in caught.value.problems} == {"PORT", "DTYPE", "LOG_LEVEL", "API_KEY"}
    assert len(str(caught.value).splitlines()) == 1 + len(caught.value.problems)
    assert all(problem in str(caught.value) for problem in caught.value.problems)


def test_settings_are_frozen_and_slotted() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().port = 1  # type: ignore[misc]
    assert not hasattr(Settings(), "__dict__")


# --- file and environment ----------------------------------------------------------------------------------------------------


def test_environment_wins_over_the_file(load: Load) -> None:
    settings = load("PORT=1\nHOST=127.0.0.1\n", PORT="2")
    assert (settings.port, settings.host) == (2, "127.0.0.1")


@pytest.mark.parametrize("blank", ["", "   "])
def test_blank_is_unset(load: Load, blank: str) -> None:
    assert load(f"PORT='{blank}'").port == 6008
    assert load("PORT=1", PORT=blank).port == 1


def test_missing_file_is_fine_and_none_is_looked_for_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.env").write_text("PORT=1\n")
    (tmp_path / "below").mkdir()
    monkeypatch.setenv("API_KEY", "k")
    monkeypatch.chdir(tmp_path / "below")
    assert load_settings().settings.port == 6008
    monkeypatch.chdir(tmp_path)
    assert load_settings().settings.port == 1


def test_file_with_a_byte_order_mark(load: Load) -> None:
    assert load("\ufeffPORT=1\n").port == 1


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_bytes(b"MODEL_NAME=\xff\n")])
def test_unreadable_file_is_one_clear_problem(tmp_path: Path, make: Callable[[Path], object]) -> None:
    file = tmp_path / "config.env"
    make(file)
    with pytest.raises(SettingsError, match=r"config\.env cannot be read: it is (a folder|not UTF-8 text)"):
        load_settings(file)


def test_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("app.settings.dotenv_values", refuse)
    with pytest.raises(SettingsError, match="cannot be read: Permission denied"):
        load_settings(tmp_path / "config.env")


# --- keys of others ----------------------------------------------------------------------------------------------------------


def test_foreign_keys_are_exported(load: Load) -> None:
    load("CUDA_VISIBLE_DEVICES=1\nHF_TOKEN=hf_x\nHF_ENDPOINT=\n")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert os.environ["HF_TOKEN"] == "hf_x"
    assert "HF_ENDPOINT" not in os.environ


def test_foreign_key_in_the_environment_stays_even_empty(load: Load) -> None:
    load("CUDA_VISIBLE_DEVICES=1\nHF_TOKEN=file\n", CUDA_VISIBLE_DEVICES="", HF_TOKEN="mine")
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["HF_TOKEN"]) == ("", "mine")


def test_our_keys_are_not_exported(load: Load) -> None:
    assert load("PORT=1\n").port == 1
    assert "PORT" not in os.environ


def test_nothing_is_exported_when_settings_are_wrong(load: Load) -> None:
    problems(load, "PORT=x\nHF_TOKEN=hf_x\n")
    assert "HF_TOKEN" not in os.environ


def test_export_is_in_time_for_torch() -> None:
    heavy = "{'torch', 'aiohttp', 'transformers', 'numpy'}"
    code = f"import sys, app.settings; sys.exit(str(sorted({heavy} & sys.modules.keys())) if {heavy} & sys.modules.keys() else 0)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_only_reader_of_the_environment() -> None:
    readers = set()
    for package in ("app", "scheduler", "models"):
        for file in (ROOT / package).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(file.read_text())))
            names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
            names |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
            if names & {"environ", "getenv", "environb"}:
                readers.add(file.relative_to(ROOT).as_posix())
    assert readers == {"app/settings.py", "app/process.py"}


def test_misspelt_key_is_a_warning_and_foreign_keys_are_none(load: Load) -> None:
    settings = load("MAX_BATCH_TOKEN=1\nport=2\nCUDA_VISIBLE_DEVICES=0\nHF_TOKEN=x\nOMP_NUM_THREADS=1\nTZ=UTC\n")
    assert [warning.split()[0] for warning in settings.warnings] == ["MAX_BATCH_TOKEN", "port"]
    assert "MAX_BATCH_TOKENS" in settings.warnings[0]
    assert settings.port == 6008


def test_misspelt_key_is_named_beside_the_problem_it_causes(load: Load) -> None:
    lines = problems(load, "API_KEYS=hidden\n", api_key="")
    assert any(line.startswith("API_KEYS is not a setting") for line in lines)
    assert "hidden" not in str(lines)


# --- API_KEY -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("k", [("key-1", "k")]),
        ("old, new,", [("key-1", "old"), ("key-2", "new")]),
        ("app:k1,k2,ops:k3,k4", [("app", "k1"), ("key-1", "k2"), ("ops", "k3"), ("key-2", "k4")]),
        ("app : a:b:c", [("app", "a:b:c")]),
        ("schlüssel", [("key-1", "schlüssel")]),
    ],
)
def test_api_key_list(load: Load, text: str, keys: list[tuple[str, str]]) -> None:
    assert load(api_key=text).api_keys == tuple(ApiKey(name, key.encode("utf-8")) for name, key in keys)


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("s3cret word", 1),
        ("ok,app:s3cret\tx", 2),
        ("s3cret\x07", 1),
        ("s3cret\u00a0x", 1),
        ("s3cret\udcff", 1),
        ("ok,app:", 2),
        (":s3cret", 1),
        ("na me:s3cret", 1),
        ("app:s3cret,app:s3cret2", 2),
        ("s3cret,key-1:s3cret2", 2),
    ],
)
def test_api_key_refused_without_a_word_of_it(load: Load, text: str, entry: int) -> None:
    [problem] = problems(load, api_key=text)
    assert problem.startswith("API_KEY must ")
    assert f"entry {entry}" in problem
    assert "s3cret" not in problem


@pytest.mark.parametrize("text", ["", " ", ",", " , "])
def test_no_api_key_stops_the_start_and_says_both_ways_out(load: Load, text: str) -> None:
    [problem] = problems(load, api_key=text)
    assert problem.startswith("API_KEY ")
    assert "AUTH_DISABLED=true" in problem


def test_no_api_key_with_auth_disabled(load: Load) -> None:
    settings = load(api_key="", AUTH_DISABLED="true")
    assert (settings.api_keys, settings.auth_disabled) == ((), True)


def test_keys_are_hidden_in_repr_and_names_are_not(load: Load) -> None:
    text = repr(load(api_key="app:s3cret,t0psecret").settings)
    assert "app" in text
    assert "key-2" not in text and "key-1" in text
    assert "s3cret" not in text and "t0psecret" not in text


# --- settings that follow from several keys ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "width", "height", "limits"),
    [
        ("", "", "", (512, 512)),
        ("256", "", "", (256, 256)),
        ("0", "", "", (0, 0)),
        ("", "1024", "", (1024, 512)),
        ("", "", "100", (512, 100)),
        ("", "0", "0", (0, 0)),
        ("", "0", "", (0, 512)),
        ("512", "1024", "100", (512, 100)),
        ("512", "0", "", (512, 512)),
        ("0", "1024", "", (1024, 0)),
        ("0", "0", "64", (0, 64)),
    ],
)
def test_image_limits(load: Load, size: str, width: str, height: str, limits: tuple[int, int]) -> None:
    settings = load(MAX_IMAGE_SIZE=size, MAX_IMAGE_WIDTH=width, MAX_IMAGE_HEIGHT=height)
    assert (settings.max_image_width, settings.max_image_height) == limits


@pytest.mark.parametrize(
    ("queue", "inputs", "effective"),
    [("100", "", 100), ("100", "200", 100), ("100", "100", None), ("", "8193", 8192), ("5000", "", None)],
)
def test_inputs_per_request_fit_the_queue(load: Load, queue: str, inputs: str, effective: int | None) -> None:
    settings = load(MAX_QUEUE_SIZE=queue, MAX_INPUTS_PER_REQUEST=inputs)
    assert settings.max_inputs_per_request == (effective or int(inputs or 2048))
    assert [warning.split()[0] for warning in settings.warnings] == (["MAX_INPUTS_PER_REQUEST"] if effective else [])


@pytest.mark.parametrize(
    ("path", "model_id", "may_download"),
    [
        ("", "", True),
        ("./models/Qwen3-VL-Embedding-2B", "", True),
        ("./models/Qwen3-VL-Embedding-2B/", "", True),
        ("/data/model", "", False),
        ("/data/model", "Qwen/Qwen3-VL-Embedding-2B", True),
    ],
)
def test_may_download(load: Load, path: str, model_id: str, may_download: bool) -> None:
    settings = load(MODEL_PATH=path, MODEL_ID=model_id)
    assert settings.may_download is may_download


@pytest.mark.parametrize(
    ("given", "spins", "parallel"),
    [
        ({}, "10000", "false"),
        ({"GOMP_SPINCOUNT": "5"}, "5", "false"),
        ({"OMP_WAIT_POLICY": "active"}, None, "false"),
        ({"TOKENIZERS_PARALLELISM": "true"}, "10000", "true"),
    ],
    ids=["nothing", "a count", "a policy", "tokenizers"],
)
def test_threads_are_tamed_unless_the_environment_says_how(
    given: dict[str, str], spins: str | None, parallel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "x")  # so that it is put back
        monkeypatch.delenv(name)
    for name, text in given.items():
        monkeypatch.setenv(name, text)
    tame_threads()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
    assert os.environ["TOKENIZERS_PARALLELISM"] == parallel
