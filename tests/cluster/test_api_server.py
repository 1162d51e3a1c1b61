"""Charts and manifests at a real API server of Kubernetes 1.36 or later: KUBEBUILDER_ASSETS is the
folder with kube-apiserver and etcd."""

import copy
import json
import os
import shlex

import pytest
import yaml

from api_server import api_server
from containers import eventually
from tools import CHART, INJECTS, ROOT, USER_CHART, kustomize, one, template

ASSETS = os.environ.get("KUBEBUILDER_ASSETS")
pytestmark = pytest.mark.skipif(not ASSETS, reason="KUBEBUILDER_ASSETS is not set: nothing was tried at a real API server")

VALUES = {"sidecar": {"backend": {"service": "chronos"}}, "clients": [{"namespace": "shop", "serviceAccount": "web"}]}

POD = {
    "apiVersion": "v1", "kind": "Pod",
    "metadata": {"name": "web", "namespace": "shop", "labels": {"aegis-proxy.io/inject": "enabled"}},
    "spec": {
        "serviceAccountName": "web", "automountServiceAccountToken": False,
        "containers": [{
            "name": "web", "image": "web",
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
                                "runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}}]},
}


def pod(annotations=None, labels=None, namespace="shop", **spec):
    item = copy.deepcopy(POD)
    item["metadata"]["namespace"] = namespace
    item["metadata"]["annotations"] = {f"aegis-proxy.io/{name}": value for name, value in (annotations or {}).items()}
    if labels is not None:
        item["metadata"]["labels"] = labels
    item["spec"] |= spec
    return item


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with api_server(ASSETS, tmp_path_factory.mktemp("api-server")) as server:
        for namespace in ["db", "shop", "stock", "other"]:
            server.kubectl("create", "namespace", namespace)
        # The strictest standard: the sidecar has to do without an exemption.
        server.kubectl("label", "namespace", "shop", "pod-security.kubernetes.io/enforce=restricted")
        for namespace in ["shop", "stock", "other"]:
            server.kubectl("create", "serviceaccount", "web", "--namespace", namespace)
        server.kubectl("create", "serviceaccount", "default", "--namespace", "db", check=False)
        yield server


def chosen(release):
    return {"aegis-proxy.io/inject": release}


def install(server, verb="install", values=VALUES, release="aegis", chart=CHART):
    result = server.helm(verb, release, chart, "--namespace", "db", "--values", "-", input=yaml.dump(values))
    in_force(server, release, values)
    return result


def in_force(server, release, values):
    """The server takes a moment to put policies into force."""
    service = values["sidecar"]["backend"]["service"]
    namespace = values["clients"][0]["namespace"]
    probe = pod(None if service else {"service": "chronos"}, chosen(release), namespace)
    eventually(lambda: not refusal(server, probe) and (env(dry(server, probe), name_of(release)) or {}).get(
        "AEGIS_KUBE_SERVICE") == (service or "chronos"), lambda: f"no injection: {refusal(server, probe)}")
    unknown = pod({"service": "chronos", "unknown": ""}, chosen(release), namespace)
    eventually(lambda: refusal(server, unknown), lambda: "no refusal")


def uninstall(server, release):
    result = server.helm("uninstall", release, "--namespace", "db", "--wait")
    for namespace in ["shop", "stock", "other"]:
        item = pod(labels=chosen(release), namespace=namespace)
        eventually(lambda: not refusal(server, item) and not sidecars(dry(server, item)), lambda: "still in force")
    return result


@pytest.fixture
def releases(server):
    """Installs releases, and removes them after the test."""
    installed = []
    # That of the tests above.
    if server.helm("status", "aegis", "--namespace", "db", check=False).returncode == 0:
        uninstall(server, "aegis")

    def start(name, **values):
        clients = values.pop("clients", VALUES["clients"])
        given = {"clients": clients, "sidecar": {"backend": {"service": name}, **values.pop("sidecar", {})}, **values}
        installed.append(name)
        return install(server, values=given, release=name)

    yield start
    for name in installed:
        uninstall(server, name)


def name_of(release):
    """Those of the tests: the others find one that takes `enabled`."""
    return f"aegis-{release}" if release in ["second", "fourth"] else "aegis"


@pytest.fixture(scope="module")
def injecting(server):
    install(server)
    yield server
    if server.helm("status", "aegis", "--namespace", "db", check=False).returncode == 0:
        uninstall(server, "aegis")


def dry(server, item, check=True):
    return server.create(item, "--dry-run=server", check=check)


def refusal(server, item):
    """Why the server refuses a pod, or nothing."""
    result = dry(server, item, check=False)
    return "" if isinstance(result, dict) else result.stderr


def warnings(server, item):
    """What the server warns of when it creates a pod."""
    relaxed = [] if server.complete else ["--validate=false"]
    result = server.kubectl("create", "-f", "-", "--dry-run=server", *relaxed, check=False, input=json.dumps(item))
    assert result.returncode == 0, result.stderr
    return result.stderr


def sidecars(item):
    return [c["name"] for c in item["spec"].get("initContainers", []) if c["name"].startswith("aegis")]


def sidecar(item, name="aegis"):
    found = [c for c in item["spec"].get("initContainers", []) if c["name"] == name]
    return found[0] if found else None


def env(item, name="aegis"):
    container = sidecar(item, name)
    return container and {e["name"]: e.get("value") for e in container["env"]}


def test_the_commands_of_the_readme(server):
    """Those that need no registry of images: install, label, and there is an injected pod."""
    section = (ROOT / "README.md").read_text().split("### In a cluster")[1]
    commands = [shlex.split(line) for line in section.split("```")[1].replace("\\\n", "").splitlines()[1:]]
    assert [command[0] for command in commands] == ["make", "docker", "helm", "kubectl"]
    template_ = {"metadata": {"labels": {"app": "web"}}, "spec": POD["spec"]}
    server.create({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": "shop"},
                   "spec": {"selector": {"matchLabels": {"app": "web"}}, "template": template_}})
    server.helm(*commands[2][1:], cwd=ROOT)
    server.kubectl(*commands[3][1:])
    patched = server.get("deployment", "web", "--namespace", "shop")["spec"]["template"]
    new_pod = pod(labels=patched["metadata"]["labels"])
    eventually(lambda: sidecar(dry(server, new_pod)), lambda: "not injected")
    created = dry(server, new_pod)
    assert sidecar(created)["image"] == "registry.example/aegis-proxy:0.1.0"
    assert (env(created)["AEGIS_KUBE_SERVICE"], env(created)["AEGIS_KUBE_NAMESPACE"]) == ("chronos", "db")
    for account, may in [("shop:web", True), ("other:web", False)]:
        assert server.may(f"system:serviceaccount:{account}", "watch", "endpointslices.discovery.k8s.io", "db") is may
    uninstall(server, "aegis")


def test_a_labelled_pod_is_really_injected_under_the_restricted_standard(injecting):
    created = injecting.create(POD)
    stored = injecting.get("pod", "web", "--namespace", "shop")
    injecting.kubectl("delete", "pod", "web", "--namespace", "shop", "--now")
    assert created == stored
    rendered = template(CHART, values={"sidecar": VALUES["sidecar"]}, namespace="db", release="aegis")
    expected = next(item for item in rendered if item["kind"] == "Pod")["spec"]["initContainers"][0]
    container = sidecar(created)
    for key, value in expected.items():
        if key in ["startupProbe", "livenessProbe"]:
            # The server adds defaults.
            value = {**value, "successThreshold": 1, "httpGet": {**value["httpGet"], "scheme": "HTTP"}}
        assert container[key] == value, key
    assert set(container) - set(expected) == {"terminationMessagePath"}
    assert [volume["name"] for volume in created["spec"]["volumes"]] == ["aegis-token", "aegis-state"]


def test_a_second_admission_changes_nothing(injecting):
    once = dry(injecting, POD)
    again = {key: copy.deepcopy(once[key]) for key in ["apiVersion", "kind", "spec"]}
    again["metadata"] = {key: once["metadata"][key] for key in ["name", "namespace", "labels"]}
    assert dry(injecting, again)["spec"] == once["spec"]


def test_an_unlabelled_pod_is_untouched(injecting):
    for labels in [{}, chosen("disabled")]:
        item = pod(labels=labels)
        created = dry(injecting, item)
        assert sidecar(created) is None and "volumes" not in created["spec"]
        assert (created["metadata"].get("labels") or {}) == labels
        assert "aegis" not in warnings(injecting, item)


def test_a_release_acts_in_its_clients_namespaces_only(injecting):
    """Not even a pod that cannot have the sidecar is refused elsewhere."""
    for labels in [chosen("enabled"), chosen("aegis"), {"aegis.aegis-proxy.io/inject": "enabled"}]:
        item = pod({"servcie": "UPPER"}, labels, namespace="other", containers=containers(name="aegis"), hostNetwork=True)
        created = dry(injecting, item)
        assert not created["spec"].get("initContainers") and created["metadata"]["labels"] == labels
    injecting.kubectl("label", "namespace", "other", "aegis-proxy.io/inject=aegis")
    assert sidecar(dry(injecting, pod(labels={}, namespace="other"))) is None
    injecting.kubectl("label", "namespace", "other", "aegis-proxy.io/inject-")


def test_a_label_that_does_nothing_is_warned_of(injecting):
    for item, value in [(pod(labels=chosen("aegsi")), "aegsi"), (pod(labels=chosen("true")), "true"),
                        (pod(namespace="other"), "enabled")]:
        said = warnings(injecting, item)
        assert "the pod starts WITHOUT a sidecar" in said and f"aegis-proxy.io/inject: {value} in the namespace" in said
    assert "WITHOUT" not in warnings(injecting, POD)
    injecting.kubectl("label", "namespace", "other", "aegis-proxy.io/inject=aegsi")
    eventually(lambda: "aegis-proxy.io/inject: aegsi in the namespace other" in warnings(injecting, pod(labels={}, namespace="other")),
               lambda: "no warning")
    assert "WITHOUT" not in warnings(injecting, pod(labels=chosen("disabled"), namespace="other"))
    injecting.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "any", "namespace": "other"}})
    assert "aegis" not in injecting.kubectl("delete", "configmap", "any", "--namespace", "other").stderr
    injecting.kubectl("label", "namespace", "other", "aegis-proxy.io/inject-")
    late = pod(labels={}, namespace="other")
    late["metadata"]["name"] = "late"
    injecting.create(late)
    labelled = injecting.kubectl("label", "pod", "late", "--namespace", "other", "aegis-proxy.io/inject=enabled").stderr
    assert "does nothing to a pod that is there already: create it anew" in labelled
    assert "aegis" not in injecting.kubectl("label", "pod", "late", "--namespace", "other", "app=x").stderr
    injecting.kubectl("delete", "pod", "late", "--namespace", "other", "--now")
    template_ = {"metadata": {"labels": {"app": "web"}}, "spec": POD["spec"]}
    workload = {"apiVersion": "apps/v1", "kind": "Deployment",
                "metadata": {"name": "labelled", "namespace": "shop", "labels": chosen("enabled")},
                "spec": {"selector": {"matchLabels": {"app": "web"}}, "template": template_}}
    assert "does nothing here: set it in spec.template.metadata.labels" in warnings(injecting, workload)
    template_["metadata"]["labels"] |= chosen("enabled")
    assert "aegis" not in warnings(injecting, workload)
    by_hand = pod(labels=chosen("by-hand"), initContainers=[sidecar(dry(injecting, POD))],
                  volumes=dry(injecting, POD)["spec"]["volumes"])
    assert "WITHOUT" not in warnings(injecting, by_hand)
    rows = injecting.get("configmaps", "--all-namespaces", "--selector", "aegis-proxy.io/inject")["items"]
    assert [(row["metadata"]["labels"]["aegis-proxy.io/inject"], row["data"]["namespaces"]) for row in rows] == [("aegis", "shop")]


def test_a_namespace_chooses_for_its_pods_and_a_pod_chooses_otherwise(injecting):
    injecting.kubectl("label", "namespace", "shop", "aegis-proxy.io/inject=aegis")
    eventually(lambda: sidecar(dry(injecting, pod(labels={}))), lambda: "not injected")
    item = pod(labels={})
    del item["metadata"]["labels"]
    assert sidecar(dry(injecting, item)), "a pod without any label"
    assert sidecar(dry(injecting, pod(labels={"app": "web"})))["name"] == "aegis"
    assert "set it to tcp" in refusal(injecting, pod({"protocol": "redis"}, labels={}))
    for value in ["disabled", "another"]:
        assert sidecar(dry(injecting, pod(labels=chosen(value)))) is None
    # Pods that cannot have it go without where it was not they who chose.
    injecting.kubectl("label", "namespace", "shop", "pod-security.kubernetes.io/enforce-")
    for unfit in [{"hostNetwork": True}, WINDOWS, {"nodeSelector": {"kubernetes.io/os": "windows"}}]:
        item = pod(labels={}, **unfit)
        eventually(lambda: not refusal(injecting, item), lambda: refusal(injecting, item))
        assert sidecar(dry(injecting, item)) is None
    injecting.kubectl("label", "namespace", "shop", "aegis-proxy.io/inject-", "pod-security.kubernetes.io/enforce=restricted")
    eventually(lambda: not sidecar(dry(injecting, pod(labels={}))), lambda: "still injected")


def test_a_pod_that_brings_its_sidecar_along_is_its_own_affair(injecting):
    """As by the library chart or the component, whatever its annotations say."""
    once = dry(injecting, POD)
    brought = pod({"servcie": "x", "protocol": "redis"}, initContainers=once["spec"]["initContainers"], volumes=once["spec"]["volumes"])
    assert refusal(injecting, brought) == ""
    assert dry(injecting, brought)["spec"]["initContainers"] == once["spec"]["initContainers"]


def test_a_sidecar_of_routes_is_seen_as_one(injecting):
    """As by the library chart: it has no AEGIS_LISTEN."""
    values = {"routes": [{"name": "a", "listenPort": 5432, "backend": {"service": "a"}}]}
    spec = one(template(USER_CHART, values={"sidecar": values}), "Deployment")["spec"]["template"]["spec"]
    brought = pod(initContainers=[{**spec["initContainers"][0], "name": "own"}], volumes=spec["volumes"])
    assert sidecars(dry(injecting, brought)) == [] and "WITHOUT" not in warnings(injecting, brought)
    taken = pod(labels=chosen("aegis"), initContainers=[
        {**spec["initContainers"][0], "name": "own", "ports": [], "env": [{"name": "AEGIS_A__LISTEN", "value": "127.0.0.1:8081"}]}],
        volumes=[{"name": "aegis-token-of-own", "emptyDir": {}}])
    taken["spec"]["initContainers"][0]["volumeMounts"] = []
    assert "8081 or 8082, too is own" in refusal(injecting, taken)


def test_the_sidecar_comes_before_what_is_there(injecting):
    other = {**POD["spec"]["containers"][0], "name": "migrate"}
    created = dry(injecting, pod(initContainers=[other], volumes=[{"name": "mine", "emptyDir": {}}]))
    assert [c["name"] for c in created["spec"]["initContainers"]] == ["aegis", "migrate"]
    assert [v["name"] for v in created["spec"]["volumes"]] == ["mine", "aegis-token", "aegis-state"]


def test_the_pod_may_mount_its_own_token_as_well(injecting):
    created = dry(injecting, pod(automountServiceAccountToken=True))
    mounts = sidecar(created)["volumeMounts"]
    assert [mount["name"] for mount in mounts] == ["aegis-token", "aegis-state"], mounts


def test_a_pod_overrides_by_annotation(injecting):
    created = dry(injecting, pod({
        "service": "other", "protocol": "http1", "pool-mode": "session",
        "cpu-request": "250m", "memory-request": "96Mi", "cpu-limit": "2", "memory-limit": "1Gi"}))
    assert env(created)["AEGIS_KUBE_SERVICE"] == "other"
    assert (env(created)["AEGIS_PROTOCOL"], env(created)["AEGIS_POOL_MODE"]) == ("http1", "session")
    assert sidecar(created)["resources"] == {
        "requests": {"cpu": "250m", "memory": "96Mi"}, "limits": {"cpu": "2", "memory": "1Gi"}}
    assert env(dry(injecting, POD))["AEGIS_KUBE_SERVICE"] == "chronos"
    assert (env(dry(injecting, POD))["AEGIS_PROTOCOL"], env(dry(injecting, POD))["AEGIS_POOL_MODE"]) == ("chronos", "request")
    assert env(dry(injecting, pod({"protocol": "tcp"})))["AEGIS_POOL_MODE"] == "preconnect"
    assert "cpu" not in sidecar(dry(injecting, POD))["resources"]["limits"]


def test_a_pod_chooses_everything_by_annotation(injecting):
    created = dry(injecting, pod({
        "service": "other", "namespace": "data", "port": "5432", "balance": "key_hash", "log-level": "info,aegis::io=debug",
        "queue-timeout": "1s", "request-timeout": "off", "connect-timeout": "3ms", "tcp-user-timeout": "4s",
        "backend-drain": "5s", "failback-time": "6s", "check-interval": "7s", "image": "registry.example:5000/aegis-proxy:0.2.0@sha256:" + "a" * 64}))
    chosen_ = {name: env(created)[f"AEGIS_{name}"] for name in [
        "KUBE_SERVICE", "KUBE_NAMESPACE", "KUBE_PORT", "BALANCE", "LOG", "QUEUE_TIMEOUT", "REQUEST_TIMEOUT",
        "CONNECT_TIMEOUT", "TCP_USER_TIMEOUT", "BACKEND_DRAIN", "FAILBACK_TIME", "CHECK_INTERVAL"]}
    assert list(chosen_.values()) == ["other", "data", "5432", "key_hash", "info,aegis::io=debug", "1s", "off", "3ms", "4s", "5s", "6s", "7s"]
    assert sidecar(created)["image"].startswith("registry.example:5000/aegis-proxy:0.2.0@")
    assert created["metadata"]["labels"]["aegis.aegis-proxy.io/version"] == "0.2.0"
    # What nobody chose is the program's own default, and a limit that is not there is not asked for.
    assert not {"AEGIS_TCP_USER_TIMEOUT", "AEGIS_BACKEND_DRAIN", "AEGIS_FAILBACK_TIME", "AEGIS_CHECK_INTERVAL", "AEGIS_CPU_LIMIT"} & set(env(dry(injecting, POD)))


def test_the_cores_of_a_pod_reach_its_sidecar(injecting):
    created = dry(injecting, pod({"cpu-request": "2500m", "cpu-limit": "2500m"}))
    sources = {e["name"]: e["valueFrom"]["resourceFieldRef"] for e in sidecar(created)["env"]
               if "resourceFieldRef" in e.get("valueFrom", {})}
    assert sources == {
        "AEGIS_WORKERS": {"resource": "requests.cpu", "divisor": "1"},
        "AEGIS_CPU_REQUEST": {"resource": "requests.cpu", "divisor": "1m"},
        "AEGIS_CPU_LIMIT": {"resource": "limits.cpu", "divisor": "1m"},
        "AEGIS_MEMORY_REQUEST": {"resource": "requests.memory", "divisor": "1"},
        "AEGIS_MEMORY_LIMIT": {"resource": "limits.memory", "divisor": "1"}}


def test_a_pod_has_a_socket_by_one_annotation(injecting):
    """All of its containers mount the folder, whatever else they mount, and the sidecar of no other release."""
    mine = [{"name": "mine", "mountPath": "/mine"}]
    apps = [{**POD["spec"]["containers"][0], "name": name, **more} for name, more in [("web", {}), ("job", {"volumeMounts": mine})]]
    other = {**apps[1], "name": "migrate"}
    created = dry(injecting, pod({"socket-folder": "/run/db", "socket-file": ".s.PGSQL.5432"}, containers=apps,
                                 initContainers=[other], volumes=[{"name": "mine", "emptyDir": {}}]))
    mount = {"name": "aegis-unix", "mountPath": "/run/db"}
    got = {c["name"]: c["volumeMounts"] for c in created["spec"]["containers"] + created["spec"]["initContainers"]}
    readable = {**mount, "readOnly": True}
    assert mount in got.pop("aegis")
    assert got == {"web": [readable], "job": [*mine, readable], "migrate": [*mine, readable]}
    assert env(created)["AEGIS_LISTEN"] == "unix:/run/db/.s.PGSQL.5432,127.0.0.1:8081,[::1]:8081"
    assert env(created)["AEGIS_SOCKET_MODE"] == "0666"
    assert {"name": "aegis-unix", "emptyDir": {}} in created["spec"]["volumes"]
    assert [c["name"] for c in created["spec"]["initContainers"]] == ["aegis", "migrate"]
    plain = dry(injecting, POD)
    assert "unix" not in str(plain["spec"]) and "SOCKET" not in str(plain["spec"])
    again = {key: copy.deepcopy(created[key]) for key in ["apiVersion", "kind", "spec"]}
    again["metadata"] = {key: created["metadata"][key] for key in ["name", "namespace", "labels", "annotations"]}
    assert dry(injecting, again)["spec"] == created["spec"], "a second admission changes nothing"


def containers(**more):
    return [{**POD["spec"]["containers"][0], **more}]


# Of what the sidecar sets there, the API server allows nothing.
WINDOWS = {"os": {"name": "windows"}, "containers": [{"name": "web", "image": "web"}]}
SERVICES = ["UPPER", "a,b", "../../x", "a" * 300, "$(AEGIS_ADMIN)", "none", "a.b", ".", "-a", "a-", "a b", "a\n", "é"]
QUANTITIES = [("cpu-request", value) for value in ["much", "-1", "0", "0m", "257", "1e9", "", "1 ", "100mm", "NaN"]] + [
    ("memory-request", "64m"), ("memory-request", "-64Mi"), ("memory-limit", "256"), ("memory-limit", "2MB"),
    ("cpu-limit", "0"), ("cpu-limit", "2x"), ("memory-limit", "9" * 40)]
DURATIONS = [("queue-timeout", "5"), ("queue-timeout", "1ms"), ("queue-timeout", "61m"), ("queue-timeout", "off"),
             ("request-timeout", "2d"), ("request-timeout", "1s1s"), ("connect-timeout", "0s"), ("connect-timeout", "6m"),
             ("connect-timeout", "9999999999999999999999s"), ("tcp-user-timeout", "999ms"), ("backend-drain", "soon"),
             ("failback-time", "2h"), ("failback-time", "off"), ("check-interval", "99ms"),
             ("request-timeout", ""), ("request-timeout", "$(AEGIS_ADMIN)")]
REFUSED = [
    *((pod({"service": value}), "aegis-proxy.io/service") for value in SERVICES),
    (pod({"service": ""}), "set the annotation aegis-proxy.io/service to the name of a Service"),
    *((pod({"namespace": value}), "aegis-proxy.io/namespace") for value in ["", "DB", "auto", "a.b", "a" * 64, "$(X)"]),
    *((pod({"port": value}), "to a number from 1 to 65535") for value in ["", "0", "65536", "99999999999999999999", "-1", "A", "a b", "1-2"]),
    *((pod({name: value}), f"the annotation aegis-proxy.io/{name}") for name, value in QUANTITIES),
    *((pod({name: value}), f"the annotation aegis-proxy.io/{name}") for name, value in DURATIONS),
    (pod({"cpu-request": "2", "cpu-limit": "1"}), "so that the limit is at least the request"),
    (pod({"memory-request": "1Gi"}), "so that the limit is at least the request"),
    (pod({"balance": "hash"}), "set it to least_conn, round_robin, random_two, peak_ewma, source_hash or key_hash"),
    (pod({"balance": "key_hash", "protocol": "http1"}), "or set aegis-proxy.io/balance to least_conn"),
    (pod({"log-level": "wran"}), "set it to off, error, warn, info, debug or trace"),
    (pod({"image": " "}), "set it to an image, such as aegis-proxy:0.1.0"),
    *((pod({"image": value}), "set it to an image") for value in ["", "$(X)", "UPPER", "a:b:c", "a//b", "a:" + "b" * 129, "a" * 513]),
    *((pod({"socket-folder": value}), "aegis-proxy.io/socket-folder is") for value in [
        "run", "/", "/a:b", "/run/../etc", "/run/", "/run/aegis", "/run/aegis/x", "/var/run", "/usr/local/bin", "/" + "a" * 64, "/$(X)"]),
    *((pod({"socket-file": value}), "to the name of a file such as db.sock") for value in ["", "..", "a/b", "a" * 41, "$(X)", "a,b"]),
    (pod({"socket-folder": "/db"}, containers=containers(volumeMounts=[{"name": "mine", "mountPath": "/db"}]),
         volumes=[{"name": "mine", "emptyDir": {}}]), "sockets are to be is web: set the annotation aegis-proxy.io/socket-folder"),
    (pod(volumes=[{"name": "aegis-unix", "emptyDir": {}}]), "or aegis-unix, as the sidecar's are: rename it"),
    (pod({"routes": "a"}), "unknown annotation aegis-proxy.io/routes: remove it"),
    (pod({"servcie": "x"}), "unknown annotation aegis-proxy.io/servcie: remove it. There are service, namespace"),
    (pod({"protocol": "redis"}), "aegis-proxy.io/protocol is redis: set it to tcp, chronos or http1"),
    (pod({"protocol": "a\nb"}), "aegis-proxy.io/protocol: set it to tcp, chronos or http1"),
    (pod({"pool-mode": "all"}), "aegis-proxy.io/pool-mode is all: set it to preconnect, session or request"),
    (pod({"protocol": "tcp", "pool-mode": "session"}), "set the annotation aegis-proxy.io/pool-mode to preconnect"),
    (pod(containers=containers(ports=[{"containerPort": 8081}])), "8081 or 8082, too is web: change it there, or set sidecar.listenPort"),
    (pod(containers=containers(ports=[{"containerPort": 8082}])), "too is web: change it there"),
    (pod(initContainers=[{**containers()[0], "name": "init", "ports": [{"containerPort": 8081}]}]), "too is init: change it there"),
    (pod(namespace="stock", containers=containers(ports=[{"containerPort": 8082, "hostPort": 8082}])), "too is web: change it there"),
    (pod(containers=containers(name="aegis")), "a container of the pod is called aegis, as the sidecar is: rename it"),
    (pod(initContainers=[{**containers()[0], "name": "aegis"}]), "a container of the pod is called aegis, as the sidecar is: rename it"),
    (pod(volumes=[{"name": "aegis-token", "emptyDir": {}}]), "a volume of the pod is called aegis-token, aegis-state or"),
    (pod(volumes=[{"name": "aegis-state", "emptyDir": {}}]), "aegis-state or aegis-unix, as the sidecar's are: rename it"),
    (pod(namespace="stock", hostNetwork=True), "set hostNetwork to false"),
    (pod(namespace="stock", **WINDOWS), "the pod is for Windows, and the sidecar is a program for Linux: remove the label"),
    (pod(namespace="stock", nodeSelector={"kubernetes.io/os": "windows"}), "the pod is for Windows"),
]


@pytest.fixture(scope="module")
def two_namespaces(injecting):
    """Also in a namespace that lets pods have more."""
    install(injecting, "upgrade", {**VALUES, "clients": [*VALUES["clients"], {"namespace": "stock", "serviceAccount": "web"}]})
    eventually(lambda: sidecar(dry(injecting, pod(namespace="stock"))), lambda: "not injected")
    return injecting


def test_what_cannot_work_is_refused_with_what_to_change(two_namespaces):
    wrong = []
    for item, message in REFUSED:
        said = refusal(two_namespaces, item)
        if message not in said or "aegis: " not in said:
            wrong.append((message, item["metadata"]["annotations"], said))
    assert not wrong


def test_what_works_is_not_refused(two_namespaces):
    fine = [
        pod({"service": "a" * 63}), pod({"service": "9a"}), pod({"port": "web"}), pod({"port": "65535"}), pod({"port": "auto"}),
        pod({"cpu-request": "0.5"}), pod({"cpu-request": "1"}), pod({"memory-request": "1e8", "memory-limit": "1G"}),
        pod({"backend-drain": "off"}), pod({"queue-timeout": "1h"}), pod({"log-level": "off"}),
        # Others' annotations, the application's own ports and a port of the node's.
        pod({}, containers=containers(ports=[{"containerPort": 8080}, {"containerPort": 8082, "protocol": "UDP"}])),
        pod(namespace="stock", containers=containers(ports=[{"containerPort": 80, "hostPort": 8082}])),
        pod(containers=containers(name="aegis-app"), volumes=[{"name": "aegis", "emptyDir": {}}]),
    ]
    fine[0]["metadata"]["annotations"] |= {"second.aegis-proxy.io/servcie": "x", "example.org/aegis": "y"}
    assert [refusal(two_namespaces, item) for item in fine] == [""] * len(fine)
    assert all(sidecars(dry(two_namespaces, item)) for item in fine)


def test_no_amount_is_refused_without_help(two_namespaces):
    """Whatever a pod asks for, either it is created or Aegis says what to change."""
    odd = ["1n", "1u", "0.1m", "+1", "1.", ".5", "1e-3", "1E3", "1Ei", "0x10", "\u0661", "1Ki", "64Mi ", "1e400", "-0", "1e-400",
           "100000000.5", "1.5Gi", "1e8", "0.0001", "999999999999999999999999"]
    unhelpful = []
    for name in ["cpu-request", "cpu-limit", "memory-request", "memory-limit"]:
        for value in odd:
            said = refusal(two_namespaces, pod({name: value}))
            if said and "aegis: the" not in said:
                unhelpful.append((name, value, said))
            if "WITHOUT" in said:
                unhelpful.append((name, value, "is refused, and starts in no way"))
    assert not unhelpful


def test_large_pods_are_no_burden(two_namespaces):
    """An expression that costs too much is refused without help, and so is the pod."""
    item = pod(containers=[container for n in range(200) for container in containers(
        name=f"web-{n}", ports=[{"containerPort": 10000 + port} for port in range(20)],
        env=[{"name": f"V{v}", "value": "x"} for v in range(20)])])
    item["metadata"]["annotations"] |= {f"example.org/{n}": "x" * 20 for n in range(3000)}
    assert refusal(two_namespaces, item) == ""
    item["metadata"]["annotations"] |= {"aegis-proxy.io/service": "x" * 150_000}
    assert "the annotation aegis-proxy.io/service: set it to the name of a Service" in refusal(two_namespaces, item)
    item["metadata"]["annotations"]["aegis-proxy.io/service"] = "chronos"
    item["metadata"]["annotations"]["aegis-proxy.io/socket-folder"] = "/run/db"
    assert all(c["volumeMounts"][0]["mountPath"] == "/run/db" for c in dry(two_namespaces, item)["spec"]["containers"])
    item["metadata"]["annotations"] = {f"aegis-proxy.io/{n}": "x" for n in range(3000)}
    assert "unknown annotation: remove it. There are service" in refusal(two_namespaces, item)


def test_clients_may_watch_endpoints_and_nothing_else(injecting):
    web = "system:serviceaccount:shop:web"
    endpoints = "endpointslices.discovery.k8s.io"
    for verb in ["get", "list", "watch"]:
        assert injecting.may(web, verb, endpoints, "db")
        assert not injecting.may("system:serviceaccount:shop:other", verb, endpoints, "db")
        assert not injecting.may(web, verb, endpoints, "shop")
        for resource in ["pods", "secrets", "configmaps"]:
            assert not injecting.may(web, verb, resource, "db")
    for verb in ["create", "update", "delete"]:
        assert not injecting.may(web, verb, endpoints, "db")


def test_the_test_pod_of_the_chart_is_injected_too(injecting):
    """Also where a selector leaves no namespace, for it is in none of the clients'."""
    install(injecting, "upgrade", {**VALUES, "injection": {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "shop"}}}})
    hooks = [hook for hook in yaml.safe_load_all(injecting.helm("get", "hooks", "aegis", "--namespace", "db").stdout)
             if hook["metadata"]["annotations"]["helm.sh/hook"] == "test"]
    for hook in sorted(hooks, key=lambda item: item["kind"] == "Pod"):
        hook["metadata"].setdefault("namespace", "db")
        injecting.create(hook)
    account = "system:serviceaccount:db:aegis-test"
    assert env(injecting.get("pod", "aegis-test", "--namespace", "db"))["AEGIS_KUBE_SERVICE"] == "chronos"
    assert injecting.may(account, "watch", "endpointslices.discovery.k8s.io", "db")
    for hook in hooks:
        injecting.kubectl("delete", "--now", hook["kind"], "aegis-test", "--namespace", "db")
    assert sidecar(dry(injecting, pod(namespace="db", serviceAccountName="default"))) is None, "no other pod is there"
    install(injecting, "upgrade")


def test_a_selector_of_namespaces_leaves_some_out(injecting):
    clients = [{"namespace": namespace, "serviceAccount": "web"} for namespace in ["shop", "stock"]]
    injecting.kubectl("label", "namespace", "shop", "team=a")
    install(injecting, "upgrade", {**VALUES, "clients": clients, "injection": {"namespaceSelector": {"matchLabels": {"team": "a"}}}})
    assert sidecar(dry(injecting, pod(namespace="stock"))) is None
    assert sidecar(dry(injecting, POD))
    install(injecting, "upgrade")
    injecting.kubectl("label", "namespace", "shop", "team-")


def test_a_release_without_a_service_asks_for_the_annotation(injecting):
    open_values = {"sidecar": {"backend": {"service": ""}}, "clients": VALUES["clients"]}
    install(injecting, "upgrade", open_values)
    assert env(dry(injecting, pod({"service": "mine"})))["AEGIS_KUBE_SERVICE"] == "mine"
    eventually(lambda: "set the annotation aegis-proxy.io/service" in refusal(injecting, POD), lambda: "not refused")
    install(injecting, "upgrade")


def test_routing_by_key_refuses_a_pod_that_chooses_otherwise(injecting):
    keyed = {**VALUES, "sidecar": {**VALUES["sidecar"], "balance": "key_hash"}}
    install(injecting, "upgrade", keyed)
    eventually(lambda: "remove the annotations" in refusal(injecting, pod({"pool-mode": "session"})), lambda: "not refused")
    assert env(dry(injecting, POD))["AEGIS_BALANCE"] == "key_hash"
    install(injecting, "upgrade")


def test_what_a_pod_chooses_goes_together_with_what_the_release_checks(injecting):
    values = {**VALUES["sidecar"], "locality": "failover", "check": {"interval": "1s", "kind": "request"}}
    install(injecting, "upgrade", {**VALUES, "sidecar": values})
    for annotations, message in [
            ({"balance": "key_hash"}, "no store has the keys of another one, and the balance is key_hash: "
                                      "set the annotation aegis-proxy.io/balance to least_conn"),
            ({"protocol": "tcp"}, "or aegis-proxy.io/check-interval to off")]:
        eventually(lambda: message in refusal(injecting, pod(annotations)), lambda: refusal(injecting, pod(annotations)) or "not refused")
    created = env(dry(injecting, pod({"protocol": "tcp", "check-interval": "off"})))
    assert (created["AEGIS_CHECK_INTERVAL"], created["AEGIS_CHECK"], created["AEGIS_POOL_MODE"]) == ("off", "request", "preconnect")
    assert env(dry(injecting, POD))["AEGIS_CHECK_INTERVAL"] == "1s"
    install(injecting, "upgrade")


def test_a_pod_mode_goes_together_with_the_sizes_of_the_release(injecting):
    values = {**VALUES["sidecar"], "protocol": "tcp", "env": {"AEGIS_POOL_MIN_IDLE": "32"}}
    install(injecting, "upgrade", {**VALUES, "sidecar": values})
    item = pod({"protocol": "chronos"})
    message = "env.AEGIS_POOL_MIN_IDLE is 32 and pool.size is 16: set pool.size to 32 or more"
    eventually(lambda: message in refusal(injecting, item), lambda: refusal(injecting, item) or "not refused")
    assert refusal(injecting, pod({"protocol": "chronos", "pool-mode": "session"})) == ""
    assert env(dry(injecting, POD))["AEGIS_POOL_MODE"] == "preconnect"
    install(injecting, "upgrade")


def test_an_upgrade_is_in_force_and_an_uninstall_leaves_nothing(injecting):
    install(injecting, "upgrade", {**VALUES, "sidecar": {"backend": {"service": "newer"}}})
    # Once more, unchanged, as a second run of a pipeline does.
    install(injecting, "upgrade", {**VALUES, "sidecar": {"backend": {"service": "newer"}}})
    said = uninstall(injecting, "aegis").stderr
    assert "the release aegis injects no more" in said and "start WITHOUT its sidecar" in said, said
    kinds = ("mutatingadmissionpolicies,mutatingadmissionpolicybindings,validatingadmissionpolicies,"
             "validatingadmissionpolicybindings,roles,rolebindings,configmaps,services,pods,serviceaccounts,secrets")
    left = injecting.get(kinds, "--all-namespaces", "--selector", "app.kubernetes.io/instance=aegis")["items"]
    assert left == []
    # One policy stays, which says it again to whoever creates a pod that asks for a sidecar.
    assert "the pod starts WITHOUT a sidecar" in warnings(injecting, POD)
    assert "WITHOUT" not in warnings(injecting, pod(labels={}))


def test_everything_else_of_the_chart_is_accepted(server):
    values = {**VALUES, "dashboard": {"enabled": True}, "seccomp": {"installer": {"enabled": True}}}
    server.helm("install", "extra", CHART, "--namespace", "db", "--values", "-", input=yaml.dump(values))
    server.helm("uninstall", "extra", "--namespace", "db")


def test_the_demo_is_accepted(server):
    objects = kustomize(ROOT / "manifests/demo")
    server.create(next(item for item in objects if item["kind"] == "Namespace"))
    demo = ROOT / "manifests/demo"
    server.apply("--dry-run=server", "-k", demo)
    applied = server.apply("-k", demo)
    # Violations of the namespace's standard come as warnings on workloads.
    assert "would violate" not in applied.stderr, applied.stderr
    again = server.apply("-k", demo).stdout
    assert "created" not in again and ("serverside-applied" in again or "unchanged" in again)
    client = "system:serviceaccount:aegis-demo:client"
    assert server.may(client, "watch", "endpointslices.discovery.k8s.io", "aegis-demo")
    assert server.may(client, "watch", "statefulsets.apps", "aegis-demo")
    assert not server.may(client, "watch", "secrets", "aegis-demo")
    assert server.may("system:serviceaccount:aegis-demo:prometheus", "list", "pods", "aegis-demo")
    deployment = server.get("deployment", "client", "--namespace", "aegis-demo")
    template_ = deployment["spec"]["template"]
    assert sidecar(template_)["restartPolicy"] == "Always"
    server.create({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "by-hand", "namespace": "aegis-demo"},
                   "spec": template_["spec"]}, "--dry-run=server")
    server.kubectl("delete", "--wait=false", "-k", demo)


def test_a_pod_with_any_sidecar_gets_no_other_unless_it_names_the_release(server, releases):
    releases("first")
    once = dry(server, POD)
    container = {**sidecar(once), "name": "aegis-mine",
                 "volumeMounts": [{"name": "own", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}]}
    brought = {"initContainers": [container], "volumes": [{**once["spec"]["volumes"][0], "name": "own"}]}
    assert sidecars(dry(server, pod(**brought))) == ["aegis-mine"]
    assert "8081 or 8082, too is aegis-mine" in refusal(server, pod(labels=chosen("first"), **brought))


def test_releases_inject_side_by_side(server, releases):
    """Each its own pods, or the same."""
    releases("first")
    # It has no backend for pods that do not name one, and other ports.
    releases("second", sidecar={"backend": {"service": "second"}, "listenPort": 9081, "adminPort": 9082},
             podMonitor={"enabled": False})
    for release in ["first", "second"]:
        created = dry(server, pod(labels=chosen(release)))
        assert sidecars(created) == [name_of(release)]
        assert env(created, name_of(release))["AEGIS_KUBE_SERVICE"] == release
        set_labels = {key for key in created["metadata"]["labels"] if key.endswith("/status")}
        assert set_labels == {"aegis-proxy.io/status", f"{release}.aegis-proxy.io/status"}
    # The first one took the label before, and it stays so.
    for release in ["second", "first"]:
        server.helm("upgrade", release, CHART, "--namespace", "db", "--reuse-values")
        assert env(dry(server, POD))["AEGIS_KUBE_SERVICE"] == "first"
    # Twice chosen is chosen.
    twice = dry(server, pod(labels={**chosen("first"), "first.aegis-proxy.io/inject": "enabled"}))
    assert sidecars(twice) == ["aegis"] and len(twice["spec"]["volumes"]) == 2
    assert sidecars(dry(server, pod(labels={"first.aegis-proxy.io/inject": "disabled"}))) == []
    both = pod({"log-level": "warn"}, {**chosen("first"), "second.aegis-proxy.io/inject": "enabled"})
    both["metadata"]["annotations"] |= {"second.aegis-proxy.io/service": "mine", "second.aegis-proxy.io/log-level": "debug"}
    created = dry(server, both)
    assert sorted(sidecars(created)) == ["aegis", "aegis-second"]
    got = {name: [env(created, name)[f"AEGIS_{key}"] for key in ["KUBE_SERVICE", "LOG", "LISTEN"]] for name in sidecars(created)}
    assert got == {"aegis": ["first", "warn", "127.0.0.1:8081,[::1]:8081"],
                   "aegis-second": ["mine", "debug", "127.0.0.1:9081,[::1]:9081"]}
    ports = {sidecar(created, name)["ports"][0]["name"] for name in got}
    assert ports == {"aegis-admin", "aegis-9082"}, "Prometheus tells them apart by these names"
    volumes = [volume["name"] for volume in created["spec"]["volumes"]]
    assert len(set(volumes)) == 4
    assert dry(server, {**created, "metadata": {key: created["metadata"][key] for key in ["name", "namespace", "labels", "annotations"]}}
               )["spec"] == created["spec"], "a second admission changes nothing"
    wrong = copy.deepcopy(both)
    wrong["metadata"]["annotations"]["second.aegis-proxy.io/servcie"] = "x"
    assert "second.aegis-proxy.io/servcie: remove it" in refusal(server, wrong)
    # What one of them refuses is nothing to the other's pods.
    assert refusal(server, pod(labels=chosen("first"), containers=containers(ports=[{"containerPort": 9082}]))) == ""
    assert "9081 or 9082" in refusal(server, pod(labels=chosen("second"), containers=containers(ports=[{"containerPort": 9082}])))


def test_two_releases_with_the_same_ports_do_not_meet_in_a_pod(server, releases):
    releases("first")
    releases("second")
    said = refusal(server, pod(labels={**chosen("first"), "second.aegis-proxy.io/inject": "enabled"}))
    assert "change it there, or set sidecar.listenPort and sidecar.adminPort of the release" in said


def test_two_releases_that_name_the_container_alike_do_not_meet_in_a_pod(server, releases):
    """Or else the pod would get one of the two, and not know which."""
    releases("first")
    releases("third", sidecar={"name": "aegis", "listenPort": 9081, "adminPort": 9082})
    said = refusal(server, pod(labels={**chosen("first"), "third.aegis-proxy.io/inject": "enabled"}))
    assert "a container of the pod is called aegis, as the sidecar is: rename it, or set sidecar.name" in said


def test_a_second_release_leaves_the_pods_of_the_first_alone(server, releases):
    """It has no backend, other rules and acts in more namespaces."""
    releases("first")
    before = dry(server, POD)
    clients = [{"namespace": namespace, "serviceAccount": "*"} for namespace in ["shop", "stock", "db"]]
    values = {"sidecar": {"backend": {"service": ""}, "balance": "key_hash", "name": "aegis"}, "clients": clients}
    server.helm("install", "second", CHART, "--namespace", "db", "--values", "-", input=yaml.dump(values))
    unknown = pod({"service": "a", "x": ""}, chosen("second"))
    eventually(lambda: refusal(server, unknown), lambda: "not in force")
    try:
        assert dry(server, POD)["spec"] == before["spec"]
        for item in [pod(labels=chosen("first"), annotations={"pool-mode": "session"}), pod(labels={}),
                     pod(labels={"app": "x"}, containers=containers(name="aegis"))]:
            assert refusal(server, item) == ""
        assert sidecars(dry(server, pod(labels=chosen("first")))) == ["aegis"]
        assert "no backend: set the annotation" in refusal(server, pod(labels=chosen("second")))
    finally:
        uninstall(server, "second")


def test_enabled_means_one_release(server, releases):
    releases("first")
    given = ["--namespace", "db", "--set", "sidecar.backend.service=x", "--set", "clients[0].namespace=shop,clients[0].serviceAccount=web"]
    refused = server.helm("install", "second", CHART, *given, "--set", "injection.default=true", check=False)
    assert "the release first takes the pods with the label aegis-proxy.io/inject: enabled" in refused.stderr
    refused = server.helm("install", "second", CHART, *given, "--set", "injection.name=first", check=False)
    assert "another release called first injects into the same namespaces: set injection.name" in refused.stderr
    # In other namespaces it may.
    releases("third", clients=[{"namespace": "stock", "serviceAccount": "web"}], injection={"default": True})
    assert env(dry(server, pod(namespace="stock")))["AEGIS_KUBE_SERVICE"] == "third"
    assert env(dry(server, POD))["AEGIS_KUBE_SERVICE"] == "first"
    releases("fourth", clients=[{"namespace": "other", "serviceAccount": "web"}], injection={"default": False})
    assert sidecars(dry(server, pod(namespace="other"))) == []


def test_a_release_may_be_chosen_by_another_name(server):
    """As two of one name in different namespaces need; as long as can be, and with dots."""
    name = "db.v2." + "x" * 47
    values = {"sidecar": {"backend": {"service": "chronos"}}, "clients": VALUES["clients"],
              "injection": {"name": name, "default": False}}
    server.helm("install", "first", CHART, "--namespace", "db", "--values", "-", input=yaml.dump(values))
    item = pod({"log-level": "off"}, chosen(name))
    item["metadata"]["annotations"][f"{name}.aegis-proxy.io/log-level"] = "debug"
    try:
        eventually(lambda: not refusal(server, item) and sidecars(dry(server, item)), lambda: refusal(server, item))
        (container,) = sidecars(dry(server, item))
        assert container == ("aegis-db-v2-" + "x" * 47)[:57]
        assert env(dry(server, item), container)["AEGIS_LOG"] == "debug"
        assert sidecars(dry(server, POD)) == []
    finally:
        server.helm("uninstall", "first", "--namespace", "db")
        eventually(lambda: not sidecars(dry(server, item)), lambda: "still injected")


def test_an_unclear_enabled_is_refused_and_names_are_not(server, releases):
    """Tools that render without an API server cannot know of the other release."""
    releases("first")
    values = {"sidecar": {"backend": {"service": "second"}}, "clients": VALUES["clients"]}
    objects = [item for item in template(CHART, *INJECTS, values=values, release="second") if "Policy" in item["kind"]]
    own = [item for item in objects if "second" in item["metadata"]["name"]]
    for item in own:
        server.create(item)
    try:
        eventually(lambda: "means several releases here" in refusal(server, POD), lambda: refusal(server, POD))
        assert "name one of them in the label, or set injection.default to false for the others" in refusal(server, POD)
        for release in ["first", "second"]:
            assert env(dry(server, pod(labels=chosen(release))))["AEGIS_KUBE_SERVICE"] == release
    finally:
        for item in own:
            server.kubectl("delete", item["kind"], item["metadata"]["name"])
        eventually(lambda: not refusal(server, POD), lambda: refusal(server, POD))


def test_an_image_is_refused_where_the_release_says_so(server, releases):
    releases("first", injection={"imageOverride": False})
    assert "unknown annotation aegis-proxy.io/image" in refusal(server, pod({"image": "x"}))


ROUTES = [
    {"name": "orders-eu", "listenPort": 5432, "backend": {"service": "postgres", "port": 5432}, "protocol": "tcp",
     "socket": {"file": ".s.PGSQL.5432"}},
    {"name": "cache", "listenPort": 8081, "backend": {"selector": "app=chronos", "namespace": "other"}, "balance": "key_hash",
     "pool": {"size": 3}, "queue": {"timeout": "6s"}, "check": {"interval": "3s", "kind": "request", "rise": 4}},
    {"name": "mine", "listenPort": 8083, "backend": {}},
]


@pytest.fixture
def routed(server, releases):
    """A release of three routes, one of which has no Service."""
    values = {"clients": VALUES["clients"], "sidecar": {"routes": ROUTES, "socket": {"folder": "/run/db"}}}
    releases("first")
    server.helm("upgrade", "first", CHART, "--namespace", "db", "--reset-values", "--values", "-", input=yaml.dump(values))
    item = pod({"mine.service": "x"})
    eventually(lambda: not refusal(server, item) and "AEGIS_ROUTES" in env(dry(server, item)), lambda: refusal(server, item))
    return server


def test_a_release_of_routes_injects_what_the_library_renders(routed):
    values = {"routes": [{**ROUTES[0]}, ROUTES[1], {**ROUTES[2], "backend": {"service": "own"}}], "socket": {"folder": "/run/db"}}
    for route in values["routes"]:
        route["backend"] = {"namespace": "db", **route["backend"]}
    spec = one(template(USER_CHART, values={"sidecar": values}), "Deployment")["spec"]["template"]["spec"]
    expected = spec["initContainers"][0]
    created = dry(routed, pod({"mine.service": "own"}))
    container = sidecar(created)

    def entries(container):
        return sorted(json.dumps(entry, sort_keys=True) for entry in container["env"])

    assert entries(container) == entries(expected)
    assert container["volumeMounts"] == expected["volumeMounts"]
    assert [volume["name"] for volume in created["spec"]["volumes"]] == [volume["name"] for volume in spec["volumes"]]
    assert created["spec"]["containers"][0]["volumeMounts"] == spec["containers"][0]["volumeMounts"]
    text = routed.helm("get", "notes", "first", "--namespace", "db").stdout
    assert "orders-eu: 5432, to postgres" in text and "mine: 8083, to the Service that the annotation aegis-proxy.io/mine.service names" in text
    assert "aegis-proxy.io/routes: orders-eu" in text and "Unix sockets in /run/db" in text


def test_a_pod_chooses_among_the_routes(routed):
    got = env(dry(routed, pod({"routes": "cache, orders-eu"})))
    assert got["AEGIS_ROUTES"] == "cache,orders-eu"
    assert not [name for name in got if name.startswith("AEGIS_MINE__")], "a variable of a route that is not named is an error"
    got = env(dry(routed, pod({"routes": "cache", "socket-folder": ""})))
    assert got["AEGIS_CACHE__LISTEN"] == "127.0.0.1:8081,[::1]:8081" and "AEGIS_SOCKET_MODE" not in got
    ports = containers(ports=[{"containerPort": 5432}])
    assert refusal(routed, pod({"routes": "cache"}, containers=ports)) == ""
    assert "5432, 8081, 8083 or 8082, too is web: change it there" in refusal(routed, pod({"routes": "orders-eu"}, containers=ports))


def test_a_pod_chooses_for_a_route_by_annotation(routed):
    """Its own annotation, then what the release says of the route, then what is for all routes."""
    chosen_ = {"orders-eu.service": "other", "orders-eu.namespace": "data", "orders-eu.port": "5433", "orders-eu.socket-file": "pg",
               "orders-eu.connect-timeout": "3s", "connect-timeout": "2s", "queue-timeout": "2s", "routes": "orders-eu,cache,mine",
               "mine.service": "m", "mine.protocol": "tcp", "mine.tcp-user-timeout": "4s", "mine.check-interval": "7s",
               "cache.check-interval": "8s", "balance": "round_robin"}
    item = pod(chosen_)
    item["metadata"]["annotations"]["first.aegis-proxy.io/mine.backend-drain"] = "5s"
    got = env(dry(routed, item))
    own = {name: value for name, value in got.items() if name.startswith(("AEGIS_MINE__", "AEGIS_ORDERS_EU__")) and "SNAPSHOT" not in name}
    assert own == {
        "AEGIS_ORDERS_EU__LISTEN": "unix:/run/db/pg,127.0.0.1:5432,[::1]:5432", "AEGIS_ORDERS_EU__DISCOVERY": "kubernetes",
        "AEGIS_ORDERS_EU__KUBE_SERVICE": "other", "AEGIS_ORDERS_EU__KUBE_NAMESPACE": "data", "AEGIS_ORDERS_EU__KUBE_PORT": "5433",
        "AEGIS_ORDERS_EU__PROTOCOL": "tcp", "AEGIS_ORDERS_EU__POOL_MODE": "preconnect", "AEGIS_ORDERS_EU__CONNECT_TIMEOUT": "3s",
        "AEGIS_MINE__LISTEN": "unix:/run/db/mine.sock,127.0.0.1:8083,[::1]:8083", "AEGIS_MINE__DISCOVERY": "kubernetes",
        "AEGIS_MINE__KUBE_SERVICE": "m", "AEGIS_MINE__KUBE_NAMESPACE": "db", "AEGIS_MINE__KUBE_PORT": "auto",
        "AEGIS_MINE__PROTOCOL": "tcp", "AEGIS_MINE__POOL_MODE": "preconnect", "AEGIS_MINE__TCP_USER_TIMEOUT": "4s",
        "AEGIS_MINE__CHECK_INTERVAL": "7s", "AEGIS_MINE__BACKEND_DRAIN": "5s"}
    assert [got[f"AEGIS_CACHE__CHECK{name}"] for name in ["", "_INTERVAL", "_RISE"]] == ["request", "8s", "4"]
    assert (got["AEGIS_CONNECT_TIMEOUT"], got["AEGIS_QUEUE_TIMEOUT"], got["AEGIS_BALANCE"]) == ("2s", "2s", "round_robin")
    assert (got["AEGIS_CACHE__QUEUE_TIMEOUT"], got["AEGIS_CACHE__BALANCE"]) == ("6s", "key_hash"), "the release's own for the route"


ROUTES_REFUSED = [
    ({}, "no backend: set the annotation aegis-proxy.io/mine.service to the name of a Service in the namespace db"),
    ({"routes": "cache,nobody"}, "aegis-proxy.io/routes is cache,nobody: set it to some of orders-eu,cache,mine, each once"),
    *(({"routes": value}, "set it to some of orders-eu,cache,mine") for value in ["", "cache,cache", "cache,,", "Cache", "x" * 2000]),
    ({"routes": "cache", "service": "x"}, "unknown annotation aegis-proxy.io/service: remove it. There are routes, socket-folder, protocol"),
    ({"routes": "cache", "cache.service": "x"}, "unknown annotation aegis-proxy.io/cache.service"),
    ({"routes": "cache", "orders-eu.port": "1"}, "that the pod does not have aegis-proxy.io/orders-eu.port: remove it, or name the route"),
    ({"routes": "cache", "cache.balance": "hash"}, "aegis-proxy.io/cache.balance is hash: set it to least_conn"),
    ({"routes": "cache", "cache.queue-timeout": ""}, "aegis-proxy.io/cache.queue-timeout"),
    ({"routes": "cache", "cache.tcp-user-timeout": "1ms"}, "aegis-proxy.io/cache.tcp-user-timeout is 1ms: set it to off, or a duration"),
    ({"routes": "cache", "cache.protocol": "tcp", "cache.check-interval": "off"}, "remove the annotations aegis-proxy.io/cache.protocol and"),
    ({"routes": "cache", "cache.protocol": "tcp", "cache.pool-mode": "preconnect", "cache.balance": "least_conn"},
     "or aegis-proxy.io/cache.check-interval to off"),
    ({"routes": "orders-eu", "pool-mode": "session"}, "set the annotation aegis-proxy.io/orders-eu.pool-mode to preconnect"),
    ({"mine.service": "A"}, "aegis-proxy.io/mine.service is A: set it to the name of a Service"),
    ({"routes": "cache", "cache.socket-file": "a/b"}, "aegis-proxy.io/cache.socket-file is a/b: set it to the name of a file"),
    ({"routes": "cache,orders-eu", "cache.socket-file": ".s.PGSQL.5432"}, "two routes have the same socket file"),
]


def test_routes_that_cannot_work_are_refused_with_what_to_change(routed):
    wrong = []
    for annotations, message in ROUTES_REFUSED:
        said = refusal(routed, pod(annotations))
        if message not in said or "aegis: " not in said:
            wrong.append((message, annotations, said))
    assert not wrong
    fine = [{"routes": "cache", "protocol": "tcp", "pool-mode": "preconnect", "cache.pool-mode": "request", "cache.protocol": "chronos"},
            {"routes": "orders-eu", "balance": "key_hash", "orders-eu.balance": "least_conn"}]
    assert [refusal(routed, pod(annotations)) for annotations in fine] == ["", ""]


def test_as_many_routes_as_there_may_be_are_no_burden(server, releases):
    """The server bounds what a policy's expressions may cost."""
    routes = [{"name": f"a-route-of-a-long-name-{n}", "listenPort": 9000 + n, "backend": {"service": f"s{n}"}} for n in range(10)]
    routes += [{"name": f"r{n}", "listenPort": 9100 + n, "backend": {"service": f"s{n}"}} for n in range(6)]
    releases("first")
    values = {"clients": VALUES["clients"], "sidecar": {"routes": routes}}
    server.helm("upgrade", "first", CHART, "--namespace", "db", "--reset-values", "--values", "-", input=yaml.dump(values))
    eventually(lambda: not refusal(server, POD) and "AEGIS_ROUTES" in env(dry(server, POD)), lambda: refusal(server, POD))
    item = pod({f"{route['name']}.{name}": value for route in routes for name, value in [
        ("service", "x"), ("queue-timeout", "1s"), ("protocol", "tcp"), ("backend-drain", "2s")]},
        containers=[container for n in range(100) for container in containers(name=f"web-{n}")])
    item["metadata"]["annotations"] |= {f"example.org/{n}": "x" * 20 for n in range(2000)}
    eventually(lambda: refusal(server, item) == "", lambda: refusal(server, item)[:2000])
    got = env(dry(server, item))
    assert sum(name.endswith("__BACKEND_DRAIN") for name in got) == 16
    assert len(got["AEGIS_ROUTES"].split(",")) == 16
    assert "has 10 routes at most, and there are 16: set" in refusal(server, pod({"socket-folder": "/run/db"}))
    assert refusal(server, pod({"socket-folder": "/run/db", "routes": "r0,r1"})) == ""


def listed(server, *selector):
    rows = server.get("pods", "--namespace", "shop", "--selector", ",".join(selector))["items"]
    return sorted(row["metadata"]["name"] for row in rows)


def test_pods_without_or_with_an_old_sidecar_are_found(server, releases):
    """The commands of docs/KUBERNETES.md."""
    def create(name, **options):
        item = pod(**options)
        item["metadata"]["name"] = name
        server.create(item)

    create("too-early")
    releases("first")
    create("old")
    create("none", labels={"app": "web"})
    install(server, "upgrade", {**VALUES, "sidecar": {"backend": {"service": "first"}, "image": {"tag": "9.9.9"}}}, "first")
    eventually(lambda: sidecar(dry(server, POD), "aegis")["image"] == "aegis-proxy:9.9.9", lambda: "not upgraded")
    create("new")
    assert listed(server, "aegis-proxy.io/inject", "!aegis-proxy.io/status") == ["too-early"]
    config = server.get("configmap", "first-injection", "--namespace", "db")["data"]["config"]
    assert listed(server, "first.aegis-proxy.io/status", f"first.aegis-proxy.io/config!={config}") == ["old"]
    table = server.kubectl("get", "pods", "--namespace", "shop", "-L", "aegis-proxy.io/inject,aegis-proxy.io/status,first.aegis-proxy.io/version").stdout
    rows = {row.split()[0]: row.split()[-2:] for row in table.splitlines()[1:]}
    assert (rows["old"], rows["new"]) == (["injected", "0.1.0"], ["injected", "9.9.9"])
    server.kubectl("delete", "pods", "--now", "--namespace", "shop", "too-early", "old", "none", "new")
