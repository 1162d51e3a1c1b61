//! A Kubernetes API over TLS with bearer tokens: etcd and kube-apiserver where
//! `KUBEBUILDER_ASSETS` names the folder that holds them, else the stand-in of [`stand_in`].
//!
//! The proxy reaches it through a [`Gate`], which cuts, refuses or falls silent on demand.

mod gate;
mod odd;
mod real;
mod stand_in;
mod tls;

use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Once;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::sandbox::hand_over;
use super::say;
pub use gate::Gate;
pub use odd::Odd;
pub use stand_in::Faults;
use tls::{Authority, base64};

/// The namespace of all objects.
pub const NAMESPACE: &str = "db";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/db/endpointslices";
const SETS: &str = "/apis/apps/v1/namespaces/db/statefulsets";
const PODS: &str = "/api/v1/namespaces/db/pods";
const ADMIN_TOKEN: &str = "admin-token";

/// The credentials that the proxy has at first.
pub const PROXY_TOKEN: &str = "proxy-token";

enum Server {
    Real(Box<real::ApiServer>),
    StandIn(stand_in::StandIn),
}

/// What a kubeconfig proves its user by.
#[derive(Debug)]
pub enum Credentials {
    Token,
    Certificate,
}

/// An API, the way to it, and a kubeconfig that names both.
pub struct KubeApi {
    server: Server,
    pub gate: Gate,
    authority: Authority,
    folder: TempDir,
}

impl KubeApi {
    /// Starts an API in which the proxy may watch.
    pub fn start() -> Self {
        let authority = Authority::new();
        let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
        let server = if let Some(assets) = assets {
            Server::Real(Box::new(real::ApiServer::start(&assets, &authority)))
        } else {
            static ONCE: Once = Once::new();
            ONCE.call_once(|| {
                say("SKIPPED: kubernetes on a real API server: KUBEBUILDER_ASSETS is not set; \
                     only the stand-in ran");
            });
            Server::StandIn(stand_in::StandIn::start(&authority))
        };
        let address = match &server {
            Server::Real(server) => server.address(),
            Server::StandIn(server) => server.address(),
        };
        let gate = Gate::to(address);
        let folder = TempDir::new().unwrap();
        hand_over(folder.path());
        let api = Self { server, gate, authority, folder };
        api.write_token(PROXY_TOKEN);
        let user = json!({"tokenFile": api.token_file()});
        fs::write(api.kubeconfig(), api.kubeconfig_of(&user)).unwrap();
        if let Server::Real(_) = api.server {
            api.create("/api/v1/namespaces", &json!({"metadata": {"name": NAMESPACE}}));
        }
        api.grant();
        api
    }

    /// Where the proxy's credentials are.
    pub fn kubeconfig(&self) -> String {
        self.folder.path().join("kubeconfig").to_str().unwrap().to_owned()
    }

    /// A home directory with a kubeconfig in its usual place, with these credentials.
    pub fn home(&self, credentials: &Credentials) -> String {
        let home = self.folder.path();
        fs::create_dir_all(home.join(".kube")).unwrap();
        let user = match credentials {
            Credentials::Token => json!({"token": PROXY_TOKEN}),
            Credentials::Certificate => json!({
                "client-certificate-data": base64(&self.authority.client_pem),
                "client-key-data": base64(&self.authority.key_pem),
            }),
        };
        fs::write(home.join(".kube/config"), self.kubeconfig_of(&user)).unwrap();
        home.to_str().unwrap().to_owned()
    }

    /// Makes the kubeconfig prove its user like this.
    pub fn set_user(&self, user: &Value) {
        fs::write(self.kubeconfig(), self.kubeconfig_of(user)).unwrap();
    }

    /// Makes the kubeconfig name another server.
    pub fn set_server(&self, address: SocketAddr) {
        let user = json!({"tokenFile": self.token_file()});
        fs::write(self.kubeconfig(), self.kubeconfig_at(address, &user)).unwrap();
    }

    /// Makes the kubeconfig name the server by this name of the local host, and have a token itself.
    pub fn set_server_name(&self, name: &str) {
        let kubeconfig = self.kubeconfig_of(&json!({"token": PROXY_TOKEN}));
        let mut kubeconfig: Value = serde_json::from_str(&kubeconfig).unwrap();
        let (cluster, gate) = (&mut kubeconfig["clusters"][0]["cluster"], self.gate.address());
        cluster["server"] = format!("https://{name}:{}", gate.port()).into();
        cluster["tls-server-name"] = gate.ip().to_string().into();
        fs::write(self.kubeconfig(), kubeconfig.to_string()).unwrap();
    }

    fn kubeconfig_of(&self, user: &Value) -> String {
        self.kubeconfig_at(self.gate.address(), user)
    }

    fn kubeconfig_at(&self, address: SocketAddr, user: &Value) -> String {
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://{address}"),
                "certificate-authority-data": base64(&self.authority.pem),
            }}],
            "users": [{"name": "proxy", "user": user}],
            "contexts": [{"name": "test", "context":
                {"cluster": "test", "user": "proxy", "namespace": NAMESPACE}}],
        })
        .to_string()
    }

    /// The proxy's certificate and its key, in PEM.
    pub fn certificate(&self) -> (&str, &str) {
        (&self.authority.client_pem, &self.authority.key_pem)
    }

    /// A folder of its own, gone with it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn token_file(&self) -> String {
        self.folder.path().join("token").to_str().unwrap().to_owned()
    }

    pub fn write_token(&self, token: &str) {
        fs::write(self.token_file(), token).unwrap();
    }

    /// Kills the server. The stand-in only looks so, from the proxy.
    pub fn kill(&mut self) {
        self.gate.close();
        if let Server::Real(server) = &mut self.server {
            server.kill();
        }
    }

    /// Brings it back, with all that it knew.
    pub fn restart(&mut self) {
        if let Server::Real(server) = &mut self.server {
            server.restart(&self.authority);
        }
        self.gate.open();
    }

    /// The faults that only the stand-in can have.
    pub fn faults(&self) -> Option<&Faults> {
        match &self.server {
            Server::Real(_) => None,
            Server::StandIn(server) => Some(server.faults()),
        }
    }

    /// Allows the proxy to read, as `docs/ENDPOINTS.md` says.
    pub fn grant(&self) {
        match &self.server {
            Server::StandIn(server) => server.faults().set_forbidden(false),
            Server::Real(_) => {
                let rbac = "/apis/rbac.authorization.k8s.io/v1/namespaces/db";
                let verbs = ["get", "list", "watch"];
                self.create(&format!("{rbac}/roles"), &json!({
                    "metadata": {"name": "aegis"},
                    "rules": [
                        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": verbs},
                        {"apiGroups": [""], "resources": ["pods"], "verbs": verbs},
                        {"apiGroups": ["apps"], "resources": ["statefulsets"], "verbs": verbs},
                    ],
                }));
                self.create(&format!("{rbac}/rolebindings"), &json!({
                    "metadata": {"name": "aegis"},
                    "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "aegis"},
                    "subjects": [{"kind": "User", "name": "proxy"}],
                }));
            }
        }
    }

    /// Takes that away again.
    pub fn revoke(&self) {
        match &self.server {
            Server::StandIn(server) => server.faults().set_forbidden(true),
            Server::Real(_) => {
                let rbac = "/apis/rbac.authorization.k8s.io/v1/namespaces/db";
                self.request("DELETE", &format!("{rbac}/rolebindings/aegis"), None);
                self.request("DELETE", &format!("{rbac}/roles/aegis"), None);
            }
        }
    }

    /// Makes the slice of this name hold one endpoint, `pod-NAME`.
    pub fn announce(&self, name: &str, address: SocketAddr) {
        self.slice(name, &Slice::of(address.port()).with(&format!("pod-{name}"), address.ip()));
    }

    /// Makes a slice say this: creates or replaces it.
    pub fn slice(&self, name: &str, slice: &Slice) {
        let object = slice.object(name);
        let path = format!("{SLICES}/{name}");
        if self.request("PUT", &path, Some(&object)).0 == 404 {
            self.create(SLICES, &object);
        }
    }

    pub fn delete_slice(&self, name: &str) {
        let (status, body) = self.request("DELETE", &format!("{SLICES}/{name}"), None);
        assert_eq!(status, 200, "{body}");
    }

    /// Makes a `StatefulSet` have so many replicas: creates or replaces it.
    pub fn stateful_set(&self, name: &str, replicas: usize) {
        let labels = json!({"app": name});
        let object = json!({
            "apiVersion": "apps/v1", "kind": "StatefulSet",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {
                "replicas": replicas, "serviceName": "chronos", "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {"containers": [{"name": "c", "image": "chronos"}]},
                },
            },
        });
        let path = format!("{SETS}/{name}");
        if self.request("PUT", &path, Some(&object)).0 == 404 {
            self.create(SETS, &object);
        }
    }

    pub fn delete_stateful_set(&self, name: &str) {
        let (status, body) = self.request("DELETE", &format!("{SETS}/{name}"), None);
        assert_eq!(status, 200, "{body}");
    }

    /// A running, ready pod.
    pub fn pod(&self, name: &str, labels: &Value, address: SocketAddr) {
        let (created, ready) = pod(name, labels, address);
        self.create(PODS, &created);
        let (status, body) = self.request("GET", &format!("{PODS}/{name}"), None);
        assert_eq!(status, 200, "{body}");
        let mut stored: Value = serde_json::from_str(&body).unwrap();
        stored["status"] = ready;
        let (status, body) = self.request("PUT", &format!("{PODS}/{name}/status"), Some(&stored));
        assert_eq!(status, 200, "{body}");
    }

    /// Makes a pod have these labels and no other ones.
    pub fn label_pod(&self, name: &str, labels: &Value) {
        let path = format!("{PODS}/{name}");
        let (status, body) = self.request("GET", &path, None);
        assert_eq!(status, 200, "{body}");
        let mut pod: Value = serde_json::from_str(&body).unwrap();
        pod["metadata"]["labels"] = labels.clone();
        let (status, body) = self.request("PUT", &path, Some(&pod));
        assert_eq!(status, 200, "{body}");
    }

    pub fn delete_pod(&self, name: &str) {
        let path = format!("{PODS}/{name}?gracePeriodSeconds=0");
        let (status, body) = self.request("DELETE", &path, None);
        assert_eq!(status, 200, "{body}");
    }

    fn create(&self, path: &str, object: &Value) {
        let (status, body) = self.request("POST", path, Some(object));
        assert!(status == 201 || status == 409, "POST {path}: {status} {body}");
    }

    fn request(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, String) {
        let address = match &self.server {
            Server::Real(server) => server.address(),
            Server::StandIn(server) => server.address(),
        };
        self.authority.request(address, ADMIN_TOKEN, method, path, body)
    }
}

fn pod(name: &str, labels: &Value, address: SocketAddr) -> (Value, Value) {
    let port = json!({"name": "chronos", "containerPort": address.port()});
    let created = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels},
        "spec": {
            "nodeName": "node-1",
            "containers": [{"name": "c", "image": "chronos", "ports": [port]}],
        },
    });
    let ip = address.ip().to_string();
    let ready = json!({
        "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
        "conditions": [{"type": "Ready", "status": "True"}],
    });
    (created, ready)
}

/// What a slice says: one port, and who is behind it.
#[derive(Clone)]
pub struct Slice {
    service: &'static str,
    port: u16,
    endpoints: Vec<Value>,
}

impl Slice {
    pub fn of(port: u16) -> Self {
        Self { service: "chronos", port, endpoints: Vec::new() }
    }

    /// The same, of another Service.
    #[must_use]
    pub fn of_service(self, service: &'static str) -> Self {
        Self { service, ..self }
    }

    pub fn with(self, pod: &str, ip: IpAddr) -> Self {
        self.with_conditions(pod, ip, json!({"ready": true, "serving": true, "terminating": false}))
    }

    /// A pod that is there and does not serve.
    pub fn unready(self, pod: &str, ip: IpAddr) -> Self {
        let not = json!({"ready": false, "serving": false, "terminating": false});
        self.with_conditions(pod, ip, not)
    }

    pub fn terminating(self, pod: &str, ip: IpAddr) -> Self {
        self.with_conditions(pod, ip, json!({"ready": false, "serving": true, "terminating": true}))
    }

    fn with_conditions(mut self, pod: &str, ip: IpAddr, conditions: Value) -> Self {
        self.endpoints.push(json!({
            "addresses": [ip.to_string()], "conditions": conditions,
            "targetRef": {"kind": "Pod", "name": pod, "namespace": NAMESPACE, "uid": format!("uid-{pod}")},
        }));
        self
    }

    /// Where the endpoint added last is.
    pub fn at(mut self, node: &str, zone: &str) -> Self {
        let last = self.endpoints.last_mut().unwrap();
        (last["nodeName"], last["zone"]) = (json!(node), json!(zone));
        self
    }

    fn object(&self, name: &str) -> Value {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": name, "namespace": NAMESPACE,
                         "labels": {"kubernetes.io/service-name": self.service}},
            "addressType": "IPv4",
            "ports": [{"name": "chronos", "port": self.port, "protocol": "TCP"}],
            "endpoints": self.endpoints,
        })
    }
}

/// An address of this host that an API server takes for an endpoint's: not of the loopback.
pub fn host_ip() -> IpAddr {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // Nothing is sent: it only asks the routing table for the source address.
    match socket.connect("192.0.2.1:9") {
        Ok(()) => socket.local_addr().unwrap().ip(),
        Err(_) => [127, 0, 0, 2].into(),
    }
}
