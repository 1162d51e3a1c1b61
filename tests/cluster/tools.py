"""The programs that the tests run, and what Kubernetes and the Prometheus operator accept."""

import json
import os
import pathlib
import re
import subprocess

import kubernetes_validate
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = ROOT / "tests/cluster"
WORK = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve() / "cluster-tests"
CHART = ROOT / "helm/aegis"
USER_CHART = HERE / "user-chart"
KUBERNETES = ["1.33", "1.34", "1.35", "1.36"]
# Which versions have the API that injects.
INJECTS_FROM = {"admissionregistration.k8s.io/v1": ["1.36"], "admissionregistration.k8s.io/v1beta1": ["1.34", "1.35", "1.36"]}
INJECTS = ["--api-versions", "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy"]


def run(*command, check=True, **options):
    """Runs a command; its output is in the message if it fails."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True,
                            timeout=options.pop("timeout", 120), **options)
    assert not check or result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


def helm(*arguments, **options):
    return run(WORK / "helm", *arguments, **options)


def template(chart, *arguments, values=None, release="shop", namespace="db"):
    """The objects that a chart renders."""
    given = ["--values", "-"] if values else []
    text = helm("template", release, chart, "--namespace", namespace, *given, *arguments,
                input=yaml.dump(values) if values else None).stdout
    return [document for document in yaml.safe_load_all(text) if document]


def refusal(chart, *arguments, values=None):
    """What helm says where it must refuse."""
    result = helm("template", "shop", chart, "--values", "-", *arguments, check=False, input=yaml.dump(values or {}))
    assert result.returncode != 0, f"not refused:\n{result.stdout}"
    return result.stderr


def kinds(objects):
    return sorted(item["kind"] for item in objects)


def one(objects, kind):
    found = [item for item in objects if item["kind"] == kind]
    assert len(found) == 1, f"{len(found)} of {kind} in {kinds(objects)}"
    return found[0]


def kustomize(folder):
    return list(yaml.safe_load_all(run(WORK / "kubectl", "kustomize", folder).stdout))


# There is no schema of it in a registry. A real API server is asked where there is one.
WITHOUT_SCHEMA = {"SeccompProfile"}


def validate(objects, versions=KUBERNETES):
    """Checks objects against the schemas of these versions of Kubernetes, unknown fields included,
    and those of the Prometheus operator against its own."""
    operators = [item for item in objects if item["apiVersion"].startswith("monitoring.coreos.com/")]
    for item in objects:
        if item in operators or item["kind"] in WITHOUT_SCHEMA:
            continue
        for version in versions:
            if item["kind"].startswith("MutatingAdmissionPolicy") and version not in INJECTS_FROM[item["apiVersion"]]:
                continue
            kubernetes_validate.validate(item, version, strict=True)
    script = """
        import { readFileSync } from "node:fs";
        import * as models from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/index";
        for (const item of JSON.parse(readFileSync(0))) new models[item.kind](item).validate();
    """
    if operators:
        run("node", "--input-type=module", "-e", script, cwd=WORK, input=json.dumps(operators))


def metrics_in(expression):
    """The names of metrics in a PromQL expression."""
    return {re.sub("_(bucket|sum|count)$", "", name)
            for name in re.findall(r"\b(?:aegis|process)_[a-z_]+", expression)}
