"""A proxy with a backend of the tests behind it, and a browser in front of its page."""

import contextlib
import http.server
import json
import os
import pathlib
import re
import socket
import subprocess
import threading
import time
import urllib.request

import pytest
from selenium import webdriver

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
PATIENCE = 30


def eventually(what, look):
    """Waits until `look` gives something, and returns that."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what}"
        time.sleep(0.05)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        time.sleep(self.server.delay)
        body = b"x" * 1000
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Backend(http.server.ThreadingHTTPServer):
    """Answers each GET after `delay` seconds."""

    daemon_threads = True
    delay = 0.002

    def __init__(self):
        super().__init__(("127.0.0.2", 0), Handler)
        self.open = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"127.0.0.2:{self.server_port}"

    def process_request(self, request, client_address):
        self.open.append(request)
        super().process_request(request, client_address)

    def handle_error(self, *_):
        """A client has left."""

    def gone(self):
        self.shutdown()
        self.server_close()
        for connection in self.open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Proxy:
    """The real one, with these variables."""

    def __init__(self, admin=None, **variables):
        self.port, self.admin = free_port(), admin or free_port()
        self.variables = variables
        self.start()

    def start(self):
        environment = {
            "PATH": os.environ["PATH"], "AEGIS_LISTEN": f"127.0.0.1:{self.port}",
            "AEGIS_ADMIN": f"127.0.0.1:{self.admin}", "AEGIS_WORKERS": "2",
            "AEGIS_PROTOCOL": "http1", "AEGIS_POOL_MODE": "request", "AEGIS_IO": "epoll",
            **self.variables,
        }
        environment = {name: value for name, value in environment.items() if value is not None}
        self.process = subprocess.Popen([TARGET / "debug/aegis-proxy"], env=environment,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            eventually("the proxy is ready", self.is_ready)
        except AssertionError:
            self.stop()
            raise

    def is_ready(self):
        assert self.process.poll() is None, "the proxy has ended"
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/startupz?wait=0").status == 200
        return False

    def stop(self):
        self.process.kill()
        self.process.wait()

    def status(self):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/status") as answer:
            return json.load(answer)

    def metric(self, name):
        """The sum of a metric's series."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/metrics") as answer:
            text = answer.read().decode()
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.M))


class KubernetesApi(http.server.ThreadingHTTPServer):
    """Names one endpoint of the Service `db`, until it is gone."""

    daemon_threads = True

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            for event in self.server.events:
                self.wfile.write(json.dumps(event).encode() + b"\n")
            self.wfile.flush()
            self.server.over.wait()

        def log_message(self, *_):
            pass

    def __init__(self, address, folder):
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.over = threading.Event()
        host, port = address.split(":")
        kind = {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice"}
        end = {"resourceVersion": "1", "annotations": {"k8s.io/initial-events-end": "true"}}
        self.events = [
            {"type": "ADDED", "object": {
                **kind,
                "metadata": {"name": "db-1", "namespace": "default", "uid": "1", "resourceVersion": "1",
                             "labels": {"kubernetes.io/service-name": "db"}},
                "addressType": "IPv4", "ports": [{"name": "db", "protocol": "TCP", "port": int(port)}],
                "endpoints": [{"addresses": [host], "conditions": {"ready": True}}],
            }},
            {"type": "BOOKMARK", "object": {**kind, "metadata": end, "addressType": "IPv4", "endpoints": []}},
        ]
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.server_port}"}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "default"}}],
        }))
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def gone(self):
        self.over.set()
        self.shutdown()
        self.server_close()


class Load:
    """Clients that ask one thing after another through the proxy, with a `pause` of seconds between."""

    def __init__(self, port, clients=8, pause=0):
        self.over, self.pause = threading.Event(), pause
        self.threads = [threading.Thread(target=self.run, args=(port,), daemon=True) for _ in range(clients)]
        for thread in self.threads:
            thread.start()

    def run(self, port):
        while not self.over.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as client:
                while not self.over.is_set():
                    client.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
                    if not client.recv(65536):
                        break
                    self.over.wait(self.pause)
            self.over.wait(0.05)

    def stop(self):
        self.over.set()
        for thread in self.threads:
            thread.join()


class EmptyLines(Load):
    """Clients that send empty lines, which a proxy of `chronos` answers by itself."""

    def run(self, port):
        while not self.over.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as client:
                threading.Thread(target=self.read, args=(client,), daemon=True).start()
                while not self.over.is_set():
                    client.sendall(b"\n" * 65536)

    def read(self, client):
        with contextlib.suppress(OSError):
            while client.recv(1 << 20):
                pass


class Page:
    """The page in a browser."""

    def __init__(self, dark=False, width=1200, height=1500):
        options = webdriver.ChromeOptions()
        for argument in ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                         "--disable-background-networking", f"--window-size={width},{height}",
                         *(["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else [])]:
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        options.binary_location = "/usr/bin/chromium"
        service = webdriver.ChromeService("/usr/bin/chromedriver")
        self.browser = webdriver.Chrome(options=options, service=service)
        if dark:
            self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {
                "features": [{"name": "prefers-color-scheme", "value": "dark"}]})
        if width < 500:
            self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
                "width": width, "height": height, "deviceScaleFactor": 2, "mobile": True})

    def open(self, proxy):
        self.admin = proxy.admin
        self.browser.get(f"http://127.0.0.1:{proxy.admin}/")

    def text(self, selector):
        """What is to be read there; empty if there is nothing."""
        script = "return [...document.querySelectorAll(arguments[0])].filter((one) => one.checkVisibility()).map((one) => one.innerText).join('\\n')"
        return self.browser.execute_script(script, selector)

    def tile(self, name):
        """The value of a tile by its name."""
        script = ("const tile = [...document.querySelectorAll('.tile')].find((one) => "
                  "one.querySelector('.name').textContent === arguments[0]);"
                  "return tile ? tile.querySelector('.value').textContent : ''")
        return self.browser.execute_script(script, name)

    def errors(self):
        """What the console has complained of so far."""
        return [line["message"] for line in self.browser.get_log("browser") if line["level"] != "INFO"]

    def requests(self):
        """The addresses that were asked for so far."""
        events = [json.loads(line["message"])["message"] for line in self.browser.get_log("performance")]
        sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]


@pytest.fixture
def backend():
    backend = Backend()
    yield backend
    with contextlib.suppress(OSError):
        backend.gone()


@pytest.fixture
def start(backend, request):
    """Starts a proxy in front of the backend."""
    def start(**variables):
        proxy = Proxy(**{"AEGIS_BACKENDS": backend.address, **variables})
        request.addfinalizer(proxy.stop)
        return proxy
    return start


@pytest.fixture
def load(request):
    """Puts a proxy under load."""
    def load(proxy, **options):
        load = Load(proxy.port, **options)
        request.addfinalizer(load.stop)
        return load
    return load


@pytest.fixture
def browse(request):
    """Opens a proxy's page."""
    def browse(proxy, **options):
        page = Page(**options)
        request.addfinalizer(page.browser.quit)
        page.open(proxy)
        eventually("the page shows its route", lambda: "default" in page.text("#routes"))
        return page
    return browse
