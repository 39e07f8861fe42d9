"""The extra `bulk`: without it `embed` ends with one line, and the server starts."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.bulk import extra
from tests.support.hosts import process
from tests.support.paths import CHECKPOINT, ROOT


def path_without(libraries: tuple[str, ...], folder: Path) -> str:
    """Return a PYTHONPATH with which importing each library fails as if it were not installed."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({libraries}))\n")
    return f"{folder}{os.pathsep}{ROOT}"


@pytest.mark.parametrize("missing", [("pyarrow",), ("tqdm",), ("pyarrow", "tqdm")], ids=" and ".join)
def test_extra_that_is_missing_is_named_in_one_line(missing: tuple[str, ...], tmp_path: Path) -> None:
    """It comes before anything else is checked: the input is missing, and the settings are wrong."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": path_without(missing, tmp_path), "PORT": "none"}
    command = [sys.executable, "-m", "app", "embed", "none.jsonl", "out.npy"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"python -m app embed needs {' and '.join(missing)}: pip install '.[bulk]'\n"


def test_extra_that_is_missing_does_not_keep_the_server_from_serving(tmp_path: Path) -> None:
    """tqdm is there, since huggingface_hub and transformers depend on it."""
    environment = {"PYTHONPATH": path_without(("pyarrow",), tmp_path), "MODEL_PATH": str(CHECKPOINT), "DEVICE": "cpu"}
    with process("app", fresh=True, **environment) as running:
        running.until_status("ok")
        assert running.request("/v1/embeddings", {"input": "a"})[0] == 200


def test_extra_has_what_is_looked_for_and_nothing_that_the_server_needs() -> None:
    project = configparser.ConfigParser()
    project.read(ROOT / "setup.cfg")
    extras = project["options.extras_require"]

    def names(requirements: str) -> set[str]:
        return {re.split(r"[<>=~!]", line)[0] for line in requirements.split()}

    assert names(extras["bulk"]) == set(extra.LIBRARIES)
    assert not names(project["options"]["install_requires"]) & set(extra.LIBRARIES)
    assert f"{project['metadata']['name']}[bulk]" in extras["test"].split()
