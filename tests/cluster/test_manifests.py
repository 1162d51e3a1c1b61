"""The manifests for kustomize and Compose."""

import json
import os

import pytest
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
    assert (env["AEGIS_MAX_SESSIONS"], env["AEGIS_BALANCE"]) == ("100", "key_hash"), "the demo's own patch"
    assert (env["AEGIS_PROTOCOL"], env["AEGIS_POOL_MODE"]) == ("chronos", "request"), "which routing by key needs"
    assert pod["metadata"]["labels"]["aegis-proxy.io/inject"] == "enabled"
    assert "initContainers" not in by_name(objects, "StatefulSet", "store")["spec"]["template"]["spec"]


def test_the_component_adds_the_sidecar_to_every_kind_of_workload(tmp_path):
    """Before other init containers, and at the place where the kind has its pod's template."""
    labels = {"aegis-proxy.io/inject": "enabled"}
    pod = {"metadata": {"labels": {"app": "a"}},
           "spec": {"initContainers": [{"name": "migrate", "image": "migrate"}], "containers": [{"name": "a", "image": "a"}],
                    "restartPolicy": "Always"}}
    job_pod = {**pod, "spec": {**pod["spec"], "restartPolicy": "Never"}}
    selector = {"selector": {"matchLabels": {"app": "a"}}}
    workloads = [
        ("apps/v1", "Deployment", {**selector, "template": pod}),
        ("apps/v1", "StatefulSet", {**selector, "serviceName": "a", "template": pod}),
        ("apps/v1", "DaemonSet", {**selector, "template": pod}),
        ("apps/v1", "ReplicaSet", {**selector, "template": pod}),
        ("v1", "ReplicationController", {"selector": {"app": "a"}, "template": pod}),
        ("batch/v1", "Job", {"template": job_pod}),
        ("batch/v1", "CronJob", {"schedule": "@hourly", "jobTemplate": {"spec": {"template": job_pod}}}),
    ]
    for version, kind, spec in workloads:
        item = {"apiVersion": version, "kind": kind, "metadata": {"name": "any", "labels": labels}, "spec": spec}
        (tmp_path / f"{kind}.yaml").write_text(yaml.dump(item))
    component = os.path.relpath(ROOT / "manifests/component", tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(
        yaml.dump({"resources": [f"{kind}.yaml" for _, kind, _ in workloads], "components": [component]}))
    objects = kustomize(tmp_path)
    validate(objects)
    (reference,) = yaml.safe_load((ROOT / "manifests/component/sidecar.yaml").read_text())["spec"]["template"]["spec"]["initContainers"]
    assert len(objects) == len(workloads)
    for item in objects:
        spec = item["spec"]["jobTemplate"]["spec"] if item["kind"] == "CronJob" else item["spec"]
        template = spec["template"]
        assert template["metadata"]["labels"] == {**labels, "app": "a"}, item["kind"]
        assert [container["name"] for container in template["spec"]["initContainers"]] == ["aegis", "migrate"], item["kind"]
        assert template["spec"]["initContainers"][0] == reference, item["kind"]


def test_the_component_patches_the_same_into_cron_jobs():
    """manifests/component/cronjob.yaml is made from sidecar.yaml: UPDATE=1 makes it anew."""
    patch = yaml.safe_load((ROOT / "manifests/component/sidecar.yaml").read_text())
    deeper = {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": patch["metadata"],
              "spec": {"jobTemplate": {"spec": patch["spec"]}}}
    file = ROOT / "manifests/component/cronjob.yaml"
    text = "# Made from sidecar.yaml by its test.\n" + yaml.dump(deeper, sort_keys=False)
    if os.environ.get("UPDATE"):
        file.write_text(text)
    assert file.read_text() == text, f"{file} differs: UPDATE=1 make test-cluster writes it"


def test_the_store_serves_on_while_the_sidecars_hear_of_its_end():
    spec = by_name(kustomize(DEMO), "StatefulSet", "store")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    # The image has no shell: the kubelet sleeps.
    seconds = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert 3 <= seconds < spec.get("terminationGracePeriodSeconds", 30)


@pytest.mark.parametrize("given", [{}, {"RUST_IMAGE": "registry.example/rust:1.95"},
                                   {"RUST_IMAGE": "rust:1", "RUNTIME_IMAGE": "registry.example/empty:1"}])
def test_images_are_built_on_the_bases_that_are_given(given, tmp_path):
    engine = tmp_path / "engine"
    engine.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/builds\n')
    engine.chmod(0o755)
    run("make", "image", f"ENGINE={engine}", *[f"{name}={value}" for name, value in given.items()], cwd=ROOT)
    builds = (tmp_path / "builds").read_text().splitlines()
    assert len(builds) == 2
    for build in builds:
        words = build.split()
        passed = [words[at + 1] for at, word in enumerate(words) if word == "--build-arg"]
        assert passed == [f"{name}={value}" for name, value in given.items()]


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
