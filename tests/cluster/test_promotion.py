"""A primary whose label moves to another pod, at a real API server: KUBEBUILDER_ASSETS is the folder with
kube-apiserver and etcd. The proxy runs as a program, and the pods' servers in threads."""

import contextlib
import json
import os
import socket
import socketserver
import threading

import pytest

from api_server import api_server
from containers import IMAGE, Native, eventually, free_port

ASSETS = os.environ.get("KUBEBUILDER_ASSETS")
pytestmark = pytest.mark.skipif(not ASSETS, reason="KUBEBUILDER_ASSETS is not set: nothing was tried at a real API server")

SESSIONS = 20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with api_server(ASSETS, tmp_path_factory.mktemp("api-server")) as server:
        server.kubectl("create", "namespace", "db")
        server.kubectl("create", "serviceaccount", "default", "--namespace", "db")
        yield server


class Database(socketserver.ThreadingTCPServer):
    """Answers each line with its name."""

    daemon_threads = True

    class RequestHandlerClass(socketserver.StreamRequestHandler):
        def handle(self):
            for _ in self.rfile:
                self.wfile.write(f"{self.server.name}\n".encode())

    def __init__(self, name):
        super().__init__(("127.0.0.1", 0), self.RequestHandlerClass)
        self.name = name
        threading.Thread(target=self.serve_forever, daemon=True).start()


def add(server, name, labels, port):
    """A pod that runs and is ready, as far as the API server knows."""
    server.create({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "db", "labels": labels},
        "spec": {"nodeName": "node", "automountServiceAccountToken": False, "containers": [
            {"name": "db", "image": "db", "ports": [{"name": "db", "containerPort": port}]}]}})
    ready = {"status": {"phase": "Running", "podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}],
                        "conditions": [{"type": "Ready", "status": "True"}]}}
    server.kubectl("patch", "pod", name, "--namespace", "db", "--subresource", "status", "--type", "merge",
                   "--patch", json.dumps(ready))


class Session:
    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)

    def ask(self):
        self.socket.sendall(b"who\n")
        return self.socket.recv(10).decode().strip()

    def is_cut(self):
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


def ask_once(port):
    with contextlib.closing(Session(port).socket) as stream:
        stream.sendall(b"who\n")
        return stream.recv(10).decode().strip()


@pytest.mark.parametrize("label", ["cnpg.io/instanceRole", "role", "redis-role"])
def test_sessions_follow_the_label_of_the_primary(server, label):
    databases = [Database("a"), Database("b")]
    cluster = label.replace("/", "-").lower()
    for number, (database, role) in enumerate(zip(databases, ["primary", "replica"])):
        add(server, f"{cluster}-{number}", {"cluster": cluster, label: role}, database.server_address[1])
    port = free_port()
    proxy = Native(IMAGE, env={
        "KUBECONFIG": str(server.kubeconfig), "AEGIS_KUBE_NAMESPACE": "db", "AEGIS_KUBE_PORT": "db",
        "AEGIS_KUBE_SELECTOR": f"cluster={cluster},{label}=primary", "AEGIS_BACKEND_DRAIN": "0s",
        "AEGIS_ENDPOINT_WAIT": "60s", "AEGIS_LISTEN": f"127.0.0.1:{port}", "AEGIS_ADMIN": f"127.0.0.1:{free_port()}"})
    try:
        eventually(lambda: ask_once(port) == "a", proxy.logs)
        sessions = [Session(port) for _ in range(SESSIONS)]
        assert [session.ask() for session in sessions] == ["a"] * SESSIONS
        for number, role in enumerate(["replica", "primary"]):
            server.kubectl("label", "pod", f"{cluster}-{number}", "--namespace", "db", "--overwrite", f"{label}={role}")
        eventually(lambda: ask_once(port) == "b", proxy.logs)
        assert all(session.is_cut() for session in sessions), proxy.logs()
        assert {ask_once(port) for _ in range(SESSIONS)} == {"b"}
        assert Session(port).ask() == "b"
    finally:
        proxy.remove()
        for database in databases:
            database.shutdown()
        server.kubectl("delete", "pods", "--force", "--grace-period", "0", "--namespace", "db", "--selector", f"cluster={cluster}")
