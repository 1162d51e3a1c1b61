"""The manifests for kustomize and Compose."""

import json
import os

import yaml

from tools import ROOT, kustomize, one, run, validate

DEMO = ROOT / "manifests/demo"
COMPOSE = ROOT / "manifests/compose/compose.yaml"


def by_name(objects, kind, name):
    return next(item for item in objects if item["kind"] == kind and item["metadata"]["name"] == name)


def test_the_demo_is_valid():
    objects = kustomize(DEMO)
    validate(objects)
    namespaces = {item["metadata"].get("namespace") for item in objects if item["kind"] != "Namespace"}
    assert namespaces == {"aegis-demo"}
    for binding in [item for item in objects if item["kind"] == "RoleBinding"]:
        assert [subject["namespace"] for subject in binding["subjects"]] == ["aegis-demo"]


def test_the_component_adds_the_sidecar_where_the_label_is_and_nowhere_else():
    objects = kustomize(DEMO)
    pod = by_name(objects, "Deployment", "client")["spec"]["template"]
    (sidecar,) = pod["spec"]["initContainers"]
    env = {item["name"]: item.get("value") for item in sidecar["env"]}
    assert env["AEGIS_KUBE_SERVICE"] == "store"
    assert (env["AEGIS_MAX_SESSIONS"], env["AEGIS_ROUTE"]) == ("100", "key"), "the demo's own patch"
    assert (env["AEGIS_PROTOCOL"], env["AEGIS_POOL_MODE"]) == ("chronos", "request"), "which routing by key needs"
    assert pod["metadata"]["labels"]["aegis-proxy.io/inject"] == "enabled"
    assert "initContainers" not in by_name(objects, "StatefulSet", "store")["spec"]["template"]["spec"]


def test_the_component_comes_before_other_init_containers(tmp_path):
    workload = {"metadata": {"name": "any", "labels": {"aegis-proxy.io/inject": "enabled"}}, "spec": {"template": {
        "spec": {"initContainers": [{"name": "migrate", "image": "migrate"}], "containers": [{"name": "a", "image": "a"}]}}}}
    kinds = [("apps/v1", "Deployment"), ("apps/v1", "StatefulSet"), ("apps/v1", "DaemonSet"), ("batch/v1", "Job")]
    for version, kind in kinds:
        name = kind.lower()
        (tmp_path / f"{name}.yaml").write_text(yaml.dump({"apiVersion": version, "kind": kind, **workload}))
    resources = [f"{kind.lower()}.yaml" for _, kind in kinds]
    component = str(ROOT / "manifests/component")
    (tmp_path / "kustomization.yaml").write_text(
        yaml.dump({"resources": resources, "components": [os.path.relpath(component, tmp_path.resolve())]}))
    for item in kustomize(tmp_path):
        names = [container["name"] for container in item["spec"]["template"]["spec"]["initContainers"]]
        assert names == ["aegis", "migrate"], item["kind"]


def test_compose_names_files_that_exist_and_publishes_on_loopback_only():
    compose = yaml.safe_load(COMPOSE.read_text())
    for name, service in compose["services"].items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (COMPOSE.parent / source).is_file(), source
        for option in service.get("security_opt", []):
            if option.startswith("seccomp:"):
                assert (COMPOSE.parent / option.removeprefix("seccomp:")).is_file(), option
        if "build" in service:
            dockerfile = (COMPOSE.parent / service["build"]["context"] / "Dockerfile").read_text()
            assert f"AS {service['build']['target']}\n" in dockerfile
    assert "127.0.0.1:3000:3000" in compose["services"]["grafana"]["ports"]


def test_the_profile_allows_io_uring_and_denies_what_no_proxy_does():
    profile = json.loads((ROOT / "manifests/seccomp/aegis.json").read_text())
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    rules = profile["syscalls"]
    allowed = {name for rule in rules if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}
    assert {"io_uring_setup", "io_uring_enter", "io_uring_register", "epoll_wait", "epoll_pwait"} <= allowed
    assert not {"mount", "ptrace", "bpf", "setns", "unshare", "kexec_load", "init_module", "keyctl", "clone3"} & allowed
    # Its arguments cannot be looked at, and C libraries fall back to clone for this error alone.
    assert {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38} in rules
