//! The way to the Kubernetes API: its address, the credentials, and answers within bounds.
//!
//! The library finds the configuration and speaks TLS. What it would do on the control thread, or
//! without a bound, is done here: token files and plugins are read elsewhere, and no answer is
//! longer, slower or more frequent than it may be.

use std::fs::File;
use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::FutureExt;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::{Request, StatusCode, Uri};
use http_body_util::BodyExt;
use kube::client::{Body, ClientBuilder};
use kube::config::{AuthInfo, ExecConfig};
use kube::core::Status as ApiStatus;
use kube::{Client, Config, Error};
use secrecy::ExposeSecret;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use super::offload::Offload;
use super::plugin::{self, Granted, KillOnDrop, Leash};
use super::trouble::{Trouble, chain};
use crate::control::discovery::status::ErrorKind;

/// A server that does not answer a handshake in this time is unreachable.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long an answer may take to begin, its connection included. The server waits for 3 s itself
/// until it is up to date.
const HEAD_TIME_MAX: Duration = Duration::from_secs(15);

/// How long files may take to be read; they are local, or of no use.
const READ_TIME_MAX: Duration = Duration::from_secs(5);

/// How long a plugin may take: many ask a server of their own.
const PLUGIN_TIME_MAX: Duration = Duration::from_secs(10);

/// How old a token that was read from a file may become: the kubelet writes a new one well before
/// the old one expires.
const TOKEN_AGE_MAX: Duration = Duration::from_secs(60);

/// Tokens are a few KiB.
const TOKEN_BYTES_MAX: u64 = 64 << 10;

/// So much of an error response is read, and so much of it is logged.
const ERROR_BYTES_MAX: usize = 64 << 10;
const ERROR_CHARS_MAX: usize = 500;

/// Where the API is, by the pod's own configuration or a kubeconfig.
async fn find(offload: &Offload) -> Result<Config, Trouble> {
    // It only looks like one that waits: it reads files, and is through at once.
    let infer = || Config::infer().now_or_never();
    match offload.run("reading the configuration", READ_TIME_MAX, infer).await? {
        Some(Ok(config)) => Ok(config),
        Some(Err(error)) => Err(Trouble::client(&Error::InferConfig(error))),
        None => Err(Trouble::configuration("the configuration is not at hand")),
    }
}

/// Has the runtime have the thread by which it looks the server's name up, and keeps. A thread was to be
/// had a moment ago: without one nothing comes as far as this, and later none may be.
fn keep_lookup_thread(server: &Uri) {
    let host = server.host().unwrap_or_default();
    if host.trim_matches(['[', ']']).parse::<IpAddr>().is_err() {
        tokio::task::spawn_blocking(|| {});
    }
}

/// The address without what proves a user: nobody sends it, and it is shown and kept in a file.
fn without_user(address: Uri) -> Uri {
    let mut parts = address.clone().into_parts();
    let host = parts.authority.as_ref().and_then(|all| Some(all.as_str().rsplit_once('@')?.1));
    let Some(host) = host.and_then(|host| host.parse().ok()) else { return address };
    parts.authority = Some(host);
    Uri::from_parts(parts).unwrap_or(address)
}

/// The credentials of a configuration: a token is taken out of it, in the order in which the library
/// looks, which would panic at one that is no header. All else stays there.
async fn credentials(auth: &mut AuthInfo, offload: &Offload) -> Result<Token, Trouble> {
    if auth.auth_provider.as_ref().is_some_and(|p| p.config.contains_key("cmd-path")) {
        let why = "an auth-provider that runs a command is not supported; exec plugins are";
        return Err(Trouble::configuration(why));
    }
    let has_password = auth.username.is_some() && auth.password.is_some();
    let token = if let Some(token) = id_token(auth) {
        Token::fixed(token)?
    } else if auth.auth_provider.is_some() || has_password {
        Token::default()
    } else if let Some(token) = auth.token.take() {
        Token::fixed(token.expose_secret())?
    } else if let Some(file) = auth.token_file.take() {
        Token::of_file(PathBuf::from(file), offload).await?
    } else if let Some(exec) = auth.exec.take() {
        granted(exec, auth, offload).await?
    } else {
        Token::default()
    };
    if token.header.is_some() {
        (auth.auth_provider, auth.username, auth.token) = (None, None, None);
        (auth.token_file, auth.exec) = (None, None);
    }
    Ok(token)
}

/// The token of a provider that has it at hand.
fn id_token(auth: &AuthInfo) -> Option<&str> {
    let provider = auth.auth_provider.as_ref()?;
    let token = provider.config.get("id-token").map(String::as_str);
    token.filter(|_| matches!(&*provider.name, "gcp" | "oidc"))
}

/// What a plugin gives: a token, or a certificate for these credentials.
async fn granted(
    exec: ExecConfig,
    auth: &mut AuthInfo,
    offload: &Offload,
) -> Result<Token, Trouble> {
    let leash = Leash::default();
    let _killed_at_the_end = KillOnDrop(leash.clone());
    let run = move || plugin::run(&exec, PLUGIN_TIME_MAX, &leash);
    let limit = PLUGIN_TIME_MAX + Duration::from_secs(2);
    let granted = offload.run("the exec plugin", limit, run).await?;
    // One that fails today may work tomorrow, but nobody else can say why it does not.
    let granted = granted.map_err(Trouble::configuration)?;
    let token = Token::granted(&granted)?;
    if let (Some(certificate), Some(key)) =
        (granted.client_certificate_data, granted.client_key_data)
    {
        auth.client_certificate_data = Some(BASE64.encode(certificate));
        auth.client_key_data = Some(BASE64.encode(key).into());
    }
    Ok(token)
}

/// A bearer token.
#[derive(Debug, Default)]
struct Token {
    header: Option<HeaderValue>,
    file: Option<PathBuf>,
    /// When it has to be read again; of a plugin's, when it is void.
    good_until: Option<Instant>,
}

impl Token {
    /// One that stays as it is.
    fn fixed(token: &str) -> Result<Self, Trouble> {
        Ok(Self { header: Some(bearer(token)?), ..Self::default() })
    }

    async fn of_file(file: PathBuf, offload: &Offload) -> Result<Self, Trouble> {
        let path = file.clone();
        let read =
            offload.run("reading the token", READ_TIME_MAX, move || read_token(&path)).await?;
        let header = bearer(&read.map_err(Trouble::configuration)?)?;
        let good_until = Some(Instant::now() + TOKEN_AGE_MAX);
        Ok(Self { header: Some(header), file: Some(file), good_until })
    }

    fn granted(granted: &Granted) -> Result<Self, Trouble> {
        let header = granted.token.as_deref().map(bearer).transpose()?;
        // One that is void already is the server's to refuse: the plugin must not run in a circle.
        let left = |at: SystemTime| at.duration_since(SystemTime::now()).unwrap_or_default();
        let left = granted.expires().map(|at| left(at).max(TOKEN_AGE_MAX));
        let good_until = left.and_then(|left| Instant::now().checked_add(left));
        Ok(Self { header, file: None, good_until })
    }

    fn is_old(&self) -> bool {
        self.good_until.is_some_and(|until| Instant::now() >= until)
    }

    /// What a request carries; read again from its file where it is old.
    async fn fresh(&mut self, offload: &Offload) -> Option<HeaderValue> {
        if self.is_old()
            && let Some(file) = self.file.clone()
        {
            match Self::of_file(file, offload).await {
                Ok(token) => *self = token,
                // The last one may be good for long; the server knows.
                Err(_) => self.good_until = Some(Instant::now() + TOKEN_AGE_MAX),
            }
        }
        self.header.clone()
    }
}

fn read_token(path: &Path) -> Result<String, String> {
    let mut text = String::new();
    let read = File::open(path).and_then(|f| f.take(TOKEN_BYTES_MAX).read_to_string(&mut text));
    read.map_err(|error| format!("the token {} cannot be read: {error}", path.display()))?;
    // So is one that is being written. No server knows it, and the last one may be good for long.
    if text.trim().is_empty() {
        return Err(format!("the token {} is empty", path.display()));
    }
    Ok(text)
}

fn bearer(token: &str) -> Result<HeaderValue, Trouble> {
    let mut value = HeaderValue::try_from(format!("Bearer {}", token.trim()))
        .map_err(|_| Trouble::configuration("the token is no text for a header"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// A client with its credentials.
pub(super) struct Connection {
    /// The namespace that goes with it.
    pub namespace: String,
    /// The server's address.
    pub server: String,
    client: Client,
    token: Mutex<Token>,
    /// When its credentials are void, where there is no file to read new ones from.
    void_at: Option<Instant>,
    /// When it was made, from files as they were then.
    pub made: Instant,
}

impl Connection {
    /// Finds the API, reads the credentials, and makes a client of them. A connection on which nothing
    /// comes for as long as `silence` is dead.
    ///
    /// # Errors
    /// There is no configuration or there are no credentials, or none that can be had in time.
    pub(super) async fn make(silence: Duration, offload: &Offload) -> Result<Self, Trouble> {
        let mut config = find(offload).await?;
        config.cluster_url = without_user(config.cluster_url);
        keep_lookup_thread(&config.cluster_url);
        let (namespace, server) =
            (config.default_namespace.clone(), config.cluster_url.to_string());
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        config.read_timeout = Some(silence);
        // The library would try 15 times in silence, with waits of up to a quarter of an hour.
        config.default_retry = false;
        // It would be read again on the thread that connects; a new client reads it anew.
        config.root_cert_file = None;
        let token = credentials(&mut config.auth_info, offload).await?;
        let build = || ClientBuilder::try_from(config);
        let builder = offload.run("reading the certificates", READ_TIME_MAX, build).await?;
        let client = builder.map_err(|error| Trouble::client(&error))?.build();
        let void_at = token.good_until.filter(|_| token.file.is_none());
        let (token, made) = (Mutex::new(token), Instant::now());
        Ok(Self { namespace, server, client, token, void_at, made })
    }

    /// Whether a new one has to be made.
    pub(super) fn is_void(&self) -> bool {
        self.void_at.is_some_and(|at| Instant::now() >= at)
    }

    /// Sends a request and gives the body of a good answer, which is JSON.
    ///
    /// # Errors
    /// There is none in time, or it is not good. `about` names the resource and its namespace.
    pub(super) async fn get(
        &self,
        request: Request<Vec<u8>>,
        (verb, resource, namespace): (&str, &str, &str),
        offload: &Offload,
    ) -> Result<Body, Trouble> {
        let mut request = request.map(Body::from);
        if let Some(header) = self.token.lock().await.fresh(offload).await {
            request.headers_mut().insert(AUTHORIZATION, header);
        }
        let answer = timeout(HEAD_TIME_MAX, self.client.send(request)).await;
        let answer = answer.map_err(|_| Trouble::unreachable("no answer in time"))?;
        let (head, body) = answer.map_err(|error| Trouble::client(&error))?.into_parts();
        let header = |name| head.headers.get(name).and_then(|value| value.to_str().ok());
        if head.status != StatusCode::OK {
            let wait = header(RETRY_AFTER).and_then(|text| text.parse().ok()).unwrap_or(0);
            let status = error_of(head.status, body).await;
            let trouble = Trouble::api(&status, verb, resource, namespace);
            return Err(trouble.asking_to_wait(Duration::from_secs(wait)));
        }
        let media_type = header(CONTENT_TYPE).unwrap_or("no type");
        if !media_type.starts_with("application/json") {
            return Err(Trouble::malformed(format!("{media_type:?} in place of JSON")));
        }
        Ok(body)
    }
}

/// What an answer of this status says, whatever its body is.
async fn error_of(code: StatusCode, body: Body) -> ApiStatus {
    let text = timeout(READ_TIME_MAX, read_all(body, ERROR_BYTES_MAX)).await;
    let text = text.unwrap_or_else(|_| Ok(Vec::new())).unwrap_or_default();
    let parsed = serde_json::from_slice::<ApiStatus>(&text).unwrap_or_default();
    let message = if parsed.message.is_empty() {
        String::from_utf8_lossy(&text).trim().to_owned()
    } else {
        parsed.message.clone()
    };
    let message = if message.is_empty() { code.to_string() } else { message };
    let message = message.chars().take(ERROR_CHARS_MAX).collect();
    // What the head says counts.
    ApiStatus { code: code.as_u16(), message, ..parsed }
}

/// Reads a body to its end.
///
/// # Errors
/// It breaks off, or is longer than `max`.
pub(super) async fn read_all(mut body: Body, max: usize) -> Result<Vec<u8>, Trouble> {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| broken(&error))?;
        let data = frame.data_ref().map(|data| &data[..]).unwrap_or_default();
        if bytes.len() + data.len() > max {
            return Err(Trouble::malformed(format!("longer than {max} bytes")));
        }
        bytes.extend_from_slice(data);
    }
    Ok(bytes)
}

fn broken(error: &Error) -> Trouble {
    Trouble::new(
        ErrorKind::Unreachable,
        format!("the Kubernetes API broke off in an answer: {}", chain(error)),
    )
}

/// The lines of a body as they come.
#[derive(Debug)]
pub(super) struct Lines {
    body: Body,
    buffer: Vec<u8>,
    /// So much of the buffer has no line feed.
    searched: usize,
    max: usize,
}

impl Lines {
    /// The lines of this body, of at most so many bytes each.
    pub(super) fn of(body: Body, max: usize) -> Self {
        Self { body, buffer: Vec::new(), searched: 0, max }
    }

    /// The next line; none at the end, where half a line counts for nothing. A future that is dropped
    /// loses nothing.
    ///
    /// # Errors
    /// The body breaks off, or the line is too long.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<u8>>, Trouble> {
        loop {
            let end = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n');
            if let Some(end) = end {
                let rest = self.buffer.split_off(self.searched + end + 1);
                self.searched = 0;
                return Ok(Some(std::mem::replace(&mut self.buffer, rest)));
            }
            self.searched = self.buffer.len();
            if self.searched > self.max {
                return Err(Trouble::malformed(format!("a line of more than {} bytes", self.max)));
            }
            let Some(frame) = self.body.frame().await else { return Ok(None) };
            let frame = frame.map_err(|error| broken(&error))?;
            self.buffer.extend_from_slice(frame.data_ref().map(|d| &d[..]).unwrap_or_default());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use kube::config::AuthProviderConfig;

    use super::*;
    use crate::control::testing::block_on;

    #[test]
    fn a_token_is_taken_as_a_header_or_refused_wherever_it_stands() {
        let inline = |token: &str| AuthInfo { token: Some(token.into()), ..AuthInfo::default() };
        let by_provider = |name: &str, token: &str| {
            let config = HashMap::from([("id-token".to_owned(), token.to_owned())]);
            let provider =
                AuthProviderConfig { name: name.to_owned(), config, other: BTreeMap::new() };
            AuthInfo { auth_provider: Some(provider), ..AuthInfo::default() }
        };
        let of = |mut auth: AuthInfo| {
            let token = block_on(credentials(&mut auth, &Offload::default()))?;
            assert!(auth.token.is_none() && auth.auth_provider.is_none(), "the library has it");
            Ok::<_, Trouble>(token.header.unwrap().to_str().unwrap().to_owned())
        };
        // As a block of YAML ends.
        for auth in [inline("abc\n"), by_provider("gcp", "abc\n"), by_provider("oidc", "abc")] {
            assert_eq!(of(auth).unwrap(), "Bearer abc");
        }
        for auth in [inline("a\nb"), by_provider("gcp", "a\nb"), by_provider("oidc", "a\0b")] {
            assert_eq!(of(auth).unwrap_err().kind, ErrorKind::Configuration);
        }
        // A password comes before a token.
        let password = Some("secret".into());
        let mut auth = AuthInfo { username: Some("me".into()), password, ..inline("abc") };
        let token = block_on(credentials(&mut auth, &Offload::default())).unwrap();
        assert!(token.header.is_none() && auth.token.is_some());
    }

    #[test]
    fn an_empty_token_is_none_and_takes_the_place_of_none() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (path, offload) = (file.path(), Offload::default());
        block_on(async {
            let trouble = Token::of_file(path.to_owned(), &offload).await.unwrap_err();
            let what = format!("the token {} is empty", path.display());
            assert!(trouble.what.contains(&what), "{trouble:?}");
            std::fs::write(path, "abc\n").unwrap();
            let mut token = Token::of_file(path.to_owned(), &offload).await.unwrap();
            for (text, header) in [(" \n", "Bearer abc"), ("", "Bearer abc"), ("new", "Bearer new")]
            {
                std::fs::write(path, text).unwrap();
                token.good_until = Some(Instant::now());
                assert_eq!(token.fresh(&offload).await.unwrap(), header, "{text:?}");
            }
        });
    }

    #[test]
    fn an_address_is_shown_without_its_password() {
        for (address, shown) in [
            ("https://me:secret@[::1]:6443/k8s?a=b", "https://[::1]:6443/k8s?a=b"),
            ("https://me@api", "https://api/"),
            ("http://api:80/", "http://api:80/"),
        ] {
            assert_eq!(without_user(address.parse().unwrap()).to_string(), shown);
        }
    }

    #[test]
    fn a_body_comes_in_lines_of_bounded_length() {
        block_on(async {
            let mut lines = Lines::of(Body::from(b"one\ntwo\n\nhalf".to_vec()), 10);
            for line in [&b"one\n"[..], b"two\n", b"\n"] {
                assert_eq!(lines.next().await.unwrap().as_deref(), Some(line));
            }
            assert_eq!(lines.next().await, Ok(None));
            let mut lines = Lines::of(Body::from(vec![b'x'; 11]), 10);
            assert_eq!(lines.next().await.unwrap_err().kind, ErrorKind::Malformed);
            let long = read_all(Body::from(vec![b'x'; 11]), 10).await;
            assert_eq!(long.unwrap_err().kind, ErrorKind::Malformed);
        });
    }
}
