//! etcd and kube-apiserver as child processes, bound to the loopback interface.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use super::tls::Authority;
use super::{ADMIN_TOKEN, PROXY_TOKEN};
use crate::support::{eventually, ports};

/// An API server takes its time on a busy machine.
const START_MAX: Duration = Duration::from_secs(120);

pub struct ApiServer {
    address: SocketAddr,
    etcd: Child,
    program: Command,
    running: Child,
    _folder: TempDir,
}

impl ApiServer {
    pub fn start(assets: &Path, authority: &Authority) -> Self {
        let folder = TempDir::new().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let authority_file = file("ca.pem", &authority.pem);
        let certificate = file("server.pem", &authority.server_pem);
        let key = file("server.key", &authority.key_pem);
        let tokens = format!(
            "{ADMIN_TOKEN},admin,admin,system:masters\n{PROXY_TOKEN},proxy,proxy\n\
             proxy-token-2,proxy,proxy\n"
        );
        let tokens = file("tokens.csv", &tokens);
        let [etcd, peer, address] = [(); 3].map(|()| ports::unused([127, 0, 0, 1].into()));
        let logs = folder.path().to_owned();
        let command = |program: &str, flags: &[(&str, &str)]| {
            let log = fs::File::create(logs.join(format!("{program}.log"))).unwrap();
            let mut command = Command::new(assets.join(program));
            command
                .args(flags.iter().map(|(name, value)| format!("--{name}={value}")))
                .stdin(Stdio::null())
                .stdout(log.try_clone().unwrap())
                .stderr(log);
            command
        };
        let data = folder.path().join("etcd");
        let etcd_url = format!("http://{etcd}");
        let peer_url = format!("http://{peer}");
        let mut etcd = command(
            "etcd",
            &[
                ("data-dir", data.to_str().unwrap()),
                ("listen-client-urls", &etcd_url),
                ("advertise-client-urls", &etcd_url),
                ("listen-peer-urls", &peer_url),
                ("initial-advertise-peer-urls", &peer_url),
                ("initial-cluster", &format!("default={peer_url}")),
                ("unsafe-no-fsync", "true"),
            ],
        );
        let mut program = command(
            "kube-apiserver",
            &[
                ("etcd-servers", &etcd_url),
                ("bind-address", "127.0.0.1"),
                ("advertise-address", "127.0.0.1"),
                ("secure-port", &address.port().to_string()),
                ("tls-cert-file", &certificate),
                ("tls-private-key-file", &key),
                ("token-auth-file", &tokens),
                ("client-ca-file", &authority_file),
                ("authorization-mode", "RBAC"),
                ("service-account-issuer", "https://127.0.0.1"),
                ("service-account-key-file", &certificate),
                ("service-account-signing-key-file", &key),
                ("service-cluster-ip-range", "10.96.0.0/16"),
                ("endpoint-reconciler-type", "none"),
                ("disable-admission-plugins", "ServiceAccount"),
            ],
        );
        let etcd = spawn(&mut etcd);
        let running = spawn(&mut program);
        let server = Self { address, etcd, program, running, _folder: folder };
        server.wait_until_ready(authority);
        server
    }

    fn wait_until_ready(&self, authority: &Authority) {
        eventually("the API server is ready", START_MAX, || {
            let ready = authority.try_request(self.address, ADMIN_TOKEN, "GET", "/readyz", None);
            (ready.ok()?.0 == 200).then_some(())
        });
    }

    /// Kills the API server; what it stored stays in etcd.
    pub fn kill(&mut self) {
        end(&mut self.running);
    }

    /// Starts it again, at its address.
    pub fn restart(&mut self, authority: &Authority) {
        self.running = spawn(&mut self.program);
        self.wait_until_ready(authority);
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

fn spawn(command: &mut Command) -> Child {
    command.spawn().unwrap_or_else(|error| panic!("{command:?} of KUBEBUILDER_ASSETS: {error}"))
}

fn end(child: &mut Child) {
    // Both fail where it has ended and been waited for.
    let _ = child.kill();
    let _ = child.wait();
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        end(&mut self.running);
        end(&mut self.etcd);
    }
}
