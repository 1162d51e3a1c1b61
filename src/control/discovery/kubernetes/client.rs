//! The client of the Kubernetes API, and what its errors mean.

use std::sync::Arc;
use std::time::Duration;

use kube::client::ClientBuilder;
use kube::core::Status as ApiStatus;
use kube::{Client, Config, Error, runtime::watcher};
use tower::util::MapResponseLayer;

use crate::control::discovery::status::{ErrorKind, Status};

/// A server that does not answer a handshake in this time is unreachable.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How much longer than a watch lasts a connection may be silent.
pub const SILENCE_MARGIN: Duration = Duration::from_secs(5);

/// A client, configured as in a pod or by a kubeconfig, and the namespace that goes with it.
///
/// Every answer that is no error counts as a sync: a watch that begins where the last one ended has
/// missed nothing.
///
/// # Errors
/// No configuration is found, or it cannot be used.
pub async fn connect(watch: Duration, status: Arc<Status>) -> kube::Result<(Client, String)> {
    let mut config = Config::infer().await.map_err(Error::InferConfig)?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    // A connection that says nothing, not even that the watch is over, is dead.
    config.read_timeout = Some(watch + SILENCE_MARGIN);
    // The library would try 15 times in silence, with waits of up to a quarter of an hour.
    config.default_retry = false;
    let namespace = config.default_namespace.clone();
    let noted = MapResponseLayer::new(move |response: http::Response<_>| {
        if response.status().is_success() {
            status.on_sync();
            status.clear_trouble();
        }
        response
    });
    Ok((ClientBuilder::try_from(config)?.with_layer(&noted).build(), namespace))
}

/// What an error means.
#[derive(Debug, PartialEq, Eq)]
pub struct Trouble {
    /// Its kind.
    pub kind: ErrorKind,
    /// What happened, to what, and what to do.
    pub what: String,
    /// How long the server asks to wait.
    pub wait: Duration,
    /// The server does not know streaming lists.
    pub no_streaming: bool,
}

/// Explains an error of a watch on `resource` (such as `endpointslices.discovery.k8s.io`).
pub fn explain(error: &watcher::Error, resource: &str, namespace: &str) -> Trouble {
    match error {
        watcher::Error::InitialListFailed(error) => client(error, "list", resource, namespace),
        watcher::Error::WatchStartFailed(error) | watcher::Error::WatchFailed(error) => {
            client(error, "watch", resource, namespace)
        }
        watcher::Error::WatchError(status) => api(status, "watch", resource, namespace),
        watcher::Error::NoResourceVersion => malformed(&error.to_string()),
    }
}

/// Explains an error of the client itself.
pub fn client(error: &Error, verb: &str, resource: &str, namespace: &str) -> Trouble {
    let (kind, what) = match error {
        Error::Api(status) => return api(status, verb, resource, namespace),
        Error::SerdeError(_) | Error::LinesCodecMaxLineLengthExceeded | Error::FromUtf8(_) => {
            return malformed(&error.to_string());
        }
        Error::InferConfig(_) | Error::RustlsTls(_) | Error::Auth(_) | Error::TlsRequired => {
            let advice = "in a pod the service account's token has to be mounted, elsewhere \
                          KUBECONFIG has to name a file";
            (
                ErrorKind::Configuration,
                format!("no way to the Kubernetes API: {}; {advice}", chain(error)),
            )
        }
        _ => {
            let why = chain(error);
            (ErrorKind::Unreachable, format!("the Kubernetes API cannot be reached: {why}"))
        }
    };
    Trouble { kind, what, wait: Duration::ZERO, no_streaming: false }
}

fn malformed(why: &str) -> Trouble {
    let what = format!("the Kubernetes API gave an answer that makes no sense: {why}");
    Trouble { kind: ErrorKind::Malformed, what, wait: Duration::ZERO, no_streaming: false }
}

fn api(status: &ApiStatus, verb: &str, resource: &str, namespace: &str) -> Trouble {
    let said = &status.message;
    let (kind, what) = match status.code {
        401 => (
            ErrorKind::Unauthorized,
            format!("the Kubernetes API does not accept the credentials: {said}"),
        ),
        403 => {
            let (name, group) = resource.split_once('.').unwrap_or((resource, ""));
            (
                ErrorKind::Forbidden,
                format!(
                    "not allowed to {verb} {name} in namespace {namespace:?}: bind the service \
                     account to a Role there with apiGroups: [{group:?}], resources: [{name:?}], \
                     verbs: [\"get\", \"list\", \"watch\"]. The API says: {said}"
                ),
            )
        }
        410 => (ErrorKind::Expired, format!("the watch fell behind and starts over: {said}")),
        429 => (ErrorKind::Throttled, format!("the Kubernetes API asks for patience: {said}")),
        code => (ErrorKind::Refused, format!("the Kubernetes API answered {code}: {said}")),
    };
    let seconds = status.details.as_ref().map_or(0, |details| details.retry_after_seconds);
    Trouble {
        kind,
        what,
        wait: Duration::from_secs(seconds.into()),
        // 500 is what a server says whose etcd is too old for them.
        no_streaming: matches!(status.code, 400 | 422 | 500),
    }
}

/// An error with its causes: the outermost one often says nothing.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(code: u16, message: &str) -> Box<ApiStatus> {
        ApiStatus::failure(message, "").with_code(code).boxed()
    }

    #[test]
    fn a_missing_permission_is_told_with_the_role_that_grants_it() {
        let forbidden = || answer(403, "User \"proxy\" is not allowed");
        let cases = [
            (watcher::Error::InitialListFailed(Error::Api(forbidden())), "list"),
            (watcher::Error::WatchStartFailed(Error::Api(forbidden())), "watch"),
            (watcher::Error::WatchFailed(Error::Api(forbidden())), "watch"),
            (watcher::Error::WatchError(forbidden()), "watch"),
        ];
        for (error, verb) in &cases {
            let trouble = explain(error, "endpointslices.discovery.k8s.io", "db");
            assert_eq!(trouble.kind, ErrorKind::Forbidden);
            assert_eq!(
                trouble.what,
                format!(
                    "not allowed to {verb} endpointslices in namespace \"db\": bind the service \
                     account to a Role there with apiGroups: [\"discovery.k8s.io\"], resources: \
                     [\"endpointslices\"], verbs: [\"get\", \"list\", \"watch\"]. The API says: User \
                     \"proxy\" is not allowed"
                )
            );
            assert!(!trouble.no_streaming && trouble.wait.is_zero());
        }
        // Pods are of the core group, which has no name.
        let trouble = explain(&cases[0].0, "pods", "db");
        assert!(trouble.what.contains("apiGroups: [\"\"], resources: [\"pods\"]"), "{trouble:?}");
    }

    #[test]
    fn each_answer_has_its_kind() {
        for (code, kind, no_streaming) in [
            (400, ErrorKind::Refused, true),
            (401, ErrorKind::Unauthorized, false),
            (403, ErrorKind::Forbidden, false),
            (410, ErrorKind::Expired, false),
            (422, ErrorKind::Refused, true),
            (429, ErrorKind::Throttled, false),
            (500, ErrorKind::Refused, true),
            (503, ErrorKind::Refused, false),
        ] {
            let error = watcher::Error::WatchError(answer(code, "because"));
            let trouble = explain(&error, "pods", "db");
            assert_eq!((trouble.kind, trouble.no_streaming), (kind, no_streaming), "{code}");
            assert!(trouble.what.contains("because"), "{trouble:?}");
        }
        let trouble = explain(&watcher::Error::NoResourceVersion, "pods", "db");
        assert_eq!(trouble.kind, ErrorKind::Malformed);
    }

    #[test]
    fn a_server_that_asks_for_patience_gets_it() {
        let status = r#"{"code": 429, "details": {"retryAfterSeconds": 7}}"#;
        let status = serde_json::from_str(status).unwrap();
        let trouble = explain(&watcher::Error::WatchError(status), "pods", "db");
        assert_eq!(trouble.wait, Duration::from_secs(7));
    }
}
