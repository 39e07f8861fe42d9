"""Settings: read once from config.env and the environment, checked, frozen, and passed in.

It knows nothing of what the settings do: it imports neither torch nor aiohttp, so that what it exports (CUDA_VISIBLE_DEVICES and
the like) is in place before they are imported.
"""

# ruff: noqa: RUF009 - setting() is dataclasses.field() with its table row; it makes immutable defaults only.

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, TypeVar

from dotenv import dotenv_values
from environs import Env

T = TypeVar("T")
Default = TypeVar("Default")

DAY_S = 86_400.0
# A float32 vector of this width is 256 KiB: far beyond any embedding model, and still harmless.
WIDEST = 65_536
NO_UNITS = {"": 1}
BYTE_UNITS = {"": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
FLAGS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
LOG_LEVELS = {level.lower(): level for level in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")}
BACKENDS = {name: name for name in ("packed", "reference")}
COMPILE = {name: name for name in ("off", "auto")}
LOG_FORMATS = {name: name for name in ("text", "json")}
DTYPES = {name: name for name in ("auto", "float32", "bfloat16", "float16")}


class SettingsError(Exception):
    """The settings are wrong. `problems` has a line for each, which begins with its key and never holds a secret."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n  ".join(["The settings are wrong:", *problems]))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that opens the service. The name may be logged, the key never."""

    name: str
    key: bytes = field(repr=False)


# --- parsers: text -> value; the ValueError says what is wrong without repeating the text -----------------------------------


def integer(low: int, high: float = inf, units: Mapping[str, int] = NO_UNITS) -> Callable[[str], int]:
    """Makes a parser of digits, which `_` may group, then one of `units` in any case."""
    pattern = rf"([0-9][0-9_]{{0,17}})\s*({'|'.join(units)})"
    rule = f"must be a whole number, {low} or more" if high == inf else f"must be a whole number from {low} to {high}"
    rule += ", of bytes or with KiB, MiB or GiB" if units is BYTE_UNITS else ""

    def parse(text: str) -> int:
        match = re.fullmatch(pattern, text.lower())
        value = int(match[1].replace("_", "")) * units[match[2]] if match else -1
        if not low <= value <= high:
            raise ValueError(rule)
        return value

    return parse


def decimal(low: float, high: float) -> Callable[[str], float]:
    """Makes a parser of plain decimals: the pattern leaves out nan, inf and exponents."""

    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]*\.?[0-9]+", text) or not low <= float(text) <= high:
            raise ValueError(f"must be a number from {low:g} to {high:g}")
        return float(text)

    return parse


def one_of(choices: Mapping[str, T]) -> Callable[[str], T]:
    """Makes a parser of one of the keys, which are lower-case, in any case."""

    def parse(text: str) -> T:
        if text.lower() not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return choices[text.lower()]

    return parse


def matching(pattern: str, rule: str) -> Callable[[str], str]:
    """Makes a parser of text that matches a pattern; `rule` says what is wrong with any other."""

    def parse(text: str) -> str:
        if not text.isprintable() or not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError(rule)
        return text

    return parse


def or_word(word: str, parse: Callable[[str], T]) -> Callable[[str], T | None]:
    """Makes a parser of what `parse` reads, or of the word, which stands for None."""

    def parse_or_word(text: str) -> T | None:
        if text.lower() == word:
            return None
        try:
            return parse(text)
        except ValueError as error:
            raise ValueError(f"{error}, or {word}") from None

    return parse_or_word


def list_of(parse: Callable[[str], str]) -> Callable[[str], tuple[str, ...]]:
    """Makes a parser of a comma-separated list, lower-cased; empty entries, such as a last comma leaves, are dropped."""
    return lambda text: tuple(parse(entry) for part in text.lower().split(",") if (entry := part.strip()))


def read_host(text: str) -> str:
    """Reads one host of IMAGE_URL_ALLOWED_HOSTS."""
    match = re.fullmatch(r"(?:\[[0-9a-f:.]+\]|[a-z0-9_][a-z0-9_.-]*)(?::([0-9]{1,5}))?", text)
    if match is None or not 1 <= int(match[1] or 1) <= 65_535:
        raise ValueError("must be hosts, each as host, host:port, [IPv6] or [IPv6]:port")
    return text


def read_hosts(text: str) -> frozenset[str]:
    """Reads IMAGE_URL_ALLOWED_HOSTS."""
    return frozenset(list_of(read_host)(text))


def read_api_keys(text: str) -> tuple[ApiKey, ...]:
    """Reads API_KEY: `name:key` or `key`, comma-separated. An entry is split at its first `:`, so a key that holds one needs a
    name before it.

    Entries without a name are called key-1, key-2 and so on.
    """
    keys: dict[str, ApiKey] = {}
    unnamed = 0
    for position, entry in enumerate(filter(None, map(str.strip, text.split(","))), start=1):
        name, colon, key = (part.strip() for part in entry.partition(":"))
        if not colon:
            unnamed += 1
            name, key = f"key-{unnamed}", name
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
            raise ValueError(f"must name entry {position} with letters, digits, _ . and - only (an entry is name:key or key)")
        # No Authorization header can carry white space or controls; bytes that are not UTF-8 are not printable either.
        if not key or not key.isprintable() or " " in key:
            raise ValueError(f"must have in entry {position} a key without white space or control characters")
        if name in keys:
            raise ValueError(f"must have a name of its own in entry {position}: this one is taken")
        keys[name] = ApiKey(name, key.encode())
    return tuple(keys.values())


@dataclass(frozen=True, slots=True)
class SettingSpec:
    """A row of the table: `parse` reads a key's text for `field` of Settings, whose default is `default`."""

    field: str
    default: Any
    parse: Callable[[str], Any]
    help: str


def setting(default: Default, parse: Callable[[str], T], help: str, key: str = "") -> Default | T:
    """Declares a field of Settings that a key sets. The key is the field's name in capitals unless given."""
    made: Default = field(default=default, metadata={"parse": parse, "help": help, "key": key})
    return made


SECONDS = decimal(0.001, DAY_S)
IMAGE_SIDE = integer(0, 1_000_000)
FLAG = one_of(FLAGS)
DIMENSION = or_word("native", integer(1, WIDEST))
BYTES = integer(1, units=BYTE_UNITS)
DEVICE = matching(r"auto|cpu|cuda(:[0-9]{1,3})?", "must be cuda, cuda:N, cpu or auto")
REPO_ID = matching(r"[\w][\w.-]*(/[\w][\w.-]*)?", "must be the id of a model, as owner/name")
ORIGIN = matching(r"\*|[a-z][a-z0-9+.-]*://[^\s/@?#]+", "must be origins, each as scheme://host[:port] without a path, or *")
NAME = matching(r".+", "must be printable text")


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting, typed and within range. Settings() has the defaults; load_settings() is how the service gets its own."""

    api_keys: tuple[ApiKey, ...] = setting((), read_api_keys, "keys, comma-separated, each as name:key or key", key="API_KEY")
    port: int = setting(6008, integer(0, 65_535), "port to listen on; 0 picks a free one")
    model_name: str = setting("Qwen3-VL-Embedding-2B", NAME, "name of the model in requests and replies")
    model_path: Path = setting(Path("models/Qwen3-VL-Embedding-2B"), Path, "folder of the checkpoint")
    device: str = setting("cuda", DEVICE, "cuda, cuda:N, cpu, or auto")
    embedding_dimension: int | None = setting(2560, DIMENSION, "components of a vector; native: the model's")
    max_image_width: int = setting(512, IMAGE_SIDE, "pixels; a smaller MAX_IMAGE_SIZE that is set wins; 0 is no limit")
    max_image_height: int = setting(512, IMAGE_SIDE, "pixels; a smaller MAX_IMAGE_SIZE that is set wins; 0 is no limit")
    log_level: str = setting("INFO", one_of(LOG_LEVELS), "DEBUG, INFO, WARNING, ERROR or CRITICAL")
    log_format: str = setting("text", one_of(LOG_FORMATS), "text: a line for people; json: an object on each line")

    host: str = setting("0.0.0.0", matching(r"[^\s/]+", "must be a host or an address"), "address to listen on")
    auth_disabled: bool = setting(False, FLAG, "true: serve everyone who reaches the port, without a key")
    model_id: str = setting("Qwen/Qwen3-VL-Embedding-2B", REPO_ID, "the model's id on the Hugging Face Hub")
    dtype: str = setting("auto", one_of(DTYPES), "auto, float32, bfloat16 or float16")
    backend: str = setting("packed", one_of(BACKENDS), "packed, or reference: the stock padded forward, as the oracle")
    compile: str = setting("auto", one_of(COMPILE), "auto: compile layers and capture graphs in the warm-up, on CUDA; or off")
    max_batch_size: int = setting(256, integer(1), "inputs in a batch, at most")
    max_batch_tokens: int | None = setting(None, or_word("auto", integer(1)), "tokens in a batch; auto: 8192, on a CPU by rate")
    max_batch_wait_ms: float = setting(0.0, decimal(0, 60_000), "milliseconds that an input may wait for others to fill a batch")
    max_queue_size: int = setting(8192, integer(1), "inputs waiting; beyond it requests get 429")
    vector_cache_mb: int = setting(0, integer(0), "MiB of memory for the vectors of recent inputs; 0 keeps none")
    max_inputs_per_request: int = setting(2048, integer(1), "inputs in a request; at most MAX_QUEUE_SIZE")
    max_input_tokens: int = setting(8192, integer(1), "tokens of an input, the prompt's template included")
    max_request_bytes: int = setting(32 << 20, BYTES, "size of a request's body")
    max_bytes_in_flight: int = setting(4 << 30, BYTES, "memory for requests under way, their bodies and prepared inputs")
    max_image_bytes: int = setting(20 << 20, BYTES, "size of an image as it is sent or fetched")
    max_image_pixels: int = setting(50_000_000, integer(1), "pixels of an image before it is resized")
    image_fetch_timeout_s: float = setting(10.0, SECONDS, "seconds for the download of an image URL")
    image_url_allowed_hosts: frozenset[str] = setting(frozenset(), read_hosts, "hosts that may be fetched from though not public")
    request_timeout_s: float = setting(60.0, SECONDS, "seconds until a request that the device has not taken gets 504")
    header_timeout_s: float = setting(15.0, SECONDS, "seconds for a request's headers to arrive")
    body_timeout_s: float = setting(30.0, SECONDS, "seconds for a request's body to arrive")
    shutdown_timeout_s: float = setting(75.0, SECONDS, "seconds that a shutdown waits for accepted work")
    drain_grace_s: float = setting(0.0, decimal(0, DAY_S), "seconds to go on listening, answering 503, once a shutdown has begun")
    worker_stall_s: float | None = setting(None, or_word("auto", SECONDS), "seconds without progress that make the device failed")
    cors_origins: tuple[str, ...] = setting((), list_of(ORIGIN), "origins of web pages that may call the service; * is every one")
    playground: bool = setting(True, FLAG, "false: no page at /, which lets people try the service and watch it")
    allow_pickle: bool = setting(False, FLAG, "true: load checkpoints in pickle format, which can run code")


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings as they were read. `warnings` are for the log; `may_download`: a checkpoint is only ever downloaded to a folder
    that was meant for it."""

    settings: Settings
    warnings: tuple[str, ...]
    may_download: bool


DEFAULTS = Settings()
SETTINGS: Mapping[str, SettingSpec] = {
    # Has no field of its own: it bounds both sides.
    "MAX_IMAGE_SIZE": SettingSpec("", 512, IMAGE_SIDE, "pixels, of either side of an image; 0 is no limit"),
    **{
        row.metadata["key"] or row.name.upper(): SettingSpec(row.name, row.default, row.metadata["parse"], row.metadata["help"])
        for row in fields(Settings)
    },
}


def load_settings(config_file: Path = Path("config.env"), need_key: bool = True) -> Loaded:
    """Reads the file, if there is one, and the environment, which wins; a blank value in either is none.

    What the file sets beyond our keys is exported, unless the environment has it. `need_key` is false for what serves nobody.
    Raises SettingsError with all that is wrong.
    """
    from_file = read_file(config_file)
    environment = Env()
    values, problems = parse({key: environment.str(key, "").strip() or from_file.get(key, "").strip() for key in SETTINGS})
    if need_key and not values.get("API_KEY") and not values.get("AUTH_DISABLED"):
        problems.setdefault("API_KEY", "must hold a key, or set AUTH_DISABLED=true to serve everyone without one")
    foreign = {key: text for key, text in from_file.items() if key not in SETTINGS and text.strip()}
    warnings = misspelt(foreign)
    if problems:
        raise SettingsError([f"{key} {problem}" for key, problem in problems.items()] + warnings)
    for key, text in foreign.items():
        os.environ.setdefault(key, text)
    return resolve(values, warnings)


def read_file(config_file: Path) -> dict[str, str]:
    """Reads a file's keys; a key without a value is none. Raises SettingsError."""
    try:
        if config_file.is_dir():
            raise IsADirectoryError
        return {key: text for key, text in dotenv_values(config_file).items() if text is not None}
    except (OSError, ValueError) as error:
        is_folder = isinstance(error, IsADirectoryError)
        reason = "it is a folder" if is_folder else getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise SettingsError([f"{config_file} cannot be read: {reason}"]) from None


def parse(given: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the values of the keys that are set, and by key what is wrong with the rest."""
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for key, text in given.items():
        if not text:
            continue
        try:
            values[key] = SETTINGS[key].parse(text)
        except ValueError as error:
            problems[key] = str(error) if key == "API_KEY" else f"{error}, not {text!r}"
    return values, problems


def misspelt(keys: Iterable[str]) -> list[str]:
    """Warns of every key that is nearly one of ours: else a slip of the pen would go unnoticed."""
    near = ((key, difflib.get_close_matches(key.upper(), SETTINGS, n=1, cutoff=0.85)) for key in keys)
    return [f"{key} is not a setting of this service; did you mean {match[0]}?" for key, match in near if match]


def resolve(values: dict[str, Any], warnings: list[str]) -> Loaded:
    """Makes settings of the values, and what follows from several of them at once."""
    queue_size = values.get("MAX_QUEUE_SIZE", DEFAULTS.max_queue_size)
    inputs = values.get("MAX_INPUTS_PER_REQUEST", DEFAULTS.max_inputs_per_request)
    if inputs > queue_size:
        warnings = [*warnings, f"MAX_INPUTS_PER_REQUEST is lowered from {inputs} to {queue_size}, the size of MAX_QUEUE_SIZE"]
    chosen = {SETTINGS[key].field: value for key, value in values.items() if SETTINGS[key].field}
    side = values.get("MAX_IMAGE_SIZE")
    chosen |= {
        "max_image_width": image_limit(values.get("MAX_IMAGE_WIDTH"), side),
        "max_image_height": image_limit(values.get("MAX_IMAGE_HEIGHT"), side),
        "max_inputs_per_request": min(inputs, queue_size),
    }
    settings = Settings(**chosen)
    may_download = settings.model_path == DEFAULTS.model_path or "MODEL_ID" in values
    return Loaded(settings, tuple(warnings), may_download)


def image_limit(side: int | None, size: int | None) -> int:
    """Returns the smaller of those that are set; 0, in and out, is no limit."""
    if side is None and size is None:
        return SETTINGS["MAX_IMAGE_SIZE"].default  # type: ignore[no-any-return]
    return min(filter(None, (side, size)), default=0)
