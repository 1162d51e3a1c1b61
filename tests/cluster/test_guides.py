"""What docs/TROUBLESHOOTING.md and docs/OPERATIONS.md quote is what the program says."""

import functools
import re

import pytest
import yaml

from pages import PAGES, section, spans, tables
from tools import ROOT

TROUBLE = PAGES["TROUBLESHOOTING.md"]
OPERATIONS = PAGES["OPERATIONS.md"]
METRICS = PAGES["METRICS.md"]
RULES = yaml.safe_load((ROOT / "manifests/monitoring/rules.yaml").read_text())["groups"][0]["rules"]
SYMPTOMS = [title for title in re.findall(r"^## (.*)$", TROUBLE, re.M) if title != "Nothing is wrong here"]
# Rows of a symptom, and those that all have.
ROWS = ["it is", "the client sees", "metric", "probe", "log", "look at", "do"]
TEXTS = ["the client sees", "probe", "log"]
LEVELS = {"error", "warn", "info", "debug", "trace"}


def labels_of_metrics():
    """The labels of each metric, by its name."""
    rows = [row for row in tables(METRICS) if row[0].startswith("`") and len(row) == 5]
    return {spans(row[0])[0]: set(spans(row[2])) for row in rows}


def values_of_labels():
    """The values that a label of a metric may have, where they are a closed set."""
    found = {}
    for label, metric in re.findall(r"^### `(\w+)` of `(\w+)`$", METRICS, re.M):
        found[metric, label] = {spans(row[0])[0] for row in tables(section(METRICS, f"### `{label}` of `{metric}`"))}
    return found


LABELS, VALUES = labels_of_metrics(), values_of_labels()
DRIVERS = {"io_uring", "epoll"}


def judge_metric(name, given):
    """Finds a metric and what is between its braces on the reference page."""
    assert name in LABELS, name
    for part in filter(None, (given or "").split(",")):
        label, _, value = part.strip().partition("=")
        assert label in LABELS[name], f"{name} has no label {label}"
        if value:
            known = DRIVERS if label == "driver" else VALUES[name, label]
            assert value.strip('"') in known, f"{name}: no {label} is {value}"


@functools.cache
def literals():
    """The texts within the program's sources, as they are written there, tests excepted."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.rs")):
        if path.stem in ["tests", "testing", "simulation"] or "tests" in path.parts or "sim" in path.parts:
            continue
        text = path.read_text().split("#[cfg(test)]\nmod tests {")[0]
        text = re.sub(r"^\s*//.*$", "", text, flags=re.M)
        found += [re.sub(r"\\\n\s*", "", literal).replace('\\"', '"')
                  for literal in re.findall(r'"((?:[^"\\]|\\.)*)"', text, re.S)]
    return found


@functools.cache
def fields():
    """Names of fields of the log."""
    sources = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.rs"))
    return set(re.findall(r"^\s+(\w+)(?: = [^=]|,$)", sources, re.M))


def is_said(quoted):
    """Whether some text of the sources has the words of a quotation, with `…` for whatever varies."""
    pattern = r".*?".join(re.escape(part.strip()) for part in quoted.split("…"))
    return any(re.search(pattern, literal) for literal in literals())


def rows_of(symptom):
    return {row[0]: row[1] for row in tables(section(TROUBLE, f"## {symptom}"))}


def test_the_page_leads_to_every_symptom_and_from_every_problem_that_the_proxy_finds():
    start = TROUBLE.split("\n## ")[0]
    assert set(re.findall(r"\(#([\w-]+)\)", start)) == {anchor(title) for title in [*SYMPTOMS, "Nothing is wrong here"]}
    assert set(re.findall(r'`\{kind="(\w+)"\}` \|', start)) == VALUES["aegis_problem", "kind"]


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_a_symptom_says_who_it_is_what_is_seen_and_what_to_do(symptom):
    rows = rows_of(symptom)
    assert [name for name in ROWS if name in rows] == list(rows), "in this order"
    assert set(ROWS) - set(rows) <= {"probe"}
    assert any(name.startswith("aegis_") for name in spans(rows["metric"])), "a metric names it"


@pytest.mark.parametrize("page", ["TROUBLESHOOTING.md", "OPERATIONS.md", "LIMITS.md", "MIGRATION.md"])
def test_every_metric_that_is_quoted_exists_with_its_labels(page):
    seen = 0
    latest = None
    for line in PAGES[page].splitlines():
        # Braces alone are of the metric before them, which may be on the line above.
        latest = "aegis_problem" if line.startswith('| `{kind=') else None if line.startswith(("|", "- ", "#")) else latest
        for span in spans(line):
            quoted = re.fullmatch(r"((?:aegis|process)_\w+)?(?:\{(.*)\})?", span)
            if not quoted or span.startswith("aegis_proxy"):
                continue
            latest = quoted[1] or latest
            judge_metric(latest, quoted[2])
            seen += 1
    assert seen > 90 or page != "TROUBLESHOOTING.md"


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_every_text_that_is_quoted_is_in_the_sources(symptom):
    rows = rows_of(symptom)
    for name in TEXTS:
        # What another program says is marked as such.
        cell = re.sub(r"`[^`]*` from the server", "", rows.get(name, ""))
        for span in spans(cell):
            is_text = " " in span or name == "log"
            if is_text and span not in LEVELS | fields() and not re.match(r"AEGIS_\w+(=\w+)?$|/\w+$|printf ", span):
                assert is_said(span), f"{name}: {span!r} is nowhere in src"


@pytest.mark.parametrize("level", ["debug", "trace"])
def test_a_line_of_the_log_below_info_is_named_with_its_level(level):
    """And no line that is quoted without a level is one of these."""
    sources = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.rs"))
    quiet = re.findall(rf'(?:tracing::)?{level}!\((?:[^";]*?,\s+)?"([^"]+)"', sources)
    assert len(quiet) >= 3
    for symptom in SYMPTOMS:
        cell = rows_of(symptom)["log"]
        for span in spans(cell):
            if span in quiet:
                assert re.search(rf"at `{level}`:? `{re.escape(span)}`", cell, re.I), span


def test_the_texts_outside_of_tables_are_in_the_sources():
    for span in re.findall(r"`((?:the rest of|log lines)[^`]*)`", section(TROUBLE, "## Nothing is wrong here")):
        assert is_said(span), span


def test_quotations_that_are_in_no_source_are_found():
    assert is_said("worker … has not turned for … ms")
    assert not is_said("worker … has turned for … ms")
    with pytest.raises(AssertionError):
        judge_metric("aegis_requests_total", 'outcome="never"')
    with pytest.raises(AssertionError):
        judge_metric("aegis_max_sessions", "worker")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_has_a_section_that_says_what_it_means_and_what_to_do(rule):
    part = section(OPERATIONS, f"### {rule['alert']}")
    rows = {row[0]: row[1] for row in tables(part)}
    assert list(rows) == ["means", "look at", "do"]
    assert f"| {rule['labels']['severity']} | |" in part
    # What the rule looks at is named, there or in what to look at besides.
    names = set(re.findall(r"aegis_\w+?(?=_bucket|\b)|process_\w+", rule["expr"]))
    linked = "".join(section(TROUBLE, f"## {title}") for title in SYMPTOMS if f"#{anchor(title)})" in part)
    assert any(name in part + linked for name in names), names


def test_no_section_is_of_an_alert_that_is_not_there():
    assert re.findall("^### (Aegis.*)$", OPERATIONS, re.M) == [rule["alert"] for rule in RULES]


def anchor(title):
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_the_cpu_per_request_is_what_the_notes_say():
    notes = (ROOT / "benches/NOTES.md").read_text().split("## How the cost grows")[1].split("\n\n")[2]
    measured = {row[0]: row[1:] for row in tables(notes)}
    (head,) = re.findall(r"^\| connections \| (.*) \|$", notes, re.M)
    connections = head.split(" | ")
    part = section(OPERATIONS, "## Sizing")
    (of_page,) = re.findall(r"^\| CPU of the proxy per request[^|]* \| (.*) \|$", part, re.M)
    chosen = [connections.index(cell.split()[0]) for cell in of_page.split(" | ")]
    for row in [row for row in tables(part) if row[0] in measured]:
        assert [cell.removesuffix(" µs") for cell in row[1:]] == [measured[row[0]][at] for at in chosen]
