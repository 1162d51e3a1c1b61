"""What the charts refuse is what the program refuses at its start: else `helm install` is content and the pods crash."""

import copy
import json
import subprocess

import pytest
import yaml

from tools import ROOT, USER_CHART, WORK, helm, one, run

# What the kubelet fills in.
FILLED_IN = {"metadata.namespace": "shop", "requests.cpu": "1", "requests.memory": "67108864", "limits.memory": "268435456"}

LISTED = {"service": "", "addresses": "db:5432"}
TIMES = ["1m 30s", "1m30s", "1.5s", "200 millis", "99ms 1ms", "010s", "off", " off ", "false", "", " ", "30", "0s", "-1s", "1 parsec", "10m 1ms",
         "9" * 30 + "s"]
ADDRESSES = ["a:1", "A:1 , b.:65535", "_a.b-c:1", "1a:1", "[::1]:5432", "[2001:DB8::1:0]:1", "[::ffff:1.2.3.4]:1", "[1:2:3:4:5:6:1.2.3.4]:1",
             "a:1,a.:1", "127.0.0.1:8082", "x" * 63 + ":1",
             "a:0", "a:65536", "a:01", "a", "a:", ":1", "a:1,", "a..b:1", "-a:1", "a-:1", "ä:1", "*:1", "u@a:1", "unix:1", "x" * 64 + ":1",
             ".".join(["x" * 63] * 4) + ":1", "1.2.3:1", "1.2.3.4.:1", "01.2.3.4:1", "256.1.1.1:1", "a.1:1",
             "::1:1", "[::1%1]:1", "[a]:1", "[]:1", "[:::]:1", "[1::2::3]:1", "[1:2:3:4:5:6:7:8::]:1", "[12345::]:1", "[1.2.3.4]:1", "[::1.2.3]:1",
             "[::1]1:1", "[::1:1", "a:1,A:1", "[::1]:1,[0::01]:1", "1.2.3.4:1,[::FFFF:102:304]:1",
             "127.0.0.1:8081", "0.0.0.0:8081", "[::]:8081", "[::ffff:127.0.0.1]:8081",
             ",".join(f"a{i}:1" for i in range(1024)), ",".join(f"a{i}:1" for i in range(1025))]
# A value, the variable that it stands for, other values, and texts.
TEXTS = [
    ("backend.addresses", "AEGIS_BACKENDS", {"backend": LISTED}, ADDRESSES),
    ("backend.selector", "AEGIS_KUBE_SELECTOR", {"backend": {"service": "", "selector": "a=b"}},
     ["a=b", " a == b ", "a!=b,!c", "x.io/a notin (b, c),d>1", "a=", " ", "none ", "a={b}", "a=ä", "a=b;c=d", "a=b:c"]),
    ("log", "AEGIS_LOG", {}, ["info", "info,aegis::io=debug", "warn,aegis::ends=off", "info,aegis::nope=debug", "aegis::=debug"]),
    ("env.AEGIS_SLOW_START", "AEGIS_SLOW_START", {}, TIMES),
    ("env.AEGIS_KUBE_WATCH_TIMEOUT", "AEGIS_KUBE_WATCH_TIMEOUT", {}, ["2000ms", "1s 1000ms", "1500ms", "0s", "off"]),
    ("env.AEGIS_CONNECT_ATTEMPTS", "AEGIS_CONNECT_ATTEMPTS", {}, ["1", " 8 ", "010", "0", "9", "+1", "1.0", "one", " "]),
    ("env.AEGIS_RETRY_BUDGET", "AEGIS_RETRY_BUDGET", {}, ["off", "false", "0", "1000", "1001", "20%", "none"]),
    ("env.AEGIS_CPU_LIMIT", "AEGIS_CPU_LIMIT", {}, ["none", "0", "1", "auto", "-1", "0.5"]),
    ("env.AEGIS_PIN", "AEGIS_PIN", {}, ["auto", "true", "off", "On", "yes"]),
    ("env.AEGIS_ZONE", "AEGIS_ZONE", {}, ["a b", " "]),
    ("env.AEGIS_SOCKET_OWNER", "AEGIS_SOCKET_OWNER", {}, ["none", "1", "1:2", ":2", "1:", "root"]),
    ("env.AEGIS_CHECK_PATH", "AEGIS_CHECK_PATH", {}, ["/$a", "/" + "x" * 1023, "/" + "x" * 1024, "/a b", "/#", "a"]),
    ("env.AEGIS_PROXY_PROTOCOL", "AEGIS_PROXY_PROTOCOL", {}, ["off", "v1"]),
    ("env.AEGIS_PROXY_PROTOCOL", "AEGIS_PROXY_PROTOCOL", {"protocol": "tcp"}, ["v2", "v3"]),
    ("env.AEGIS_POOL_MIN_IDLE", "AEGIS_POOL_MIN_IDLE", {}, ["16", "17", "020"]),
    ("env.AEGIS_POOL_MIN_IDLE", "AEGIS_POOL_MIN_IDLE", {"protocol": "tcp"}, ["64", "65"]),
    ("env.AEGIS_POOL_MIN_IDLE", "AEGIS_POOL_MIN_IDLE", {"protocol": "tcp", "env": {"AEGIS_PRESET": "mysql"}}, ["4096", "4097"]),
    ("env.AEGIS_POOL_MAX_IDLE", "AEGIS_POOL_MAX_IDLE", {"protocol": "tcp", "env": {"AEGIS_POOL_MIN_IDLE": "2"}}, ["0", "2"]),
    ("env.AEGIS_ENDPOINT_MAX", "AEGIS_ENDPOINT_MAX", {"protocol": "tcp", "env": {"AEGIS_POOL_MIN_IDLE": "2"}}, ["1", "2"]),
    ("env.AEGIS_CHECK", "AEGIS_CHECK", {"protocol": "tcp", "check": {"interval": "1s"}}, ["connect", "request"]),
    ("env.AEGIS_CHECK", "AEGIS_CHECK", {"protocol": "tcp"}, ["request"]),
    ("env.AEGIS_KUBE_SELECTOR", "AEGIS_KUBE_SELECTOR", {}, ["none", "a=b"]),
    ("env.AEGIS_BACKUPS", "AEGIS_BACKUPS", {"backend": LISTED}, ["none", "b:1, unix:/run/c", "b", "unix:/run/"]),
    ("env.AEGIS_LOG_FORMATS", "AEGIS_LOG_FORMATS", {}, ["json"]),
    ("env.AEGIS_A__LOG_ENDS", "AEGIS_A__LOG_ENDS", {}, ["all"]),
]


@pytest.fixture(scope="module")
def program():
    run("cargo", "build", "--locked", "--bin", "aegis-proxy", cwd=ROOT, timeout=1200)
    return WORK.parent / "debug/aegis-proxy"


def rendered(values):
    """The environment of the sidecar, or why there is none."""
    result = helm("template", "shop", USER_CHART, "--values", "-", check=False, input=json.dumps({"sidecar": values}))
    if result.returncode != 0:
        return None, result.stderr
    (container,) = one(list(filter(None, yaml.safe_load_all(result.stdout))), "Deployment")["spec"]["template"]["spec"]["initContainers"]

    def value(name, value=None, valueFrom=None):
        place = next(iter(valueFrom.values())) if valueFrom else {}
        return value if valueFrom is None else FILLED_IN[place.get("fieldPath") or place["resource"]]
    return {item["name"]: value(**item) for item in container["env"]}, ""


def with_value(values, path, text):
    values = copy.deepcopy(values)
    *folders, name = path.split(".")
    place = values
    for folder in folders:
        place = place.setdefault(folder, {})
    place[name] = text
    return values


@pytest.mark.parametrize("path, variable, values, texts", TEXTS, ids=[f"{row[0]}-{at}" for at, row in enumerate(TEXTS)])
def test_the_chart_takes_what_the_program_takes(program, path, variable, values, texts):
    values = {"backend": {"service": "db"}, **values}
    env, why = rendered(values)
    assert env, why
    for text in texts:
        taken = subprocess.run([program, "check"], env={**env, variable: text}, capture_output=True, text=True)
        found, why = rendered(with_value(values, path, text))
        assert (found is not None) == (taken.returncode == 0), f"{path}={text!r:.200}: {taken.stderr or why or 'both'}"
        assert found is None or found[variable] == text
