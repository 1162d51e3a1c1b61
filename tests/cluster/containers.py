"""Builds the image on a base that is made here, and runs it under a real container runtime."""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import pathlib
import re
import resource
import shlex
import shutil
import socket
import socketserver
import subprocess
import tempfile
import threading
import time
import urllib.request

import pytest

from tools import ROOT, WORK, run

IMAGE = "localhost/aegis-proxy:test"
STORE = "localhost/aegis-demo-store:test"
BASE = "localhost/rust-base:test"
NOTHING = "localhost/nothing:test"
PROFILE = ROOT / "manifests/seccomp/aegis.json"
STATE = WORK / "containers"
# Podman cannot clean up after a container when this path is longer than 50 characters.
RUN = pathlib.Path("/tmp") / f"aegis-{hashlib.sha256(bytes(STATE)).hexdigest()[:8]}"
CONFINED = ["--network", "host", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]

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


def build_options():
    """What lets buildah use the machine's own compiler: no registry of images is needed."""
    sysroot = run("rustc", "--print", "sysroot").stdout.strip()
    registry = pathlib.Path(os.environ.get("CARGO_HOME", pathlib.Path.home() / ".cargo")) / "registry"
    mounts = ["/usr:/usr:ro", "/etc/alternatives:/etc/alternatives:ro", f"{sysroot}:/rust:ro", f"{registry}:/cargo/registry"]
    return ["--layers", "--isolation", "chroot", "--build-arg", f"RUST_IMAGE={BASE}",
            *[part for mount in mounts for part in ("--volume", mount)]]


def buildah_build(*arguments, context=ROOT):
    return run("buildah", "bud", *build_options(), *arguments, context, env=environment(), timeout=1200)


@functools.cache
def no_containers():
    """Why not even a container that does nothing can be built and run here, or nothing. There is
    nothing of Aegis in it: once it works, whatever fails is a failure."""
    try:
        base()
        nothing = STATE / "nothing.Dockerfile"
        nothing.write_text(f"FROM {BASE}\nRUN true\n")
        buildah_build("-t", NOTHING, "-f", nothing, context=STATE / "base")
        podman("run", "--rm", *CONFINED, "--volume", "/usr:/usr:ro", NOTHING, "true")
    except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
        return str(error).strip().splitlines()[-1]
    return None


@functools.cache
def no_uring():
    """Why no ring can be set up on this machine, whatever the profile of a container, or nothing."""
    # CLAMP, SUBMIT_ALL, COOP_TASKRUN and SINGLE_ISSUER, which Aegis cannot do without.
    parameters = (ctypes.c_uint32 * 30)(0, 0, 1 << 4 | 1 << 7 | 1 << 8 | 1 << 12)
    ring = ctypes.CDLL(None, use_errno=True).syscall(425, 8, parameters)
    if ring < 0:
        return os.strerror(ctypes.get_errno())
    os.close(ring)
    return None


def base():
    """An image with the places where the machine's own compiler is mounted."""
    folders = STATE / "base"
    if folders.exists():
        shutil.rmtree(folders)
    for folder in ["usr", "tmp", "etc", "dev", "proc", "sys"]:
        (folders / folder).mkdir(parents=True)
    for folder in ["bin", "lib", "lib64", "sbin"]:
        (folders / folder).symlink_to(f"usr/{folder}")
    dockerfile = STATE / "base.Dockerfile"
    # The tests are not about speed, and optimizing would take most of their time.
    dockerfile.write_text("FROM scratch\nCOPY . /\nENV PATH=/rust/bin:/usr/bin:/bin CARGO_HOME=/cargo CARGO_NET_OFFLINE=true "
                          "CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 "
                          "CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_DEBUG=none\n")
    run("buildah", "bud", "--layers", "--isolation", "chroot", "--timestamp", "0", "-t", BASE, "-f", dockerfile, folders,
        env=environment())


@functools.cache
def build():
    """Both images, by the makefile; layers are kept from one run of the tests to the next."""
    if denied := no_containers():
        pytest.skip(f"containers do not work here, so nothing was tried in one: {denied}")
    run("cargo", "fetch", "--locked", cwd=ROOT, timeout=600)
    engine = STATE / "engine"
    engine.write_text(f'#!/bin/sh\nshift\nexec buildah bud {shlex.join(build_options())} "$@"\n')
    engine.chmod(0o755)
    run("make", "image", f"ENGINE={engine}", f"IMAGE={IMAGE}", f"STORE_IMAGE={STORE}", cwd=ROOT, env=environment(), timeout=1200)


class Container:
    """A container that runs with the host's network, read-only and without any capability."""

    def __init__(self, image, *command, env=None, options=()):
        given = [part for name, value in (env or {}).items() for part in ("--env", f"{name}={value}")]
        self.id = podman("run", "--detach", *CONFINED, *given, *options, image, *command).stdout.strip()

    def logs(self):
        result = podman("logs", self.id)
        return result.stdout + result.stderr

    def signal(self, name):
        podman("kill", "--signal", name, self.id)

    def exit_code(self, timeout=30):
        return int(podman("wait", self.id, timeout=timeout).stdout)

    def remove(self):
        podman("rm", "--force", "--time", "0", self.id, check=False)


class Native:
    """The program of an image without the image, for what is not about images where no container
    works."""

    def __init__(self, image, *command, env=None):
        run("cargo", "build", "--locked", "--bin", "aegis-proxy", "--example", "demo", cwd=ROOT, timeout=1200)
        program = WORK.parent / "debug" / {IMAGE: "aegis-proxy", STORE: "examples/demo"}[image]
        self.folder = tempfile.TemporaryDirectory()
        self.log = pathlib.Path(self.folder.name) / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen([program, *command], stdout=log, stderr=log,
                                            env={**os.environ, "DEMO_DATA": self.folder.name, **(env or {})})

    def logs(self):
        return self.log.read_text()

    def remove(self):
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


@contextlib.contextmanager
def container(image, *command, kind=Container, **options):
    running = kind(image, *command, **options)
    try:
        yield running
    finally:
        running.remove()


class Aegis:
    """The proxy, once it has started."""

    def __init__(self, running, port, admin):
        self.running, self.port, self.admin = running, port, admin
        self.logs = running.logs

    def signal(self, name):
        self.running.signal(name)

    def exit_code(self):
        return self.running.exit_code()

    def get(self, path):
        return get(f"http://127.0.0.1:{self.admin}/{path}")

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def driver(self):
        return re.search(r'io driver driver="(\w+)" reason="(.*)" kernel', self.logs()).groups()


@contextlib.contextmanager
def aegis(env=None, **options):
    port, admin = free_port(), free_port()
    env = {"AEGIS_LISTEN": f"127.0.0.1:{port}", "AEGIS_ADMIN": f"127.0.0.1:{admin}", **(env or {})}
    with container(IMAGE, env=env, **options) as running:
        proxy = Aegis(running, port, admin)
        eventually(lambda: proxy.get("startupz") == "ok\n", proxy.logs)
        yield proxy


@contextlib.contextmanager
def store(**options):
    """The demo's store; gives its address."""
    address = f"127.0.0.1:{free_port()}"
    with container(STORE, "store", address, **options) as running:
        eventually(lambda: "listens on" in running.logs(), running.logs)
        yield address


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


def ask(connection, data, length=None):
    """Sends bytes and meanwhile receives as many, or so many."""
    sender = threading.Thread(target=connection.sendall, args=(data,), daemon=True)
    sender.start()
    found = bytearray()
    while len(found) < (length or len(data)):
        part = connection.recv(65536)
        assert part, f"ended after {len(found)} bytes: {found[:100]!r}"
        found += part
    sender.join()
    return found


def inspect(image):
    return json.loads(podman("image", "inspect", image).stdout)[0]
