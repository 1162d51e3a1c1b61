//! The last endpoints that the API named, in a file: for a start while nobody answers.
//!
//! The file says whose endpoints they are and when the API confirmed them last. One that is of
//! another Service, too old, or garbage is not used, and reported.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::known::Location;
use super::offload::Offload;
use crate::config::{Balance, RouteConfig, in_making};
use crate::control::discovery::{Declared, Wanted};
use crate::io::net::Address;
use crate::limits::ENDPOINTS_MAX;
use crate::proxy::endpoints::Tier;

/// The format of the file. Another program's file is not guessed at.
const VERSION: u32 = 1;

/// A file of [`ENDPOINTS_MAX`] endpoints and as many stores has a fraction of this.
const BYTES_MAX: u64 = 4 << 20;

/// The least time between two writes: changes that come faster share one.
const WRITE_PAUSE: Duration = Duration::from_secs(1);

/// How often the time of the last confirmation is written, where nothing else changes.
const REFRESH: Duration = Duration::from_secs(60);

/// A file may be of a clock that went ahead by this much.
const CLOCK_SKEW_MAX: Duration = Duration::from_secs(60);

/// How long the start waits for the file of endpoints to be read.
const READ_TIME_MAX: Duration = Duration::from_secs(2);

/// Whose endpoints they are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    server: String,
    namespace: String,
    service: Option<String>,
    selector: Option<String>,
    port: Option<String>,
    by_key: bool,
    stores: Option<usize>,
}

impl Identity {
    /// What this configuration means at this server, in this namespace.
    pub(super) fn new(config: &RouteConfig, server: &str, namespace: &str) -> Self {
        let kube = &config.kube;
        Self {
            server: server.to_owned(),
            namespace: namespace.to_owned(),
            service: kube.service.as_ref().map(|service| service.name.clone()),
            selector: kube.selector.clone(),
            port: kube.port.as_ref().map(ToString::to_string),
            by_key: config.balance == Balance::KeyHash,
            stores: kube.stores.map(Into::into),
        }
    }
}

/// What the API named: endpoints and, where keys say where requests go, stores.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Named {
    /// The endpoints.
    pub endpoints: Vec<Wanted>,
    /// The stores.
    pub stores: Vec<Declared>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedEndpoint {
    name: String,
    address: Address,
    near: bool,
    #[serde(default)]
    tier: Tier,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedStore {
    name: String,
    address: Option<Address>,
    why: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    version: u32,
    /// Milliseconds since the Unix epoch.
    confirmed_ms: u64,
    of: Identity,
    endpoints: Vec<SavedEndpoint>,
    stores: Vec<SavedStore>,
}

/// A file that was read, and makes sense.
#[derive(Debug)]
pub(super) struct Snapshot(Saved);

impl Snapshot {
    /// Reads a file; none if there is none.
    ///
    /// # Errors
    /// It cannot be read, or is no such file; the message says why.
    pub(super) fn read(path: &Path) -> Result<Option<Self>, String> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        let mut bytes = Vec::new();
        file.take(BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
        if bytes.len() as u64 > BYTES_MAX {
            return Err(format!("longer than {BYTES_MAX} bytes"));
        }
        Self::parse(&bytes).map(Some)
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let head: Head = serde_json::from_slice(bytes)
            .map_err(|error| format!("not a file of endpoints: {error}"))?;
        if head.version != VERSION {
            return Err(format!("of format {}, and {VERSION} is known", head.version));
        }
        let saved: Saved = serde_json::from_slice(bytes)
            .map_err(|error| format!("not a file of endpoints: {error}"))?;
        let count = saved.endpoints.len().max(saved.stores.len());
        if count > ENDPOINTS_MAX {
            return Err(format!("{count} endpoints, and {ENDPOINTS_MAX} at most can be served"));
        }
        Ok(Self(saved))
    }

    /// When the API confirmed them last.
    pub(super) fn confirmed(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.0.confirmed_ms)
    }

    /// What it names, if it is of `identity` and not too old.
    ///
    /// # Errors
    /// Why it is not to be used.
    pub(super) fn use_for(
        &self,
        identity: &Identity,
        age_max: Duration,
        now: SystemTime,
    ) -> Result<Named, String> {
        if self.0.of != *identity {
            let [its, own] = [&self.0.of, identity].map(serde_json::to_string);
            let [its, own] = [its, own].map(Result::unwrap_or_default);
            return Err(format!("of {its}, which is not {own}"));
        }
        let confirmed = self.confirmed();
        if confirmed > now + CLOCK_SKEW_MAX {
            return Err("from the future".to_owned());
        }
        let age = now.duration_since(confirmed).unwrap_or_default();
        if age > age_max {
            return Err(format!("{age:.0?} old, and AEGIS_KUBE_SNAPSHOT_MAX_AGE is {age_max:?}"));
        }
        let endpoints = self.0.endpoints.iter().map(|saved| Wanted {
            name: saved.name.clone(),
            address: saved.address.clone(),
            near: saved.near,
            tier: saved.tier,
        });
        let stores = self.0.stores.iter().map(|saved| Declared {
            name: saved.name.clone(),
            address: saved.address.clone().ok_or_else(|| saved.why.clone()),
        });
        Ok(Named { endpoints: endpoints.collect(), stores: stores.collect() })
    }
}

fn to_file(of: &Identity, named: &Named, confirmed: SystemTime) -> Saved {
    let confirmed = confirmed.duration_since(UNIX_EPOCH).unwrap_or_default();
    let endpoints = named.endpoints.iter().map(|wanted| SavedEndpoint {
        name: wanted.name.clone(),
        address: wanted.address.clone(),
        near: wanted.near,
        tier: wanted.tier,
    });
    let stores = named.stores.iter().map(|store| SavedStore {
        name: store.name.clone(),
        address: store.address.as_ref().ok().cloned(),
        why: store.address.as_ref().err().cloned().flatten(),
    });
    Saved {
        version: VERSION,
        confirmed_ms: confirmed.as_millis() as u64,
        of: of.clone(),
        endpoints: endpoints.take(ENDPOINTS_MAX).collect(),
        stores: stores.take(ENDPOINTS_MAX).collect(),
    }
}

/// Replaces the file as a whole, so that who reads it sees the old or the new one.
fn write(path: &Path, saved: &Saved) -> io::Result<()> {
    let new = in_making(path);
    // One that was left behind by a crash, or is something else, such as a pipe.
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).open(&new)?;
    let written = file.write_all(&serde_json::to_vec(saved)?).and_then(|()| file.sync_data());
    let replaced = written.and_then(|()| fs::rename(&new, path));
    if replaced.is_err() {
        // Of a full disk, half a file would only take more.
        let _ = fs::remove_file(&new);
    }
    replaced
}

/// What is to be written.
#[derive(Debug, Default)]
struct Pending {
    of: Identity,
    named: Option<Named>,
    confirmed: Option<SystemTime>,
    /// Whether the file is to be written soon.
    due: bool,
    written: Option<Instant>,
}

/// Writes the file, on a thread that nobody waits for: the disk may hang.
#[derive(Debug, Clone)]
pub(super) struct Writer(Arc<(Mutex<Pending>, Condvar)>);

impl Writer {
    /// A writer of this file.
    ///
    /// # Errors
    /// There is no thread for it.
    pub(super) fn start(path: PathBuf) -> io::Result<Self> {
        let shared = Arc::new((Mutex::default(), Condvar::new()));
        let writer = Self(Arc::clone(&shared));
        thread::Builder::new()
            .name("aegis-snapshot".to_owned())
            .spawn(move || Self(shared).run(&path))?;
        Ok(writer)
    }

    /// Whose endpoints come from now on.
    pub(super) fn identify(&self, of: Identity) {
        self.change(|pending| {
            if pending.of != of {
                // What was named before is of another one.
                *pending = Pending { of, ..Pending::default() };
            }
        });
    }

    /// What the API names now.
    pub(super) fn save(&self, named: Named) {
        self.change(|pending| {
            pending.due |= pending.named.as_ref() != Some(&named);
            pending.named = Some(named);
            pending.confirmed = Some(SystemTime::now());
        });
    }

    /// The API has confirmed what it named.
    pub(super) fn confirm(&self) {
        self.change(|pending| {
            pending.confirmed = Some(SystemTime::now());
            pending.due |= pending.written.is_some_and(|written| written.elapsed() >= REFRESH);
        });
    }

    fn change(&self, change: impl FnOnce(&mut Pending)) {
        let (pending, changed) = &*self.0;
        // Held only for as long as it takes to change or to copy it, never while the disk is busy.
        let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut pending);
        if pending.due && pending.named.is_some() {
            changed.notify_one();
        }
    }

    fn run(&self, path: &Path) {
        let mut failing = false;
        loop {
            let result = write(path, &self.next());
            let path = path.display();
            match &result {
                Ok(()) if failing => info!(%path, "endpoints are kept in the file again"),
                Err(error) if !failing => {
                    warn!("AEGIS_KUBE_SNAPSHOT={path}: endpoints cannot be kept there: {error}");
                }
                _ => {}
            }
            failing = result.is_err();
            thread::sleep(WRITE_PAUSE);
        }
    }

    /// What is to be written next, once there is something.
    fn next(&self) -> Saved {
        let (pending, changed) = &*self.0;
        let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if pending.due
                && let Some(named) = &pending.named
            {
                let confirmed = pending.confirmed.unwrap_or(UNIX_EPOCH);
                let saved = to_file(&pending.of, named, confirmed);
                pending.due = false;
                pending.written = Some(Instant::now());
                return saved;
            }
            pending = changed.wait(pending).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The endpoints of a former run, and the file for those of this one.
#[derive(Debug, Default)]
pub(super) struct SavedEndpoints {
    age_max: Duration,
    /// Where the file is, for messages.
    path: String,
    writer: Option<Writer>,
    read: Mutex<Option<Snapshot>>,
    identity: Mutex<Option<Identity>>,
}

impl SavedEndpoints {
    /// Reads the file, if there is to be one, and keeps it from now on.
    pub(super) async fn open(config: &RouteConfig) -> Self {
        let Some(path) = config.kube.snapshot.clone() else { return Self::default() };
        let shown = path.display().to_string();
        let file = path.clone();
        let reading = move || Snapshot::read(&file);
        let read = Offload::default().run("reading it", READ_TIME_MAX, reading).await;
        // It has nothing to do with the way to the API, of which the trouble would tell.
        let late = || Err(format!("reading it takes longer than {READ_TIME_MAX:?}"));
        let read = read.unwrap_or_else(|_| late()).unwrap_or_else(|why| {
            warn!("AEGIS_KUBE_SNAPSHOT={shown}: the saved endpoints are of no use: {why}");
            None
        });
        let writer = Writer::start(path)
            .inspect_err(|error| warn!("AEGIS_KUBE_SNAPSHOT={shown}: no thread for it: {error}"));
        Self {
            age_max: config.kube.snapshot_age_max,
            path: shown,
            writer: writer.ok(),
            read: Mutex::new(read),
            identity: Mutex::default(),
        }
    }

    /// This is where the endpoints of this run are from.
    pub(super) fn locate(&self, config: &RouteConfig, Location { server, namespace }: &Location) {
        let identity = Identity::new(config, server, namespace);
        if let Some(writer) = &self.writer {
            writer.identify(identity.clone());
        }
        *self.identity.lock().unwrap_or_else(PoisonError::into_inner) = Some(identity);
    }

    /// The endpoints of a former run, if they are of use, and when they were confirmed last.
    pub(super) fn usable(&self) -> Option<(Named, SystemTime)> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let identity = self.identity.lock().unwrap_or_else(PoisonError::into_inner);
        let snapshot = read.as_ref()?;
        let named = match &*identity {
            Some(identity) => snapshot.use_for(identity, self.age_max, SystemTime::now()),
            None => Err("whose they have to be is not known".to_owned()),
        };
        match named {
            Ok(named) => Some((named, snapshot.confirmed())),
            Err(why) => {
                warn!(
                    "AEGIS_KUBE_SNAPSHOT={}: the saved endpoints are of no use: {why}",
                    self.path
                );
                *read = None;
                None
            }
        }
    }

    /// These are the endpoints now.
    pub(super) fn save(&self, named: Named) {
        if let Some(writer) = &self.writer {
            writer.save(named);
        }
    }

    /// The API says so at this moment, too.
    pub(super) fn confirm(&self) {
        if let Some(writer) = &self.writer {
            writer.confirm();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(service: &str) -> Identity {
        Identity { service: Some(service.to_owned()), ..Identity::default() }
    }

    fn named() -> Named {
        let address: Address = "10.0.0.1:1".parse().unwrap();
        let store = |name: &str, address| Declared { name: name.to_owned(), address };
        Named {
            endpoints: vec![Wanted { near: true, ..Wanted::new("a-0", address.clone()) }],
            stores: vec![
                store("a-0", Ok(address)),
                store("a-1", Err(None)),
                store("a-2", Err(Some("two pods have its name".to_owned()))),
            ],
        }
    }

    #[test]
    fn what_was_named_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("endpoints.json");
        assert!(Snapshot::read(&path).unwrap().is_none());
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        // Something in the way, as of a crash in the middle.
        fs::write(folder.path().join("endpoints.json.new"), "half").unwrap();
        write(&path, &to_file(&identity("db"), &named(), now)).unwrap();
        let snapshot = Snapshot::read(&path).unwrap().unwrap();
        let hour = Duration::from_secs(3600);
        assert_eq!(snapshot.use_for(&identity("db"), hour, now + hour), Ok(named()));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left behind");

        let old = snapshot.use_for(&identity("db"), hour, now + 2 * hour).unwrap_err();
        assert!(old.contains("7200s old") && old.contains("MAX_AGE"), "{old}");
        let other = snapshot.use_for(&identity("web"), hour, now).unwrap_err();
        assert!(other.contains("\"db\"") && other.contains("\"web\""), "{other}");
        let early = snapshot.use_for(&identity("db"), hour, now - hour).unwrap_err();
        assert_eq!(early, "from the future");
    }

    #[test]
    fn garbage_is_no_snapshot() {
        let whole =
            serde_json::to_vec(&to_file(&identity("db"), &named(), SystemTime::now())).unwrap();
        assert!(Snapshot::parse(&whole).is_ok());
        for len in 0..whole.len() {
            assert!(Snapshot::parse(&whole[..len]).is_err(), "{len} bytes of it");
        }
        for (text, why) in [
            ("<html>", "not a file of endpoints"),
            ("[]", "not a file of endpoints"),
            ("{\"version\": 2}", "of format 2, and 1 is known"),
            ("{\"version\": 1}", "not a file of endpoints"),
        ] {
            let error = Snapshot::parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
