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
from tools import CHART, ROOT, kustomize, template

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


def pod(annotations=None, labels=None, **spec):
    item = copy.deepcopy(POD)
    item["metadata"]["annotations"] = {f"aegis-proxy.io/{name}": value for name, value in (annotations or {}).items()}
    if labels is not None:
        item["metadata"]["labels"] = labels
    item["spec"] |= spec
    return item


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with api_server(ASSETS, tmp_path_factory.mktemp("api-server")) as server:
        for namespace in ["db", "shop"]:
            server.kubectl("create", "namespace", namespace)
        # The strictest standard: the sidecar has to do without an exemption.
        server.kubectl("label", "namespace", "shop", "pod-security.kubernetes.io/enforce=restricted")
        server.kubectl("create", "serviceaccount", "web", "--namespace", "shop")
        yield server


def install(server, verb="install", values=VALUES, release="aegis"):
    server.helm(verb, release, CHART, "--namespace", "db", "--values", "-", input=yaml.dump(values))
    # The server takes a moment to put policies into force.
    service = values["sidecar"]["backend"]["service"]
    probe = pod(None if service else {"service": "chronos"})
    eventually(lambda: not refusal(server, probe) and (env(dry(server, probe)) or {}).get(
        "AEGIS_KUBE_SERVICE") == (service or "chronos"), lambda: f"no injection: {refusal(server, probe)}")
    eventually(lambda: refusal(server, pod({"service": "chronos", "unknown": ""})), lambda: "no refusal")


@pytest.fixture(scope="module")
def injecting(server):
    install(server)
    return server


def dry(server, item, check=True):
    return server.create(item, "--dry-run=server", check=check)


def refusal(server, item):
    """Why the server refuses a pod, or nothing."""
    result = dry(server, item, check=False)
    return "" if isinstance(result, dict) else result.stderr


def sidecar(item):
    found = [c for c in item["spec"].get("initContainers", []) if c["name"] == "aegis"]
    return found[0] if found else None


def env(item):
    container = sidecar(item)
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
    server.helm("uninstall", "aegis", "--namespace", "db")
    eventually(lambda: sidecar(dry(server, new_pod)) is None, lambda: "still injected")


def test_a_labelled_pod_is_really_injected_under_the_restricted_standard(injecting):
    created = injecting.create(POD)
    assert created == injecting.get("pod", "web", "--namespace", "shop")
    rendered = template(CHART, values={"sidecar": VALUES["sidecar"]}, namespace="db")
    expected = next(item for item in rendered if item["kind"] == "Pod")["spec"]["initContainers"][0]
    container = sidecar(created)
    for key, value in expected.items():
        if key in ["startupProbe", "livenessProbe"]:
            # The server adds defaults.
            value = {**value, "successThreshold": 1, "httpGet": {**value["httpGet"], "scheme": "HTTP"}}
        assert container[key] == value, key
    assert set(container) - set(expected) == {"terminationMessagePath"}
    (volume,) = created["spec"]["volumes"]
    assert volume["name"] == "aegis-token"
    injecting.kubectl("delete", "pod", "web", "--namespace", "shop", "--now")


def test_a_second_admission_changes_nothing(injecting):
    once = dry(injecting, POD)
    again = {key: copy.deepcopy(once[key]) for key in ["apiVersion", "kind", "spec"]}
    again["metadata"] = {key: once["metadata"][key] for key in ["name", "namespace", "labels"]}
    assert dry(injecting, again)["spec"] == once["spec"]


def test_an_unlabelled_pod_is_untouched(injecting):
    for labels in [{}, {"aegis-proxy.io/inject": "disabled"}]:
        created = dry(injecting, pod(labels=labels))
        assert sidecar(created) is None and "volumes" not in created["spec"]


def test_the_sidecar_comes_before_what_is_there(injecting):
    other = {**POD["spec"]["containers"][0], "name": "migrate"}
    created = dry(injecting, pod(initContainers=[other], volumes=[{"name": "mine", "emptyDir": {}}]))
    assert [c["name"] for c in created["spec"]["initContainers"]] == ["aegis", "migrate"]
    assert [v["name"] for v in created["spec"]["volumes"]] == ["mine", "aegis-token"]


def test_the_pod_may_mount_its_own_token_as_well(injecting):
    created = dry(injecting, pod(automountServiceAccountToken=True))
    mounts = sidecar(created)["volumeMounts"]
    assert [mount["name"] for mount in mounts] == ["aegis-token"], mounts


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


@pytest.mark.parametrize("item, message", [
    (pod({"servcie": "x"}), "unknown annotation aegis-proxy.io/servcie: remove it"),
    (pod({"cpu-request": "much"}), "quantities must match"),
    (pod({"protocol": "redis"}), "aegis-proxy.io/protocol is redis: set it to tcp, chronos or http1"),
    (pod({"pool-mode": "all"}), "aegis-proxy.io/pool-mode is all: set it to preconnect, session or request"),
    (pod({"protocol": "tcp", "pool-mode": "session"}), "set the annotation aegis-proxy.io/pool-mode to preconnect"),
], ids=["unknown", "quantity", "protocol", "pool-mode", "lending"])
def test_what_cannot_work_is_refused_with_what_to_change(injecting, item, message):
    assert message in refusal(injecting, item)


def test_a_pod_on_the_nodes_network_is_refused(injecting):
    item = pod(hostNetwork=True)
    item["metadata"]["namespace"], item["spec"]["serviceAccountName"] = "db", "default"
    injecting.kubectl("create", "serviceaccount", "default", "--namespace", "db", check=False)
    assert "set hostNetwork to false" in refusal(injecting, item)
    del item["metadata"]["labels"]
    assert sidecar(dry(injecting, item)) is None


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
    hooks = list(yaml.safe_load_all(injecting.helm("get", "hooks", "aegis", "--namespace", "db").stdout))
    for hook in sorted(hooks, key=lambda item: item["kind"] == "Pod"):
        hook["metadata"].setdefault("namespace", "db")
        injecting.create(hook)
    account = "system:serviceaccount:db:aegis-test"
    assert env(injecting.get("pod", "aegis-test", "--namespace", "db"))["AEGIS_KUBE_SERVICE"] == "chronos"
    assert injecting.may(account, "watch", "endpointslices.discovery.k8s.io", "db")
    for hook in hooks:
        injecting.kubectl("delete", "--now", hook["kind"], "aegis-test", "--namespace", "db")


def test_a_release_without_a_service_asks_for_the_annotation(injecting):
    open_values = {"sidecar": {"backend": {"service": ""}}, "clients": VALUES["clients"]}
    install(injecting, "upgrade", open_values)
    assert env(dry(injecting, pod({"service": "mine"})))["AEGIS_KUBE_SERVICE"] == "mine"
    eventually(lambda: "set the annotation aegis-proxy.io/service" in refusal(injecting, POD), lambda: "not refused")
    install(injecting, "upgrade")


def test_routing_by_key_refuses_a_pod_that_chooses_otherwise(injecting):
    keyed = {**VALUES, "sidecar": {**VALUES["sidecar"], "route": "key"}}
    install(injecting, "upgrade", keyed)
    eventually(lambda: "remove the annotations" in refusal(injecting, pod({"pool-mode": "session"})), lambda: "not refused")
    assert env(dry(injecting, POD))["AEGIS_ROUTE"] == "key"
    install(injecting, "upgrade")


def test_an_upgrade_is_in_force_and_an_uninstall_leaves_nothing(injecting):
    install(injecting, "upgrade", {**VALUES, "sidecar": {"backend": {"service": "newer"}}})
    # Once more, unchanged, as a second run of a pipeline does.
    install(injecting, "upgrade", {**VALUES, "sidecar": {"backend": {"service": "newer"}}})
    injecting.helm("uninstall", "aegis", "--namespace", "db", "--wait")
    kinds = ("mutatingadmissionpolicies,mutatingadmissionpolicybindings,validatingadmissionpolicies,"
             "validatingadmissionpolicybindings,roles,rolebindings,configmaps,services,pods,serviceaccounts,secrets")
    left = injecting.get(kinds, "--all-namespaces", "--selector", "app.kubernetes.io/instance=aegis")["items"]
    assert left == []
    eventually(lambda: sidecar(dry(injecting, POD)) is None, lambda: "still injected")


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


def test_a_pod_gets_the_sidecars_of_two_releases_that_name_them_differently(server):
    install(server, release="first")
    server.helm("install", "second", CHART, "--namespace", "db", "--values", "-",
                input=yaml.dump({**VALUES, "sidecar": {"name": "aegis2", "listenPort": 9081, "adminPort": 9082,
                                                       "backend": {"service": "second"}}}))

    def both():
        names = [c["name"] for c in dry(server, POD)["spec"]["initContainers"]]
        return sorted(names) == ["aegis", "aegis2"]

    eventually(both, lambda: json.dumps(dry(server, POD)["spec"].get("initContainers")))
    for release in ["first", "second"]:
        server.helm("uninstall", release, "--namespace", "db")
