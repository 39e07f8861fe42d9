"""The tables of the pages against the code: settings, routes, fields, errors, metrics, exit codes."""

from __future__ import annotations

import re
import signal
from typing import Any

from prometheus_client.metrics import MetricWrapperBase

from app.bulk.ending import Ending
from app.dialects.contract import Failure
from app.dialects.openai import FIELDS, error_detail
from app.dialects.registry import DIALECTS
from app.engine.metrics import Metrics
from app.errors import TABLE
from app.http.routes import routes
from app.lifecycle import ExitCode
from app.settings import SETTINGS
from models.base import EmbeddingModel, Preparer
from tests.conftest import Client
from tests.docs.pages import BY_PATH, Page, bare, each_page_with, pages_with
from tests.support.paths import ROOT

YES = {"yes": True, "no": False, "是": True, "否": False}
KINDS = {"计数器": "counter", "直方图": "histogram", "瞬时值": "gauge"}


def default_of(key: str, cell: str) -> object:
    """The value that a default in the table stands for; one that names another setting follows it."""
    return SETTINGS[cell].default if cell in SETTINGS else SETTINGS[key].parse(cell)


def test_tables_stand_in_one_english_page_each() -> None:
    for name in ("settings", "routes", "request", "errors", "metrics", "clients", "endings", "exit codes"):
        assert len([page for page in pages_with(name) if "zh" not in page.path]) == 1


@each_page_with("settings")
def test_settings_table_is_that_of_the_service(page: Page) -> None:
    table = {bare(name): bare(default) for name, default, _ in page.table("settings")}
    assert len(page.table("settings")) == len(table)
    assert sorted(table) == sorted(SETTINGS)
    assert {key: default_of(key, cell) for key, cell in table.items()} == {key: row.default for key, row in SETTINGS.items()}
    example = dict(re.findall(r"(?m)^([A-Z_]+)=(.*)$", (ROOT / "config.env.example").read_text()))
    assert {key: table[key] for key in example} == example


@each_page_with("routes")
def test_routes_table_is_that_of_the_service(page: Page) -> None:
    # The table has one row for all folders of files.
    paths = {row.path: re.sub(r"^/assets/\w+/", "/assets/", row.path).replace(":.+", "") for row in routes(DIALECTS)}
    served = {(row.method, paths[row.path], not row.public) for row in routes(DIALECTS)}
    assert {(bare(method), bare(path), YES[key]) for method, path, key, _ in page.table("routes")} == served


@each_page_with("request")
def test_request_table_has_every_field(page: Page) -> None:
    assert [bare(row[0]) for row in page.table("request") if len(row) == 3] == [field.name for field in FIELDS]


async def refused_by_the_router(client: Client) -> set[tuple[int, str, str]]:
    """(status, type, code) of what is refused before the error table is asked: path, method, Expect."""
    seen = set()
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", "/nowhere", {}),
        ("DELETE", "/health", {}),
        ("GET", "/health", {"Expect": "wonders"}),
    ]
    for method, path, headers in asked:
        async with client.request(method, path, headers=headers) as reply:
            error = (await reply.json())["error"]
            seen.add((reply.status, error["type"], error["code"] or ""))
    return seen


@each_page_with("errors")
async def test_errors_table_is_that_of_the_service(page: Page, client: Client) -> None:
    table = {(row.status, error_detail(Failure(row.status, "")).type, row.code or "") for row in TABLE.values()}
    shown = [(int(status), bare(kind), bare(code)) for status, kind, code, _ in page.table("errors")]
    assert len(shown) == len(set(shown))
    assert set(shown) == table | await refused_by_the_router(client)


@each_page_with("metrics")
def test_metrics_table_is_that_of_the_service(page: Page) -> None:
    # A counter has _total in the text format alone.
    suffix = {"counter": "_total"}
    served = set()
    for metric in (value for value in vars(Metrics()).values() if isinstance(value, MetricWrapperBase)):
        (family,) = metric.describe()
        labels = f"{{{','.join(metric._labelnames)}}}" if metric._labelnames else ""
        served.add((family.name + suffix.get(family.type, "") + labels, family.type))
    assert {(bare(name), KINDS.get(kind, kind)) for name, kind, _ in page.table("metrics")} == served


@each_page_with("exit codes")
def test_exit_codes_table_is_that_of_the_service(page: Page) -> None:
    assert [int(code) for code, _, _ in page.table("exit codes")] == sorted(ExitCode)


@each_page_with("endings")
def test_exit_codes_table_is_that_of_a_bulk_run(page: Page) -> None:
    codes = [int(code) for cell, _ in page.table("endings") for code in cell.split(", ")]
    assert codes == [*sorted(Ending), *sorted(128 + number for number in (signal.SIGINT, signal.SIGTERM))]


def test_family_recipe_names_the_methods_of_the_seam() -> None:
    recipe = BY_PATH["models/README.md"].section("A new family")
    for number, half in ((1, Preparer), (2, EmbeddingModel)):
        (step,) = re.findall(rf"(?ms)^{number}\. .*?`{half.__name__}`: (.*?)\.", recipe)
        assert re.findall(r"`(\w+)`", step) == [name for name in vars(half) if not name.startswith("_")]
