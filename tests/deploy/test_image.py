"""deploy/Dockerfile and compose.yaml: what goes into the image is the service, and both agree with it and with each other."""

from __future__ import annotations

import configparser
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.http.server import ABANDON_GRACE_S
from app.settings import DEFAULTS, SETTINGS
from tests.support.hosts import process
from tests.support.paths import CHECKPOINT, ROOT
from tests.support.programs import run

pytestmark = pytest.mark.deploy

DEPLOY = ROOT / "deploy"
PACKAGES = ("app", "scheduler", "models")


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continued lines joined."""
    lines = (line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line.strip() and not line.startswith("#"))
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    found = [tuple(line.split(None, 1)) for line in joined.splitlines()]
    return [(name, arguments) for name, arguments in found]


def arguments_of(name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions() if instruction == name]


def environment() -> dict[str, str]:
    return dict(word.split("=", 1) for line in arguments_of("ENV") for word in shlex.split(line))


def copied() -> dict[str, str]:
    """What is copied from the project, by where it comes to lie in the folder of the build."""
    found = {}
    for line in arguments_of("COPY"):
        *sources, target = line.split()
        found.update({source: os.path.normpath(os.path.join(target, source) if target == "./" else target) for source in sources})
    return found


def ignored(path: str) -> bool:
    """As .dockerignore says: of the patterns that match a path, or a folder above it, the last one decides."""
    parents = [path, *map(str, Path(path).parents)][:-1]
    decision = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.lstrip("!")
        if pattern.startswith("**/"):
            matches = any(fnmatch.fnmatch(Path(parent).name, pattern[3:]) for parent in parents)
        else:
            matches = any(fnmatch.fnmatch(parent, pattern) and parent.count("/") == pattern.count("/") for parent in parents)
        if matches:
            decision = not line.startswith("!")
    return decision


def tracked(*folders: str) -> set[str]:
    listed = run("git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", *folders)
    return {line for line in listed.splitlines() if (ROOT / line).exists()}


def installed() -> set[str]:
    """The files of the packages, less their pages."""
    return {path for path in tracked(*PACKAGES) if not path.endswith("README.md")}


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the build as the Dockerfile fills it."""
    folder = tmp_path_factory.mktemp("build")
    for source, target in copied().items():
        files = [ROOT / source] if (ROOT / source).is_file() else [file for file in (ROOT / source).rglob("*") if file.is_file()]
        for file in files:
            inside = file.relative_to(ROOT).as_posix()
            if not ignored(inside):
                place = folder / target / file.relative_to(ROOT / source)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
    return folder


def test_what_is_copied_is_the_project_and_no_more(context: Path) -> None:
    files = {file.relative_to(context).as_posix() for file in context.rglob("*") if file.is_file()}
    assert files == installed() | {"setup.cfg", "pyproject.toml", "LICENSE", "README.md"}


@pytest.mark.parametrize(
    "path",
    [
        "config.env",
        "deploy/.env",
        ".git/config",
        "models/weights/model.safetensors",
        "models/bench-40m/tokenizer.json",
        ".venv/x",
    ],
)
def test_what_is_secret_or_large_does_not_reach_the_builder(path: str) -> None:
    assert ignored(path)


def test_the_patterns_are_read_as_docker_reads_them() -> None:
    assert not ignored("app/static/docs/docs.css") and not ignored("models/base.py") and not ignored("models/qwen3_vl/text.py")
    assert not ignored("README.md") and ignored("models/README.md") and ignored("app/bulk/README.md")
    assert ignored("app/__pycache__/x.pyc") and ignored("tests/conftest.py") and ignored("models/qwen3_vl/notes.txt")


def test_what_is_copied_is_enough_to_install_the_service(context: Path, tmp_path: Path) -> None:
    """By the wheel that pip builds of it, which has every file; it serves from there, its pages too."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(context))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "installed")
    assert names == installed()
    checkpoint = str(CHECKPOINT)
    with process("app", PYTHONPATH=str(tmp_path / "installed"), MODEL_PATH=checkpoint, DEVICE="cpu", **PYTHON) as running:
        running.until_status("ok")
        assert running.request("/v1/embeddings", {"input": "a"})[0] == 200
        run(
            sys.executable,
            "-c",
            f"import urllib.request as u; u.urlopen('http://127.0.0.1:{running.port()}/assets/docs/docs.js')",
        )
        running.popen.terminate()
        assert running.wait() == 0


# As the image sets them, less what is about its folders.
PYTHON = {name: text for name, text in environment().items() if name.startswith("PYTHON")}


def test_every_dependency_is_installed(tmp_path: Path) -> None:
    """The step that lists them, as it stands."""
    (step,) = (line for line in arguments_of("RUN") if "requirements.txt" in line)
    (listing,) = re.findall(r'python -c "[^"]+" > requirements\.txt', step)
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    run("sh", "-c", listing.replace("python", sys.executable, 1), cwd=tmp_path)
    project = configparser.ConfigParser()
    project.read(ROOT / "setup.cfg")
    listed = (tmp_path / "requirements.txt").read_text().split()
    # With those of `embed`, which the image's entry point offers as it does `serve`.
    assert listed == (project["options"]["install_requires"] + project["options.extras_require"]["bulk"]).split() != []


def test_the_steps_are_shell() -> None:
    for step in arguments_of("RUN"):
        run("sh", "-n", "-c", re.sub(r"^(--\S+\s+)+", "", step))


def test_the_image_is_what_it_says() -> None:
    names = [name for name, _ in instructions()]
    assert set(names) <= {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL",
                          "ENTRYPOINT", "CMD"}  # fmt: skip
    (user,) = arguments_of("USER")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user) and user.split(":")[0] in "".join(arguments_of("RUN"))
    assert arguments_of("STOPSIGNAL") == ["SIGTERM"]
    # Without a shell between it and the signal.
    assert [json.loads(line) for line in arguments_of("ENTRYPOINT") + arguments_of("CMD")] == [["python", "-m", "app"], ["serve"]]
    assert arguments_of("EXPOSE") == [environment()["PORT"]] == [str(DEFAULTS.port)]
    known = {"PYTHONSAFEPATH", "PYTHONDONTWRITEBYTECODE", "HOME", "TORCHINDUCTOR_CACHE_DIR", "NVIDIA_DRIVER_CAPABILITIES"}
    assert set(environment()) - known <= set(SETTINGS)
    assert re.search(r"^3\.\d+$", next(line for line in arguments_of("ARG") if "PYTHON" in line).partition("=")[2])
    # DEVICE is VARIANT, and both of its values are devices.
    assert environment()["DEVICE"] == "${VARIANT}"
    for variant in ("cpu", "cuda"):
        assert SETTINGS["DEVICE"].parse(variant) == variant
        assert re.search(rf"\b{variant}\) ", arguments_of("RUN")[0])


def test_no_secret_is_in_a_layer() -> None:
    text = " ".join(arguments_of("ENV") + arguments_of("ARG"))
    assert not re.search(r"KEY|TOKEN|PASSWORD|SECRET", text)


# The health check


def healthy(port: int) -> bool:
    """By the image's own command."""
    (line,) = arguments_of("HEALTHCHECK")
    command = json.loads(line.partition("CMD ")[2])
    done = subprocess.run(
        [sys.executable, *command[1:]], env={"PORT": str(port), "http_proxy": "http://127.0.0.1:9"}, timeout=120
    )
    return done.returncode == 0


def test_a_server_that_loads_is_healthy_and_one_that_is_not_there_is_not() -> None:
    with process(FAKE_LOAD_SECONDS="3600") as running:
        port = running.port()
        running.until_status("loading")
        assert healthy(port)
        running.popen.kill()
        running.wait()
        assert not healthy(port)


def test_a_server_that_is_ready_is_healthy() -> None:
    with process() as running:
        running.until_status("ok")
        assert healthy(running.port())


# Compose


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())
    return parsed


def seconds(text: str) -> float:
    assert re.fullmatch(r"\d+s", text)
    return float(text[:-1])


def test_every_setting_reaches_the_container() -> None:
    given = [entry.partition("=")[0] for entry in compose()["services"]["embedding"]["environment"]]
    assert len(given) == len(set(given))
    assert set(given) == set(SETTINGS) - {"HOST", "PORT", "DEVICE"} | {"HF_TOKEN", "HF_ENDPOINT"}


def test_the_container_is_what_the_image_is_made_for() -> None:
    service = compose()["services"]["embedding"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    assert seconds(service["stop_grace_period"]) > DEFAULTS.shutdown_timeout_s + ABANDON_GRACE_S
    assert [port.rsplit(":", 1)[1] for port in service["ports"]] == [environment()["PORT"]]
    folders = {volume.split(":")[1] for volume in service["volumes"]}
    # The weights' folder is in its volume, not the volume itself: a download is renamed into place.
    workdir = arguments_of("WORKDIR")[-1]
    assert folders == {environment()["HOME"], os.path.join(workdir, DEFAULTS.model_path.parts[0])}
    assert environment()["TORCHINDUCTOR_CACHE_DIR"].startswith(environment()["HOME"] + "/")
    assert all(folder in arguments_of("RUN")[1] for folder in folders), "the image makes them, for the user that it runs as"
    assert service["read_only"] and service["cap_drop"] == ["ALL"]


def test_the_gpu_is_one_file_more() -> None:
    service = compose("compose.gpu.yaml")["services"]["embedding"]
    assert service["build"]["args"]["VARIANT"] == "cuda" and service["image"] != compose()["services"]["embedding"]["image"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"] and len(device["device_ids"]) == 1


def test_what_is_published_stays_on_the_host_and_what_is_pulled_is_pinned() -> None:
    file = compose()
    for name, service in file["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["image"].startswith("embedding:") or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        assert set(service["networks"]) <= set(file["networks"])
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in file["volumes"] or (DEPLOY / source).exists(), volume
    assert "ports" not in file["services"]["prometheus"] and file["networks"]["monitoring"]["internal"]


def test_no_secret_is_in_the_file() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    assert '"API_KEY=${API_KEY:?' in text
    assert re.search(r'GF_SECURITY_ADMIN_PASSWORD: "\$\{GRAFANA_PASSWORD:\?', text)
