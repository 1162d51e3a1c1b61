"""The symptoms of docs/TROUBLESHOOTING.md, made so: what the page quotes is what there is to see.

Both the page's section and the running program have to have it. Not made here: what needs a seccomp
profile or a lossy link; test_image.py and tests/e2e have those."""

import contextlib
import http.server
import json
import os
import re
import socket
import socketserver
import subprocess
import sys
import threading
import time

import pytest

from containers import IMAGE, Native, aegis, container, echo, eventually, free_port, get
from pages import PAGES, section
from test_guides import SYMPTOMS

FRAMED = {"AEGIS_PROTOCOL": "chronos", "AEGIS_POOL_MODE": "request", "AEGIS_POOL_SIZE": "1", "AEGIS_POOL_MIN_IDLE": "0", "AEGIS_WORKERS": "1"}


@pytest.fixture(params=["auto", "epoll"], autouse=True)
def driver(request, monkeypatch):
    """Both, where a ring can be set up."""
    monkeypatch.setenv("AEGIS_IO", request.param)


class Symptom:
    """A section of the page, held against a proxy."""

    def __init__(self, title, proxy):
        assert title in SYMPTOMS
        self.text, self.proxy = section(PAGES["TROUBLESHOOTING.md"], f"## {title}"), proxy

    def quoted(self, words):
        """The words as they are on the page, where what varies is `…`."""
        assert words in self.text.replace("\\|", "|"), f"the page does not say {words!r}"
        return ".*?".join(map(re.escape, words.split("…")))

    def log(self, *texts):
        for text in texts:
            pattern = self.quoted(text)
            eventually(lambda: re.search(pattern, self.proxy.logs()), lambda: f"{text}\n{self.proxy.logs()}")

    def metric(self, name, given="", at_least=1):
        """What all series of this name and label have come to."""
        self.quoted(name)
        assert not given or given in self.text, f"the page does not say {given!r}"
        series = re.compile(rf'^{name}(?:\{{(?=[^}}]*{re.escape(given)})[^}}]*\}})? (\S+)$', re.M)
        eventually(lambda: sum(map(float, series.findall(self.proxy.get("metrics")))) >= at_least,
                   lambda: f"{name} {given}\n{self.proxy.get('metrics')}")

    def reply(self, data, *texts):
        assert any(re.search(self.quoted(text).encode(), data) for text in texts), data


@contextlib.contextmanager
def backend(serve):
    """Serves each connection by a function; gives its address."""
    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with contextlib.suppress(OSError):
                serve(self.request)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield "127.0.0.1:%d" % server.server_address[1]
        server.shutdown()


def silent(connection):
    while connection.recv(65536):
        pass


def rest(client):
    """What a client gets to the end, and how it ends."""
    client.settimeout(10)
    found = b""
    try:
        while part := client.recv(65536):
            found += part
    except ConnectionResetError:
        return found, "reset"
    return found, "end"


def line(proxy, data):
    client = proxy.connect()
    client.sendall(data)
    client.settimeout(10)
    found = b""
    while not found.endswith(b"\n"):
        part = client.recv(65536)
        assert part, found
        found += part
    return found


def through(address, **env):
    return aegis(env={"AEGIS_BACKENDS": address, **env}, kind=Native)


def test_a_backend_that_is_slow():
    with backend(silent) as address, through(address, **FRAMED, AEGIS_REQUEST_TIMEOUT="200ms") as proxy:
        seen = Symptom("The backend is slow", proxy)
        seen.reply(line(proxy, b"GET k\n"), "no answer in …; the request may have taken effect")
        seen.metric("aegis_requests_total", 'outcome="timeout"')
        seen.metric("aegis_pool_discards_total", 'reason="timeout"')


def test_a_backend_that_accepts_and_never_answers():
    """With tcp no problem names it: what the page says instead is all there is to see."""
    with backend(silent) as address, through(address) as proxy:
        seen = Symptom("The backend is slow", proxy)
        client = proxy.connect()
        client.sendall(b"a")
        seen.metric("aegis_bytes_total", 'direction="to_backend"')
        seen.metric("aegis_endpoint_sessions_active")
        metrics = proxy.get("metrics")
        for still in ["aegis_bytes_total{.*to_client.*}", "aegis_first_byte_seconds_count{.*}"]:
            assert set(re.findall(rf"^{still} (.*)$", metrics, re.M)) == {"0"}, metrics
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        seen.log("ended")
        (line,) = [line for line in proxy.logs().splitlines() if " ended " in line]
        for part in ["client_reset", "aegis.bytes.to_client=0", "aegis.endpoint"]:
            assert part in line and part in seen.text, line
        assert "aegis.seconds.first_byte" not in line


def test_a_backend_that_refuses():
    with through(f"127.0.0.1:{free_port()}", AEGIS_ENDPOINT_WAIT="600ms", AEGIS_EJECT_FAILURES="1") as proxy:
        seen = Symptom("The backend refuses", proxy)
        with proxy.connect() as client:
            client.sendall(b"a")
            assert rest(client) == (b"", "reset")
        seen.metric("aegis_endpoint_connect_failures_total")
        seen.metric("aegis_endpoint_ejections_total")
        seen.metric("aegis_sessions_closed_total", 'reason="connect_failed"')
        seen.log("ejected", "no endpoint is usable: clients wait", "refuses")
        assert "are ejected" in eventually(lambda: not_ready(proxy), proxy.logs)


def not_ready(proxy):
    """What /readyz says if it is not 200."""
    with socket.create_connection(("127.0.0.1", proxy.admin), timeout=10) as client:
        client.sendall(b"GET /readyz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        answer = rest(client)[0].decode()
    return answer if " 503 " in answer.splitlines()[0] else None


def test_requests_to_a_backend_that_refuses():
    with through(f"127.0.0.1:{free_port()}", **FRAMED, AEGIS_ENDPOINT_WAIT="200ms", AEGIS_QUEUE_TIMEOUT="200ms") as proxy:
        seen = Symptom("The backend refuses", proxy)
        seen.reply(line(proxy, b"GET k\n"), "no endpoint could be connected to in …")
        seen.metric("aegis_requests_total", 'outcome="unreachable"')


def test_a_host_that_is_gone():
    """One whose accept queue is full drops handshakes, as a network does that loses all."""
    with socket.socket() as listener, contextlib.ExitStack() as held:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            client = held.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        with through("127.0.0.1:%d" % listener.getsockname()[1], AEGIS_ENDPOINT_WAIT="600ms", AEGIS_CONNECT_TIMEOUT="100ms") as proxy:
            seen = Symptom("The network loses packets, or a host is gone", proxy)
            with proxy.connect() as client:
                client.sendall(b"a")
                assert rest(client) == (b"", "reset")
            seen.metric("aegis_sessions_closed_total", 'reason="connect_timeout"')
            seen.log("no endpoint is usable: clients wait", "does not answer")


def test_a_pool_that_is_too_small():
    with backend(silent) as address, through(address, **FRAMED, AEGIS_QUEUE_TIMEOUT="400ms", AEGIS_QUEUE_MAX="1") as proxy:
        seen = Symptom("The pool is too small", proxy)
        clients = [proxy.connect() for _ in range(3)]
        clients[0].sendall(b"GET a\n")
        seen.metric("aegis_pool_connections", 'state="in_use"')
        clients[1].sendall(b"GET b\n")
        seen.metric("aegis_queue_depth")
        seen.reply(line(proxy, b"GET c\n"), "too many requests wait for a connection")
        clients[1].settimeout(10)
        seen.reply(clients[1].recv(1000), "no backend connection was free in …")
        seen.metric("aegis_requests_total", 'outcome="queue_full"')
        seen.metric("aegis_requests_total", 'outcome="queue_timeout"')


@contextlib.contextmanager
def kube_api(tmp_path, answer):
    """An API server that answers all alike, or none if there is no answer; gives what leads to it."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps(answer).encode()
            self.send_response(answer["code"])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port = server.server_address[1]
    if answer:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    else:
        server.server_close()
    config = {"clusters": [{"name": "a", "cluster": {"server": f"http://127.0.0.1:{port}"}}], "users": [{"name": "a", "user": {}}],
              "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a", "namespace": "db"}}], "current-context": "a"}
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    yield {"KUBECONFIG": str(tmp_path / "kubeconfig"), "AEGIS_KUBE_SERVICE": "orders"}
    if answer:
        server.shutdown()
        server.server_close()


def test_an_api_server_that_is_away(tmp_path):
    with kube_api(tmp_path, None) as env, aegis(env={**env, "AEGIS_START_TIMEOUT": "100ms", "AEGIS_ENDPOINT_WAIT": "300ms", **FRAMED}, kind=Native) as proxy:
        stale = Symptom("Discovery is stale", proxy)
        stale.log("the Kubernetes API cannot be reached: …", "going on without endpoints")
        stale.metric("aegis_discovery_errors_total", 'kind="unreachable"')
        none = Symptom("There is no endpoint", proxy)
        none.reply(line(proxy, b"GET k\n"), "no endpoint is known, and none came in …")
        none.metric("aegis_requests_total", 'outcome="no_endpoint"')
        assert re.search(none.quoted("no endpoint: …"), not_ready(proxy))


def test_an_api_server_that_gives_no_rights(tmp_path):
    denied = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "no", "reason": "Forbidden", "code": 403}
    admin = free_port()
    own = {"AEGIS_LISTEN": f"127.0.0.1:{free_port()}", "AEGIS_ADMIN": f"127.0.0.1:{admin}"}
    with kube_api(tmp_path, denied) as env, container(IMAGE, env={**env, **own}, kind=Native) as running:
        running.get = lambda path: get(f"http://127.0.0.1:{admin}/{path}")
        seen = Symptom("The API server gives no rights", running)
        seen.log("not allowed to … in namespace …: bind the service account to a Role there with apiGroups: …")
        seen.metric("aegis_discovery_errors_total", 'kind="forbidden"')


def test_a_cpu_that_is_short():
    """Three others want the only core that the worker may have."""
    core = {min(os.sched_getaffinity(0))}
    with echo() as address, through(address, AEGIS_WORKERS="1", AEGIS_PIN="off") as proxy, contextlib.ExitStack() as others:
        seen = Symptom("The CPU is short, or throttled", proxy)
        seen.log("aegis-proxy starts")
        for thread in os.listdir(f"/proc/{proxy.running.process.pid}/task"):
            os.sched_setaffinity(int(thread), core)
        for _ in range(3):
            other = others.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            others.callback(other.kill)
            os.sched_setaffinity(other.pid, core)
        with proxy.connect() as client:
            until = time.monotonic() + 2
            while time.monotonic() < until:
                client.sendall(b"a" * 1000)
                client.recv(1000)
        seen.metric("aegis_worker_core_wait_seconds_total", at_least=0.02)


def test_the_limit_of_sessions():
    with echo() as address, through(address, AEGIS_MAX_SESSIONS="1", AEGIS_WORKERS="1") as proxy:
        seen = Symptom("The session limit is reached", proxy)
        with proxy.connect() as first, proxy.connect():
            first.sendall(b"a")
            assert first.recv(1) == b"a"
            seen.log("… sessions are open (AEGIS_MAX_SESSIONS): newcomers wait in the kernel's queue")
            seen.metric("aegis_accept_pauses_total")


def test_too_few_descriptors(tmp_path):
    with container(IMAGE, env={"AEGIS_MAX_SESSIONS": "1000000"}, kind=Native) as running:
        Symptom("Descriptors are short", running).log("AEGIS_MAX_SESSIONS=… needs … descriptors; RLIMIT_NOFILE allows …")
        assert running.process.wait(timeout=10) == 78


def test_a_server_that_ends_connections_at_once():
    with backend(lambda connection: None) as address, through(address, AEGIS_POOL_MAX_IDLE="0", AEGIS_POOL_MIN_IDLE="0", AEGIS_EJECT_FAILURES="1") as proxy:
        seen = Symptom("TLS or the PROXY header confuses the server", proxy)
        with proxy.connect() as client:
            rest(client)
        seen.metric("aegis_endpoint_ejections_total")
        seen.log("ejected", "it ended a connection at once, without a byte")


def test_a_server_that_answers_with_an_error_of_its_own():
    def blocked(connection):
        connection.sendall(b"Host 'a' is blocked because of many connection errors")
    with backend(blocked) as address, through(address, AEGIS_PRESET="mysql", AEGIS_EJECT_FAILURES="1") as proxy:
        seen = Symptom("MariaDB or MySQL has locked the host out", proxy)
        for _ in range(5):
            with proxy.connect() as client:
                seen.reply(rest(client)[0], "Host '…' is blocked because of many connection errors")
        seen.metric("aegis_sessions_closed_total", 'reason="finished"', at_least=5)
        assert "ejected" not in proxy.logs()


def test_a_client_that_is_half_closed():
    with backend(lambda connection: time.sleep(5)) as address, through(address, AEGIS_HALF_CLOSE_TIMEOUT="200ms") as proxy:
        seen = Symptom("Half-closed clients", proxy)
        with proxy.connect() as client:
            client.sendall(b"a")
            client.shutdown(socket.SHUT_WR)
            assert rest(client) == (b"", "reset")
        seen.metric("aegis_sessions_closed_total", 'reason="half_close_timeout"')
        seen.log("ended")
        assert 'error.type="half_close_timeout"' in proxy.logs()


def test_clients_that_wait_through_an_outage():
    port = free_port()
    with through(f"127.0.0.1:{port}", AEGIS_ENDPOINT_WAIT="20s") as proxy:
        seen = Symptom("Clients wait through an outage", proxy)
        with proxy.connect() as client:
            client.sendall(b"a")
            seen.log("no endpoint is usable: clients wait")
            seen.metric("aegis_clients_waiting")
            with socket.create_server(("127.0.0.1", port)) as listener:
                served, _ = listener.accept()
                with served:
                    seen.log("endpoints are usable again", "lasted_ms", "waited", "longest_wait_ms", "given_up")
                    seen.metric("aegis_outage_seconds_total", at_least=0.1)


def test_a_budget_of_retries_that_is_used_up():
    addresses = ",".join(f"127.0.0.1:{free_port()}" for _ in range(3))
    with through(addresses, AEGIS_RETRY_BUDGET="0", AEGIS_ENDPOINT_WAIT="0s", AEGIS_EJECT_FAILURES="1000", AEGIS_WORKERS="1") as proxy:
        seen = Symptom("The retry budget is used up", proxy)
        for _ in range(100):
            with contextlib.suppress(OSError), proxy.connect() as client:
                client.sendall(b"a")
                rest(client)
        seen.metric("aegis_retries_refused_total")
        seen.metric("aegis_connect_retries_total")


def test_a_drain_that_takes_long():
    with echo() as address, through(address, AEGIS_DRAIN_DELAY="0s", AEGIS_DRAIN_TIMEOUT="600ms") as proxy:
        seen = Symptom("A drain takes long", proxy)
        with proxy.connect() as client:
            client.sendall(b"a")
            assert client.recv(1) == b"a"
            proxy.running.process.terminate()
            seen.log("drain asked: not ready, still accepting", "draining: sessions finish, still accepting until they have",
                     "drain deadline passed: ending the rest")
            assert rest(client) == (b"", "reset")
            assert proxy.running.process.wait(timeout=10) == 0
