//! Plugins of a kubeconfig: programs that print credentials.
//!
//! The client library runs them, too, but waits for them without end on the thread that asks.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::config::ExecConfig;
use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use serde_json::json;

/// More than this of a plugin's output is not read: credentials are a few KiB.
const OUTPUT_MAX: u64 = 1 << 20;

/// So much of what it says on standard error is passed on.
const COMPLAINT_MAX: usize = 400;

/// The credentials that a plugin gives.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Granted {
    /// A bearer token.
    pub token: Option<String>,
    /// A client certificate in PEM, with its key.
    pub client_certificate_data: Option<String>,
    /// The key.
    pub client_key_data: Option<String>,
    expiration_timestamp: Option<Time>,
}

impl Granted {
    /// Until when they are valid, where that is given.
    pub(super) fn expires(&self) -> Option<SystemTime> {
        self.expiration_timestamp.as_ref().map(|time| time.0.into())
    }
}

#[derive(Deserialize)]
struct Answer {
    status: Option<Granted>,
}

/// The processes of a running plugin: they end with the last of these, however it comes to that.
#[derive(Debug, Default, Clone)]
pub(super) struct Leash(Arc<Mutex<Option<Pid>>>);

impl Leash {
    fn hold(&self, leader: Option<Pid>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = leader;
    }

    /// Kills them all, unless the plugin was waited for: then its number may be another's.
    pub(super) fn kill(&self) {
        let leader = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(leader) = *leader {
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

/// Kills what is on a leash when dropped.
#[derive(Debug)]
pub(super) struct KillOnDrop(pub Leash);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        self.0.kill();
    }
}

/// Runs a plugin, for at most this long.
///
/// # Errors
/// It cannot be run, fails, takes longer, or prints no credentials.
pub(super) fn run(exec: &ExecConfig, limit: Duration, leash: &Leash) -> Result<Granted, String> {
    let deadline = Instant::now() + limit;
    let name = exec.command.as_deref().ok_or("the exec plugin has no command")?;
    let wrong = |why: String| format!("the exec plugin {name:?} {why}");
    let mut command = command(exec, name)?;
    let mut child =
        command.spawn().map_err(|error| wrong(format!("cannot be started: {error}")))?;
    leash.hold(Some(Pid::from_child(&child)));
    let output = read(child.stdout.take());
    let complaint = read(child.stderr.take());
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Ok(status),
            Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
            Ok(None) => break Err(format!("takes longer than {limit:?}")),
            Err(error) => break Err(error.to_string()),
        }
    };
    if status.is_err() {
        leash.kill();
        // It has been killed: this does not wait for long.
        let _ = child.wait();
    }
    leash.hold(None);
    let status = status.map_err(wrong)?;
    // What it left running may hold its pipes open.
    let left = deadline.saturating_duration_since(Instant::now());
    let complaint = || {
        let bytes = complaint.recv_timeout(left.min(Duration::from_secs(1))).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes).trim().to_owned();
        text.chars().take(COMPLAINT_MAX).collect::<String>()
    };
    if !status.success() {
        return Err(wrong(format!("failed ({status}): {}", complaint())));
    }
    let output = output.recv_timeout(left).map_err(|error| match error {
        RecvTimeoutError::Timeout => wrong("leaves its output open".to_owned()),
        RecvTimeoutError::Disconnected => wrong("cannot be read from".to_owned()),
    })?;
    let answer: Answer = serde_saphyr::from_slice(&output)
        .map_err(|error| wrong(format!("prints no credentials: {error}")))?;
    answer.status.ok_or_else(|| wrong("prints no credentials: no status".to_owned()))
}

fn command(exec: &ExecConfig, name: &str) -> Result<Command, String> {
    let mut spec = json!({"interactive": false});
    if exec.provide_cluster_info {
        spec["cluster"] = serde_json::to_value(&exec.cluster).map_err(|error| error.to_string())?;
    }
    let info = json!({"apiVersion": exec.api_version, "kind": "ExecCredential", "spec": spec});
    let mut command = Command::new(name);
    command
        .args(exec.args.iter().flatten())
        .env("KUBERNETES_EXEC_INFO", info.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Its children are killed with it.
        .process_group(0);
    for variable in exec.env.iter().flatten() {
        if let (Some(name), Some(value)) = (variable.get("name"), variable.get("value")) {
            command.env(name, value);
        }
    }
    Ok(command)
}

/// All that comes out of a pipe, up to [`OUTPUT_MAX`].
fn read(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    // Without a thread, the sender is dropped, and the receiver learns of it.
    let _ = thread::Builder::new().name("aegis-plugin".to_owned()).spawn(move || {
        let mut bytes = Vec::new();
        if let Some(pipe) = pipe {
            // What came before an error is of use, too.
            let _ = pipe.take(OUTPUT_MAX).read_to_end(&mut bytes);
        }
        drop(sender.send(bytes));
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> Result<Granted, String> {
        let exec = json!({"apiVersion": "client.authentication.k8s.io/v1", "command": "sh",
                          "args": ["-c", script], "env": [{"name": "WORD", "value": "secret"}]});
        run(&serde_json::from_value(exec).unwrap(), limit, &Leash::default())
    }

    #[test]
    fn a_plugin_gives_credentials_in_json_or_yaml() {
        let minute = Duration::from_secs(60);
        let json = r#"echo "{\"kind\": \"ExecCredential\", \"status\": {\"token\": \"$WORD\",
                       \"expirationTimestamp\": \"2030-01-01T00:00:00+02:00\"}}""#;
        let granted = shell(json, minute).unwrap();
        assert_eq!(granted.token.as_deref(), Some("secret"));
        let expires = SystemTime::UNIX_EPOCH + Duration::from_secs(1_893_448_800);
        assert_eq!(granted.expires(), Some(expires));
        let yaml = "printf 'kind: ExecCredential\\nstatus:\\n  token: abc\\n'";
        assert_eq!(shell(yaml, minute).unwrap().token.as_deref(), Some("abc"));
    }

    #[test]
    fn a_plugin_that_fails_says_why() {
        let minute = Duration::from_secs(60);
        for (script, why) in [
            ("echo no login >&2; exit 3", "failed (exit status: 3): no login"),
            ("echo hello", "prints no credentials"),
            ("echo '{}'", "prints no credentials: no status"),
        ] {
            let error = shell(script, minute).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_plugin_that_hangs_is_killed_with_its_children() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pid");
        let script =
            format!("sleep 1000 & echo $! > {0}.new; mv {0}.new {0}; wait", file.display());
        let error = shell(&script, Duration::from_secs(2)).unwrap_err();
        assert!(error.contains("takes longer than 2s"), "{error}");
        let child: i32 = std::fs::read_to_string(&file).unwrap().trim().parse().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        // A zombie, where nobody reaps orphans, is as good as gone.
        let lives = || {
            let stat = std::fs::read_to_string(format!("/proc/{child}/stat"));
            stat.is_ok_and(|stat| !stat.contains(") Z"))
        };
        while lives() {
            assert!(Instant::now() < deadline, "its child still runs");
            thread::sleep(Duration::from_millis(5));
        }
    }
}
