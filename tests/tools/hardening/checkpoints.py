"""Checks of checkpoints that no model can be loaded from: each ends the process, with a line that says what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from tests.tools.hardening.board import CHECKPOINT, Outcome, Site, check
from tests.tools.hardening.callers import Callers
from tests.tools.hardening.life import complaints

WEIGHTS = "model.safetensors"
# More at a time would only take each other's cores.
AT_ONCE = 2


def without_the_check_of_weights() -> None:
    """without the check that every weight is there and has its shape: what is missing is random."""
    from models.qwen3_vl import model

    def load_pretrained(kind: Any, path: Path, dtype: Any, allow_pickle: bool) -> Any:
        return kind.from_pretrained(path, dtype=dtype, local_files_only=True, ignore_mismatched_sizes=True)

    model.load_pretrained = load_pretrained


def without_the_clear_line() -> None:
    """without the line in place of a traceback."""
    from app import main
    from app.engine import loading
    from app.lifecycle import ExitCode, Lifecycle

    def end_on_failure(lifecycle: Lifecycle, error: BaseException, loaded: bool) -> None:
        loading.log.critical("the model cannot be loaded", exc_info=error)
        lifecycle.end(ExitCode.START_FAILED)

    main.end_on_failure = end_on_failure


def without_the_end_of_a_start() -> None:
    """without the end of a process that cannot load its model."""
    from app import main

    main.end_on_failure = lambda lifecycle, error, loaded: None


@dataclass(frozen=True, slots=True)
class Broken:
    """A whole checkpoint is spoilt; the server's line has to have the word. `quick` ones are seen by `make test` too."""

    kind: str
    spoil: Callable[[Path], object]
    word: str
    quick: bool = False


def set_in_config(path: Path, part: str, name: str, value: object) -> None:
    config = json.loads((path / "config.json").read_bytes())
    (config[part] if part else config)[name] = value
    (path / "config.json").write_text(json.dumps(config))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def leave_out_a_tensor(path: Path) -> None:
    tensors = load_file(path / WEIGHTS)
    del tensors[sorted(tensors)[len(tensors) // 2]]
    save_file(tensors, path / WEIGHTS, {"format": "pt"})


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


BROKEN = (
    Broken("no config.json", lambda path: (path / "config.json").unlink(), "config.json", quick=True),
    Broken("weights cut off", lambda path: cut(path / WEIGHTS), WEIGHTS, quick=True),
    Broken("a weight missing", leave_out_a_tensor, "weights are missing", quick=True),
    Broken("pickled weights", lambda path: (path / WEIGHTS).rename(path / "pytorch_model.bin"), "ALLOW_PICKLE", quick=True),
    Broken("another family", lambda path: set_in_config(path, "", "model_type", "t5"), "'t5'", quick=True),
    Broken("other shapes", lambda path: set_in_config(path, "text_config", "intermediate_size", 96), "of another shape"),
    Broken("no tokenizer", lambda path: (path / "tokenizer.json").unlink(), "tokenizer"),
    Broken("an LFS pointer", lambda path: (path / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"), "git-LFS"),
    Broken("config.json cut off", lambda path: cut(path / "config.json"), "config.json"),
    Broken("nothing in the folder", empty, "no model"),
)


@check(
    "broken checkpoints",
    f"{len(BROKEN)} kinds",
    "exit 1, never ready, exactly one line that names the fault, no traceback",
    without_the_check_of_weights,
    without_the_clear_line,
    without_the_end_of_a_start,
)
def broken_checkpoints(site: Site) -> Outcome:
    kinds = [broken for broken in BROKEN if broken.quick or not site.quick]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(lambda broken: fault_of(site, broken), kinds))
    bad = [f"{broken.kind}: {fault}" for broken, fault in zip(kinds, found, strict=True) if fault]
    return Outcome(not bad, "; ".join([f"{len(kinds) - len(bad)} of {len(kinds)} end with 1 and their line", *bad]))


def fault_of(site: Site, broken: Broken) -> str:
    """What the server does wrong with it; empty where it does what it should."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        shutil.copytree(CHECKPOINT, path)
        broken.spoil(path)
        with site.own("app", MODEL_PATH=str(path)) as server:
            limit = site.seconds(30)
            statuses = asyncio.run(_statuses(server.port(limit), lambda: server.popen.poll() is not None, limit))
            lines = complaints(server)
            if "ok" in statuses:
                return "ready"
            if server.popen.poll() != 1:
                return f"exit {server.popen.poll()}, said to be {', '.join(sorted(statuses))}"
            if "Traceback" in server.stderr:
                return "a traceback"
            if len(lines) != 1:
                return f"{len(lines)} lines that complain"
            return "" if broken.word in lines[0] else f"does not name it: {lines[0]}"


async def _statuses(port: int, is_over: Callable[[], bool], seconds: float) -> set[str]:
    """What /health says: until the end, until it is ready, for so many seconds, or for a tenth of them from "failed" on."""
    seen: set[str] = set()
    ask_until = time.monotonic() + seconds
    async with Callers(port) as callers:
        while not is_over() and "ok" not in seen and time.monotonic() < ask_until:
            with contextlib.suppress(OSError):
                if (status := await callers.status()) == "failed" and status not in seen:
                    ask_until = time.monotonic() + seconds / 10
                seen.add(status)
            await asyncio.sleep(0.1)
    return seen
