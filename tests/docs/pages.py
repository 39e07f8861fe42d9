"""The pages, and what a test reads of them: fences, tables, headings, links.

`PAGES` has every page with the headings of its tables that the code decides; `TRANSLATED` has every heading of the Chinese page
with the section that it translates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from tests.support.paths import ROOT

RUN = {"bash", "python"}
# Configuration, replies, and commands that start or install something: not meant to be run here.
SHOWN = {"console", "yaml", "json", "text"}
# Run by `make clients`, each in the environment of the package that it imports: see tests/tools/clients/.
SNIPPETS = {"py"}


@dataclass(frozen=True)
class Page:
    """A page: `path` is from the root, `tables` has the heading under which each table stands."""

    path: str
    tables: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return (ROOT / self.path).read_text(encoding="utf-8")

    def blocks(self) -> list[tuple[str, str]]:
        """(language, content) of every fence, in order; one inside a list loses its indent."""
        return fences(self.text)

    def prose(self) -> str:
        """The page without its fences."""
        return re.sub(r"^( *)```.*?^\1```$", "", self.text, flags=re.MULTILINE | re.DOTALL)

    def headings(self) -> list[str]:
        return re.findall(r"(?m)^#+ (.+)$", self.prose())

    def section(self, heading: str) -> str:
        """The text between a heading and the next of any level."""
        start = re.search(rf"^#+ {re.escape(heading)}$", self.text, re.MULTILINE)
        assert start, f"{self.path} has no heading {heading!r}"
        rest, depth = [], 0
        for line in self.text[start.end() :].splitlines():
            depth ^= line.lstrip().startswith("```")
            if not depth and re.match(r"#+ ", line):
                break
            rest.append(line)
        return "\n".join(rest) + "\n"

    def table(self, name: str) -> list[list[str]]:
        """The cells of a table that `tables` names."""
        return rows(self.section(self.tables[name]))


def fences(text: str) -> list[tuple[str, str]]:
    """(language, content) of every fence of a text."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [(language, re.sub(rf"(?m)^{indent}", "", content)) for indent, language, content in found]


def rows(section: str) -> list[list[str]]:
    """The cells of every table row of a section; heads, rules and the names of groups are left out."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    heads = {index - 1 for index, line in enumerate(lines) if set(line) <= set("|-: ")}
    kept = [line for index, line in enumerate(lines) if index not in heads and index - 1 not in heads]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in kept]
    return [row for row in cells if any(row[1:])]


def bare(cell: str) -> str:
    """What a cell holds; a dash is nothing."""
    return "" if cell == "–" else cell.strip("`")


CHINESE = Page(
    "README.zh-CN.md",
    {"settings": "配置项", "routes": "路由", "request": "请求", "errors": "错误", "metrics": "指标", "exit codes": "退出码"},
)
PAGES = (
    Page("README.md"),
    CHINESE,
    Page(
        "app/README.md",
        {"routes": "Routes", "request": "Request", "errors": "Errors", "metrics": "Metrics", "clients": "Clients"},
    ),
    Page("app/bulk/README.md", {"endings": "Stopping and resuming"}),
    Page("deploy/README.md", {"settings": "Settings", "exit codes": "Exit codes"}),
    Page("models/README.md"),
    Page("tests/README.md"),
    Page("tests/tools/load/README.md"),
)
BY_PATH = {page.path: page for page in PAGES}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path)

TRANSLATED = {
    "Qwen3-VL-Embedding 向量服务": ("README.md", "Qwen3-VL-Embedding server"),
    "启动": ("README.md", "Start"),
    "网页": ("README.md", "The page"),
    "示例": ("README.md", "Examples"),
    "代码": ("README.md", "The code"),
    "更多文档": ("README.md", "Read on"),
    "许可证": ("README.md", "Licence"),
    "配置项": ("deploy/README.md", "Settings"),
    "API": ("app/README.md", "The HTTP API"),
    "路由": ("app/README.md", "Routes"),
    "请求": ("app/README.md", "Request"),
    "响应": ("app/README.md", "Reply"),
    "HTTP 头": ("app/README.md", "Headers"),
    "错误": ("app/README.md", "Errors"),
    "指标": ("app/README.md", "Metrics"),
    "部署": ("deploy/README.md", "Running the service"),
    "systemd": ("deploy/README.md", "systemd"),
    "退出码": ("deploy/README.md", "Exit codes"),
    "nginx": ("deploy/README.md", "nginx"),
    "Docker": ("deploy/README.md", "Docker"),
    "选择 GPU": ("deploy/README.md", "Which GPU"),
    "没有 GPU": ("deploy/README.md", "Without a GPU"),
    "探针": ("deploy/README.md", "Probes"),
    "Prometheus 与 Grafana": ("deploy/README.md", "Prometheus and Grafana"),
    "多副本": ("deploy/README.md", "Several replicas"),
    "内存": ("deploy/README.md", "Memory"),
    "安全": ("deploy/README.md", "Security"),
    "排查问题": ("deploy/README.md", "Troubleshooting"),
    "连不上 hub": ("deploy/README.md", "The hub cannot be reached"),
}


def pages_with(table: str) -> list[Page]:
    """The pages that have a table."""
    return [page for page in PAGES if table in page.tables]


def each_page_with(table: str) -> pytest.MarkDecorator:
    """Runs a test for each page that has the table."""
    return pytest.mark.parametrize("page", pages_with(table), ids=lambda page: page.path)
