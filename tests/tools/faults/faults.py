"""The faults of faults.txt: each is a change of a line or two that a tired person could make, in the form of a diff."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

LIST = Path(__file__).with_name("faults.txt")


@dataclass(frozen=True, slots=True)
class Fault:
    """The lines `before`, which stand in `file` once, become the lines `after`. `what` says what is wrong then."""

    file: str
    what: str
    before: str
    after: str

    def put_into(self, folder: Path) -> None:
        """Puts the fault into the tree in a folder. Raises ValueError if the code has changed under it."""
        path = folder / self.file
        text = "\n" + path.read_text()
        if text.count(self.before) != 1:
            raise ValueError(f"{self.file} has {text.count(self.before)} times:{self.before}")
        path.write_text(text.replace(self.before, self.after)[1:])


def read_faults(text: str) -> list[Fault]:
    """Reads blocks of `FILE: WHAT` with lines that begin with - and +, a blank line between blocks."""
    faults = []
    for block in filter(str.strip, re.split(r"\n\n+(?=\S+: )", text.strip())):
        head, *lines = block.splitlines()
        file, _, what = head.partition(": ")
        old, new = (["", *(line[1:] for line in lines if line.startswith(sign)), ""] for sign in "-+")
        faults.append(Fault(file, what, "\n".join(old), "\n".join(new)))
    return faults


FAULTS = read_faults(LIST.read_text())
