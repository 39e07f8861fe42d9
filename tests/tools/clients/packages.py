"""The packages that are tried, and where each lives: `make clients` puts every one into an environment of its own."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Package:
    """`name` is what pip calls it, its environment's folder, and its file in requirements/; `module` what its users import;
    `program` the file here that tries it; `tokenizer` says that it would download a file for tiktoken."""

    name: str
    module: str
    program: str
    tokenizer: bool = False

    @property
    def requirements(self) -> Path:
        return FOLDER / "requirements" / f"{self.name}.txt"

    def python(self, environments: Path) -> Path:
        return environments / self.name / "bin" / "python"

    def version(self, environments: Path) -> str:
        """What is installed. Raises CalledProcessError or FileNotFoundError where nothing is."""
        code = f"import importlib.metadata; print(importlib.metadata.version({self.name!r}))"
        command = [self.python(environments), "-c", code]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


PACKAGES = (
    Package("openai", "openai", "openai_client.py"),
    Package("langchain-openai", "langchain_openai", "langchain_client.py", tokenizer=True),
    Package("llama-index-embeddings-openai-like", "llama_index", "llamaindex_client.py"),
    Package("litellm", "litellm", "litellm_client.py"),
    Package("haystack-ai", "haystack", "haystack_client.py"),
)


def tokenizer_files(environments: Path) -> Path:
    """The folder in which litellm's wheel carries what tiktoken would download. Raises FileNotFoundError."""
    found = (environments / "litellm").glob("lib/python*/site-packages/litellm/litellm_core_utils/tokenizers")
    if (folder := next(found, None)) is None:
        raise FileNotFoundError(f"{environments / 'litellm'} holds no files for tiktoken")
    return folder
