"""make clients: the packages that people use, each in its own environment, against servers started here; then their table.

    python -m tests.tools.clients [--only NAME ...] [--environments FOLDER]

Every client's vectors are compared with the server's own reply to the same request by plain HTTP, every error with its message;
the README's examples are run as they stand. Exits with 1 where anything fails.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.docs.pages import PAGES, SNIPPETS
from tests.support.paths import ROOT
from tests.tools.clients import isolation
from tests.tools.clients.isolation import Outside
from tests.tools.clients.judge import Verdict, judge
from tests.tools.clients.packages import FOLDER, PACKAGES, Package, tokenizer_files
from tests.tools.clients.site import Site, site

PROGRAM_S = 300
# Without these two packages would call home; the README names them.
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HAYSTACK_TELEMETRY_ENABLED": "False"}


@dataclass(frozen=True, slots=True)
class Result:
    package: Package
    version: str
    verdicts: tuple[Verdict, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.clients", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [package.name for package in PACKAGES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="one of " + ", ".join(names))
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-clients", help="where `make clients` puts them")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        ended = isolation.enter(["--environments", str(options.environments.resolve()), "--only", *options.only])
        if ended is not None:
            return ended
        print("no network namespace is to be had: what native code dials is not seen")
    chosen = [package for package in PACKAGES if package.name in options.only]
    with tempfile.TemporaryDirectory() as folder, isolation.outside(options.inside) as outside:
        results = list(run(chosen, options.environments.resolve(), Path(folder), outside))
    print_table(results)
    return 0 if results and all(result.passed for result in results) else 1


def run(chosen: list[Package], environments: Path, folder: Path, outside: Outside) -> Iterator[Result]:
    """Try one package after the other, and print each verdict as it falls."""
    outside.prove(folder)
    with site() as running:
        for package in chosen:
            started = time.monotonic()
            print(f"\n{package.name}", flush=True)
            verdicts = []
            try:
                version = package.version(environments)
                for verdict in tried(package, environments, folder / package.name, running, outside):
                    print(f"  {'pass' if verdict.passed else 'FAIL'}  {verdict.tried}: {verdict.figure}", flush=True)
                    verdicts.append(verdict)
            except (OSError, subprocess.SubprocessError) as error:
                version = "–"
                verdicts.append(Verdict("its environment", False, f"{error}: `make clients` makes it"))
                print(f"  FAIL  {verdicts[-1].tried}: {verdicts[-1].figure}")
            yield Result(package, version, tuple(verdicts), time.monotonic() - started)


def tried(package: Package, environments: Path, folder: Path, running: Site, outside: Outside) -> Iterator[Verdict]:
    """The verdicts on a package's program, on its examples in the README, and on what they dialled."""
    folder.mkdir()
    trials, dialled = folder / "trials", folder / "dialled"
    environment = {
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "TRIALS": str(trials),
        "DIALLED": str(dialled),
        **QUIET,
        **running.variables,
    }
    if package.tokenizer:  # a copy: tiktoken removes what it takes for broken
        environment["TIKTOKEN_CACHE_DIR"] = str(shutil.copytree(tokenizer_files(environments), folder / "tokenizers"))

    def execute(program: Path) -> subprocess.CompletedProcess[str]:
        command = [package.python(environments), "-m", "tests.tools.clients.guard", str(program)]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PROGRAM_S)

    ran = execute(FOLDER / package.program)
    records = [json.loads(line) for line in trials.read_text().splitlines()] if trials.exists() else []
    yield from map(judge, records)
    if ran.returncode or not records:
        yield Verdict("its program runs to its end", False, f"ended with {ran.returncode}: {(ran.stdout + ran.stderr)[-4000:]}")
    for index, snippet in enumerate(snippets(package)):
        program = folder / f"readme_{index}.py"
        program.write_text(snippet, encoding="utf-8")
        ran = execute(program)
        shown = ran.stdout.strip()
        passed = ran.returncode == 0 and shown != ""
        yield Verdict("the README's example", passed, shown.splitlines()[-1] if passed else (ran.stdout + ran.stderr)[-4000:])
    found = outside.dialled(dialled)
    yield Verdict("nobody else is dialled", not found, ", ".join(found) or "nobody")


def snippets(package: Package) -> list[str]:
    """The README's examples that import a package and are run nowhere else."""
    imports = re.compile(rf"^(?:from|import) {package.module}\b", re.MULTILINE)
    blocks = dict.fromkeys(block for page in PAGES for block in page.blocks())
    return [text for language, text in blocks if language in SNIPPETS and imports.search(text)]


def print_table(results: list[Result]) -> None:
    print("\n| package | version | what was tried | passed | seconds |\n|---|---|---|---|---|")
    for result in results:
        what = "; ".join(verdict.tried for verdict in result.verdicts)
        passed = sum(verdict.passed for verdict in result.verdicts)
        outcome = f"{passed} of {len(result.verdicts)}: {'pass' if result.passed else 'FAIL'}"
        print(f"| {result.package.name} | {result.version} | {what} | {outcome} | {result.seconds:.0f} |")


if __name__ == "__main__":
    sys.exit(main())
