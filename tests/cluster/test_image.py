"""The image from the real Dockerfile, and containers of it under a real runtime."""

import math
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
from fractions import Fraction

import pytest
import yaml

from containers import (IMAGE, PROFILE, STORE, aegis, ask, build, buildah_build, container, echo, eventually,
                        free_port, get, inspect, no_uring, podman, store)
from tools import CHART, ROOT, USER_CHART, kustomize, one, run, template

@pytest.fixture(scope="module", autouse=True)
def images():
    build()


@pytest.mark.parametrize("image", [IMAGE, STORE])
def test_an_image_is_small_and_has_nothing_but_the_program(image, tmp_path):
    assert inspect(image)["Size"] < 15_000_000
    created = podman("create", image).stdout.strip()
    podman("export", "--output", tmp_path / "image.tar", created)
    podman("rm", created)
    listing = run("tar", "-tvf", tmp_path / "image.tar").stdout.splitlines()
    # The runtime adds empty files and folders of its own.
    files = [line.split()[-1] for line in listing if line.startswith("-") and line.split()[2] != "0"]
    assert files == ["usr/local/bin/" + ("demo" if image == STORE else "aegis-proxy")]


def test_an_image_runs_as_nobody_in_particular_and_says_what_it_is():
    for image in [IMAGE, STORE]:
        assert inspect(image)["Config"]["User"] == "65532:65532"
    config = inspect(IMAGE)["Config"]
    assert config["Labels"]["org.opencontainers.image.revision"] == run("git", "rev-parse", "HEAD", cwd=ROOT).stdout.strip()
    assert podman("run", "--rm", "--network", "none", IMAGE, "--version").stdout == \
        f"aegis-proxy {config['Labels']['org.opencontainers.image.version']}\n"


def test_dependencies_are_a_layer_that_sources_do_not_touch(tmp_path):
    shutil.copytree(ROOT / "src", tmp_path / "src")
    for name in ["Cargo.toml", "Cargo.lock", "Dockerfile", ".dockerignore"]:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "src/main.rs").write_text("fn main() { other }")
    output = buildah_build("--target", "dependencies", context=tmp_path).stdout
    step = output[output.index("RUN mkdir -p src"):]
    assert "Using cache" in step, output


@pytest.fixture(params=["epoll", "io_uring"])
def driver(request):
    """Each driver, and the options of a container that has it."""
    if request.param == "epoll":
        return request.param, []
    if why := no_uring():
        pytest.skip(f"io_uring does not work on this machine, so only epoll was tried: {why}")
    return request.param, ["--security-opt", f"seccomp={PROFILE}"]


def denial():
    """What the proxy says of io_uring under the default profile."""
    return "io_uring cannot be used" if no_uring() else "a seccomp profile"


def test_the_default_profile_means_epoll_and_the_shipped_one_io_uring(driver):
    name, options = driver
    with echo() as backend, aegis(env={"AEGIS_BACKENDS": backend}, options=options) as proxy:
        found, reason = proxy.driver()
        assert found == name and (denial() if name == "epoll" else "work") in reason, proxy.logs()
        for size in [1, 100_000, 20_000_000]:
            with proxy.connect() as client:
                assert ask(client, b"x" * size) == b"x" * size
        assert f'aegis_io_driver_info{{driver="{name}"' in proxy.get("metrics")
        assert "readyz" in proxy.get("") and proxy.get("livez") == "ok\n"
        proxy.signal("TERM")
        assert proxy.exit_code() == 0, proxy.logs()


def test_io_uring_by_name_is_refused_with_the_reason_under_the_default_profile():
    with container(IMAGE, env={"AEGIS_IO": "uring"}) as proxy:
        assert proxy.exit_code() == 78
        assert denial() in proxy.logs() and "AEGIS_IO=auto" in proxy.logs()


def test_a_stop_lets_sessions_finish_and_ends_with_success(driver):
    drain = {"AEGIS_DRAIN_DELAY": "0s", "AEGIS_DRAIN_TIMEOUT": "30s"}
    with echo() as backend, aegis(env={"AEGIS_BACKENDS": backend, **drain}, options=driver[1]) as proxy:
        client = proxy.connect()
        ask(client, b"before")
        stop = threading.Thread(target=podman, args=("stop", "--time", "30", proxy.running.id))
        stop.start()
        eventually(lambda: "draining: sessions finish" in proxy.logs(), proxy.logs)
        assert ask(client, b"during the drain") == b"during the drain"
        client.close()
        stop.join()
        assert proxy.exit_code() == 0
        assert "drained: every session has finished" in proxy.logs()


def test_a_second_signal_ends_at_once():
    with echo() as backend, aegis(env={"AEGIS_BACKENDS": backend, "AEGIS_DRAIN_DELAY": "5m"}) as proxy:
        client = proxy.connect()
        ask(client, b"open")
        proxy.signal("TERM")
        eventually(lambda: "drain asked" in proxy.logs(), proxy.logs)
        proxy.signal("TERM")
        assert proxy.exit_code() == 0
        assert "second signal" in proxy.logs()


def test_a_wrong_configuration_is_told_and_ends_with_its_own_code():
    with container(IMAGE, env={"AEGIS_WORKERS": "none", "AEGIS_BACKEND": "db:1"}) as proxy:
        assert proxy.exit_code() == 78
        assert "AEGIS_WORKERS" in proxy.logs() and "Is AEGIS_BACKENDS meant?" in proxy.logs()


def name_server():
    """Answers every question for an IPv4 address with 127.0.0.1, and others with nothing."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.153", 53))

    def answer():
        while True:
            try:
                query, client = server.recvfrom(512)
            except OSError:
                return
            end = query.index(b"\0", 12) + 5
            ipv4 = query[end - 4:end - 2] == b"\0\1"
            record = b"\xc0\x0c" + struct.pack(">HHIH4s", 1, 1, 60, 4, bytes([127, 0, 0, 1])) if ipv4 else b""
            counts = struct.pack(">HHHH", 1, int(ipv4), 0, 0)
            server.sendto(query[:2] + b"\x81\x80" + counts + query[12:end] + record, client)
    threading.Thread(target=answer, daemon=True).start()
    return server


def test_names_are_resolved_without_a_c_library_in_the_image(tmp_path):
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.153\nsearch db.svc.cluster.local svc.cluster.local\noptions ndots:5\n")
    with name_server(), echo() as backend:
        options = ["--volume", f"{tmp_path}/resolv.conf:/etc/resolv.conf:ro"]
        port = backend.split(":")[1]
        with aegis(env={"AEGIS_BACKENDS": f"chronos.db:{port}"}, options=options) as proxy:
            with proxy.connect() as client:
                assert ask(client, b"by name") == b"by name"
            assert f"127.0.0.1:{port}" in proxy.get("backends")


@pytest.fixture
def script_env(tmp_path):
    """Busybox's programs by name: not every build of it has a shell that finds them by itself."""
    for name in ["nc", "sleep"]:
        (tmp_path / name).symlink_to(shutil.which("busybox"))
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_the_demo_store_answers_the_request_of_the_chart_through_the_proxy(script_env):
    values = {"sidecar": {"backend": {"service": "chronos"}}}
    pod = next(item for item in template(CHART, values=values) if item["kind"] == "Pod")
    (request,) = pod["spec"]["containers"]
    env = {**script_env, **{item["name"]: item["value"] for item in request["env"]}}
    # As the charts have it, and as an unknown protocol.
    for protocol in ["chronos", "tcp"]:
        settings = charted({"backend": {"addresses": "any:1"}, "protocol": protocol})
        modes = {name: settings[name] for name in ["AEGIS_PROTOCOL", "AEGIS_POOL_MODE"]}
        with store() as backend, aegis(env={"AEGIS_BACKENDS": backend, **modes}) as proxy:
            shell, option, script = request["command"]
            script = script.replace("127.0.0.1 8081", f"127.0.0.1 {proxy.port}")
            said = run("busybox", shell, option, script, env=env).stdout
            assert said == "the reply: PONG\n"
            refused = run("busybox", shell, option, script, check=False, env={**env, "REPLY": "PANG"})
            assert refused.returncode == 1 and "no reply of 'PANG'" in refused.stdout


def test_the_client_of_the_demo_finds_what_it_stored_in_two_stores(script_env):
    deployment = next(item for item in kustomize(ROOT / "manifests/demo")
                      if item["kind"] == "Deployment" and item["metadata"]["name"] == "client")
    spec = deployment["spec"]["template"]["spec"]
    settings = {item["name"]: item.get("value") for item in spec["initContainers"][0]["env"]}
    chosen = {name: settings[name] for name in ["AEGIS_PROTOCOL", "AEGIS_POOL_MODE", "AEGIS_BALANCE"]}
    shell, option, script = spec["containers"][0]["command"]
    with store() as one_store, store() as other, aegis(env={"AEGIS_BACKENDS": f"{one_store},{other}", **chosen}) as proxy:
        script = script.replace("127.0.0.1 8081", f"127.0.0.1 {proxy.port}")
        client = subprocess.Popen(["busybox", shell, option, script], env=script_env, stdout=subprocess.PIPE, text=True)
        answered = re.compile(r'aegis_requests_total\{route="default",command="get",outcome="answered"\} (\d+)')
        eventually(lambda: int(answered.search(proxy.get("metrics"))[1]) >= 10, proxy.logs)
        client.terminate()
        assert client.communicate(timeout=20)[0] == "", "it complains of each wrong answer"
        assert client.returncode == 0
        used = re.findall(r'aegis_endpoint_connects_total\{.*\} (\d+)', proxy.get("metrics"))
        assert len(used) == 2 and "0" not in used


def test_the_demo_store_ends_with_success():
    with container(STORE, "store", f"127.0.0.1:{free_port()}") as running:
        eventually(lambda: "listens on" in running.logs(), running.logs)
        running.signal("TERM")
        assert running.exit_code() == 0, running.logs()


def check(env):
    """What the proxy says of these variables."""
    given = [part for name, value in env.items() for part in ("--env", f"{name}={value}")]
    return podman("run", "--rm", "--network", "none", *given, IMAGE, "check").stdout


EXAMPLES = {"metadata.namespace": "shop", "spec.nodeName": "node-1",
            "metadata.labels['topology.kubernetes.io/zone']": "zone-1"}


def amount(quantity, divisor):
    """What the downward API makes of a quantity: so many of the divisor, rounded up."""
    units = {"": 1, "m": Fraction(1, 1000), "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}

    def number(text):
        digits, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()
        return Fraction(digits) * units[unit]
    return str(math.ceil(number(quantity) / number(divisor)))


def charted(values):
    """The environment that the library chart gives to a sidecar."""
    spec = one(template(USER_CHART, values={"sidecar": values}), "Deployment")["spec"]["template"]["spec"]
    container = spec["initContainers"][0]

    def value(item):
        if "value" in item:
            return item["value"]
        if field := item["valueFrom"].get("fieldRef"):
            return EXAMPLES[field["fieldPath"]]
        resource = item["valueFrom"]["resourceFieldRef"]
        kind, name = resource["resource"].split(".")
        return amount(container["resources"][kind][name], resource["divisor"])
    return {item["name"]: value(item) for item in container["env"]}


@pytest.mark.parametrize("by", ["addresses", "service"])
def test_a_charted_sidecar_runs_while_everything_refuses_it(by, tmp_path):
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=tests",
        "-keyout", tmp_path / "key", "-out", tmp_path / "ca.crt")
    (tmp_path / "token").write_text("token")
    (tmp_path / "namespace").write_text("shop")
    tmp_path.chmod(0o755)
    # What the kubelet adds.
    mount = ["--volume", f"{tmp_path}:/var/run/secrets/kubernetes.io/serviceaccount:ro",
             "--tmpfs", "/run/aegis:rw,mode=1777"]
    closed = str(free_port())
    kubelet = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": closed}
    backend = {"addresses": f"127.0.0.1:{closed}"} if by == "addresses" else {"service": "chronos"}
    port, admin = free_port(), free_port()
    env = charted({"backend": backend, "listenPort": port, "adminPort": admin})
    with container(IMAGE, env={**kubelet, **env}, options=mount) as proxy:
        eventually(lambda: get(f"http://127.0.0.1:{admin}/livez") == "ok\n", proxy.logs)
        eventually(lambda: "refused" in proxy.logs(), proxy.logs)
        assert get(f"http://127.0.0.1:{admin}/livez") == "ok\n"
        proxy.signal("TERM")
        assert proxy.exit_code() == 0, proxy.logs()


@pytest.mark.parametrize("values", [
    {"backend": {"service": "chronos"}},
    {"backend": {"service": "chronos", "port": "db"}, "locality": "zone"},
    {"backend": {"selector": "app=db"}, "locality": "node", "balance": "key_hash"},
    {"backend": {"service": "web"}, "protocol": "http1", "pool": {"mode": "session", "size": 4096},
     "queue": {"max": 1000000, "timeout": "1h"}, "requestTimeout": "off"},
    {"backend": {"service": "db"}, "protocol": "tcp"},
    {"backend": {"addresses": "db:1,db:2"}, "listenPort": 5000, "env": {"AEGIS_MAX_SESSIONS": "100"}},
])
def test_the_proxy_accepts_what_the_charts_set(values):
    said = check(charted(values))
    assert "AEGIS_DRAIN_DELAY=0s" in said
    mode = "preconnect" if values.get("protocol") == "tcp" else values.get("pool", {}).get("mode", "request")
    assert f"AEGIS_POOL_MODE={mode}\n" in said
    assert f"AEGIS_LISTEN=127.0.0.1:{values.get('listenPort', 8081)}" in said


def test_the_proxy_accepts_what_compose_sets():
    compose = yaml.safe_load((ROOT / "manifests/compose/compose.yaml").read_text())
    assert "AEGIS_BACKENDS=store:8080" in check(compose["services"]["aegis"]["environment"])
