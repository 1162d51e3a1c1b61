//! Kubernetes objects, read only as far as they matter here. Whole pods, which are in a `StatefulSet`
//! too, are hundreds of types: to read all of them would take a third of the library's code.

use k8s_openapi::api::{apps, core};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::{Metadata, NamespaceResourceScope, Resource};
use serde::Deserialize;

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Pod {
    #[serde(default)]
    pub metadata: ObjectMeta,
    pub spec: Option<PodSpec>,
    pub status: Option<PodStatus>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodSpec {
    pub containers: Option<Vec<Container>>,
    pub init_containers: Option<Vec<Container>>,
    pub node_name: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Container {
    pub ports: Option<Vec<ContainerPort>>,
    pub restart_policy: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct ContainerPort {
    pub name: Option<String>,
    pub protocol: Option<String>,
    #[serde(rename = "containerPort")]
    pub number: i32,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodStatus {
    pub phase: Option<String>,
    #[serde(rename = "podIP")]
    pub pod_ip: Option<String>,
    pub conditions: Option<Vec<PodCondition>>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct PodCondition {
    #[serde(rename = "type")]
    pub type_: String,
    pub status: String,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct StatefulSet {
    #[serde(default)]
    pub metadata: ObjectMeta,
    pub spec: Option<StatefulSetSpec>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct StatefulSetSpec {
    pub replicas: Option<i32>,
    pub service_name: Option<String>,
    pub ordinals: Option<StatefulSetOrdinals>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct StatefulSetOrdinals {
    pub start: Option<i32>,
}

/// Makes an object of the API's kind that it stands for.
macro_rules! stands_for {
    ($object:ident, $kind:ty) => {
        impl Resource for $object {
            const API_VERSION: &'static str = <$kind>::API_VERSION;
            const GROUP: &'static str = <$kind>::GROUP;
            const KIND: &'static str = <$kind>::KIND;
            const VERSION: &'static str = <$kind>::VERSION;
            const URL_PATH_SEGMENT: &'static str = <$kind>::URL_PATH_SEGMENT;
            type Scope = NamespaceResourceScope;
        }

        impl Metadata for $object {
            type Ty = ObjectMeta;

            fn metadata(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn metadata_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

stands_for!(Pod, core::v1::Pod);
stands_for!(StatefulSet, apps::v1::StatefulSet);
