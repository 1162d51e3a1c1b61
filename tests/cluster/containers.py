"""Builds the image on a base that is made here, and runs it under a real container runtime."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import pathlib
import re
import resource
import shutil
import socket
import socketserver
import threading
import time
import urllib.request

import pytest

from tools import ROOT, WORK, run

IMAGE = "localhost/aegis-proxy:test"
STORE = "localhost/aegis-demo-store:test"
BASE = "localhost/rust-base:test"
PROFILE = ROOT / "manifests/seccomp/aegis.json"
STATE = WORK / "containers"
# Podman cannot clean up after a container when this path is longer than 50 characters.
RUN = pathlib.Path("/tmp") / f"aegis-{hashlib.sha256(bytes(STATE)).hexdigest()[:8]}"
CGROUPS = pathlib.Path("/sys/fs/cgroup")

CONFIG = f"""
[containers]
# What a container gets by default is more than a test machine may hand out.
default_ulimits = ["nofile=1024:{min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 524288)}", "nproc=1024:1024"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "{RUN}/libpod"
"""
STORAGE = f"""
[storage]
driver = "vfs"
runroot = "{RUN}/storage"
graphroot = "{STATE}/graph"
"""


@functools.cache
def environment():
    STATE.mkdir(parents=True, exist_ok=True)
    (STATE / "containers.conf").write_text(CONFIG)
    (STATE / "storage.conf").write_text(STORAGE)
    return {**os.environ, "CONTAINERS_CONF": str(STATE / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(STATE / "storage.conf")}


def podman(*arguments, **options):
    return run("podman", *arguments, env=environment(), **options)


def buildah_build(*arguments, context=ROOT, **options):
    """Builds with the machine's own compiler: no registry of images is needed."""
    sysroot = run("rustc", "--print", "sysroot").stdout.strip()
    registry = pathlib.Path(os.environ.get("CARGO_HOME", pathlib.Path.home() / ".cargo")) / "registry"
    mounts = ["/usr:/usr:ro", "/etc/alternatives:/etc/alternatives:ro", f"{sysroot}:/rust:ro", f"{registry}:/cargo/registry"]
    return run("buildah", "bud", "--layers", "--isolation", "chroot", "--build-arg", f"RUST_IMAGE={BASE}",
               *[part for mount in mounts for part in ("--volume", mount)], *arguments, context,
               env=environment(), timeout=1200, **options)


def lacking_privilege():
    """What the kernel denies that every container needs, or nothing. It is asked without any
    container tool: whatever else goes wrong with those is a failure."""
    isolate = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--mount-proc", "true"]
    denied = run(*isolate, check=False).stderr.strip()
    if any(error in denied for error in ["Operation not permitted", "Permission denied"]):
        return denied
    assert not denied, denied
    # Version 2 has the group itself where version 1 has its controllers.
    for root in [CGROUPS] if (CGROUPS / "cgroup.procs").exists() else sorted(CGROUPS.glob("*/")):
        group = root / f"aegis-tests-{os.getpid()}"
        try:
            group.mkdir()
            group.rmdir()
        except OSError as error:
            if error.errno not in [errno.EPERM, errno.EACCES, errno.EROFS]:
                raise
            return str(error)
    return None


@functools.cache
def build():
    """The base, and both images; layers are kept from one run of the tests to the next."""
    if denied := lacking_privilege():
        pytest.skip(f"containers are not allowed here, so nothing was tried in one: {denied}")
    run("cargo", "fetch", "--locked", cwd=ROOT, timeout=600)
    base = STATE / "base"
    if base.exists():
        shutil.rmtree(base)
    for folder in ["usr", "tmp", "etc", "dev", "proc", "sys"]:
        (base / folder).mkdir(parents=True)
    for folder in ["bin", "lib", "lib64", "sbin"]:
        (base / folder).symlink_to(f"usr/{folder}")
    dockerfile = STATE / "base.Dockerfile"
    # The tests are not about speed, and optimizing would take most of their time.
    dockerfile.write_text("FROM scratch\nCOPY . /\nENV PATH=/rust/bin:/usr/bin:/bin CARGO_HOME=/cargo CARGO_NET_OFFLINE=true "
                          "CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 "
                          "CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_DEBUG=none\n")
    run("buildah", "bud", "--layers", "--isolation", "chroot", "--timestamp", "0", "-t", BASE, "-f", dockerfile, base, env=environment())
    buildah_build("--target", "store", "-t", STORE)
    return buildah_build("--build-arg", "REVISION=abc", "-t", IMAGE).stdout


class Container:
    """A container that runs with the host's network, read-only and without any capability."""

    def __init__(self, image, *command, env=None, options=()):
        given = [part for name, value in (env or {}).items() for part in ("--env", f"{name}={value}")]
        self.id = podman("run", "--detach", "--network", "host", "--read-only", "--cap-drop", "ALL",
                         "--security-opt", "no-new-privileges", *given, *options, image, *command).stdout.strip()

    def logs(self):
        result = podman("logs", self.id)
        return result.stdout + result.stderr

    def signal(self, name):
        podman("kill", "--signal", name, self.id)

    def exit_code(self, timeout=30):
        return int(podman("wait", self.id, timeout=timeout).stdout)

    def remove(self):
        podman("rm", "--force", "--time", "0", self.id, check=False)


@contextlib.contextmanager
def container(image, *command, **options):
    running = Container(image, *command, **options)
    try:
        yield running
    finally:
        running.remove()


class Aegis(Container):
    """The proxy, once it has started."""

    def __init__(self, env=None, options=()):
        self.port, self.admin = free_port(), free_port()
        super().__init__(IMAGE, options=options, env={
            "AEGIS_LISTEN": f"127.0.0.1:{self.port}", "AEGIS_ADMIN": f"127.0.0.1:{self.admin}", **(env or {})})
        try:
            eventually(lambda: self.get("startupz") == "ok\n", self.logs)
        except BaseException:
            self.remove()
            raise

    def get(self, path):
        return get(f"http://127.0.0.1:{self.admin}/{path}")

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def driver(self):
        return re.search(r'io driver driver="(\w+)" reason="(.*)" kernel', self.logs()).groups()


@contextlib.contextmanager
def aegis(**options):
    running = Aegis(**options)
    try:
        yield running
    finally:
        running.remove()


def get(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def eventually(condition, describe, seconds=20):
    """Waits until the condition holds; errors of connections count as not yet."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            found = condition()
            if found:
                return found
        except OSError:
            pass
        assert time.monotonic() < deadline, describe()
        time.sleep(0.05)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        with contextlib.suppress(ConnectionError):
            while data := self.request.recv(65536):
                self.request.sendall(data)


@contextlib.contextmanager
def echo():
    """A backend that sends back what it gets; gives its address."""
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield "127.0.0.1:%d" % server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def ask(connection, data):
    connection.sendall(data)
    found = b""
    while len(found) < len(data):
        part = connection.recv(65536)
        assert part, f"ended after {found!r}"
        found += part
    return found


def inspect(image):
    return json.loads(podman("image", "inspect", image).stdout)[0]
