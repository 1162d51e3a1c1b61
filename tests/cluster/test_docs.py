"""What README.md and the pages of docs tell people to type and to write, tried; and what the chart
says after an installation."""

import json
import os
import re
import shlex

import pytest
import yaml

from api_server import api_server
from containers import Native, aegis, ask, eventually, store
from pages import PAGES as PAGES_BY_NAME, blocks, commands
from tools import CHART, INJECTS, ROOT, WORK, helm, kinds, kustomize, one, refusal, run, template, validate

README = PAGES_BY_NAME["README.md"]
PAGE = PAGES_BY_NAME["KUBERNETES.md"]
PAGES = list(PAGES_BY_NAME.values())
ASSETS = os.environ.get("KUBEBUILDER_ASSETS")


def cluster_section():
    return README.split("### In a cluster")[1].split("\n### ")[0]


def files(text):
    """The blocks of YAML that begin with the name of the file that they are."""
    named = re.findall(r"^```yaml\n# (\S+\.yaml)\n(.*?)^```$", text, re.M | re.S)
    return named


def library_example():
    section = PAGE.split("**The library chart**")[1].split("**The kustomize component**")[0]
    return dict(files(section))


@pytest.fixture
def library_chart(tmp_path):
    """The example of the library chart as a folder, with its dependency fetched as the page says."""
    chart = tmp_path / "shop"
    for name, text in library_example().items():
        (chart / name).parent.mkdir(parents=True, exist_ok=True)
        (chart / name).write_text(text)
    # The checkout is where the example says.
    (tmp_path / "aegis").symlink_to(ROOT)
    helm("dependency", "build", "shop", cwd=tmp_path)
    return chart


def test_the_example_of_the_library_chart_is_whole(library_chart):
    objects = template(library_chart, namespace="shop")
    validate(objects)
    assert kinds(objects) == ["Deployment", "Role", "RoleBinding", "ServiceAccount"]
    pod = one(objects, "Deployment")["spec"]["template"]
    assert pod["metadata"]["labels"]["aegis-proxy.io/inject"] == "enabled"
    (sidecar,) = pod["spec"]["initContainers"]
    assert sidecar["image"] == "registry.example/aegis-proxy:0.1.0"
    env = {item["name"]: item.get("value") for item in sidecar["env"]}
    assert (env["AEGIS_KUBE_SERVICE"], env["AEGIS_KUBE_NAMESPACE"], env["AEGIS_BALANCE"]) == ("chronos", "db", "key_hash")
    role, binding = one(objects, "Role"), one(objects, "RoleBinding")
    assert role["metadata"]["namespace"] == binding["metadata"]["namespace"] == "db"
    assert {resource for rule in role["rules"] for resource in rule["resources"]} == {"endpointslices", "statefulsets"}
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": pod["spec"]["serviceAccountName"], "namespace": "shop"}]
    assert {volume["name"] for volume in pod["spec"]["volumes"]} >= {mount["name"] for mount in sidecar["volumeMounts"]}


def test_the_chart_for_the_tests_is_written_as_the_example_is():
    """tests/cluster/user-chart is what the other tests render."""
    def pod_lines(text):
        return [line for line in text.splitlines() if "include" in line or "initContainers:" in line or "volumes:" in line]
    user = (ROOT / "tests/cluster/user-chart/templates/deployment.yaml").read_text()
    assert pod_lines(user) == pod_lines(library_example()["templates/deployment.yaml"])


def test_the_library_chart_can_be_packed_for_a_registry(tmp_path):
    words = shlex.split(re.search(r"`(helm package [^`]*)`", PAGE)[1])
    assert words[2] == "helm/aegis-sidecar"
    helm(*words[1:], "--destination", tmp_path, cwd=ROOT)
    (package,) = tmp_path.iterdir()
    assert f"helm push {package.name}" in PAGE


def test_every_block_of_yaml_is_valid():
    """Objects against Kubernetes' schemas, values against the chart's."""
    seen = 0
    for text in [text for page in PAGES for text in blocks(page, "yaml")]:
        if "{{" in text or text.startswith(("# Chart.yaml", "# values.yaml")):
            continue  # Tried as part of a chart.
        if text.startswith(("# routes.yaml", "# kustomization.yaml")):
            continue  # Tried with the component.
        if text.startswith("# compose.yaml"):
            service = yaml.safe_load((ROOT / "manifests/compose/compose.yaml").read_text())["services"]["aegis"]
            assert yaml.safe_load(text)["healthcheck"]["test"] == service["healthcheck"]["test"]
            continue
        for item in yaml.safe_load_all(text):
            if "kind" in item:
                validate([item])
            else:
                # A part of a pod template.
                (container,) = item["spec"]["template"]["spec"]["containers"]
                pod = {"spec": {"containers": [{"image": "store", **container}]}, "metadata": {"labels": {"app": "a"}}}
                validate([{"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "a"}, "spec": {
                    "serviceName": "a", "selector": {"matchLabels": {"app": "a"}}, "template": pod}}])
            seen += 1
    assert seen >= 2
    for name, text in files(PAGE):
        if name == "values.yaml" and "networkPolicy" in text:
            objects = template(CHART, values=yaml.safe_load(text), namespace="db")
            validate(objects)
            assert kinds(objects).count("NetworkPolicy") == 1


def test_the_recipes_for_failovers_are_values_of_the_chart():
    recipes = [yaml.safe_load(text) for _, text in files((ROOT / "docs/FAILOVER.md").read_text())]
    assert len(recipes) == 3
    for recipe in recipes:
        values = {**recipe, "clients": [{"namespace": "shop", "serviceAccount": "web"}]}
        objects = template(CHART, *INJECTS, values=values)
        validate(objects)
        role = one(objects, "Role")
        assert ["pods"] in [rule["resources"] for rule in role["rules"]], role
        rendered = yaml.dump([item for item in objects if item["kind"] == "MutatingAdmissionPolicy"], width=10_000)
        backend, sidecar = recipe["sidecar"]["backend"], recipe["sidecar"]
        for set_value in [backend["selector"], sidecar["backendDrain"], *sidecar["env"].values(), "AEGIS_BACKEND_DRAIN"]:
            assert set_value in rendered, set_value


def test_every_command_is_of_a_known_program_and_names_what_exists():
    known = {"make", "docker", "helm", "kubectl", "curl", "printf", "ab", "cargo", "apt-get", "aegis-proxy"}
    for words in [words for page in PAGES for words in commands(page)]:
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        program = words[0].rsplit("/", 1)[-1]
        assert program in known, words
        if program == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words
        for word in words[1:]:
            if re.match(r"(helm|manifests)/\w", word):
                assert (ROOT / word).exists(), words


def test_names_of_values_and_variables_exist():
    """`sidecar.x`, `networkPolicy.x` … of the page are values of the charts."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    values["sidecar"] = {**yaml.safe_load((ROOT / "helm/aegis-sidecar/values.yaml").read_text()), **values["sidecar"]}

    def exists(path):
        place = values
        for part in path.split("."):
            if not isinstance(place, dict) or part not in place:
                # Maps that people fill.
                return path.startswith(("sidecar.env.", "prometheusRule.thresholds."))
            place = place[part]
        return True
    roots = "|".join(values)
    named = set(re.findall(rf"`((?:{roots})\.[A-Za-z.]+?)(?:[=:][^`]*)?`", PAGE + cluster_section()))
    assert len(named) > 10
    assert [path for path in sorted(named) if not exists(path)] == []


def readme_values():
    """What the README's command gives to helm, without the command."""
    (install,) = [words for words in commands(cluster_section()) if words[:2] == ["helm", "install"]]
    assert install[2:6] == ["aegis", "helm/aegis", "--namespace", "db"]
    return install[6:]


def test_the_readmes_cluster_finds_every_key_in_two_stores():
    pod = one(template(CHART, *readme_values(), release="aegis"), "Pod")
    settings = {item["name"]: item.get("value") for item in pod["spec"]["initContainers"][0]["env"]}
    chosen = {name: settings[name] for name in ["AEGIS_PROTOCOL", "AEGIS_POOL_MODE", "AEGIS_BALANCE"]}
    with store(kind=Native) as a, store(kind=Native) as b, \
            aegis(env={"AEGIS_BACKENDS": f"{a},{b}", **chosen}, kind=Native) as proxy:
        for turn in range(20):
            with proxy.connect() as client:
                assert ask(client, f"SET key-{turn} {turn}\n".encode(), 3) == b"OK\n"
            for _ in range(2):
                with proxy.connect() as client:
                    reply = f"{turn}\n".encode()
                    assert ask(client, f"GET key-{turn}\n".encode(), len(reply)) == reply
        used = re.findall(r"aegis_endpoint_connects_total\{.*\} (\d+)", proxy.get("metrics"))
        assert len(used) == 2 and "0" not in used


def test_every_fault_of_the_platform_has_a_test_and_its_figures():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in
            (ROOT / "docs/PLATFORM-FAULTS.md").read_text().splitlines() if line.endswith("` |")]
    tests = re.findall(r"#\[test\]\nfn (\w+)", (ROOT / "tests/e2e/platform.rs").read_text())
    assert len(rows) >= 8
    assert sorted(row[3].strip("`") for row in rows) == sorted(tests)
    for fault, happens, measured, test in rows:
        assert fault and happens and re.search(r"\d", measured), test


def opens(policy, port, peer):
    """Whether a policy lets this peer, by its namespace, connect to this port of TCP."""
    for rule in policy["spec"]["ingress"]:
        ports = rule.get("ports", [{"protocol": "TCP", "port": 1, "endPort": 65535}])
        here = any(p["protocol"] == "TCP" and p["port"] <= port <= p.get("endPort", p["port"]) for p in ports)
        namespaces = [other["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for other in rule.get("from", [])]
        if here and (not namespaces or peer in namespaces):
            return True
    return False


SHOP = {"sidecar": {"backend": {"service": "chronos"}}, "clients": [{"namespace": "shop", "serviceAccount": "web"}]}
MONITORING = {"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]}


def policies(sidecar=None, **network):
    values = {**SHOP, "networkPolicy": {"enabled": True, **network}}
    if sidecar:
        values["sidecar"] = sidecar
    objects = template(CHART, *INJECTS, values=values)
    found = [item for item in objects if item["kind"] == "NetworkPolicy"]
    validate(found)
    return found


def test_a_network_policy_is_optional_and_of_the_clients_namespaces():
    assert "NetworkPolicy" not in kinds(template(CHART, values=SHOP))
    clients = [{"namespace": name, "serviceAccount": "*"} for name in ["shop", "other", "shop"]]
    objects = template(CHART, values={**SHOP, "clients": clients, "networkPolicy": {"enabled": True}})
    validate(objects)
    assert [item["metadata"]["namespace"] for item in objects if item["kind"] == "NetworkPolicy"] == ["other", "shop"]
    (policy,) = policies()
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    # The pods that the monitor scrapes.
    monitor = one(template(CHART, *INJECTS, values={**SHOP, "podMonitor": {"enabled": True}}), "PodMonitor")
    assert policy["spec"]["podSelector"] == monitor["spec"]["selector"]
    assert "networkPolicy" in refusal(CHART, values={**SHOP, "networkPolicy": {"egres": {}}})


@pytest.mark.parametrize("admin", [8082, 1024, 65535])
def test_the_admin_port_is_closed_except_to_those_that_are_named(admin):
    sidecar = {"backend": {"service": "chronos"}, "adminPort": admin}
    for named, may in [({}, False), (MONITORING, True)]:
        (policy,) = policies(sidecar, admin=named)
        assert opens(policy, admin, "monitoring") is may
        assert not opens(policy, admin, "elsewhere")
        for port in {1, admin - 1, min(admin + 1, 65534), 443, 65534} - {admin}:
            assert opens(policy, port, "elsewhere"), port
        (policy,) = policies(sidecar, admin=named, application={"open": False})
        assert not opens(policy, 443, "elsewhere") and opens(policy, admin, "monitoring") is may


def test_egress_reaches_dns_the_api_server_and_the_backend():
    api = [{"ipBlock": {"cidr": "192.0.2.10/32"}}]
    store_pods = {"matchLabels": {"app": "chronos"}}
    backend = {"service": "chronos", "namespace": "data", "port": 5432}
    (policy,) = policies({"backend": backend}, egress={"enabled": True, "api": {"to": api}, "backend": {"podSelector": store_pods}})
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    dns, server, pods = policy["spec"]["egress"]
    assert dns == {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]}
    assert server == {"ports": [{"protocol": "TCP", "port": 443}, {"protocol": "TCP", "port": 6443}], "to": api}
    assert pods == {"to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "data"}}, "podSelector": store_pods}],
                    "ports": [{"protocol": "TCP", "port": 5432}]}
    objects = template(CHART, values={**SHOP, "backendNamespaces": ["other", "db"], "networkPolicy": {"enabled": True, "egress": {"enabled": True}}})
    (other,) = [item for item in objects if item["kind"] == "NetworkPolicy"]
    assert [to["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for to in other["spec"]["egress"][2]["to"]] == ["db", "other"]
    addresses = {"backend": {"addresses": "db-0.example:5432, [2001:db8::1]:5433,db-1.example:5432"}}
    (policy,) = policies(addresses, egress={"enabled": True})
    assert policy["spec"]["egress"][1:] == [{"ports": [{"protocol": "TCP", "port": 5432}, {"protocol": "TCP", "port": 5433}]}]


def test_the_kustomize_component_is_the_charts_policy(tmp_path):
    (policy,) = policies(admin={"from": [{"podSelector": {"matchLabels": {"app": "prometheus"}}}]},
                         egress={"enabled": True, "backend": {"podSelector": {"matchLabels": {"app": "store"}}}})
    spec = policy["spec"]
    # The names of the demo, and its one namespace.
    spec["podSelector"] = {"matchLabels": {"aegis-proxy.io/inject": "enabled"}}
    del spec["egress"][2]["to"][0]["namespaceSelector"]
    assert yaml.safe_load((ROOT / "manifests/networkpolicy/networkpolicy.yaml").read_text())["spec"] == spec
    (tmp_path / "kustomization.yaml").write_text(yaml.dump({
        "namespace": "aegis-demo", "resources": [os.path.relpath(ROOT / "manifests/demo", tmp_path.resolve())],
        "components": [os.path.relpath(ROOT / "manifests/networkpolicy", tmp_path.resolve())]}))
    objects = kustomize(tmp_path)
    validate(objects)
    assert one(objects, "NetworkPolicy")["metadata"]["namespace"] == "aegis-demo"
    labels = [item["spec"]["template"]["metadata"]["labels"] for item in objects if item["kind"] in ["Deployment", "StatefulSet"]]
    for selector in [spec["podSelector"], spec["ingress"][1]["from"][0]["podSelector"], spec["egress"][2]["to"][0]["podSelector"]]:
        assert sum(selector["matchLabels"].items() <= item.items() for item in labels) == 1, selector


def notes(*arguments, values):
    return helm("install", "shop", CHART, "--namespace", "db", "--dry-run=client", "--values", "-",
                *arguments, input=yaml.dump({**SHOP, **values})).stdout.split("NOTES:")[1]


@pytest.mark.parametrize("sidecar, said, unsaid", [
    ({}, ["epoll on most nodes", "default seccomp profile denies", "containerd 1.x allows it", "aegis_io_driver_info"], []),
    ({"seccomp": {"type": "Localhost"}},
     ["io_uring where the node has Linux 6.0", "else epoll", "profiles/aegis.json does not start", "aegis_io_driver_info"], ["most nodes"]),
    ({"env": {"AEGIS_IO": "epoll"}}, ["driver is epoll, as sidecar.env.AEGIS_IO says"], ["io_uring", "aegis_io_driver_info"]),
    ({"seccomp": {"type": "Localhost"}, "env": {"AEGIS_IO": "epoll"}}, ["driver is epoll, as"], ["io_uring"]),
    ({"env": {"AEGIS_IO": "uring"}}, ["DOES NOT START", "AEGIS_IO=auto falls back"], ["most nodes"]),
], ids=["default", "localhost", "epoll", "epoll with a profile", "uring"])
def test_the_notes_tell_the_driver_truly(sidecar, said, unsaid):
    text = " ".join(notes(values={"sidecar": {**SHOP["sidecar"], **sidecar}}).split())
    assert [part for part in said if part not in text] == []
    assert [part for part in unsaid if part in text] == []


def test_the_notes_say_who_may_ask_the_admin_port():
    assert "NetworkPolicies" not in notes(values={})
    assert "answers the node and\nnobody else" in notes(values={"networkPolicy": {"enabled": True}})
    text = notes(values={"networkPolicy": {"enabled": True, "admin": MONITORING, "egress": {"enabled": True}}})
    assert "those under networkPolicy.admin.from, and the pods reach DNS" in text


def test_commands_of_the_notes_do_what_they_are_for():
    commands = re.findall(r"^  ((?:kubectl|curl) .*)$", notes(values={}), re.M)
    forward, curl = map(shlex.split, commands)
    # As far as it goes without a server: kubectl takes it, for a pod where the clients are.
    assert forward[:3] == ["kubectl", "--namespace", "shop"] and forward[-1] == "&"
    tried = run(WORK / "kubectl", "--server", "http://127.0.0.1:9", *forward[1:-1], check=False)
    assert "refused" in tried.stderr, tried.stderr
    with store(kind=Native) as backend, aegis(env={"AEGIS_BACKENDS": backend}, kind=Native) as proxy:
        shown = run(*[word.replace(f":{forward[-2]}/", f":{proxy.admin}/") for word in curl]).stdout
        assert json.loads(shown)["endpoints"][0]["address"] == backend
    (flags,) = re.findall(r"^  (--set .*)$", notes(values={"clients": []}), re.M)
    assert "NOBODY MAY WATCH" not in notes(*shlex.split(flags), values={"clients": []})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not ASSETS:
        pytest.skip("KUBEBUILDER_ASSETS is not set: nothing was tried at a real API server")
    with api_server(ASSETS, tmp_path_factory.mktemp("api-server")) as server:
        for namespace in ["db", "shop"]:
            server.kubectl("create", "namespace", namespace)
            server.kubectl("create", "serviceaccount", "default", "--namespace", namespace, check=False)
        yield server


def test_the_objects_of_the_page_are_accepted_by_a_real_server(server, library_chart, tmp_path):
    objects = template(library_chart, namespace="shop")
    for name, text in files(PAGE):
        if name == "values.yaml" and "networkPolicy" in text:
            objects += [item for item in template(CHART, values=yaml.safe_load(text)) if item["kind"] == "NetworkPolicy"]
    assert "NetworkPolicy" in kinds(objects)
    for item in objects:
        # Helm creates what has no namespace of its own in the release's.
        item["metadata"].setdefault("namespace", "shop")
        made = server.create(item, "--dry-run=server")
        assert made["metadata"]["name"] == item["metadata"]["name"]


def test_the_pull_secret_of_the_page_reaches_every_new_pod(server):
    server.kubectl("create", "serviceaccount", "web", "--namespace", "shop")
    section = PAGE.split("**From a registry with a login**")[1].split("\n## ")[0]
    for words in commands(section):
        server.kubectl(*words[1:])
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "shop"},
           "spec": {"serviceAccountName": "web", "containers": [{"name": "web", "image": "web"}]}}
    assert server.create(pod, "--dry-run=server")["spec"]["imagePullSecrets"] == [{"name": "aegis-registry"}]


def test_the_commands_that_list_pods_are_understood(server):
    listing = [words for words in commands(PAGE) if words[:2] in [["kubectl", "get"]]]
    assert len(listing) >= 4
    for words in listing:
        if any("$(" in word for word in words):
            continue  # Asks for a ConfigMap that a release makes: tried with the charts.
        server.kubectl(*words[1:])


@pytest.mark.parametrize("cpu, limited", [(None, True), ("1", False)])
def test_a_limit_range_limits_the_cpu_that_the_sidecar_leaves_open(server, library_chart, cpu, limited):
    limits = {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "limits", "namespace": "shop"},
              "spec": {"limits": [{"type": "Container", "default": {"cpu": "200m", "memory": "128Mi"}}]}}
    server.create(limits, check=False)
    chosen = ["--set", f"sidecar.resources.limits.cpu={cpu}"] if cpu else []
    spec = one(template(library_chart, *chosen, namespace="shop"), "Deployment")["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "namespace": "shop", **spec["metadata"]}, "spec": spec["spec"]}
    pod["spec"]["serviceAccountName"] = "default"
    (sidecar,) = eventually(lambda: server.create(pod, "--dry-run=server"), lambda: "refused")["spec"]["initContainers"]
    assert sidecar["resources"]["limits"]["cpu"] == ("200m" if limited else "1")
    # What the sidecar has by itself stays.
    assert sidecar["resources"]["limits"]["memory"] == "256Mi"
    server.kubectl("delete", "limitrange", "limits", "--namespace", "shop")
