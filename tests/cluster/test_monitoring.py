"""Metrics, alerts and dashboard, judged by the real Prometheus and its tool."""

import contextlib
import json
import subprocess
import urllib.parse

import pytest
import yaml

from containers import Container, Native, aegis, ask, build, eventually, free_port, get, no_containers, store
from tools import ROOT, metrics_in, run

MONITORING = ROOT / "manifests/monitoring"


def dashboard_expressions():
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def rule_expressions():
    rules = yaml.safe_load((MONITORING / "rules.yaml").read_text())
    return [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def test_rules_are_valid_and_fire_when_they_should():
    run("promtool", "check", "rules", MONITORING / "rules.yaml")
    run("promtool", "test", "rules", MONITORING / "rules_test.yaml")


def test_every_alert_is_tested_to_fire():
    tests = yaml.safe_load((MONITORING / "rules_test.yaml").read_text())["tests"]
    samples = " ".join(sample["labels"] for sample in tests[0]["promql_expr_test"][0]["exp_samples"])
    rules = yaml.safe_load((MONITORING / "rules.yaml").read_text())
    for rule in rules["groups"][0]["rules"]:
        assert f'"{rule["alert"]}"' in samples
        assert {"summary", "description"} == set(rule["annotations"])


@contextlib.contextmanager
def prometheus(folder, target):
    """The real one with the configuration of Compose, only that the target is `target`."""
    config = yaml.safe_load((ROOT / "manifests/compose/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / "rules.yaml")]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (folder / "prometheus.yml").write_text(yaml.dump(config))
    run("promtool", "check", "config", folder / "prometheus.yml")
    port = free_port()
    log = (folder / "log").open("w+")
    process = subprocess.Popen(["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                                f"--web.listen-address=127.0.0.1:{port}"], stderr=log, stdout=log)
    try:
        def query(expression):
            arguments = urllib.parse.urlencode({"query": expression})
            return json.loads(get(f"http://127.0.0.1:{port}/api/v1/query?{arguments}"))["data"]["result"]
        eventually(lambda: [s for s in query("up") if s["value"][1] == "1"],
                   lambda: (folder / "log").read_text(), seconds=30)
        yield query
    finally:
        process.terminate()
        process.wait()
        log.close()


@pytest.fixture(scope="module")
def scraped(tmp_path_factory):
    """A proxy with the settings of Compose after some traffic, and how to query the Prometheus that
    scrapes it."""
    kind = Native if no_containers() else Container
    if kind is Container:
        build()
    compose = yaml.safe_load((MONITORING.parent / "compose/compose.yaml").read_text())
    modes = {name: compose["services"]["aegis"]["environment"][name] for name in ["AEGIS_PROTOCOL", "AEGIS_POOL_MODE"]}
    with store(kind=kind) as backend, aegis(env={"AEGIS_BACKENDS": backend, **modes}, kind=kind) as proxy:
        for turn in range(20):
            with proxy.connect() as client:
                for request, reply in [(f"SET k {turn}", "OK"), ("GET k", f"{turn}"), ("PING", "PONG"),
                                       ("DEL k", "OK_DELETED"), ("COMPACT", "OK_COMPACTED")]:
                    assert ask(client, request.encode() + b"\n", len(reply) + 1) == reply.encode() + b"\n"
        with prometheus(tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{proxy.admin}") as query:
            yield proxy, query


def test_requests_are_counted_by_what_they_asked_for(scraped):
    _, query = scraped
    for command in ["set", "get", "ping", "del", "compact"]:
        labels = f'command="{command}"'
        for expression in [f'aegis_requests_total{{{labels}, outcome="answered"}}', f"aegis_request_duration_seconds_count{{{labels}}}"]:
            assert [series["value"][1] for series in query(expression)] == ["20"], expression


def test_promtool_likes_the_metrics(scraped):
    proxy, _ = scraped
    run("promtool", "check", "metrics", input=proxy.get("metrics"))


def test_a_real_prometheus_scrapes_and_knows_every_metric_that_is_named(scraped):
    _, query = scraped
    known = set()
    for series in query('{job="aegis"}'):
        known |= metrics_in(series["metric"]["__name__"])
    named = set().union(*map(metrics_in, dashboard_expressions() + rule_expressions()))
    assert len(named) > 30
    assert named - known == set(), "named, but not scraped"


def test_a_real_prometheus_understands_every_query_of_the_dashboard(scraped):
    _, query = scraped
    expressions = []
    for expression in dashboard_expressions():
        for variable, value in [("$namespace", "compose"), ("$pod", "aegis"), ("$__rate_interval", "1m")]:
            expression = expression.replace(variable, value)
        assert "$" not in expression
        query(expression)
        # A share of nothing is not a number, and reasons that did not occur are left out.
        if "> 0" not in expression:
            expressions.append(expression)
    assert len(expressions) > 30
    # Rates need a second scrape.
    eventually(lambda: all(map(query, expressions)), lambda: [e for e in expressions if not query(e)])


def test_sound_traffic_raises_no_alert(scraped):
    _, query = scraped
    firing = {series["metric"]["alertname"] for series in query("ALERTS")}
    assert firing <= {"AegisFallbackDriver"}, firing
