"""Every command that the pages show runs in a test, or it is said here why it does not."""

import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib

import pytest

from containers import eventually
from pages import PAGES, lines
from test_docs import library_chart, server  # noqa: F401, fixtures
from tools import ROOT, WORK, run

COMMANDS = [(page, line) for page, text in PAGES.items() for line in lines(text)]
# What is asked of a proxy that has the control socket of the page, and what it says.
WITH_CONTROL = {
    r"aegis-proxy log-level": r"^info$",
    r"aegis-proxy log-level info,aegis::worker=trace --for 10m": r"^info,aegis::worker=trace \(for another (10m|9m 59s), then info\)$",
    r"aegis-proxy log-level info": r"^info$",
    r"aegis-proxy tap session\.pcap": r"^waiting for the next client\n6 bytes of a client of route default from 127\.0\.0\.1:\d+.*; \S",
    r"aegis-proxy tap session\.pcap --nth 3 --bytes 64k --for 5s": r"^waiting for client 3 from now on\n6 bytes of a client of route default",
    r"aegis-proxy drain --wait": r"^draining, 0 sessions are open\nended$",
}
# What the demo prints is typed as well.
PRINTED = re.search(r'WHAT_TO_TRY: &str = r"(.*?)"', (ROOT / "examples/demo/main.rs").read_text(), re.S)[1]
COMMANDS += [("demo", line) for line in re.findall(r"^  (\S.*)$", PRINTED, re.M)]
OF_PROXY = re.compile(r"(?:[A-Z][A-Z0-9_]*=\S+ +)*(?:target/release/)?aegis-proxy(?: check)?$")
# What is typed beside `make demo`, and what comes of it.
WITH_DEMO = {
    r"printf .* \| nc -q1 127\.0\.0\.1 8081": r"OK\nv\n",
    r"ab .* http://127\.0\.0\.1:8081/": r"Failed requests: +0\n",
    r"curl http://\S+:8082/metrics": r"\naegis_build_info\{",
    r"curl http://\S+:8082/backends": r'"endpoints"',
    r"curl http://\S+:8082/readyz": r"^ok\n",
    r"curl http://\S+:8082/status": r'^\{.*"workers"',
}
# At a real API server where there is one, in the order of the page.
AT_SERVER = r"(kubectl (?!port-forward)|helm install aegis )"
# What installs the example of the library chart: rendered, and at a real API server.
OF_LIBRARY = r"helm (dependency build shop|install shop shop --namespace shop)"


def read(path):
    return (ROOT / path).read_text()


def recipe(target):
    """What `make` does for a target."""
    return re.search(rf"^{target}:.*\n((?:\t.*\n)+)", read("Makefile"), re.M)[1]


# Who runs a command, or why nobody does, and how one sees that this still holds.
ELSEWHERE = {
    r"make (lint|test|test-page|test-cluster|bench QUICK=1)": (
        ".ci/run runs it", lambda line: re.search(rf"^(timeout .*)?{line}$", read(".ci/run"), re.M)),
    r"make demo": (
        ".ci/demo-under-load does what it does", lambda line: "target/demo/examples/demo" in recipe("demo").replace("$${CARGO_TARGET_DIR:-target}", "target")
        and recipe("demo").splitlines()[0].strip() in read(".ci/demo-under-load")),
    r"make image IMAGE=\S+": (
        "test_image.py runs it with an engine of its own", lambda line: '"make", "image"' in read("tests/cluster/containers.py")),
    r"make bench": (
        "it measures for 20 minutes; .ci/run runs it with QUICK=1", lambda line: "make bench QUICK=1" in read(".ci/run")),
    r"make fuzz SECONDS=60": (
        "it takes a build with optimizations; `make test` runs the same test for shorter",
        lambda line: "cargo test --release --test fuzz" in recipe("fuzz") and (ROOT / "tests/fuzz.rs").exists()),
    r"make faults": (
        "it measures and writes a page; `make test` runs the same tests",
        lambda line: '"--test", "e2e", "platform::"' in read("tests/platform-faults") and (ROOT / "tests/e2e/platform.rs").exists()),
    r"cargo build --release": (
        "the image is built by it, in test_image.py", lambda line: re.search(r"cargo build .*--release .*aegis-proxy", read("Dockerfile"))),
    r"cargo bench --bench compare -- --scenario (\S+) --rounds 7": (
        "it measures; `make bench QUICK=1` runs all scenarios",
        lambda line: f'"{line.split()[6]}"' in read("benches/compare/scenarios.rs")),
    r"cargo test --test e2e felt .*": (
        "`make test` runs these tests", lambda line: "fn felt_of_" in read("tests/e2e/endpoint_wait.rs")),
    r"cargo test --test e2e -- a_switchover a_promotion .*": (
        "`make test` runs these tests", lambda line: all(f"fn {name}" in read(f"tests/e2e/{file}.rs") for name, file in [
            ("a_switchover", "databases/switchover"), ("a_promotion", "promotion")])),
    r"apt-get install (.*)": (
        "it changes the machine; .ci/run installs the same packages",
        lambda line: set(line.split()[2:]) <= set(read(".ci/run").split())),
    r"docker push (\S+)": (
        "there is no registry; the image is the one that was made",
        lambda line: any(f"make image IMAGE={line.split()[2]}" in of_page for of_page in map(lines, PAGES.values()))),
    r"kubectl port-forward pod/POD 8082 &": (
        "there is no kubelet; 8082 is the port by default",
        lambda line: "kubelet" not in read("tests/cluster/api_server.py") and "`[::]:8082`" in PAGES["CONFIGURATION.md"]),
}


def of(pattern):
    return [pytest.param(line, id=f"{page}: {line[:60]}") for page, line in COMMANDS if re.fullmatch(pattern, line)]


@pytest.mark.parametrize("page, line", COMMANDS, ids=lambda part: part[:60])
def test_a_command_runs_here_or_elsewhere_or_cannot(page, line):
    ways = [*WITH_DEMO, *WITH_CONTROL, *ELSEWHERE, rf"{AT_SERVER}.*", OF_LIBRARY, OF_PROXY.pattern]
    fitting = [way for way in ways if re.fullmatch(way, line)]
    assert len(fitting) == 1, f"{line}\nis run by no test: add it to this file, or say there why it cannot be"
    if fitting[0] in ELSEWHERE:
        reason, holds = ELSEWHERE[fitting[0]]
        assert holds(line), f"{line}\nno longer holds: {reason}"


def test_nothing_is_said_of_commands_that_no_page_has():
    ways = [*WITH_DEMO, *WITH_CONTROL, *ELSEWHERE, OF_LIBRARY]
    assert [way for way in ways if not any(re.fullmatch(way, line) for _, line in COMMANDS)] == []


def test_targets_and_features_that_pages_name_in_a_sentence_exist():
    cargo = tomllib.loads(read("Cargo.toml"))
    benches = {bench["name"] for bench in cargo["bench"]}
    seen = 0
    for page, text in PAGES.items():
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
        for program, rest in re.findall(r"`(?:[A-Z_]+=\S+ )?(make|cargo) ([^`]+)`", prose):
            seen += 1
            if program == "make":
                assert recipe(rest.split()[0]), (page, rest)
                continue
            for kind, name in re.findall(r"--(test|bench|example) (\S+)", rest):
                there = {"test": [f"tests/{name}.rs", f"tests/{name}/main.rs"], "bench": [f"benches/{name}.rs", f"benches/{name}/main.rs"],
                         "example": [f"examples/{name}.rs", f"examples/{name}/main.rs"]}[kind]
                assert any((ROOT / path).exists() for path in there), (page, rest)
                assert kind != "bench" or name in benches, (page, rest)
    assert seen > 15


@functools.cache
def helped(program, *words):
    """What a program says of one of its commands, or nothing if it has none of this name."""
    done = run(WORK / program, *words, "--help", check=False)
    return done.stdout if done.returncode == 0 and f"{program} {' '.join(words)}" in done.stdout else ""


def test_commands_for_a_cluster_that_pages_name_in_a_sentence_have_these_flags():
    """Those with `…` are parts of one."""
    seen = 0
    for page, text in PAGES.items():
        prose = " ".join(re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S).split())
        for span in re.findall(r"`((?:kubectl|helm) [^`…]+)`", prose):
            program, *words = shlex.split(span)
            command = next((words[:n] for n in [2, 1] if helped(program, *words[:n])), None)
            assert command, (page, span)
            # What follows `--` is said to the program in the container.
            for flag in re.findall(r"(?<= )--[\w-]+", span.partition(" -- ")[0]):
                options = run(WORK / "kubectl", "options").stdout if program == "kubectl" else ""
                assert re.search(rf"(^|\s){flag}\b", helped(program, *command) + options), (page, span, flag)
            seen += 1
    assert seen > 8


@functools.cache
def programs():
    """The folder with the proxy and the demo."""
    run("cargo", "build", "--locked", "--bin", "aegis-proxy", "--example", "demo", cwd=ROOT, timeout=1200)
    return WORK.parent / "debug"


@functools.cache
def no_namespaces():
    """Why no network can be had for a command alone, or nothing."""
    try:
        run(*ALONE, "true")
    except (AssertionError, OSError) as error:
        return str(error).splitlines()[-1]
    return None


ROOTLESS = [] if os.geteuid() == 0 else ["--map-root-user"]
# A network and a /run of its own: the ports and paths of the pages are free there, whatever else runs.
ALONE = ["unshare", *ROOTLESS, "--net", "--mount", "bash", "-c",
         'ip link set lo up && mount -t tmpfs none /run && mkdir /run/aegis && exec "$@"', "-"]


@pytest.fixture
def place(tmp_path):
    """Where the page's programs are found by the names that it has for them."""
    if reason := no_namespaces():
        pytest.skip(f"a command gets no network of its own: {reason}")
    (tmp_path / "target").mkdir()
    (tmp_path / "target/release").symlink_to(programs())
    return tmp_path


def environment(place):
    return {"PATH": f"{place}/target/release:{os.environ['PATH']}", "HOME": str(place), "DEMO_DATA": str(place)}


@pytest.mark.parametrize("line", of(OF_PROXY.pattern))
def test_a_command_that_starts_the_proxy_starts_it(place, line):
    options = {"cwd": place, "env": environment(place)}
    checked = run(*ALONE, "bash", "-c", line if line.endswith(" check") else f"{line} check", **options)
    assert not re.search("^warning:", checked.stdout, re.M), checked.stdout
    if line.endswith(" check"):
        return
    log = place / "log"
    with log.open("w") as output:
        # The last word of what `exec` leaves is the proxy itself.
        process = subprocess.Popen([*ALONE, "bash", "-c", re.sub(r"(\S*aegis-proxy)$", r"exec \1", line)], stdout=output, stderr=output, **options)
    try:
        eventually(lambda: " listening " in log.read_text() and " io driver " in log.read_text(), log.read_text)
        assert process.poll() is None, log.read_text()
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
    # There is no API server whose Service could be asked for.
    assert code == (78 if "KUBE_" in line else 0), log.read_text()


@pytest.mark.parametrize("line", of("|".join(WITH_DEMO)))
def test_a_command_beside_the_demo_does_what_the_page_says(place, line):
    if not shutil.which(line.split("|")[-1].split()[0]):
        pytest.skip(f"{line.split('|')[-1].split()[0]} is not installed")
    script = """
        "$0" >log 2>&1 & demo=$!
        until grep -q 'Aegis is up' log; do kill -0 $demo || { cat log; exit 99; }; sleep 0.1; done
        bash -c "$1"; code=$?
        kill $demo; wait $demo
        exit $code
    """
    done = run(*ALONE, "bash", "-c", script, programs() / "examples/demo", line, cwd=place, env=environment(place), timeout=300)
    (wanted,) = [output for way, output in WITH_DEMO.items() if re.fullmatch(way, line)]
    assert re.search(wanted, done.stdout), done.stdout[-2000:]


@pytest.mark.parametrize("line", of("|".join(WITH_CONTROL)))
def test_a_command_for_the_control_socket_does_what_the_page_says(place, line):
    assert "`AEGIS_CONTROL=unix:/run/aegis/control.sock`" in PAGES["OPERATIONS.md"]
    script = """
        export AEGIS_CONTROL=unix:/run/aegis/control.sock AEGIS_DRAIN_DELAY=0s
        aegis-proxy 2>log & proxy=$!
        until grep -q 'control listening' log; do kill -0 $proxy || { cat log; exit 99; }; sleep 0.1; done
        if [[ "$0" == *" tap "* ]]; then
            while sleep 0.1; do echo hello >/dev/tcp/127.0.0.1/8081; done 2>>log & clients=$!
        fi
        bash -c "$0" 2>&1; code=$?
        kill $clients $proxy 2>>log; wait $proxy
        exit $code
    """
    done = run(*ALONE, "bash", "-c", script, line, cwd=place, env=environment(place), timeout=60)
    (wanted,) = [output for way, output in WITH_CONTROL.items() if re.fullmatch(way, line)]
    assert re.search(wanted, done.stdout.strip()), done.stdout
    if " tap " in line:
        # The magic number of a file with nanoseconds, and the client's words.
        captured = (place / "session.pcap").read_bytes()
        assert captured[:4] == (0xA1B23C4D).to_bytes(4, sys.byteorder) and b"hello\n" in captured


def test_the_example_of_the_library_chart_is_installed_as_the_page_says(library_chart):  # noqa: F811
    (build, install) = [line.split() for _, line in COMMANDS if re.fullmatch(OF_LIBRARY, line)]
    run(WORK / "helm", *build[1:], cwd=library_chart.parent)
    assert "STATUS: pending-install" in run(WORK / "helm", *install[1:], "--dry-run=client", cwd=library_chart.parent).stdout


def test_the_commands_for_a_cluster_work_at_a_real_server(server, tmp_path):  # noqa: F811
    (tmp_path / "kubectl").symlink_to(WORK / "kubectl")
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "KUBECONFIG": str(server.kubeconfig)}
    labels = {"app": "web"}
    server.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "web", "namespace": "shop"}}, check=False)
    server.create({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": "shop"}, "spec": {
        "selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "web", "image": "web"}]}}}})
    server.kubectl("delete", "secret", "aegis-registry", "--namespace", "shop", "--ignore-not-found")
    ran = []
    for page, line in COMMANDS:
        if not re.match(AT_SERVER, line):
            continue
        if line.startswith("helm "):
            server.helm(*shlex.split(line)[1:], cwd=ROOT)
        else:
            ran.append((line, run("bash", "-c", line, env=env).stdout))
    assert len(ran) >= 9
    listed = {line: output for line, output in ran}
    assert "aegis-injection" in next(output for line, output in listed.items() if "get configmaps" in line)
    assert json.loads(server.kubectl("get", "deployment", "web", "--namespace", "shop", "-o", "json").stdout)[
        "spec"]["template"]["metadata"]["labels"]["aegis-proxy.io/inject"] == "enabled"
    left = server.kubectl("get", "validatingadmissionpolicies", "-o", "name").stdout
    assert "warnings.aegis-proxy.io" not in left
    server.helm("uninstall", "aegis", "--namespace", "db")
    server.kubectl("delete", "deployment", "web", "--namespace", "shop")
