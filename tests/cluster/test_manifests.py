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


def workload(folder, kind, pod, labels=None):
    """A file of a workload that asks for the sidecar."""
    labels = {"aegis-proxy.io/inject": "enabled"} if labels is None else labels
    spec = {"selector": {"matchLabels": {"app": "a"}}, "template": pod}
    if kind == "CronJob":
        spec = {"schedule": "@hourly", "jobTemplate": {"spec": {"template": {**pod, "spec": {**pod["spec"], "restartPolicy": "Never"}}}}}
    version = "batch/v1" if kind == "CronJob" else "apps/v1"
    item = {"apiVersion": version, "kind": kind, "metadata": {"name": "web", "labels": labels}, "spec": spec}
    (folder / "workload.yaml").write_text(yaml.dump(item))


POD = {"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [{"name": "a", "image": "a"}]}}


@pytest.mark.parametrize("kind", ["Deployment", "CronJob"])
def test_a_second_component_adds_a_socket(kind, tmp_path):
    workload(tmp_path, kind, POD)
    components = [os.path.relpath(ROOT / "manifests" / name, tmp_path.resolve()) for name in ["component", "socket"]]
    (tmp_path / "kustomization.yaml").write_text(yaml.dump({"resources": ["workload.yaml"], "components": components}))
    (item,) = kustomize(tmp_path)
    validate([item])
    spec = item["spec"]["jobTemplate"]["spec"] if kind == "CronJob" else item["spec"]
    spec = spec["template"]["spec"]
    (container,) = spec["initContainers"]
    env = {item["name"]: item.get("value") for item in container["env"]}
    assert (env["AEGIS_LISTEN"], env["AEGIS_SOCKET_MODE"]) == ("unix:/run/db/aegis.sock,127.0.0.1:8081,[::1]:8081", "0666")
    assert env["AEGIS_KUBE_SERVICE"] == "store", "the rest is there still"
    assert sorted(mount["mountPath"] for mount in container["volumeMounts"]) == [
        "/run/aegis", "/run/db", "/var/run/secrets/kubernetes.io/serviceaccount"]
    assert {"name": "aegis-unix", "emptyDir": {}} in spec["volumes"] and len(spec["volumes"]) == 3


def test_a_patch_of_the_page_gives_the_component_routes(tmp_path):
    page = (ROOT / "docs/KUBERNETES.md").read_text().split("Several databases by the component")[1].split("The last two need")[0]
    folder = tmp_path / "app"
    folder.mkdir()
    (tmp_path / "aegis").symlink_to(ROOT)
    blocks = [block.split("```")[0] for block in page.split("```yaml\n")[1:]]
    for block in blocks:
        (folder / block.splitlines()[0].removeprefix("# ")).write_text(block)
    assert len(blocks) == 2
    workload(folder, "Deployment", POD)
    text = (folder / "kustomization.yaml").read_text()
    (folder / "kustomization.yaml").write_text(text.replace("../aegis", os.path.relpath(ROOT, folder.resolve())))
    (item,) = kustomize(folder)
    validate([item])
    (container,) = item["spec"]["template"]["spec"]["initContainers"]
    env = {item["name"]: item.get("value") for item in container["env"]}
    assert env["AEGIS_ROUTES"] == "orders,cache" and env["AEGIS_CACHE__LISTEN"] == env["AEGIS_LISTEN"]
    program = ROOT / "target/debug/aegis-proxy"
    if program.exists():
        given = {name: value or {"AEGIS_KUBE_NAMESPACE": "shop", "AEGIS_WORKERS": "1"}.get(name) for name, value in env.items()}
        given = {name: value for name, value in given.items() if value}
        said = run(program, "check", env=given).stdout
        assert "AEGIS_ORDERS__KUBE_SERVICE=postgres" in said and "AEGIS_CACHE__KUBE_SERVICE=store" in said


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
