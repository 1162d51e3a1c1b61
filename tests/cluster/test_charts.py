"""The charts: what they render is valid, what they refuse says what to change."""

import json
import os
import re
import tomllib

import pytest
import yaml

from tools import (CHART, HERE, INJECTS, ROOT, USER_CHART, helm, kinds, one, refusal, run, template,
                   validate)

BACKEND = {"sidecar": {"backend": {"service": "chronos"}}}
CLIENTS = {"clients": [{"namespace": "shop", "serviceAccount": "web"}]}


def sidecar(**values):
    return {"sidecar": {"backend": {"service": "chronos"}, **values}}


@pytest.mark.parametrize("chart", [CHART, ROOT / "helm/aegis-sidecar"], ids=lambda chart: chart.name)
def test_lint(chart):
    helm("lint", "--strict", chart)


def test_versions_are_the_programs():
    version = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
    for chart in [CHART, ROOT / "helm/aegis-sidecar"]:
        assert yaml.safe_load((chart / "Chart.yaml").read_text())["appVersion"] == version
    values = yaml.safe_load((ROOT / "helm/aegis-sidecar/values.yaml").read_text())
    assert values["image"]["tag"] == version
    assert f"ARG VERSION={version}\n" in (ROOT / "Dockerfile").read_text()


EVERYTHING = {
    **CLIENTS, **BACKEND,
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True, "thresholds": {"AegisFirstByteSlow": 0.25}},
    "dashboard": {"enabled": True},
    "seccomp": {"installer": {"enabled": True}},
}
MATRIX = {
    "defaults": {},
    "everything": EVERYTHING,
    "service-monitor": {**CLIENTS, **BACKEND, "serviceMonitor": {"enabled": True}},
    "whole-namespace": {**BACKEND, "clients": [{"namespace": "shop", "serviceAccount": "*"}]},
    "pods": {**CLIENTS, "sidecar": {"backend": {"selector": "app=db", "port": 8080}}},
    "dns": {**CLIENTS, "sidecar": {"backend": {"addresses": "db.example:5432"}}},
    "zone": {**CLIENTS, **sidecar(locality="zone", readiness=True)},
    "one-store-of-many": {**CLIENTS, **sidecar(balance="key_hash")},
    "one-store-of-three": {**CLIENTS, **sidecar(balance="key_hash", stores=3)},
    "http": {**CLIENTS, **sidecar(protocol="http1", pool={"mode": "session"}, requestTimeout="off")},
    "backups": {**CLIENTS, "sidecar": {"backend": {"addresses": "db.example:5432", "backups": "other.example:5433"},
                                       "failbackTime": "1m", "check": {"interval": "2s", "kind": "request", "fall": 2, "rise": 3}}},
    "any-bytes": {**CLIENTS, **sidecar(protocol="tcp")},
    "socket": {**CLIENTS, **sidecar(socket={"folder": "/run/db"})},
    "io_uring": {**CLIENTS, **sidecar(seccomp={"type": "Localhost"}), "seccomp": {"operator": True}},
    "chosen": {**CLIENTS, **sidecar(workers=3, tcpUserTimeout="5s", backendDrain="off", startTimeout="9s",
                                    resources={"requests": {"cpu": 2}, "limits": {"cpu": "2.5"}})},
    "by-name-only": {**CLIENTS, **BACKEND, "injection": {"name": "db.v2", "default": False, "imageOverride": False,
                                                         "namespaceSelector": {"matchLabels": {"team": "a"}}}},
    "no-injection": {**CLIENTS, **BACKEND, "injection": {"enabled": False}},
}


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
@pytest.mark.parametrize("injects", [[], INJECTS], ids=["no-policy-api", "policy-api"])
def test_what_is_rendered_is_valid(values, injects):
    objects = template(CHART, *injects, values=values)
    validate(objects)
    off = not injects or values.get("injection") == {"enabled": False}
    names = {(item["kind"], item["metadata"]["name"]) for item in objects if "Policy" in item["kind"]}
    own = "shop.db.aegis-proxy.io"
    bindings = [own, f"also.{own}", f"namespace.{own}", f"test.{own}"]
    assert names == (set() if off else {
        ("MutatingAdmissionPolicy", own), *(("MutatingAdmissionPolicyBinding", name) for name in bindings),
        *(("ValidatingAdmissionPolicy", name) for name in [own, "warnings.aegis-proxy.io"]),
        *(("ValidatingAdmissionPolicyBinding", name) for name in [
            *bindings, "warnings.aegis-proxy.io", "namespace.warnings.aegis-proxy.io"])})
    bindings = {item["metadata"]["name"] for item in objects if item["kind"] == "RoleBinding"}
    backend = values.get("sidecar", {}).get("backend", {})
    watches = "addresses" not in backend
    assert bindings == ({"shop-endpoints"} if watches and "clients" in values else set()) | (
        {"shop-test"} if watches and backend else set())
    assert kinds(objects).count("Role") == watches


def test_validation_itself_finds_what_is_wrong():
    policy = template(CHART, *INJECTS, values=BACKEND)
    one(policy, "MutatingAdmissionPolicy")["spec"]["mutation"] = []
    with pytest.raises(Exception, match="mutation"):
        validate(policy)
    monitor = template(CHART, values=EVERYTHING)
    one(monitor, "PodMonitor")["spec"]["podMetricsEndpoints"] = "all"
    with pytest.raises(AssertionError, match="podMetricsEndpoints"):
        validate(monitor)


def test_failover_by_zone_and_region_knows_where_the_pod_is():
    route = {"name": "a", "listenPort": 5432, "backend": {"service": "a"}, "locality": "failover"}
    for values in [sidecar(locality="failover"), {"sidecar": {"routes": [route]}}]:
        text = json.dumps(template(CHART, values=values))
        for name, label in [("AEGIS_ZONE", "zone"), ("AEGIS_REGION", "region")]:
            assert name in text and f"topology.kubernetes.io/{label}" in text, name


def test_the_beta_of_the_policy_serves_too():
    objects = template(CHART, "--api-versions", "admissionregistration.k8s.io/v1beta1/MutatingAdmissionPolicy", values=BACKEND)
    assert one(objects, "MutatingAdmissionPolicy")["apiVersion"] == "admissionregistration.k8s.io/v1beta1"
    validate(objects)


REFUSALS = {
    "unknown value": ({"podMonitr": {}}, "podMonitr"),
    "unknown value below": ({"podMonitor": {"enable": True}}, "enable"),
    "unknown value of the sidecar": ({"sidecar": {"pol": 1}}, "pol"),
    "no such protocol": (sidecar(protocol="redis"), "'tcp', 'chronos', 'http1'"),
    "no such pool mode": (sidecar(pool={"mode": "all"}), "'preconnect', 'session', 'request'"),
    "no pool at all": (sidecar(pool={"size": 0}), "want 1"),
    "too long a queue": (sidecar(queue={"max": 1000001}), "/queue/max"),
    "time without unit": (sidecar(queue={"timeout": 5}), "/queue/timeout"),
    "switch that YAML makes of a bare off": (sidecar(requestTimeout=False), "got boolean, want string"),
    "no such way of balancing": (sidecar(balance="hash"), "'source_hash', 'key_hash'"),
    "no number of stores": (sidecar(balance="key_hash", stores=0), "/stores"),
    "lending for unknown bytes": (sidecar(protocol="tcp", pool={"mode": "session"}),
                                  "empty pool.mode, or set protocol to chronos or http1"),
    "keys without keys": (sidecar(protocol="http1", balance="key_hash"), "set balance to least_conn, or protocol to chronos"),
    "keys for a whole session": (sidecar(pool={"mode": "session"}, balance="key_hash"), "or pool.mode to request"),
    "service in capitals": (sidecar(backend={"service": "UPPER"}), "/backend/service"),
    "two services": (sidecar(backend={"service": "a,b"}), "/backend/service"),
    "path for a service": (sidecar(backend={"service": "../../x"}), "/backend/service"),
    "too long a service": (sidecar(backend={"service": "a" * 300}), "/backend/service"),
    "service that the kubelet would expand": (sidecar(backend={"service": "$(AEGIS_ADMIN)"}), "/backend/service"),
    "service that means none": (sidecar(backend={"service": "none"}), "/backend/service"),
    "service with its namespace": (sidecar(backend={"service": "a.b"}), "/backend/service"),
    "namespace in capitals": (sidecar(backend={"service": "a", "namespace": "DB"}), "/backend/namespace"),
    "no such port": (sidecar(backend={"service": "a", "port": 65536}), "/backend/port"),
    "no such port as text": (sidecar(backend={"service": "a", "port": "65536"}), "set it to a port's name, or a number"),
    "selector that the kubelet would expand": (sidecar(backend={"service": "", "selector": "a=$(B)"}), "/backend/selector"),
    "backend without a port": (sidecar(backend={"service": "", "addresses": "db"}), "/backend/addresses"),
    "wrong level": (sidecar(log="wran"), "/log"),
    "queue without time": (sidecar(queue={"timeout": "1ms"}), "queue.timeout is 1ms: set it to a duration from 10ms to 1h"),
    "too long a wait": (sidecar(requestTimeout="2d"), "requestTimeout is 2d: set it to off, or a duration from 10ms to 1d"),
    "no time to connect": (sidecar(connectTimeout="0s"), "connectTimeout is 0s: set it to a duration from 1ms to 5m"),
    "drain for ever": (sidecar(drain={"timeout": "1d"}), "drain.timeout is 1d: set it to a duration from 0s to 1h"),
    "no quantity": (sidecar(resources={"requests": {"cpu": "much"}}), "/resources/requests/cpu"),
    "cores below zero": (sidecar(resources={"requests": {"cpu": -1}}), "/resources/requests/cpu"),
    "no cores": (sidecar(resources={"requests": {"cpu": "0m"}}), "resources.requests.cpu is 0m: set it to more than 0"),
    "no request for workers": (sidecar(resources={"requests": {"cpu": None}}), "resources.requests.cpu is not set"),
    "too many cores": (sidecar(resources={"requests": {"cpu": 257}}), "set it to 256 at most"),
    "thousandths of a byte": (sidecar(resources={"limits": {"memory": "256m"}}), "/resources/limits/memory"),
    "no memory": (sidecar(resources={"limits": {"memory": "256"}}), "resources.limits.memory is 256: set it to 8Mi at least"),
    "limit below the request": (sidecar(resources={"requests": {"memory": "1Gi"}}), "set the limit to at least the request"),
    "no workers": (sidecar(workers=0), "/workers"),
    "image in capitals": (sidecar(image={"repository": "UPPER"}), "/image/repository"),
    "image with a space": (sidecar(image={"repository": "a b"}), "/image/repository"),
    "name that pods cannot choose": ({"injection": {"name": "enabled"}}, "cannot choose a release by the name enabled"),
    "no such locality": (sidecar(locality="rack"), "'off', 'zone', 'node'"),
    "privileged port": (sidecar(listenPort=80), "want 1,024"),
    "not a variable of Aegis": (sidecar(env={"PATH": "/"}), "AEGIS_"),
    "client without account": ({"clients": [{"namespace": "shop"}]}, "serviceAccount"),
    "both monitors": ({"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}, "disable one"),
    "both profiles": ({"seccomp": {"operator": True, "installer": {"enabled": True}}}, "keep one"),
    "no such alert": ({"prometheusRule": {"enabled": True, "thresholds": {"AegisSlow": 1}}},
                      "thresholds.AegisSlow: there is no such alert, but AegisNoUsableEndpoint"),
    "a page that is none": ({"prometheusRule": {"runbookBase": "git.example"}}, "/prometheusRule/runbookBase"),
    "one port twice": (sidecar(adminPort=8081), "both 8081: change one"),
    "backup beside Kubernetes": (sidecar(backend={"service": "a", "backups": "b:1"}),
                                 "backend.backups is set and backend.addresses is not"),
    "backup of itself": (sidecar(backend={"service": "", "addresses": "a:1, b:1", "backups": "c:1,b:1"}),
                         "b:1 is in backend.addresses and in backend.backups: nothing stands in for itself"),
    "backup without a port": (sidecar(backend={"service": "", "addresses": "a:1", "backups": "b"}), "/backend/backups"),
    "keys of another store": (sidecar(backend={"service": "", "addresses": "a:1", "backups": "b:1"}, balance="key_hash"),
                              "backend.backups is set: no store has the keys of another one: set balance to least_conn, or empty backend.backups"),
    "keys of another zone": (sidecar(balance="key_hash", locality="failover"),
                             "locality is failover: no store has the keys of another one: set balance to least_conn, or locality to off"),
    "checks without a pause": (sidecar(check={"interval": "50ms"}), "check.interval is 50ms: set it to off, or a duration from 100ms to 1h"),
    "no such check": (sidecar(check={"interval": "1s", "kind": "ping"}), "'connect', 'request'"),
    "no check ever fails": (sidecar(check={"interval": "1s", "fall": 0}), "/check/fall"),
    "path that is none": (sidecar(check={"path": "healthz"}), "/check/path"),
    "path that the kubelet would expand": (sidecar(check={"path": "/$(AEGIS_ADMIN)"}), "/check/path"),
    "request of unknown bytes": (sidecar(protocol="tcp", check={"interval": "1s", "kind": "request"}),
                                 "only chronos and http1 have a request for that: empty check.kind, or set protocol"),
    "checks that lock a host out": (sidecar(protocol="tcp", check={"interval": "1s"}, env={"AEGIS_PRESET": "mysql"}),
                                    "check.interval is 1s and env.AEGIS_PRESET is mysql: such a server counts connections"),
    "checks by a variable that lock a host out": (sidecar(protocol="tcp", env={"AEGIS_PRESET": "mysql", "AEGIS_CHECK_INTERVAL": "2s"}),
                                                  "check.interval is 2s and env.AEGIS_PRESET is mysql"),
    "back again after a day": (sidecar(failbackTime="1d"), "failbackTime is 1d: set it to a duration from 0s to 1h"),
    "two backends": ({"sidecar": {"backend": {"service": "a", "addresses": "b:1"}}},
                     "backend.service and backend.addresses are set: keep one"),
    "no folder": (sidecar(socket={"folder": "run/db"}), "/socket/folder"),
    "folder above": (sidecar(socket={"folder": "/run/../etc"}), "/socket/folder"),
    "folder that the kubelet would expand": (sidecar(socket={"folder": "/$(AEGIS_ADMIN)"}), "/socket/folder"),
    "too long a folder": (sidecar(socket={"folder": "/" + "a" * 64}), "/socket/folder"),
    "folder with something in it": (sidecar(socket={"folder": "/run/aegis"}), "where the sidecar has something else: set it to another one"),
    "file in another folder": (sidecar(socket={"file": "../x"}), "/socket/file"),
    "too long a file": (sidecar(socket={"file": "a" * 41}), "/socket/file"),
    "mode that YAML makes a number of": (sidecar(socket={"mode": 0o666}), "got number, want string"),
    "two routes of one name": ({"sidecar": {"routes": [{"name": "a", "listenPort": 5432, "backend": {}}] * 2}}, "two routes are called a"),
    "more warm connections than there may be": (sidecar(env={"AEGIS_POOL_MIN_IDLE": "32"}),
                                               "env.AEGIS_POOL_MIN_IDLE is 32 and pool.size is 16: set pool.size to 32 or more"),
    "more connections than an endpoint takes": (sidecar(env={"AEGIS_ENDPOINT_MAX": "8"}),
                                                "env.AEGIS_ENDPOINT_MAX is 8 and pool.size is 16: set pool.size to 8 or less"),
    "start for ever": (sidecar(startTimeout="6m"), "startTimeout is 6m: set it to a duration from 0s to 5m"),
    "port with zeros": (sidecar(backend={"service": "a", "port": "05432"}), "backend.port is 05432: set it to a port's name"),
    "address without a port that is": (sidecar(backend={"service": "", "addresses": "a:65536"}), "has a:65536: set its port to one from 1"),
    "address with zeros": (sidecar(backend={"service": "", "addresses": "a:1,b:080"}), "has b:080: set its port to one from 1"),
    "address without brackets": (sidecar(backend={"service": "", "addresses": "::1:5432"}), "has ::1:5432: write HOST:PORT, and IPv6"),
    "address twice": (sidecar(backend={"service": "", "addresses": "a:1, A:1"}), "backend.addresses has A:1 twice: remove one"),
    "backup twice": (sidecar(backend={"service": "", "addresses": "a:1", "backups": "b:1,b:1"}), "backend.backups has b:1 twice"),
    "backup of itself in capitals": (sidecar(backend={"service": "", "addresses": "a:1", "backups": "A:1"}), "nothing stands in for itself"),
    "address of the sidecar": (sidecar(backend={"service": "", "addresses": "127.0.0.1:8081"}), "where the sidecar itself listens"),
    "socket over what the sidecar has": (sidecar(socket={"folder": "/var/run"}), "socket.folder is /var/run, where the sidecar"),
    "socket over the program": (sidecar(socket={"folder": "/usr/local/bin"}), "socket.folder is /usr/local/bin, where"),
    "selector of another syntax": (sidecar(backend={"service": "", "selector": "a={b}"}), 'backend.selector is "a={b}": set it to a label'),
    "selector that means none": (sidecar(backend={"service": "", "selector": " none"}), "set it to a label selector"),
    "address of no host": (sidecar(backend={"service": "", "addresses": "a:1,b..c:1"}), "backend.addresses has b..c:1: write HOST:PORT"),
    "address of no host by IPv6": (sidecar(backend={"service": "", "addresses": "[::1%1]:1"}), "backend.addresses has [::1%1]:1: write"),
    "address twice by IPv6": (sidecar(backend={"service": "", "addresses": "[::1]:1,[0::01]:1"}), "backend.addresses has [0::01]:1 twice"),
    "too many addresses": (sidecar(backend={"service": "", "addresses": ",".join(f"a{i}:1" for i in range(1000)), "backups": ",".join(f"b{i}:1" for i in range(25))}),
                           "backend.addresses and backend.backups have 1025 items: keep 1024 at most"),
    "address of another route": ({"sidecar": {"routes": [{"name": "a", "listenPort": 5432, "backend": {"addresses": "0.0.0.0:5433"}},
                                                         {"name": "b", "listenPort": 5433, "backend": {"service": "b"}}]}},
                                 "has 0.0.0.0:5433, where the sidecar itself listens for its route b: change it, or listenPort"),
    "module of the log": (sidecar(log="info,aegis::nope=debug"), "log has aegis::nope: there is no such module: name one of "),
    "no such variable": (sidecar(env={"AEGIS_MAX_SESSION": "5"}), "env.AEGIS_MAX_SESSION: there is no such variable: correct its name"),
    "variable of no route": (sidecar(env={"AEGIS_A__CHECK": "connect"}), "env.AEGIS_A__CHECK: there is no such variable of a route"),
    "blank variable": (sidecar(env={"AEGIS_MAX_SESSIONS": " "}), 'env.AEGIS_MAX_SESSIONS is " ": set it to auto, or a number from 1 to 1000000'),
    "variable without its unit": (sidecar(env={"AEGIS_SLOW_START": "30"}), 'env.AEGIS_SLOW_START is "30": set it to off, or a duration from 100ms'),
    "variable out of its range": (sidecar(env={"AEGIS_SLOW_START": "10m 1s"}), "set it to off, or a duration from 100ms to 10m"),
    "header of a shared connection": (sidecar(env={"AEGIS_PROXY_PROTOCOL": "v1"}), "env.AEGIS_PROXY_PROTOCOL is v1 and pool.mode is request: the header names one client"),
    "request of unknown bytes by a variable": (sidecar(protocol="tcp", check={"interval": "1s"}, env={"AEGIS_CHECK": "request"}), "env.AEGIS_CHECK is request and protocol is tcp"),
    "more warm connections than are kept": (sidecar(protocol="tcp", env={"AEGIS_POOL_MIN_IDLE": "65"}), "env.AEGIS_POOL_MIN_IDLE is 65 and at most 64 are kept"),
    "two backends by a variable": (sidecar(env={"AEGIS_KUBE_SELECTOR": "a=b"}), "backend.service and env.AEGIS_KUBE_SELECTOR are set: keep one"),
    "variable set twice": (sidecar(env={"AEGIS_DRAIN_DELAY": "1s"}), "env.AEGIS_DRAIN_DELAY: another value"),
}


@pytest.mark.parametrize("values, message", REFUSALS.values(), ids=REFUSALS)
def test_refusals_say_what_to_change(values, message):
    assert message in refusal(CHART, *INJECTS, values=values)


@pytest.mark.parametrize("nulls", [{"env": None, "check": None, "routes": None, "workers": None, "tcpUserTimeout": None, "name": None},
                                   {"check": {"interval": None, "fall": None}, "pool": {"mode": None}, "socket": {"folder": None, "file": None}}])
def test_a_value_of_which_all_lines_are_comments_is_an_empty_one(nulls):
    """It is a null then, which removes the default."""
    for chart, arguments in [(USER_CHART, []), (CHART, INJECTS)]:
        assert template(chart, *arguments, values=sidecar(**nulls)) == template(chart, *arguments, values=sidecar())


@pytest.mark.parametrize("nulls, message", [
    ({"protocol": None}, "missing property 'protocol'"), ({"resources": None}, "missing property 'resources'"),
    ({"control": None}, "missing property 'control'"), ({"queue": {"max": None}}, "at '/queue': missing property 'max'")])
def test_a_null_that_leaves_nothing_is_refused(nulls, message):
    assert message in refusal(CHART, values=sidecar(**nulls)) and message in refusal(USER_CHART, values=sidecar(**nulls))


def test_the_library_refuses_a_sidecar_without_backend():
    assert "set one of backend.service, backend.selector" in refusal(USER_CHART)


def library(values):
    spec = one(template(USER_CHART, values={"sidecar": values}), "Deployment")["spec"]["template"]["spec"]
    return spec["initContainers"][0], spec["volumes"]


def test_the_library_renders_what_the_component_patches_in():
    """manifests/component/sidecar.yaml is made from the library chart: UPDATE=1 makes it anew."""
    container, volumes = library({"backend": {"service": "store"}})
    labels = {"aegis-proxy.io/inject": "enabled"}
    patch = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "any"},
             "spec": {"template": {"metadata": {"labels": labels},
                                   "spec": {"initContainers": [container], "volumes": volumes}}}}
    file = ROOT / "manifests/component/sidecar.yaml"
    golden(file, "# Made from helm/aegis-sidecar by its test.\n" + yaml.dump(patch, sort_keys=False))


def test_the_library_renders_what_the_socket_component_patches_in():
    """manifests/socket is what a folder adds to the component: UPDATE=1 makes it anew."""
    plain, volumes = library({"backend": {"service": "store"}})
    container, more = library({"backend": {"service": "store"}, "socket": {"folder": "/run/db"}})
    added = {"name": "aegis", **{key: [item for item in container[key] if item not in plain[key]] for key in ["env", "volumeMounts"]}}
    spec = {"template": {"spec": {"initContainers": [added], "volumes": [item for item in more if item not in volumes]}}}
    for name, kind, version, at in [("sidecar", "Deployment", "apps/v1", spec), ("cronjob", "CronJob", "batch/v1", {"jobTemplate": {"spec": spec}})]:
        patch = {"apiVersion": version, "kind": kind, "metadata": {"name": "any"}, "spec": at}
        golden(ROOT / f"manifests/socket/{name}.yaml", "# Made from helm/aegis-sidecar by its test.\n" + yaml.dump(patch, sort_keys=False))


def golden(file, text):
    if os.environ.get("UPDATE"):
        file.write_text(text)
    assert file.read_text() == text, f"{file} differs: UPDATE=1 make test-cluster writes it"


def test_the_sidecar_needs_no_exemption_from_the_restricted_standard():
    for values in [{}, {"seccomp": {"type": "Localhost"}}]:
        container, volumes = library({"backend": {"service": "db"}, **values})
        context = container["securityContext"]
        assert context.pop("seccompProfile") in [
            {"type": "RuntimeDefault"}, {"type": "Localhost", "localhostProfile": "profiles/aegis.json"}]
        assert context == {
            "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True, "runAsNonRoot": True, "runAsUser": 65532, "runAsGroup": 65532}
        assert [set(volume) - {"name"} for volume in volumes] == [{"projected"}, {"emptyDir"}]
        assert container["restartPolicy"] == "Always"
        assert "lifecycle" not in container


def test_readiness_is_by_request():
    container, _ = library({"backend": {"service": "db"}})
    assert "readinessProbe" not in container
    assert container["startupProbe"]["httpGet"]["path"] == "/startupz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    container, _ = library({"backend": {"service": "db"}, "readiness": True})
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"


def place(fieldRef=None, resourceFieldRef=None):
    """Where a variable's value comes from."""
    return fieldRef["fieldPath"] if fieldRef else f"{resourceFieldRef['resource']} in {resourceFieldRef['divisor']}"


def test_every_value_reaches_the_environment():
    container, _ = library({
        "backend": {"selector": "app=db", "namespace": "data", "port": 5432}, "locality": "zone",
        "listenPort": 5000, "adminPort": 5001,
        "protocol": "chronos", "pool": {"mode": "request", "size": 3}, "queue": {"max": 1000000, "timeout": "6s"},
        "requestTimeout": "off", "connectTimeout": "2s", "balance": "key_hash", "stores": 3,
        "tcpUserTimeout": "11s", "backendDrain": "12s", "startTimeout": "13s", "log": "warn", "workers": 2,
        "resources": {"limits": {"cpu": 2}},
        "drain": {"delay": "2s", "timeout": "3s"}, "env": {"AEGIS_MAX_SESSIONS": "50"}})
    env = {item["name"]: item.get("value") or place(**item["valueFrom"]) for item in container["env"]}
    assert env == {
        "AEGIS_LISTEN": "127.0.0.1:5000,[::1]:5000", "AEGIS_ADMIN": "[::]:5001",
        "AEGIS_DISCOVERY": "kubernetes", "AEGIS_KUBE_SELECTOR": "app=db", "AEGIS_KUBE_NAMESPACE": "data",
        "AEGIS_KUBE_PORT": "5432", "AEGIS_KUBE_SNAPSHOT": "/run/aegis/endpoints.json",
        "AEGIS_CONTROL": "unix:/run/aegis/control.sock",
        "AEGIS_PROTOCOL": "chronos", "AEGIS_POOL_MODE": "request", "AEGIS_POOL_SIZE": "3",
        "AEGIS_QUEUE_MAX": "1000000", "AEGIS_QUEUE_TIMEOUT": "6s", "AEGIS_REQUEST_TIMEOUT": "off", "AEGIS_BALANCE": "key_hash",
        "AEGIS_KUBE_STORES": "3",
        "AEGIS_LOCALITY": "zone", "AEGIS_NODE_NAME": "spec.nodeName",
        "AEGIS_ZONE": "metadata.labels['topology.kubernetes.io/zone']",
        "AEGIS_CONNECT_TIMEOUT": "2s", "AEGIS_TCP_USER_TIMEOUT": "11s", "AEGIS_BACKEND_DRAIN": "12s",
        "AEGIS_START_TIMEOUT": "13s", "AEGIS_LOG": "warn", "AEGIS_WORKERS": "2",
        "AEGIS_CPU_REQUEST": "requests.cpu in 1m", "AEGIS_MEMORY_REQUEST": "requests.memory in 1",
        "AEGIS_CPU_LIMIT": "limits.cpu in 1m", "AEGIS_MEMORY_LIMIT": "limits.memory in 1",
        "AEGIS_DRAIN_DELAY": "2s", "AEGIS_DRAIN_TIMEOUT": "3s", "AEGIS_MAX_SESSIONS": "50"}


def test_backups_and_checks_reach_the_environment():
    values = {"backend": {"addresses": "db:5432", "backups": "one:5432,two:5433"}, "protocol": "http1", "failbackTime": "1m",
              "check": {"interval": "2s", "kind": "request", "path": "/healthz", "fall": 2, "rise": 5}}
    expected = {"BACKENDS": "db:5432", "BACKUPS": "one:5432,two:5433", "FAILBACK_TIME": "1m", "CHECK_INTERVAL": "2s",
                "CHECK": "request", "CHECK_PATH": "/healthz", "CHECK_FALL": "2", "CHECK_RISE": "5"}
    env = environment({**values, "backend": {"service": "", **values["backend"]}})
    assert {name: env.get(f"AEGIS_{name}") for name in expected} == expected
    env = environment({"backend": {"service": ""}, "routes": [{"name": "a", "listenPort": 5432, **values}]})
    assert {name: env.get(f"AEGIS_A__{name}") for name in expected} == expected
    assert not any("CHECK" in name or "FAILBACK" in name for name in environment({}))


def test_backups_may_be_reached():
    egress = {"networkPolicy": {"enabled": True, "egress": {"enabled": True}}}
    rules = one(template(CHART, values={**MATRIX["backups"], **egress}), "NetworkPolicy")["spec"]["egress"]
    assert [port["port"] for rule in rules for port in rule.get("ports", [])][-2:] == [5432, 5433]


ROUTES = [
    {"name": "orders-eu", "listenPort": 5432, "backend": {"service": "postgres", "port": 5432}, "protocol": "tcp"},
    {"name": "cache", "listenPort": 8081, "backend": {"service": "chronos", "namespace": "data"}, "balance": "key_hash",
     "pool": {"size": 3}, "queue": {"max": 1000000}, "locality": "zone", "stores": 3, "requestTimeout": "off"},
    {"name": "web", "listenPort": 8083, "backend": {"addresses": "web.example:80"}, "protocol": "http1",
     "pool": {"mode": "session"}},
]


def test_each_route_has_variables_of_its_own_and_shares_the_rest():
    container, volumes = library({"backend": {"service": ""}, "routes": ROUTES, "connectTimeout": "2s"})
    env = {item["name"]: item.get("value") or place(**item["valueFrom"]) for item in container["env"]}
    own = {name: value for name, value in env.items() if "__" in name}
    assert own == {
        "AEGIS_ORDERS_EU__LISTEN": "127.0.0.1:5432,[::1]:5432", "AEGIS_ORDERS_EU__DISCOVERY": "kubernetes",
        "AEGIS_ORDERS_EU__KUBE_SERVICE": "postgres", "AEGIS_ORDERS_EU__KUBE_NAMESPACE": "metadata.namespace",
        "AEGIS_ORDERS_EU__KUBE_PORT": "5432", "AEGIS_ORDERS_EU__KUBE_SNAPSHOT": "/run/aegis/endpoints-orders-eu.json",
        "AEGIS_ORDERS_EU__PROTOCOL": "tcp", "AEGIS_ORDERS_EU__POOL_MODE": "preconnect",
        "AEGIS_CACHE__LISTEN": "127.0.0.1:8081,[::1]:8081", "AEGIS_CACHE__DISCOVERY": "kubernetes",
        "AEGIS_CACHE__KUBE_SERVICE": "chronos", "AEGIS_CACHE__KUBE_NAMESPACE": "data", "AEGIS_CACHE__KUBE_PORT": "auto",
        "AEGIS_CACHE__KUBE_SNAPSHOT": "/run/aegis/endpoints-cache.json", "AEGIS_CACHE__PROTOCOL": "chronos",
        "AEGIS_CACHE__POOL_MODE": "request", "AEGIS_CACHE__POOL_SIZE": "3", "AEGIS_CACHE__QUEUE_MAX": "1000000",
        "AEGIS_CACHE__REQUEST_TIMEOUT": "off", "AEGIS_CACHE__BALANCE": "key_hash", "AEGIS_CACHE__KUBE_STORES": "3",
        "AEGIS_CACHE__LOCALITY": "zone",
        "AEGIS_WEB__LISTEN": "127.0.0.1:8083,[::1]:8083", "AEGIS_WEB__BACKENDS": "web.example:80",
        "AEGIS_WEB__PROTOCOL": "http1", "AEGIS_WEB__POOL_MODE": "session"}
    assert env["AEGIS_ROUTES"] == "orders-eu,cache,web"
    assert (env["AEGIS_CONNECT_TIMEOUT"], env["AEGIS_PROTOCOL"], env["AEGIS_NODE_NAME"]) == ("2s", "chronos", "spec.nodeName")
    assert not {"AEGIS_LISTEN", "AEGIS_BACKENDS", "AEGIS_DISCOVERY", "AEGIS_KUBE_SERVICE", "AEGIS_LOCALITY"} & set(env)
    assert "/run/aegis" in [mount["mountPath"] for mount in container["volumeMounts"]]
    container, volumes = library({"backend": {"service": ""}, "routes": ROUTES[2:]})
    assert env["AEGIS_CONTROL"] == "unix:/run/aegis/control.sock"
    container, volumes = library({"backend": {"service": ""}, "routes": ROUTES[2:], "control": False})
    assert "/run/aegis" not in [mount["mountPath"] for mount in container["volumeMounts"]], "nothing to keep"


def test_a_socket_is_mounted_in_both_containers_by_one_value():
    spec = one(template(USER_CHART, values={"sidecar": {"backend": {"service": "db"}, "socket": {"folder": "/run/db"}}}),
               "Deployment")["spec"]["template"]["spec"]
    (container,) = spec["initContainers"]
    env = {item["name"]: item.get("value") for item in container["env"]}
    assert env["AEGIS_LISTEN"] == "unix:/run/db/aegis.sock,127.0.0.1:8081,[::1]:8081"
    assert env["AEGIS_SOCKET_MODE"] == "0666", "who mounts it runs as another user"
    assert {"name": "aegis-unix", "mountPath": "/run/db"} in container["volumeMounts"]
    assert spec["containers"][0]["volumeMounts"] == [{"name": "aegis-unix", "mountPath": "/run/db", "readOnly": True}]
    assert {"name": "aegis-unix", "emptyDir": {}} in spec["volumes"]
    plain = one(template(USER_CHART, values={"sidecar": {"backend": {"service": "db"}}}), "Deployment")["spec"]["template"]["spec"]
    assert not plain["containers"][0]["volumeMounts"] and "aegis-unix" not in str(plain)


def test_each_route_has_a_socket_of_its_own():
    routes = [{**ROUTES[0], "socket": {"file": ".s.PGSQL.5432"}}, ROUTES[1]]
    container, _ = library({"backend": {"service": ""}, "routes": routes, "socket": {"folder": "/run/db", "mode": "0660"}})
    env = {item["name"]: item.get("value") for item in container["env"]}
    assert env["AEGIS_ORDERS_EU__LISTEN"] == "unix:/run/db/.s.PGSQL.5432,127.0.0.1:5432,[::1]:5432"
    assert env["AEGIS_CACHE__LISTEN"] == "unix:/run/db/cache.sock,127.0.0.1:8081,[::1]:8081"
    assert env["AEGIS_SOCKET_MODE"] == "0660"


@pytest.mark.parametrize("change, message", [
    ({"backend": {"service": "db"}}, "routes and backend.service are set: give each route its backend"),
    ({"backend": {"service": "", "namespace": "db"}}, "routes and backend.namespace are set"),
    ({"routes": [ROUTES[0], ROUTES[0]]}, "two routes are called orders-eu"),
    ({"socket": {"file": "x"}}, "routes and socket.file are set: give each route its socket.file"),
    ({"routes": [ROUTES[0], {**ROUTES[1], "socket": {"file": "orders-eu.sock"}}]},
     "the socket.file of route cache is orders-eu.sock, which is another one's"),
    ({"routes": [ROUTES[0], {**ROUTES[1], "listenPort": 5432}]}, "the listenPort of route cache is 5432"),
    ({"routes": [{**ROUTES[0], "listenPort": 8082}]}, "the listenPort of route orders-eu is 8082"),
    ({"routes": [{**ROUTES[0], "backend": {}}]}, "route orders-eu has no backend"),
    ({"routes": [{**ROUTES[0], "name": "Orders"}]}, "/routes/0/name"),
    ({"routes": [{**ROUTES[0], "workers": 2}]}, "workers"),
    ({"routes": [{**ROUTES[0], "balance": "key_hash"}]}, "set balance to least_conn, or protocol to chronos"),
    ({"routes": [{**ROUTES[1], "locality": "failover"}]}, "no store has the keys of another one"),
    ({"routes": [{**ROUTES[0], "check": {"interval": "1s", "kind": "request"}}]}, "only chronos and http1 have a request for that"),
    ({"routes": [{**ROUTES[0], "backend": {"addresses": "a:1", "backups": "a:1"}}]}, "nothing stands in for itself"),
    ({"routes": [{**ROUTES[0], "connectTimeout": "6m"}]}, "connectTimeout is 6m: set it to a duration from 1ms to 5m"),
    ({"routes": [ROUTES[1]], "env": {"AEGIS_POOL_MIN_IDLE": "4"}}, "env.AEGIS_POOL_MIN_IDLE is 4 and pool.size is 3: set pool.size"),
    ({"routes": [ROUTES[1]], "env": {"AEGIS_CACHE__ENDPOINT_MAX": "2"}}, "env.AEGIS_CACHE__ENDPOINT_MAX is 2 and pool.size is 3"),
    ({"routes": [{**ROUTES[0], "name": f"r{i}", "listenPort": 5000 + i} for i in range(11)], "socket": {"folder": "/run/db"}},
     "there are 11 routes, and each listens by IPv4, by IPv6 and with socket.folder at a socket: keep 10 at most"),
    ({"routes": ROUTES, "env": {"AEGIS_WEB__PROTOCOL": "tcp"}}, "env.AEGIS_WEB__PROTOCOL: another value of the chart"),
])
def test_routes_that_do_not_fit_are_refused(change, message):
    values = {"sidecar": {"backend": {"service": ""}, "routes": ROUTES[:1], **change}}
    assert message in refusal(USER_CHART, values=values)


INJECTED_ROUTES = {**CLIENTS, "sidecar": {"routes": [*ROUTES, {"name": "mine", "listenPort": 8084, "backend": {"selector": "app=db"}}],
                                          "socket": {"folder": "/run/db"}}}


@pytest.mark.parametrize("injects", [[], INJECTS], ids=["no-policy-api", "policy-api"])
def test_the_injecting_chart_takes_routes(injects):
    """Each may be read and reached where it is."""
    egress = {"networkPolicy": {"enabled": True, "egress": {"enabled": True}}}
    objects = template(CHART, *injects, values={**INJECTED_ROUTES, **egress})
    validate(objects)
    roles = {item["metadata"]["namespace"]: sorted(resource for rule in item["rules"] for resource in rule["resources"])
             for item in objects if item["kind"] == "Role"}
    own = ["statefulsets"] if injects else []
    assert roles == {"db": ["endpointslices", "pods", *own], "data": ["endpointslices"]}
    for name in ["shop-endpoints", "shop-test"]:
        found = [item["metadata"]["namespace"] for item in objects if item["kind"] == "RoleBinding" and item["metadata"]["name"] == name]
        assert sorted(found) == ["data", "db"]
    rules = one(objects, "NetworkPolicy")["spec"]["egress"][2:]
    reached = [([place_["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for place_ in rule.get("to", [])],
                [port["port"] for port in rule.get("ports", [])]) for rule in rules]
    assert reached == [(["db"], [5432]), (["data"], []), ([], [80]), (["db"], [])]
    probe = one([item for item in objects if item["kind"] == "Pod"], "Pod")
    assert "127.0.0.1 5432" in probe["spec"]["containers"][0]["command"][2], "the first route"
    assert "The route web speaks http1 and its pool mode is session." in notes(values=INJECTED_ROUTES)


def test_a_selector_may_be_read_only_where_it_is():
    objects = template(CHART, values={**CLIENTS, "backendNamespaces": ["more"], "sidecar": {"routes": [
        {"name": "a", "listenPort": 5432, "backend": {"selector": "app=a", "namespace": "one"}},
        {"name": "b", "listenPort": 5433, "backend": {"service": "b", "namespace": "two"}}]}})
    roles = {item["metadata"]["namespace"]: [rule["resources"] for rule in item["rules"]] for item in objects if item["kind"] == "Role"}
    assert roles == {"more": [["endpointslices"], ["pods"]], "one": [["pods"]], "two": [["endpointslices"]]}


def test_workers_follow_the_request_of_cpu():
    """A container without a limit has all cores of its node: no guide to how many workers it needs."""
    container, _ = library({"backend": {"service": "db"}})
    env = {item["name"]: place(**item["valueFrom"]) for item in container["env"] if "valueFrom" in item}
    assert env["AEGIS_WORKERS"] == "requests.cpu in 1"
    # Without a limit this would be the node's CPU, so it must not be asked for.
    assert "AEGIS_CPU_LIMIT" not in env


def test_the_last_endpoints_outlive_a_restart_of_the_container():
    container, volumes = library({"backend": {"service": "db"}})
    (mount,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/run/aegis"]
    assert {"name": mount["name"], "emptyDir": {}} in volumes
    container, volumes = library({"backend": {"addresses": "db:1"}, "control": False})
    assert "AEGIS_KUBE_SNAPSHOT" not in str(container) and "emptyDir" not in str(volumes)


def test_commands_are_taken_by_a_socket_that_only_the_sidecar_has():
    for backend in [{"service": "db"}, {"addresses": "db:1"}]:
        spec = one(template(USER_CHART, values={"sidecar": {"backend": backend}}), "Deployment")["spec"]["template"]["spec"]
        (container,) = spec["initContainers"]
        env = {item["name"]: item.get("value") for item in container["env"]}
        assert env["AEGIS_CONTROL"] == "unix:/run/aegis/control.sock"
        assert {"name": "aegis-state", "mountPath": "/run/aegis"} in container["volumeMounts"]
        assert {"name": "aegis-state", "emptyDir": {}} in spec["volumes"]
        assert "aegis-state" not in str(spec["containers"])
    assert "AEGIS_CONTROL" not in environment({"control": False})
    elsewhere = environment({"control": False, "env": {"AEGIS_CONTROL": "unix:/run/aegis/other.sock"}})
    assert elsewhere["AEGIS_CONTROL"] == "unix:/run/aegis/other.sock"


MYSQL = {"name": "shop", "listenPort": 3306, "backend": {"service": "mariadb"}, "protocol": "tcp"}


@pytest.mark.parametrize("values, route, preset", [
    ({"check": {"interval": "1s"}}, {}, "AEGIS_PRESET"),
    ({"check": {"interval": "1s"}}, {}, "AEGIS_SHOP__PRESET"),
    ({}, {"check": {"interval": "1s"}}, "AEGIS_SHOP__PRESET"),
    ({"env": {"AEGIS_SHOP__CHECK_INTERVAL": "1s"}}, {}, "AEGIS_PRESET")])
def test_checks_that_a_server_of_mysql_minds_are_refused_for_each_route(values, route, preset):
    def of(**env):
        routes = [{**MYSQL, **route}, *ROUTES[1:2]]
        return {"backend": {"service": ""}, "routes": routes, **values, "env": {**values.get("env", {}), **env}}
    message = f"check.interval is 1s and env.{preset} is mysql: such a server counts"
    assert message in refusal(USER_CHART, values={"sidecar": of(**{preset: "mysql"})})
    library(of(AEGIS_SHOP__PRESET="none", AEGIS_CACHE__PRESET="none", AEGIS_PRESET="mysql"))


def test_the_start_is_asked_for_once_and_waited_for():
    """A probe that fails is asked again a second later, which every start would pay."""
    container, _ = library({"backend": {"service": "db"}})
    probe = container["startupProbe"]
    assert (probe["periodSeconds"], probe["timeoutSeconds"], probe["failureThreshold"]) == (1, 10, 8)
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


def milliseconds(text):
    number, unit = re.fullmatch(r"(\d+)([a-z]+)", text).groups()
    return int(number) * {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}[unit]


def test_no_duration_passes_that_the_program_refuses():
    rows = re.findall(r"^\| `(AEGIS_\w+)` .*\((off, or )?a duration from (\w+) to (\w+)\) \|", (ROOT / "docs/CONFIGURATION.md").read_text(), re.M)
    bounds = {variable: (off, milliseconds(least), milliseconds(most)) for variable, off, least, most in rows}
    named = (ROOT / "helm/aegis-sidecar/templates/_sidecar.tpl").read_text()
    charts = re.findall(r"^\S+: {variable: (\w+), min: (\w+), max: (\w+)(, orOff: true)?}", named, re.M)
    assert len(charts) == 10
    for variable, least, most, off in charts:
        program = bounds[variable]
        assert bool(off) == bool(program[0]), variable
        assert program[1] <= milliseconds(least) < milliseconds(most) <= program[2], variable


def test_clients_may_watch_each_namespace_that_they_may_choose():
    objects = template(CHART, values={**CLIENTS, **BACKEND, "backendNamespaces": ["db", "data"]})
    for kind in ["Role", "RoleBinding"]:
        found = [item["metadata"]["namespace"] for item in objects
                 if item["kind"] == kind and item["metadata"]["name"] == "shop-endpoints"]
        assert found == ["db", "data"], kind


@pytest.mark.parametrize("balance, stores, reads", [("key_hash", "auto", True), ("key_hash", 3, False), ("least_conn", "auto", False)])
def test_stateful_sets_may_be_read_where_they_tell_the_stores(balance, stores, reads):
    role = one(template(CHART, values={**CLIENTS, **sidecar(balance=balance, stores=stores)}), "Role")
    assert ("statefulsets" in str(role["rules"])) is reads, role


def environment(values):
    container, _ = library({"backend": {"service": "db"}, **values})
    return {item["name"]: item.get("value") for item in container["env"]}


@pytest.mark.parametrize("values, mode", [
    ({}, "request"), ({"protocol": "http1"}, "request"), ({"protocol": "tcp"}, "preconnect"),
    ({"pool": {"mode": "session"}}, "session"), ({"pool": {"mode": "preconnect"}}, "preconnect"),
])
def test_the_pool_mode_suits_the_protocol_unless_it_is_set(values, mode):
    assert environment(values)["AEGIS_POOL_MODE"] == mode


def test_numbers_that_the_charts_repeat_are_the_programs():
    """All but what the charts choose on purpose: see docs/KUBERNETES.md."""
    rows = re.findall(r"^\| `(AEGIS_\w+)` \| `(.*?)` \|", (ROOT / "docs/CONFIGURATION.md").read_text(), re.M)
    defaults = dict(rows)
    assert len(rows) > 40
    computed = ["AEGIS_CPU_REQUEST", "AEGIS_MEMORY_REQUEST", "AEGIS_MEMORY_LIMIT"]
    given = {name: value for name, value in environment({}).items() if name not in computed}
    other = {name: value for name, value in given.items() if value != defaults.get(name)}
    assert other == {
        "AEGIS_DISCOVERY": "kubernetes", "AEGIS_KUBE_SERVICE": "db", "AEGIS_KUBE_NAMESPACE": None,
        "AEGIS_KUBE_SNAPSHOT": "/run/aegis/endpoints.json", "AEGIS_WORKERS": None,
        "AEGIS_CONTROL": "unix:/run/aegis/control.sock",
        "AEGIS_PROTOCOL": "chronos", "AEGIS_POOL_MODE": "request", "AEGIS_DRAIN_DELAY": "0s"}


def cel_to_json(text):
    """A literal of CEL without look-ups, as data: type names go, field names are quoted."""
    text = re.sub(r"Object(\.\w+)+\{", "{", text)
    return json.loads(re.sub(r'([{,] ?)(\w+):', r'\1"\2":', text))


@pytest.mark.parametrize("values", [{}, {"readiness": True, "locality": "zone"}, {"seccomp": {"type": "Localhost"}},
                                    {"env": {"AEGIS_NODE_NAME": 'a"b\\c'}, "resources": {"requests": {"cpu": 1}}},
                                    {"workers": "auto", "resources": {"limits": {"cpu": 4}}},
                                    {"balance": "key_hash"}, {"protocol": "tcp"}, {"pool": {"mode": "session"}},
                                    {"backend": {"addresses": "cel:5432"}},
                                    {"check": {"kind": "request", "fall": 2}}])
def test_the_policy_injects_what_the_library_renders(values):
    values = {"backend": {"service": "db", "namespace": "data"}, **values}
    objects = template(CHART, *INJECTS, values={"sidecar": values}, release="aegis")
    policy = one(objects, "MutatingAdmissionPolicy")
    expression = policy["spec"]["mutations"][0]["jsonPatch"]["expression"]
    # Without annotations each look-up gives its default.
    chosen = {v["name"]: re.sub(r".*\.orValue\((.*)\)", r"\1", v["expression"]) for v in policy["spec"]["variables"]}
    if "?" in chosen["poolMode"]:
        assert chosen["poolMode"] == 'variables.protocol == "tcp" ? "preconnect" : "request"'
        chosen["poolMode"] = '"preconnect"' if chosen["protocol"] == '"tcp"' else '"request"'
    # What is not chosen is not added.
    expression = re.sub(r'\(variables\.\w+ == "" \? \[\] : \[.*?\}\]\) \+', "", expression)
    expression = re.sub(r'\(variables\.socketFolder == "" \? \[\] : object.*?\}\)\) \+', "", expression)
    expression = re.sub(r'\(variables\.socketFolder == "" \? "" : [^)]*\) \+ ', "", expression)
    expression = re.sub(r"variables\.(\w+)", lambda found: chosen[found[1]], expression)
    values_of = re.findall(r'value: (Object\.spec\.\w+\{.*?\})\s+\}\]', expression, re.S)
    injected = [cel_to_json(value) for value in values_of]
    container, volumes = library(values)
    amounts = container["resources"]
    for kind in ["requests", "limits"]:
        for name, amount in amounts.setdefault(kind, {}).items():
            amounts[kind][name] = str(amount)
    assert injected == [container, *volumes]


def test_the_golden_policy():
    """The look-ups, as the API server gets them."""
    policy = one(template(CHART, *INJECTS, values=BACKEND, release="aegis"), "MutatingAdmissionPolicy")
    variables = [f"{v['name']}: {v['expression']}" for v in policy["spec"]["variables"]]
    look_ups = re.findall(r'\S+ variables\.\w+',
                          policy["spec"]["mutations"][0]["jsonPatch"]["expression"])
    golden(HERE / "golden/look-ups.txt", "\n".join(variables + look_ups) + "\n")


def notes(*arguments, values):
    return helm("install", "shop", CHART, "--namespace", "db", "--dry-run=client", "--values", "-",
                *arguments, input=yaml.dump(values)).stdout.split("NOTES:")[1]


def test_the_notes_say_what_to_do_next():
    text = notes(values={**BACKEND, **CLIENTS})
    assert "NO INJECTION" in text and "MutatingAdmissionPolicy" in text and "aegis-sidecar" in text
    assert "NOBODY" not in text
    assert "kubectl --namespace shop port-forward pod/POD 8082" in text
    text = notes(values={**BACKEND, "injection": {"enabled": False}})
    assert "Injection is off" in text and "NO INJECTION" not in text
    assert "--set 'clients[0].namespace=shop" in text
    assert "epoll" in text
    assert "epoll on most nodes" not in notes(values=sidecar(seccomp={"type": "Localhost"}))


@pytest.mark.parametrize("arguments, labels", [
    (INJECTS, {"shop.aegis-proxy.io/status": "injected"}), ([], {"aegis-proxy.io/inject": "enabled"})], ids=["injecting", "by-hand"])
def test_a_monitor_scrapes_its_own_releases_sidecars(arguments, labels):
    values = {**CLIENTS, **sidecar(adminPort=9082)}
    monitor = one(template(CHART, *arguments, values={**values, "podMonitor": {"enabled": True}}), "PodMonitor")
    assert monitor["spec"]["selector"]["matchLabels"] == labels
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] == "aegis-9082"
    service = one(template(CHART, *arguments, values={**values, "serviceMonitor": {"enabled": True}}), "Service")
    assert service["spec"]["selector"] == labels
    container, _ = library({"backend": {"service": "db"}, "adminPort": 9082})
    assert container["ports"][0]["name"] == "aegis-9082"


def test_thresholds_and_labels_reach_the_rule():
    rule = one(template(CHART, values=EVERYTHING), "PrometheusRule")
    expressions = {item["alert"]: item["expr"] for item in rule["spec"]["groups"][0]["rules"]}
    assert expressions["AegisFirstByteSlow"].endswith("> 0.25")
    assert expressions["AegisPoolMisses"].endswith("> 0.2")
    paths = {item["annotations"]["runbook_url"] for item in rule["spec"]["groups"][0]["rules"]}
    assert "docs/OPERATIONS.md#aegispoolmisses" in paths, "where it can be read is not known"
    values = {**EVERYTHING, "prometheusRule": {"enabled": True, "runbookBase": "https://git.example/aegis/blob/main/"}}
    rule = one(template(CHART, values=values), "PrometheusRule")
    urls = {item["annotations"]["runbook_url"] for item in rule["spec"]["groups"][0]["rules"]}
    assert urls == {f"https://git.example/aegis/blob/main/{path}" for path in paths}
    assert one(template(CHART, values=EVERYTHING), "PodMonitor")["metadata"]["labels"]["release"] == "prometheus"


def test_packages_hold_what_their_links_point_to(tmp_path):
    helm("package", CHART, "--destination", tmp_path)
    package = next(tmp_path.glob("*.tgz"))
    assert kinds(template(package, values=EVERYTHING)) == kinds(template(CHART, values=EVERYTHING))
    listing = run("tar", "-tvzf", package).stdout
    assert "files/rules.yaml" in listing and " -> " not in listing
