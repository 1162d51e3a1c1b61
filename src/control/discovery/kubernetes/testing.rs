//! Objects that the tests of this module make up.

use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};

use super::convert::Rules;
use crate::config::Locality;

pub(super) fn rules() -> Rules {
    Rules {
        port: None,
        locality: Locality::Off,
        node: None,
        zone: None,
        region: None,
        by_key: true,
    }
}

pub(super) fn named(port: &str) -> Rules {
    Rules { port: Some(port.parse().unwrap()), ..rules() }
}

pub(super) fn slice_of(family: &str, ports: Value, endpoints: Value) -> EndpointSlice {
    serde_json::from_value(json!({
        "metadata": {"name": "s"}, "addressType": family, "ports": ports,
        "endpoints": endpoints,
    }))
    .unwrap()
}

pub(super) fn endpoint(ip: &str, pod: &str, conditions: Value) -> Value {
    let target = json!({"kind": "Pod", "name": pod, "uid": format!("uid-{pod}")});
    json!({"addresses": [ip], "targetRef": target, "conditions": conditions})
}

pub(super) fn one_port() -> Value {
    json!([{"name": "chronos", "port": 8080, "protocol": "TCP"}])
}
