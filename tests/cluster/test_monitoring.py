"""Metrics, alerts and dashboard, judged by the real Prometheus and its tool."""

import contextlib
import json
import re
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
        assert {"summary", "description", "runbook", "runbook_url"} == set(rule["annotations"])


def test_every_alert_leads_to_its_section():
    for rule in yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"][0]["rules"]:
        path, anchor = rule["annotations"]["runbook_url"].split("#")
        headings = re.findall(r"^### (.*)$", (ROOT / path).read_text(), re.M)
        assert anchor in [heading.lower() for heading in headings], rule["alert"]
        assert anchor == rule["alert"].lower(), "its own"


def test_every_alert_says_what_clients_see_and_what_to_look_at():
    rules = yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"][0]["rules"]
    variables = set(re.findall(r"^\| `(AEGIS_\w+)`", (ROOT / "docs/CONFIGURATION.md").read_text(), re.M))
    for rule in rules:
        text = rule["annotations"]
        assert text["description"].startswith("Clients "), rule["alert"]
        assert re.search(r"aegis_\w+|AEGIS_\w+|/backends|container runtime|log collector", text["runbook"]), rule["alert"]
        named = set(re.findall(r"AEGIS_[A-Z_]+", " ".join(text.values()) ))
        assert named <= variables, rule["alert"]


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
    # Told only where a former run's endpoints are in use.
    assert named - known == {"aegis_discovery_snapshot_age_seconds"}, "named, but not scraped"


def test_a_real_prometheus_understands_every_query_of_the_dashboard(scraped):
    _, query = scraped
    expressions = []
    for expression in dashboard_expressions():
        expression = filled_in(expression, "1m")
        query(expression)
        # Left out: what is not shown while there is nothing to show.
        if "> 0" not in expression and ">= 0" not in expression:
            expressions.append(expression)
    assert len(expressions) > 20
    # Rates need a second scrape.
    eventually(lambda: all(map(query, expressions)), lambda: [e for e in expressions if not query(e)])


def panels():
    return [panel for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"] if panel.get("targets")]


def filled_in(expression, interval):
    for variable, value in [("$namespace", "compose"), ("$pod", "aegis"), ("$route", "default"), ("$__rate_interval", interval)]:
        expression = expression.replace(variable, value)
    assert "$" not in expression
    return expression


@pytest.mark.parametrize("traffic", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("mode", ["request", "preconnect"])
def test_no_panel_shows_what_is_not_a_number(mode, traffic, tmp_path):
    """With the charts' defaults, and for any bytes; and a panel that shows nothing says why."""
    modes = {"request": {"AEGIS_PROTOCOL": "chronos", "AEGIS_POOL_MODE": "request"}, "preconnect": {"AEGIS_PROTOCOL": "tcp"}}[mode]
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(store(kind=Native))
        proxy = stack.enter_context(aegis(env={"AEGIS_BACKENDS": backend, **modes}, kind=Native))
        query = stack.enter_context(prometheus(tmp_path, f"127.0.0.1:{proxy.admin}"))

        def look():
            """What each panel shows after some seconds of this load."""
            if traffic:
                for _ in range(20):
                    with proxy.connect() as client:
                        assert ask(client, b"GET k\n", 5) == b"NULL\n"
            return {panel["title"]: [series["value"][1] for target in panel["targets"]
                                     for series in query(filled_in(target["expr"], "5s"))] for panel in panels()}
        # Rates need a second scrape with the load between.
        eventually(lambda: look()["Completions a turn"] and (not traffic or look()["Session"]), lambda: look())
        shown = look()
    for panel in panels():
        values = shown[panel["title"]]
        assert not {"NaN", "+Inf", "-Inf"} & set(values), panel["title"]
        if not values and panel["type"] == "stat":
            assert panel["fieldConfig"]["defaults"]["noValue"], panel["title"]
        if not values and traffic:
            assert "Empty w" in panel["description"], panel["title"]
    if traffic:
        expected = {"request": ["Request, p99", "Wait in line", "Warm connections found"], "preconnect": ["First byte, p99", "Warm connections found"]}
        assert all(shown[title] for title in expected[mode]), shown


def test_a_process_without_any_endpoint_shows(tmp_path):
    env = {"AEGIS_BACKENDS": "nobody.invalid:1", "AEGIS_DISCOVERY": "dns"}
    with aegis(env=env, kind=Native) as proxy, prometheus(tmp_path, f"127.0.0.1:{proxy.admin}") as query:
        (usable,) = [panel for panel in panels() if panel["title"] == "Usable endpoints"]
        assert [series["value"][1] for series in query(filled_in(usable["targets"][0]["expr"], "5s"))] == ["0"]


def test_sound_traffic_raises_no_alert(scraped):
    _, query = scraped
    firing = {series["metric"]["alertname"] for series in query("ALERTS")}
    assert firing <= {"AegisFallbackDriver"}, firing
