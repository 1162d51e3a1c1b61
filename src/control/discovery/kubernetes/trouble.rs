//! What can go wrong with the Kubernetes API, and what follows from it.

use std::error::Error as StdError;
use std::io;
use std::time::Duration;

use kube::Error;
use kube::core::Status as ApiStatus;

use crate::control::discovery::status::ErrorKind;

/// A server that asks for more patience than this is asked again all the same: what it says may be
/// garbage, and endpoints grow old meanwhile.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(10);

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trouble {
    /// Its kind.
    pub kind: ErrorKind,
    /// What happened, to what, and what to do.
    pub what: String,
    /// The status of the answer; 0 without one.
    pub code: u16,
    /// How long the server asks to wait, at most [`RETRY_AFTER_MAX`].
    pub wait: Duration,
    /// Nobody listens at the server's address.
    pub refused: bool,
    /// Once, it is nothing to speak of.
    pub quiet: bool,
}

impl Trouble {
    /// Trouble of this kind, without an answer of the server. What servers and plugins say becomes a
    /// line: it is shown as a reason, and printed.
    pub(super) fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        let (code, wait) = (0, Duration::ZERO);
        let what = what.into().replace(char::is_control, " ");
        Self { kind, what, code, wait, refused: false, quiet: false }
    }

    /// No answer, or none in time.
    pub(super) fn unreachable(why: impl std::fmt::Display) -> Self {
        let what = format!("the Kubernetes API cannot be reached: {why}");
        Self::new(ErrorKind::Unreachable, what)
    }

    /// An answer that is none.
    pub(super) fn malformed(why: impl std::fmt::Display) -> Self {
        let what = format!("the Kubernetes API gave an answer that makes no sense: {why}");
        Self::new(ErrorKind::Malformed, what)
    }

    /// A watch that ended before its time. A server that restarts does that to each, once.
    pub(super) fn early(after: Duration) -> Self {
        let what = format!("the Kubernetes API ends watches before their time, after {after:.1?}");
        Self { quiet: true, ..Self::new(ErrorKind::Refused, what) }
    }

    /// The configuration does not lead to the API.
    pub(super) fn configuration(why: impl std::fmt::Display) -> Self {
        let what = format!(
            "no way to the Kubernetes API: {why}; in a pod the service account's token has to be \
             mounted, elsewhere KUBECONFIG has to name a file"
        );
        Self::new(ErrorKind::Configuration, what)
    }

    /// An error of the client.
    pub(super) fn client(error: &Error) -> Self {
        match error {
            Error::InferConfig(_) | Error::RustlsTls(_) | Error::Auth(_) | Error::TlsRequired => {
                Self::configuration(chain(error))
            }
            // Its address may hold a password.
            Error::ProxyProtocolDisabled { .. } | Error::ProxyProtocolUnsupported { .. } => {
                Self::new(
                    ErrorKind::Configuration,
                    "no way to the Kubernetes API: proxies are not supported: unset HTTPS_PROXY, or \
                 proxy-url in the kubeconfig",
                )
            }
            _ => Self::transport(error),
        }
    }

    /// An error on the way to the server or back.
    pub(super) fn transport(error: &(dyn StdError + 'static)) -> Self {
        let why = chain(error);
        // What rustls says of a certificate that it does not trust.
        if why.contains("invalid peer certificate") {
            let what = format!("the Kubernetes API cannot be trusted: {why}");
            return Self::new(ErrorKind::Configuration, what);
        }
        let refused = causes(error).any(|cause| {
            let io = cause.downcast_ref::<io::Error>();
            io.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
        });
        Self { refused, ..Self::unreachable(why) }
    }

    /// An error that the server reports; it concerns `resource`, such as
    /// `endpointslices.discovery.k8s.io`.
    pub(super) fn api(status: &ApiStatus, verb: &str, resource: &str, namespace: &str) -> Self {
        let message = &status.message;
        let (kind, what) = match status.code {
            401 => (
                ErrorKind::Unauthorized,
                format!("the Kubernetes API does not accept the credentials: {message}"),
            ),
            403 => {
                let (name, group) = resource.split_once('.').unwrap_or((resource, ""));
                (
                    ErrorKind::Forbidden,
                    format!(
                        "not allowed to {verb} {name} in namespace {namespace:?}: bind the service \
                         account to a Role there with apiGroups: [{group:?}], resources: \
                         [{name:?}], verbs: [\"get\", \"list\", \"watch\"]. The API says: {message}"
                    ),
                )
            }
            410 => {
                (ErrorKind::Expired, format!("the watch fell behind and starts over: {message}"))
            }
            429 => {
                (ErrorKind::Throttled, format!("the Kubernetes API asks for patience: {message}"))
            }
            code => (ErrorKind::Refused, format!("the Kubernetes API answered {code}: {message}")),
        };
        let seconds = status.details.as_ref().map_or(0, |details| details.retry_after_seconds);
        let trouble = Self { code: status.code, ..Self::new(kind, what) };
        trouble.asking_to_wait(Duration::from_secs(seconds.into()))
    }

    /// The same, from a server that asks for so much patience.
    pub(super) fn asking_to_wait(self, wait: Duration) -> Self {
        Self { wait: self.wait.max(wait).min(RETRY_AFTER_MAX), ..self }
    }

    /// Whether the server may be one that does not know streaming lists. 500 is what a server says
    /// whose etcd is too old for them.
    pub(super) fn may_be_for_streaming(&self) -> bool {
        matches!(self.code, 400 | 422 | 500)
    }

    /// Whether watching on from where the last watch ended is of no use. 504 is what a server says
    /// that was put back to an older state.
    pub(super) fn loses_the_version(&self) -> bool {
        matches!(self.kind, ErrorKind::Expired | ErrorKind::Malformed)
            || matches!(self.code, 400 | 404 | 422 | 500 | 504)
    }

    /// Whether it is an error of the configuration or of rights, which no patience mends: a pod
    /// that starts with it must not pass for a good one.
    pub(super) fn holds_the_start(&self) -> bool {
        match self.kind {
            ErrorKind::Unauthorized
            | ErrorKind::Forbidden
            | ErrorKind::Configuration
            | ErrorKind::Malformed => true,
            ErrorKind::Refused => (1..500).contains(&self.code),
            ErrorKind::Unreachable
            | ErrorKind::Expired
            | ErrorKind::Throttled
            | ErrorKind::Lookup
            | ErrorKind::Loop => false,
        }
    }
}

/// An error and its causes.
fn causes<'a>(
    error: &'a (dyn StdError + 'static),
) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    let mut next = Some(error);
    std::iter::from_fn(move || {
        let error = next?;
        next = error.source();
        Some(error)
    })
}

/// An error with its causes: the outermost one often says nothing.
pub(super) fn chain(error: &(dyn StdError + 'static)) -> String {
    causes(error).skip(1).fold(error.to_string(), |text, cause| {
        let cause = cause.to_string();
        if text.contains(&cause) { text } else { format!("{text}: {cause}") }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(code: u16, message: &str) -> ApiStatus {
        ApiStatus::failure(message, "").with_code(code)
    }

    #[test]
    fn a_missing_permission_is_told_with_the_role_that_grants_it() {
        let forbidden = answer(403, "User \"proxy\" is not allowed");
        let trouble = Trouble::api(&forbidden, "watch", "endpointslices.discovery.k8s.io", "db");
        assert_eq!(trouble.kind, ErrorKind::Forbidden);
        assert_eq!(
            trouble.what,
            "not allowed to watch endpointslices in namespace \"db\": bind the service account to a \
             Role there with apiGroups: [\"discovery.k8s.io\"], resources: [\"endpointslices\"], \
             verbs: [\"get\", \"list\", \"watch\"]. The API says: User \"proxy\" is not allowed"
        );
        // Pods are of the core group, which has no name.
        let trouble = Trouble::api(&forbidden, "list", "pods", "db");
        assert!(trouble.what.contains("apiGroups: [\"\"], resources: [\"pods\"]"), "{trouble:?}");
    }

    #[test]
    fn what_others_say_is_one_line() {
        let trouble =
            Trouble::api(&answer(500, "broken\nERROR forged\x1b[2J"), "list", "pods", "db");
        assert_eq!(trouble.what, "the Kubernetes API answered 500: broken ERROR forged [2J");
    }

    #[test]
    fn each_answer_has_its_kind_and_its_consequences() {
        for (code, kind, no_streaming, lost, holds) in [
            (302, ErrorKind::Refused, false, false, true),
            (400, ErrorKind::Refused, true, true, true),
            (401, ErrorKind::Unauthorized, false, false, true),
            (403, ErrorKind::Forbidden, false, false, true),
            (404, ErrorKind::Refused, false, true, true),
            (410, ErrorKind::Expired, false, true, false),
            (422, ErrorKind::Refused, true, true, true),
            (429, ErrorKind::Throttled, false, false, false),
            (500, ErrorKind::Refused, true, true, false),
            (503, ErrorKind::Refused, false, false, false),
            (504, ErrorKind::Refused, false, true, false),
        ] {
            let trouble = Trouble::api(&answer(code, "because"), "watch", "pods", "db");
            assert_eq!((trouble.kind, trouble.code), (kind, code));
            assert_eq!(trouble.may_be_for_streaming(), no_streaming, "{code}");
            assert_eq!(trouble.loses_the_version(), lost, "{code}");
            assert_eq!(trouble.holds_the_start(), holds, "{code}");
            assert!(trouble.what.contains("because"), "{trouble:?}");
        }
        assert!(!Trouble::unreachable("gone").holds_the_start());
        assert!(!Trouble::early(Duration::ZERO).holds_the_start());
    }

    #[test]
    fn a_server_that_asks_for_patience_gets_it_within_bounds() {
        for (asked, wait) in [(0, 0), (7, 7), (4_000_000, 10)] {
            let text = format!(r#"{{"code": 429, "details": {{"retryAfterSeconds": {asked}}}}}"#);
            let status = serde_json::from_str(&text).unwrap();
            let trouble = Trouble::api(&status, "watch", "pods", "db");
            assert_eq!(trouble.wait, Duration::from_secs(wait), "{asked}");
        }
    }

    #[test]
    fn who_is_not_trusted_is_not_away() {
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        let trouble = Trouble::transport(&refused);
        assert!(trouble.refused && trouble.kind == ErrorKind::Unreachable);
        let untrusted = io::Error::other("invalid peer certificate: UnknownIssuer");
        assert_eq!(Trouble::transport(&untrusted).kind, ErrorKind::Configuration);
    }
}
