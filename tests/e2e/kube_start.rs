//! What holds the start-up of a proxy that finds its endpoints in Kubernetes, and what does not:
//! errors of the configuration and of rights do, an API out of reach does not.

use std::time::{Duration, Instant};

use crate::support::backend::Backend;
use crate::support::client::ask_once;
use crate::support::kube_api::{KubeApi, Slice, host_ip};
use crate::support::metrics::DISCOVERY_ENDPOINTS;
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, skip};

const START_TIMEOUT: Duration = Duration::from_secs(1);

fn on(api: &KubeApi) -> Builder {
    Builder::on(Io::Auto).kubernetes(api).set("AEGIS_START_TIMEOUT", "1s")
}

/// Waits until the start-up is held for this reason, and far longer than it may wait for an API.
fn wait_until_held(proxy: &Proxy, parts: &[&str]) -> String {
    let why = eventually(&format!("it says {parts:?}"), PATIENCE, || {
        let answer = proxy.get("/startupz?wait=0");
        assert_eq!(answer.status, 503);
        parts.iter().all(|part| answer.body.contains(part)).then_some(answer.body)
    });
    let begun = Instant::now();
    eventually("it is held for long", PATIENCE, || {
        assert_eq!(proxy.get("/startupz?wait=0").status, 503);
        (begun.elapsed() > 3 * START_TIMEOUT).then_some(())
    });
    let warned = proxy.log_at("WARN");
    let told = |line: &serde_json::Value| {
        let message = line["message"].as_str().unwrap_or_default();
        parts.iter().all(|part| message.contains(part))
    };
    assert_eq!(warned.iter().filter(|line| told(line)).count(), 1, "{warned:#?}");
    assert_eq!(proxy.get("/livez").status, 200);
    why
}

/// Ends a proxy that never started, and checks that it says why.
fn end(mut proxy: Proxy, why: &str) {
    proxy.terminate();
    assert_eq!(proxy.wait(PATIENCE).code(), Some(78));
    let reason = why.trim();
    eventually("its last line is the reason", PATIENCE, || {
        (proxy.log_lines().last()? == &format!("aegis-proxy: {reason}")).then_some(())
    });
}

#[test]
fn a_missing_role_holds_the_start() {
    let api = KubeApi::start();
    let server = Backend::named_at("a", host_ip());
    api.announce("a", server.address());
    api.revoke();
    let [held, mended] = [(); 2].map(|()| on(&api).launch());
    let parts = ["not allowed to", "endpointslices", "Role"];
    let why = wait_until_held(&held, &parts);
    end(held, &why);
    wait_until_held(&mended, &parts);
    api.grant();
    mended.wait_for_start();
    assert_eq!(ask_once(mended.address(), "who").unwrap(), "a");
}

#[test]
fn credentials_that_are_not_accepted_hold_the_start() {
    let api = KubeApi::start();
    let server = Backend::named_at("a", host_ip());
    api.announce("a", server.address());
    api.write_token("somebody-elses");
    let [held, mended] = [(); 2].map(|()| on(&api).launch());
    let why = wait_until_held(&held, &["does not accept the credentials"]);
    end(held, &why);
    api.write_token(crate::support::kube_api::PROXY_TOKEN);
    mended.wait_for_start();
}

#[test]
fn a_service_that_does_not_exist_holds_the_start() {
    let api = KubeApi::start();
    let server = Backend::named_at("a", host_ip());
    let [held, mended] = [(); 2].map(|()| on(&api).launch());
    let why = wait_until_held(&held, &["no EndpointSlice", "\"chronos\""]);
    end(held, &why);
    api.announce("a", server.address());
    mended.wait_for_start();
    assert_eq!(ask_once(mended.address(), "who").unwrap(), "a");
    // Once it has started, a Service may go.
    api.delete_slice("a");
    mended.wait_for(DISCOVERY_ENDPOINTS, &[], |count| count == 0);
    assert_eq!(mended.get("/startupz?wait=0").status, 200);
}

#[test]
fn a_service_without_endpoints_does_not_hold_the_start() {
    let api = KubeApi::start();
    api.slice("a", &Slice::of(1));
    let proxy = on(&api).launch();
    proxy.wait_for_start();
    assert_eq!(proxy.get("/readyz").status, 503);
    let mut proxy = proxy;
    proxy.terminate();
    proxy.wait_clean(PATIENCE);
}

#[test]
fn a_port_that_does_not_exist_holds_the_start() {
    let api = KubeApi::start();
    let ip = host_ip();
    for slice in [Slice::of(1).with("pod-a", ip), Slice::of(1).unready("pod-a", ip)] {
        api.slice("a", &slice);
        let proxy = on(&api).set("AEGIS_KUBE_PORT", "chrnos").launch();
        let why = wait_until_held(&proxy, &["no TCP port is called \"chrnos\"", "chronos"]);
        end(proxy, &why);
    }
    // A pod names its ports, ready or not.
    let labels = serde_json::json!({"app": "chronos"});
    api.pod("chronos-0", &labels, (ip, 1).into());
    let proxy = on(&api)
        .set("AEGIS_KUBE_SERVICE", "none")
        .set("AEGIS_KUBE_SELECTOR", "app=chronos")
        .set("AEGIS_KUBE_PORT", "chrnos")
        .launch();
    let why = wait_until_held(&proxy, &["no TCP port is called \"chrnos\"", "chronos"]);
    end(proxy, &why);
}

#[test]
fn no_way_to_the_api_holds_the_start() {
    let proxy = Builder::on(Io::Auto)
        .set("AEGIS_KUBE_SERVICE", "chronos")
        .set("AEGIS_START_TIMEOUT", "1s")
        .launch();
    let why = wait_until_held(&proxy, &["no way to the Kubernetes API", "KUBECONFIG"]);
    end(proxy, &why);
}

#[test]
fn a_proxy_on_the_way_holds_the_start() {
    let api = KubeApi::start();
    let proxy = on(&api).set("HTTPS_PROXY", "http://me:secret@127.0.0.1:1").launch();
    let why = wait_until_held(&proxy, &["proxies are not supported", "unset HTTPS_PROXY"]);
    assert!(!proxy.log_lines().iter().any(|line| line.contains("secret")));
    end(proxy, &why);
}

#[test]
fn an_api_out_of_reach_does_not_hold_the_start() {
    let api = KubeApi::start();
    let server = Backend::named_at("a", host_ip());
    api.announce("a", server.address());
    api.gate.close();
    let mut proxy = on(&api).launch();
    proxy.wait_for_start();
    // Who has no endpoints does not say that it keeps them.
    let warned = proxy.log_at("WARN");
    let keeps = |line: &serde_json::Value| line["message"].as_str().unwrap().contains("keeping");
    assert!(!warned.iter().any(keeps), "{warned:#?}");
    // What it learns later is an error like others.
    api.revoke();
    api.gate.open();
    eventually("it is told", PATIENCE, || proxy.get("/readyz").body.contains("Role").then_some(()));
    assert_eq!(proxy.get("/startupz?wait=0").status, 200);
    proxy.terminate();
    proxy.wait_clean(PATIENCE);
}

#[test]
fn an_api_that_fails_does_not_hold_the_start() {
    let api = KubeApi::start();
    let Some(faults) = api.faults() else { return skip("no real API server fails on demand") };
    for status in [429, 500, 503, 504] {
        faults.answer(Some(status));
        let proxy = on(&api).launch();
        proxy.wait_for_start();
    }
    // What it says of rights counts, whatever it says between.
    faults.answer(Some(403));
    let proxy = on(&api).launch();
    wait_until_held(&proxy, &["not allowed to"]);
    faults.answer(Some(503));
    wait_until_held(&proxy, &["not allowed to"]);
}
