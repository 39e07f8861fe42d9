"""deploy/prometheus/ and deploy/grafana/: Prometheus itself scrapes a running server, and is asked every alert and panel."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from app.engine.metrics import Metrics
from app.settings import DEFAULTS
from tests.support.hosts import Process, base64_of, picture, process
from tests.support.paths import ROOT
from tests.support.programs import edited, free_port, program, run, running, until

pytestmark = pytest.mark.deploy

PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
CONFIG = (PROMETHEUS / "prometheus.yml").read_text()
ALERTS = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((GRAFANA / "dashboards" / "embedding.json").read_text())
PROMTOOL = ("promtool", "apt-get install prometheus")
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
INTERVAL = re.compile(r"\[\$__rate_interval\]")


def prometheus_query(expression: str) -> str:
    """As Grafana sends it: with its variables filled in."""
    return INTERVAL.sub("[30s]", expression).replace("$instance", ".*")


def names(expression: str) -> set[str]:
    return set(re.findall(r"\bembedding_\w+", expression))


# Prometheus and a server that has seen a bit of everything


def traffic(server: Process) -> None:
    """A reply of every kind that a panel has a line for: texts, an image, identical inputs, refusals, a deadline that passed."""
    embed = partial(server.request, "/v1/embeddings")
    assert embed({"input": ["a text", "another", "another"]})[0] == 200
    assert embed({"input": {"image": base64_of(picture())}})[0] == 200
    assert embed({"input": 1})[0] == 400
    assert embed({"input": "a"}, Authorization="Bearer wrong")[0] == 401

    def too_late() -> bool:
        """Whether a request whose deadline is near had to wait: one runs, and one is in the queue, as there most likely is."""
        others = [threading.Thread(target=embed, args=({"input": f"keeps the device busy {number}"},)) for number in range(3)]
        for other in others:
            other.start()
        until(lambda: server.request("/health")[2]["queue_depth"] > 0 or not others[0].is_alive(), "the device is busy")
        status = embed({"input": "too late"}, **{"X-Request-Timeout": "0.01"})[0]
        for other in others:
            other.join()
        return status == 504

    until(too_late, "a deadline passes in the queue")


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with process(FAKE_SECONDS_PER_BATCH="0.3") as server:
        server.until_status("ok")
        traffic(server)
        yield server


@pytest.fixture(scope="module")
def ask(server: Process, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A query -> Prometheus's answer, once it has seen the server a few times, with traffic between; without one its rules."""
    folder = tmp_path_factory.mktemp("prometheus")
    changed = {r"embedding:6008": f"127.0.0.1:{server.port()}", r"(_interval): \d+s": r"\1: 2s", r"(_timeout): \d+s": r"\1: 2s"}
    (folder / "prometheus.yml").write_text(edited(CONFIG, changed))
    (folder / "alerts.yml").write_text((PROMETHEUS / "alerts.yml").read_text())
    port = free_port()
    command = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]

    def ask(query: str | None = None) -> Any:
        path = "rules" if query is None else f"query?{urlencode({'query': query})}"
        with urlopen(f"http://127.0.0.1:{port}/api/v1/{path}", timeout=60) as reply:
            answer = json.loads(reply.read())
        assert answer["status"] == "success"
        return answer["data"]["groups"] if query is None else answer["data"]["result"]

    def scrapes() -> int:
        try:
            found = ask("count_over_time(embedding_ready[1m])")
        except OSError:
            return 0
        return int(found[0]["value"][1]) if found else 0

    with running(*command, log=folder / "log"):
        until(lambda: scrapes() >= 1, f"Prometheus has seen the server:\n{(folder / 'log').read_text()}")
        seen = scrapes()
        traffic(server)
        until(lambda: scrapes() >= seen + 2, "and again")
        until(lambda: all(rule["health"] != "unknown" for group in ask() for rule in group["rules"]), "it has judged every alert")
        yield ask


def test_promtool_takes_the_configuration() -> None:
    run(
        program(*PROMTOOL),
        "check",
        "config",
        "--lint=all",
        "--lint-fatal",
        str(PROMETHEUS / "prometheus.yml"),
    )


def test_every_alert_fires_for_what_it_is_for() -> None:
    tests = PROMETHEUS / "alerts.test.yml"
    run(program(*PROMTOOL), "test", "rules", str(tests))
    cases = [case for test in yaml.safe_load(tests.read_text())["tests"] for case in test["alert_rule_test"]]
    fires = {case["alertname"] for case in cases if case.get("exp_alerts")}
    stays = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    assert fires == stays == {rule["alert"] for rule in ALERTS}


@pytest.mark.parametrize("query", QUERIES)
def test_every_panel_has_data(ask: Any, query: str) -> None:
    found = ask(prometheus_query(query))
    assert found
    (by,) = re.findall(r"^sum by \((\w+)\)", query) or [None]
    assert by is None or all(by in row["metric"] for row in found)


def test_every_alert_is_judged(ask: Any) -> None:
    (group,) = ask()
    assert {(rule["name"], rule["health"]) for rule in group["rules"]} == {(rule["alert"], "ok") for rule in ALERTS}
    assert not [rule["name"] for rule in group["rules"] if rule["alerts"] and rule["name"] != "EmbeddingErrors"]


def test_the_figures_are_the_services(ask: Any) -> None:
    (ready,) = ask("sum(embedding_ready)")
    assert ready["value"][1] == "1"
    status = {row["metric"]["status"] for row in ask("embedding_requests_total")}
    assert {"200", "400", "401", "504"} <= status


# The files by themselves


def test_what_is_named_is_served(server: Process) -> None:
    with urlopen(f"http://127.0.0.1:{server.port()}/metrics", timeout=60) as reply:
        served = set(re.findall(r"(?m)^(embedding_\w+)", reply.read().decode()))
    for expression in [*QUERIES, *(rule["expr"] for rule in ALERTS)]:
        assert names(expression) <= served, expression


def test_every_metric_is_on_the_dashboard() -> None:
    shown = set().union(*map(names, QUERIES))
    for metric in (value for value in vars(Metrics()).values() if isinstance(value, MetricWrapperBase)):
        (family,) = metric.describe()
        assert any(name.startswith(family.name) for name in shown), family.name


def test_the_dashboard_is_whole() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    for panel in PANELS:
        assert panel["title"] and panel["targets"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(DASHBOARD)))
    assert used == variables
    # Every query is of the replicas that are chosen, and no rate is over less than Grafana knows to be enough.
    for query in QUERIES:
        selectors = re.findall(r"embedding_\w+(\{[^}]*\})?", query)
        assert all(selector.startswith('{instance=~"$instance"') for selector in selectors), query
        assert len(INTERVAL.findall(query)) == len(re.findall(r"(?:rate|increase)\(", query)), query


def test_no_panel_covers_another() -> None:
    boxes = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(box["x"] + box["w"] <= 24 for box in boxes)
    cells = [(x, y) for box in boxes for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])]
    assert len(cells) == len(set(cells))
    assert all(one["y"] <= other["y"] for one, other in pairwise(boxes))


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    (source,) = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in compose
    config = yaml.safe_load(CONFIG)
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "embedding.yml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"])
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    (targets,) = config["scrape_configs"][0]["static_configs"]
    assert targets["targets"] == [f"embedding:{DEFAULTS.port}"] and "embedding" in compose
    assert dict(volume.split(":")[:2] for volume in compose["prometheus"]["volumes"])["./prometheus"] == "/etc/prometheus"


def test_what_is_slow_is_slow_before_callers_are_refused() -> None:
    (rule,) = (rule for rule in ALERTS if rule["alert"] == "EmbeddingSlow")
    assert float(rule["expr"].rpartition(">")[2]) == DEFAULTS.request_timeout_s / 2
