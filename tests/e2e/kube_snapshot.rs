//! The last endpoints in a file: what a start is worth while the Kubernetes API is away.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::support::backend::Backend;
use crate::support::client::{ask, ask_once, connect};
use crate::support::kube_api::{KubeApi, Slice, host_ip};
use crate::support::metrics::{DISCOVERY_ENDPOINTS, DISCOVERY_SNAPSHOT_AGE, STORE_PRESENT};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, measured, ports, skip};

fn on(api: &KubeApi, file: &Path) -> Builder {
    Builder::on(Io::Auto)
        .kubernetes(api)
        .set("AEGIS_KUBE_SNAPSHOT", file.to_str().unwrap())
        .set("AEGIS_START_TIMEOUT", "1s")
        .without_pool()
}

fn read(file: &Path) -> Option<Value> {
    serde_json::from_slice(&fs::read(file).ok()?).ok()
}

/// A proxy keeps its endpoints in a file, and ends.
fn saved(api: &KubeApi, count: usize) -> (PathBuf, Value) {
    let file = api.folder().join("endpoints.json");
    let mut proxy = on(api, &file).start();
    proxy.wait_for_endpoints(count as u64);
    let saved = eventually("the endpoints are saved", PATIENCE, || {
        read(&file).filter(|saved| saved["endpoints"].as_array().unwrap().len() == count)
    });
    proxy.terminate();
    proxy.wait_clean(PATIENCE);
    (file, saved)
}

#[test]
fn a_start_without_an_api_has_the_last_endpoints() {
    let api = KubeApi::start();
    let servers = ["a", "b"].map(|name| Backend::named_at(name, host_ip()));
    api.announce("a", servers[0].address());
    let (file, _) = saved(&api, 1);

    api.gate.close();
    let begun = Instant::now();
    let proxy = on(&api, &file).launch();
    proxy.wait_for_endpoints(1);
    measured(&format!("endpoints {:?} after the start, the API being away", begun.elapsed()));
    assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");
    proxy.wait_for_start();
    assert_eq!(proxy.get("/readyz").status, 200);
    assert!(proxy.metric(DISCOVERY_SNAPSHOT_AGE, &[]) < 60);
    let told = "the Kubernetes API has not answered: going on with the saved endpoints";
    let age = eventually("it is told", PATIENCE, || {
        proxy.log_events(told).first().map(|line| line["age_s"].as_u64())
    });
    assert!(age.is_some_and(|age| age < 60), "{age:?}");

    api.announce("b", servers[1].address());
    api.delete_slice("a");
    api.gate.open();
    proxy.wait_for_absence(DISCOVERY_SNAPSHOT_AGE, &[]);
    eventually("the API's word counts", PATIENCE, || {
        (ask_once(proxy.address(), "who").ok()? == "b").then_some(())
    });
    eventually("and is saved", PATIENCE, || {
        (read(&file)?["endpoints"][0]["name"] == "pod-b").then_some(())
    });
}

#[test]
fn saved_endpoints_are_used_at_once_where_nobody_listens() {
    let api = KubeApi::start();
    let server = Backend::named_at("a", host_ip());
    api.announce("a", server.address());
    let (file, mut saved) = saved(&api, 1);
    let nobody = ports::unused([127, 0, 0, 1].into());
    saved["of"]["server"] = json!(format!("https://{nobody}/"));
    fs::write(&file, saved.to_string()).unwrap();
    api.set_server(nobody);
    let proxy = on(&api, &file).set("AEGIS_START_TIMEOUT", "5m").launch();
    proxy.wait_for_endpoints(1);
    assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");
    proxy.wait_for_start();
}

#[test]
fn a_refusal_is_waited_out_without_saved_endpoints() {
    let api = KubeApi::start();
    api.set_server(ports::unused([127, 0, 0, 1].into()));
    let begun = Instant::now();
    let file = api.folder().join("endpoints.json");
    let proxy = on(&api, &file).set("AEGIS_START_TIMEOUT", "2s").launch();
    proxy.wait_for_start();
    let took = begun.elapsed();
    assert!(took >= Duration::from_secs(2), "{took:?}");
}

#[test]
fn a_file_that_is_of_no_use_is_reported_and_left_alone() {
    let api = KubeApi::start();
    let server = Backend::named_at("a", host_ip());
    api.announce("a", server.address());
    let (file, good) = saved(&api, 1);
    api.gate.close();
    let edited = |edit: &dyn Fn(&mut Value)| {
        let mut saved = good.clone();
        edit(&mut saved);
        saved.to_string()
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    let hours = |count: u64| count * 3_600_000;
    let whole = good.to_string();
    for (text, why) in [
        ("<html>".to_owned(), "not a file of endpoints"),
        (String::new(), "not a file of endpoints"),
        (whole[..whole.len() / 2].to_owned(), "not a file of endpoints"),
        ("\0".repeat(5 << 20), "longer than"),
        (edited(&|saved| saved["version"] = json!(2)), "of format 2"),
        (edited(&|saved| saved["of"]["service"] = json!("web")), "which is not"),
        (edited(&|saved| saved["of"]["namespace"] = json!("other")), "which is not"),
        (edited(&|saved| saved["of"]["by_key"] = json!(true)), "which is not"),
        (edited(&|saved| saved["confirmed_ms"] = json!(now - hours(2))), "MAX_AGE"),
        (edited(&|saved| saved["confirmed_ms"] = json!(now + hours(1))), "from the future"),
    ] {
        fs::write(&file, &text).unwrap();
        let mut proxy = on(&api, &file).launch();
        proxy.wait_for_start();
        assert_eq!(proxy.metric(DISCOVERY_ENDPOINTS, &[]), 0, "{why}");
        let is_told = |line: &Value| {
            let message = line["message"].as_str().unwrap();
            message.contains("AEGIS_KUBE_SNAPSHOT=") && message.contains(why)
        };
        eventually(&format!("it is told: {why}"), PATIENCE, || {
            let told = proxy.log_at("WARN").iter().filter(|line| is_told(line)).count();
            (told == 1).then_some(())
        });
        assert_eq!(fs::read_to_string(&file).unwrap(), text);
        proxy.terminate();
        proxy.wait_clean(PATIENCE);
    }
}

#[test]
fn a_place_where_nothing_can_be_kept_harms_nobody() {
    let api = KubeApi::start();
    let server = Backend::named_at("a", host_ip());
    api.announce("a", server.address());
    let folder = api.folder().join("folder");
    fs::create_dir(&folder).unwrap();
    let pipe = api.folder().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let nowhere = api.folder().join("nowhere/endpoints.json");
    for (path, told) in [(&nowhere, true), (&folder, true), (&pipe, false)] {
        let mut proxy = on(&api, path).start();
        proxy.wait_for_endpoints(1);
        assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");
        let cannot = |proxy: &Proxy| {
            let lines = proxy.log_lines().into_iter();
            lines.filter(|line| line.contains("endpoints cannot be kept there")).count()
        };
        if told {
            eventually("it is told", PATIENCE, || (cannot(&proxy) == 1).then_some(()));
        } else {
            let warned = proxy.log_at("WARN");
            let late = "of no use: reading it takes longer than 2s";
            let said = |line: &&Value| line["message"].as_str().unwrap().ends_with(late);
            assert_eq!(warned.iter().filter(said).count(), 1, "{warned:#?}");
        }
        proxy.terminate();
        proxy.wait_clean(PATIENCE);
        assert!(cannot(&proxy) <= 1);
    }
}

#[test]
fn a_file_is_written_seldom_and_as_a_whole() {
    const CHANGES: u16 = 60;
    let api = KubeApi::start();
    let server = Backend::named_at("a", host_ip());
    api.announce("a", server.address());
    let file = api.folder().join("endpoints.json");
    let proxy = on(&api, &file).start();
    eventually("it is there", PATIENCE, || read(&file));
    let (begun, mut files) = (Instant::now(), HashSet::new());
    for change in 0..CHANGES {
        let slice = Slice::of(server.address().port()).with("pod-a", host_ip());
        api.slice(
            "a",
            &(0..=change % 7).fold(slice, |slice, more| {
                slice.with(&format!("pod-{more}"), [10, 99, 0, more as u8 + 1].into())
            }),
        );
        // Whoever looks sees a whole file.
        assert!(read(&file).is_some());
        files.insert(fs::metadata(&file).unwrap().ino());
    }
    let last = 2 + u64::from((CHANGES - 1) % 7);
    let names = eventually("the last change is saved", PATIENCE, || {
        files.insert(fs::metadata(&file).unwrap().ino());
        let count = read(&file)?["endpoints"].as_array()?.len() as u64;
        (count == last && proxy.metric(DISCOVERY_ENDPOINTS, &[]) == last).then_some(count)
    });
    let took = begun.elapsed();
    measured(&format!("{CHANGES} changes in {took:?}: {} files, {names} names", files.len()));
    assert!(files.len() as u64 <= took.as_secs() + 2, "{} files in {took:?}", files.len());
}

#[test]
fn declared_stores_are_saved_with_them() {
    let api = KubeApi::start();
    api.stateful_set("chronos", 2);
    let store = Backend::chronos_on((host_ip(), 0).into(), &Arc::default());
    api.slice("a", &Slice::of(store.address().port()).with("chronos-0", host_ip()));
    let file = api.folder().join("endpoints.json");
    let by_key = || {
        let builder = on(&api, &file).protocol("chronos", "request");
        builder.set("AEGIS_BALANCE", "key_hash").set("AEGIS_ENDPOINT_WAIT", "0s")
    };
    let answers = |proxy: &Proxy| {
        proxy.wait_for(STORE_PRESENT, &[("store", "chronos-0")], |present| present == 1);
        proxy.wait_for(STORE_PRESENT, &[("store", "chronos-1")], |present| present == 0);
        let client = connect(proxy.address());
        (0..20).map(|key| ask(&client, &format!("SET key-{key} value"))).collect::<Vec<_>>()
    };
    let mut proxy = by_key().launch();
    let before = answers(&proxy);
    assert!(before.iter().any(|answer| answer == "OK"), "{before:?}");
    assert!(before.iter().any(|answer| answer.contains("chronos-1")), "{before:?}");
    eventually("it is saved", PATIENCE, || {
        (read(&file)?["stores"].as_array()?.len() == 2).then_some(())
    });
    proxy.terminate();
    proxy.wait_clean(PATIENCE);
    api.gate.close();
    let proxy = by_key().launch();
    assert_eq!(answers(&proxy), before, "the same store for each key");
    // Then endpoints are known, and have moved; only who shares the keys is not.
    let Some(faults) = api.faults() else { return skip("a real API server answers for all kinds") };
    faults.fail(Some(("statefulsets", 503)));
    let moved = Backend::chronos_on((host_ip(), 0).into(), &Arc::default());
    drop(store);
    api.gate.open();
    api.slice("a", &Slice::of(moved.address().port()).with("chronos-0", host_ip()));
    eventually("they count", PATIENCE, || (answers(&proxy) == before).then_some(()));
    drop(proxy);
    let proxy = by_key().launch();
    assert_eq!(answers(&proxy), before);
    assert_eq!(proxy.get("/startupz?wait=0").status, 200);
    let told =
        "the Kubernetes API has not said which stores there are: going on with the saved ones";
    eventually("it is told", PATIENCE, || (proxy.log_events(told).len() == 1).then_some(()));
    api.stateful_set("chronos", 1);
    faults.fail(None);
    eventually("what is declared by now is known", PATIENCE, || {
        let client = connect(proxy.address());
        (0..20).all(|key| ask(&client, &format!("SET key-{key} value")) == "OK").then_some(())
    });
}

#[test]
fn a_start_waits_no_longer_for_the_declaration_of_stores_than_for_endpoints() {
    let api = KubeApi::start();
    let Some(faults) = api.faults() else { return skip("a real API server answers for all kinds") };
    api.stateful_set("chronos", 1);
    let store = Backend::chronos_on((host_ip(), 0).into(), &Arc::default());
    api.slice("a", &Slice::of(store.address().port()).with("chronos-0", host_ip()));
    faults.fail(Some(("statefulsets", 503)));
    let proxy = on(&api, &api.folder().join("endpoints.json"))
        .protocol("chronos", "request")
        .set("AEGIS_BALANCE", "key_hash")
        .launch();
    proxy.wait_for_start();
    let told = "the Kubernetes API has not said which stores there are: going on without endpoints";
    eventually("it is told", PATIENCE, || (proxy.log_events(told).len() == 1).then_some(()));
    faults.fail(None);
    proxy.wait_for(STORE_PRESENT, &[("store", "chronos-0")], |present| present == 1);
    assert_eq!(ask(&connect(proxy.address()), "SET key value"), "OK");
}
