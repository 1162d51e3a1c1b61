"""The page at the admin port, as its readers see it."""

import os
import re
import subprocess

import pytest

from conftest import ROOT, TARGET, EmptyLines, KubernetesApi, eventually

AXE = TARGET / "page-tests/node_modules/axe-core/axe.min.js"
# Where a look is: a desktop, a phone, and both by night.
LOOKS = {
    "light": {}, "dark": {"dark": True}, "phone": {"width": 390, "height": 844},
    "phone-dark": {"width": 390, "height": 844, "dark": True},
}


def number(text):
    return float(re.sub(r"[^0-9.]", "", text) or "nan")


def test_numbers_are_those_of_the_metrics_and_change(start, load, browse):
    proxy = start()
    load = load(proxy, clients=8)
    page = browse(proxy)
    eventually("8 sessions are shown", lambda: number(page.tile("sessions")) == 8)
    assert proxy.metric("aegis_sessions_active") == 8
    eventually("a rate is shown", lambda: number(page.tile("requests a second")) > 0)
    load.stop()
    eventually("they are gone", lambda: number(page.tile("sessions")) == 0)
    eventually("the rate falls", lambda: number(page.tile("requests a second")) == 0)
    assert page.text("#route-0 h2") == "default: fine"
    assert page.text("#workers tbody tr").count("running") == 2
    assert page.errors() == []


def test_the_part_that_is_slow_is_seen(backend, start, load, browse):
    backend.delay = 0.05
    proxy = start()
    load(proxy)
    page = browse(proxy)

    # The third of the four parts of a request's way.
    share = "#route-0 table:first-of-type tbody tr:nth-child(3)"
    eventually("the first byte takes nearly all", lambda: re.search(r"first byte\s+(9\d|100) %", page.text(share)))


def test_a_backend_that_refuses_is_named(backend, start, load, browse):
    proxy = start(AEGIS_ENDPOINT_WAIT="100ms", AEGIS_EJECT_TIME="1s", AEGIS_POOL_MIN_IDLE="0")
    load(proxy)
    page = browse(proxy)
    eventually("it is fine", lambda: page.text("#route-0 h2") == "default: fine")
    backend.gone()
    eventually("it is said", lambda: "refuses" in page.text('[data-problem="backend_refusing"]'))
    eventually("the worst of all is on top", lambda: "down" in page.text("#health"))
    eventually("ends are listed", lambda: "request" in page.text("#route-0 h3 + ul"))
    assert page.errors() == []


def says(page, problem):
    """What the page says of a problem, once it does. It says so on top as well."""
    words = eventually(f"{problem} is said", lambda: page.text(f'[data-problem="{problem}"]'))
    eventually("the worst of all is on top", lambda: page.text("#health .word") in ("degraded", "down"))
    return words


def test_a_backend_that_becomes_slow_is_named(backend, start, load, browse):
    proxy = start()
    load(proxy)
    page = browse(proxy)
    eventually("it has seen what is usual", lambda: proxy.status()["alive"] > 3)
    backend.delay = 0.3
    assert re.match(r"the first byte takes .* usual are ", says(page, "backend_slow"))


def test_a_pool_that_is_too_small_is_named(backend, start, load, browse):
    backend.delay = 0.02
    proxy = start(AEGIS_POOL_SIZE="1", AEGIS_POOL_MIN_IDLE="0")
    load(proxy)
    assert says(browse(proxy), "pool_small").startswith("clients wait ")


def test_a_worker_that_is_overloaded_is_named(start, browse, request):
    proxy = start(AEGIS_PROTOCOL="chronos", AEGIS_WORKERS="1")
    # In front of all else that runs, or it would wait for a core.
    subprocess.run(["chrt", "-a", "-f", "-p", "1", str(proxy.process.pid)], check=True)
    load = EmptyLines(proxy.port, clients=3)
    request.addfinalizer(load.stop)
    assert " busy all the time" in says(browse(proxy), "worker_overloaded")


def test_a_cpu_that_is_throttled_is_named(start, load, browse, request):
    proxy = start()
    for _ in range(3):
        busy = subprocess.Popen(["taskset", "-c", "0", "sh", "-c", "while :; do :; done"])
        request.addfinalizer(busy.wait)
        request.addfinalizer(busy.kill)
    subprocess.run(["taskset", "-a", "-p", "-c", "0", str(proxy.process.pid)], check=True, stdout=subprocess.DEVNULL)
    load(proxy)
    assert "waited for a core" in says(browse(proxy), "cpu_throttled")


def test_endpoints_that_may_be_old_are_named(backend, start, browse, tmp_path):
    api = KubernetesApi(backend.address, tmp_path)
    proxy = start(AEGIS_BACKENDS=None, AEGIS_KUBE_SERVICE="db", KUBECONFIG=str(api.kubeconfig))
    page = browse(proxy)
    eventually("it is fine", lambda: page.text("#route-0 h2") == "default: fine")
    api.gone()
    assert says(page, "discovery_stale").startswith("the endpoints may be old: ")


def test_a_network_that_is_lossy_is_named(start, browse):
    """A browser cannot follow into a network of its own, so what the proxy would say is put in its mouth."""
    page = browse(start())
    page.browser.execute_script(
        "const reading = structuredClone(history[history.length - 1]);"
        "const reasons = [{problem: 'network_lossy', words: 'db: 4.0 % of the segments', lasts: 7}];"
        "read = async () => { reading.alive += 2; reading.routes[0].health = {word: 'degraded', reasons};"
        "  return structuredClone(reading); };")
    assert says(page, "network_lossy") == "db: 4.0 % of the segments (for 7 s)"


def test_of_several_routes_those_in_trouble_are_on_top(backend, start, browse):
    own = {f"AEGIS_{route}__LISTEN": "127.0.0.1:0" for route in ["DEFAULT", "CACHE", "ORDERS"]}
    proxy = start(AEGIS_ROUTES="default,orders,cache", AEGIS_LISTEN=None, **own,
                  AEGIS_CACHE__BACKENDS="127.0.0.2:9")
    page = browse(proxy)
    eventually("it is on top", lambda: "cache: no endpoint usable" in page.text("#health"))
    assert "orders" not in page.text("#health") and "default" not in page.text("#health")
    target = page.browser.execute_script("return document.querySelector('#health a').hash")
    assert page.text(f"{target} h2") == "cache: down"


def test_it_says_that_the_proxy_is_lost_and_goes_on_with_the_next(start, load, browse):
    proxy = start()
    page = browse(proxy)
    assert page.text("#lost") == ""
    proxy.stop()
    eventually("it is said", lambda: "has not answered since" in page.text("#lost"))
    proxy.start()
    eventually("it is forgotten", lambda: page.text("#lost") == "")
    load(proxy)
    eventually("the next one is shown", lambda: number(page.tile("sessions")) == 8)
    # The browser itself complains of the connects that failed meanwhile.
    assert [error for error in page.errors() if "ERR_CONNECTION_REFUSED" not in error] == []


def test_nothing_is_asked_of_anybody_else(start, browse):
    proxy = start()
    page = browse(proxy)
    own = f"http://127.0.0.1:{proxy.admin}/"
    asked = page.requests()
    assert f"{own}status" in asked
    assert [url for url in asked if not url.startswith((own, "data:"))] == []


def test_a_name_from_outside_is_text(start, browse):
    name = "<img/src=x/onerror=alert(1)>"
    proxy = start(AEGIS_ROUTES="default", AEGIS_LISTEN="127.0.0.1:0")
    page = browse(proxy)
    page.browser.execute_script(
        "const reading = structuredClone(history[history.length - 1]);"
        "reading.routes[0].endpoints[0].name = arguments[0]; reading.alive += 1; heard(reading);", name)
    assert name in page.text("#route-0 table")
    assert page.browser.execute_script("return document.images.length") == 0


def test_a_reason_without_a_space_is_no_wider_than_a_phone(start, browse):
    page = browse(start(), width=390, height=844)
    page.browser.execute_script(
        "const reading = structuredClone(history[history.length - 1]);"
        "reading.routes[0].health = {word: 'degraded', reasons: [{problem: '', words: 'a'.repeat(253), lasts: null}]};"
        "reading.alive += 1; heard(reading);")
    assert "aaa" in page.text("#route-0")
    assert page.browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth") <= 0


def test_who_looks_again_sees_what_is_now(start, browse):
    page = browse(start())
    page.browser.execute_script(
        "Object.defineProperty(document, 'hidden', {value: true, writable: true, configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'));")
    read = "return history[history.length - 1].alive"
    before = page.browser.execute_script(read)
    page.browser.execute_script("document.hidden = false; document.dispatchEvent(new Event('visibilitychange'));")
    # In less than the two seconds after which it would ask anyway.
    page.browser.set_script_timeout(1.5)
    page.browser.execute_async_script(
        "const look = () => history[history.length - 1].alive > arguments[0] ? arguments[1]() : setTimeout(look, 10); look();", before)


def test_another_version_brings_its_own_page(start, browse):
    page = browse(start())
    page.browser.execute_script(
        "const reading = structuredClone(history[history.length - 1]);"
        "window.isOld = true; reading.version = 'another'; reading.routes = [{}]; heard(reading);")
    eventually("the page was loaded anew", lambda: page.browser.execute_script("return !window.isOld"))
    eventually("it shows its route", lambda: "default" in page.text("#routes"))


@pytest.mark.parametrize("look", LOOKS)
def test_everybody_can_read_it(look, start, load, browse, backend):
    # As most run: on the driver of this host, and far from what its cores can do.
    proxy = start(AEGIS_IO=None)
    load(proxy, pause=0.02)
    page = browse(proxy, **LOOKS[look])
    eventually("there are rates", lambda: number(page.tile("requests a second")) > 0)
    page.browser.execute_script(AXE.read_text())
    found = page.browser.execute_async_script(
        "axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice']}).then(arguments[0])")
    assert found["passes"], "nothing was checked"
    wrong = [(one["id"], [node["html"] for node in one["nodes"]]) for one in found["violations"]]
    assert wrong == []
    wide = page.browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0, "the page is wider than its window"
    if os.environ.get("AEGIS_SCREENSHOTS"):
        # So that the curves have something to show.
        eventually("it has run for 25 s", lambda: proxy.status()["alive"] > 25)
        page.browser.save_screenshot(str(ROOT / f"docs/page-{look}.png"))
