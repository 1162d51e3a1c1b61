"""docs/MIGRATION.md: the settings of the others, judged by themselves, and ours by `check`."""

import re
import shutil

import pytest
import yaml

from pages import PAGES, blocks, section, spans, tables
from tools import ROOT, run

PAGE = PAGES["MIGRATION.md"]
HAPROXY, NGINX, PGBOUNCER, ENVOY = (section(PAGE, f"## From {name}") for name in ["HAProxy", "nginx", "PgBouncer", "Envoy"])
VARIABLES = set(re.findall(r"^\| `(AEGIS_\w+)`", PAGES["CONFIGURATION.md"], re.M))


def needs(program):
    return pytest.mark.skipif(not shutil.which(program), reason=f"{program} is not installed")


def settings(text):
    """What the rows of a section set, by where it stands there."""
    found = {}
    for place, theirs, *_ in tables(text):
        found.setdefault(place, []).extend(spans(theirs))
    return found


def example(text, language):
    (block,) = blocks(text, language)
    return block


def test_every_row_names_a_variable_or_says_that_there_is_none():
    for text in [HAPROXY, NGINX, PGBOUNCER, ENVOY]:
        rows = tables(text)
        assert len(rows) > 15
        for *place, theirs, ours, different in rows:
            assert spans(theirs), theirs
            assert "not there" in ours or "by itself" in ours or spans(ours), theirs
            assert set(spans(ours)) <= VARIABLES, theirs


def test_a_word_for_balancing_that_the_page_names_exists():
    (accepted,) = re.findall(r"^\| `AEGIS_BALANCE` .*\((.*?)\) \|$", PAGES["CONFIGURATION.md"], re.M)
    words = set(re.split(", | or ", accepted))
    for row in [row for text in [HAPROXY, NGINX, ENVOY] for row in tables(text) if row[2] == "`AEGIS_BALANCE`"]:
        named = [word for word in spans(row[3]) if re.fullmatch("[a-z_]+", word) and not word.startswith("source_ip")]
        assert set(named) - {"zone"} <= words, row


@needs("haproxy")
def test_haproxy_knows_its_settings(tmp_path):
    file = tmp_path / "haproxy.cfg"
    file.write_text(example(HAPROXY, "haproxy"))
    run("haproxy", "-c", "-f", file)

    rows = settings(HAPROXY)
    parts = ["global", *(f"  {line}" for line in rows.pop("global")), "defaults", "  mode tcp",
             "  timeout connect 1s", "  timeout client 1h", "  timeout server 1h", "backend b", "  server s 127.0.0.1:1"]
    for number, (place, line) in enumerate((place, line) for place, given in rows.items() for line in given):
        if place == "bind":
            parts += [f"frontend f{number}", f"  bind 127.0.0.1:1 {line}", "  default_backend b"]
        elif place == "frontend":
            parts += [f"frontend f{number}", "  bind 127.0.0.1:1", f"  {line}", "  default_backend b"]
        elif place == "backend":
            table = "  stick-table type ip size 1k\n" if line.startswith("stick on") else ""
            parts += [f"backend b{number}", f"{table}  {line}", "  server s 127.0.0.1:1"]
        else:
            assert place == "server", place
            checked = " check observe layer4" if line.startswith(("error-limit", "on-error", "on-marked")) else ""
            parts += [f"backend b{number}", f"  server s 127.0.0.1:1{checked} {line}"]
    file.write_text("\n".join(parts) + "\n")
    run("haproxy", "-c", "-f", file)


STREAM = "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\npid {folder}/pid;\nerror_log {folder}/log;\n"


@needs("nginx")
def test_nginx_knows_its_settings(tmp_path):
    def judge(main, events, stream):
        file = tmp_path / "nginx.conf"
        start = STREAM.format(folder=tmp_path)
        if any(line.startswith("error_log") for line in main):
            start = start.replace("error_log", "# error_log")
        file.write_text(start + "\n".join(main) + f"\nevents {{ {' '.join(events)} }}\n{stream}")
        run("nginx", "-t", "-c", file)

    judge([], [], example(NGINX, "nginx"))
    rows = settings(NGINX)
    main, events, parts = rows.pop("main"), rows.pop("events"), ["upstream orders { server 127.0.0.1:1; }"]
    for number, (place, line) in enumerate((place, line) for place, given in rows.items() for line in given):
        server = f"listen 127.0.0.1:{40000 + number}"
        if place == "listen":
            parts.append(f"server {{ {server} {line}; proxy_pass orders; }}")
        elif place == "upstream":
            parts.append(f"upstream u{number} {{ {line.replace('orders', f'z{number}')} server 127.0.0.1:1; }}")
        elif place == "server of upstream":
            parts.append(f"upstream u{number} {{ server 127.0.0.1:2; server 127.0.0.1:1 {line}; }}")
        else:
            assert place == "server", place
            parts.append(f"server {{ {server}; proxy_pass orders; {line} }}")
    judge(main, events, "stream {\n" + "\n".join(parts) + "\n}\n")


# Of versions that Debian does not have yet; the page says so.
LATER = {"max_prepared_statements", "track_extra_parameters"}


@needs("pgbouncer")
def test_pgbouncer_knows_its_settings():
    """It has no way to judge a file. What it knows stands in the program, each name by itself."""
    with open(shutil.which("pgbouncer"), "rb") as file:
        program = file.read()
    named = [name for theirs, *_ in tables(PGBOUNCER) for name in spans(theirs)]
    named += [line.split("=")[0].strip() for line in example(PGBOUNCER, "pgbouncer").split("[pgbouncer]")[1].splitlines() if line]
    assert [name for name in named if name.encode() + b"\0" not in program and name not in LATER] == []
    assert all(name in PGBOUNCER.split("\n\n")[-2] for name in LATER), "said below the table"


def test_envoys_schema_has_its_settings():
    from envoy.config.bootstrap.v3.bootstrap_pb2 import Bootstrap
    from envoy.config.cluster.v3.cluster_pb2 import Cluster
    from envoy.config.listener.v3.listener_pb2 import Listener
    from envoy.extensions.filters.network.tcp_proxy.v3.tcp_proxy_pb2 import TcpProxy
    from google.protobuf.json_format import ParseDict

    known = ParseDict(yaml.safe_load(example(ENVOY, "envoy")), Bootstrap())
    assert known.static_resources.clusters[0].name == "orders"
    messages = {message.DESCRIPTOR.name: message.DESCRIPTOR.fields_by_name for message in [Bootstrap, Cluster, Listener, TcpProxy]}
    rows = settings(ENVOY)
    assert set(rows) == set(messages)
    assert [(place, name) for place, given in rows.items() for name in given if name not in messages[place]] == []


def test_every_variable_that_a_page_names_exists():
    """Those of a route by the plain name; those of the tests are named in CONTRIBUTING alone."""
    of_tests = {"AEGIS_SEEDS", "AEGIS_BLESS", "AEGIS_FUZZ"}
    others = {"README.md": (ROOT / "README.md").read_text(), "values.yaml": (ROOT / "helm/aegis-sidecar/values.yaml").read_text()}
    for page, text in {**PAGES, **others}.items():
        named = set(re.findall(r"\bAEGIS_[A-Z0-9_]*[A-Z0-9]", text))
        plain = {re.sub("^AEGIS_[A-Z0-9_]+?__", "AEGIS_", name) for name in named}
        unknown = plain - VARIABLES - (of_tests if page == "CONTRIBUTING.md" else set())
        # Families such as AEGIS_QUEUE_*, and the mistakes that CONFIGURATION and OPERATIONS show.
        unknown = {name for name in unknown if not re.search(rf"{name}_?\*", text)}
        assert unknown - {"AEGIS_KUBE_SERVICE_PORT", "AEGIS_BLESS"} == set(), page
