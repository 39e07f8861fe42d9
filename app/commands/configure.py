"""`python -m app configure`: config.env from the example, with an API key of its own. An existing one is left alone."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path


def configure(example: Path = Path("config.env.example"), target: Path = Path("config.env")) -> int:
    """Writes `target` if there is none, readable by its owner alone, and prints the new key this once."""
    if target.exists():
        return 0
    key = f"sk-{secrets.token_urlsafe(32)}"
    text, count = re.subn(r"(?m)^API_KEY=.*$", lambda _: f"API_KEY={key}", example.read_text())
    if count != 1:
        raise ValueError(f"{example} has {count} lines that set API_KEY, not 1")
    with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    print(f"{target} is written. Its API key, shown this once:\n\n    {key}\n", flush=True)
    return 0
