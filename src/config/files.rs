//! The files that a process makes: no two may be one, whatever they are called. Only the host can tell,
//! so this is found out at the start.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use super::error::{ConfigErrors, Problem};
use super::{Config, Discovery};
use crate::io::net::Address;

/// A file that is made.
struct Made {
    /// The variable that names it.
    variable: String,
    /// As it is written there.
    text: String,
    /// Where it is, with links followed, and what is written beside it.
    places: Vec<PathBuf>,
}

impl Config {
    /// Looks for files that are the same by different paths. Equal ones of the same kind are found
    /// when the configuration is read.
    ///
    /// # Errors
    /// There are such; all of them.
    pub fn check_files(&self) -> Result<(), ConfigErrors> {
        let files = self.files();
        let mut problems = Vec::new();
        for (at, file) in files.iter().enumerate() {
            let is_same = |other: &&Made| other.places.iter().any(|at| file.places.contains(at));
            let Some(other) = files[..at].iter().find(is_same) else { continue };
            let pair = |made: &Made| (made.variable.clone(), made.text.clone());
            let why = "both are the same file. Set another one for each".to_owned();
            problems.push(Problem::Conflict { route: None, pairs: [pair(other), pair(file)], why });
        }
        if problems.is_empty() { Ok(()) } else { Err(ConfigErrors(problems)) }
    }

    fn files(&self) -> Vec<Made> {
        let socket = |variable: String, path: &Path| Made {
            variable,
            text: format!("unix:{}", path.display()),
            places: places(path),
        };
        let control = self.control.as_ref().and_then(Address::path);
        let control = control.map(|path| socket("AEGIS_CONTROL".to_owned(), path));
        let mut files: Vec<_> = control.into_iter().collect();
        for (at, route) in self.routes.iter().enumerate() {
            for path in route.listen.iter().filter_map(Address::path) {
                files.push(socket(self.name_to_set("AEGIS_LISTEN", at), path));
            }
            let keeps = route.discovery == Discovery::Kubernetes;
            if let Some(path) = route.kube.snapshot.as_deref().filter(|_| keeps) {
                let mut all = places(path);
                all.push(in_its_folder(&in_making(path)));
                files.push(Made {
                    variable: self.name_to_set("AEGIS_KUBE_SNAPSHOT", at),
                    text: path.display().to_string(),
                    places: all,
                });
            }
        }
        files
    }
}

/// Where a file of endpoints is written before it takes its place.
pub(crate) fn in_making(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

/// The file itself, and what it leads to where it is a link.
fn places(path: &Path) -> Vec<PathBuf> {
    let itself = in_its_folder(path);
    let target = fs::canonicalize(path).ok().filter(|target| *target != itself);
    [itself].into_iter().chain(target).collect()
}

/// The path by its folder's own name. One that cannot be looked at stays what it is.
fn in_its_folder(path: &Path) -> PathBuf {
    let folder = path.parent().filter(|folder| *folder != OsStr::new("")).unwrap_or(Path::new("."));
    match (fs::canonicalize(folder), path.file_name()) {
        (Ok(folder), Some(name)) => folder.join(name),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn owned(vars: &[(&str, &str)]) -> Vec<(String, String)> {
        vars.iter().map(|&(name, text)| (name.to_owned(), text.to_owned())).collect()
    }

    fn problems(vars: &[(&str, &str)]) -> Vec<String> {
        let checked = Config::from_vars(owned(vars)).unwrap().check_files();
        checked.map_or_else(|e| e.problems().iter().map(ToString::to_string).collect(), |()| vec![])
    }

    /// Of two routes by Kubernetes.
    fn problems_of_two(vars: [(&str, &str); 2]) -> Vec<String> {
        let listen =
            ["AEGIS_A__LISTEN", "AEGIS_B__LISTEN"].into_iter().zip(["127.0.0.1:1", "127.0.0.1:2"]);
        let listen = listen.filter(|(name, _)| vars.iter().all(|(set, _)| set != name));
        let all = [("AEGIS_ROUTES", "a,b"), ("AEGIS_KUBE_SERVICE", "db")].into_iter().chain(listen);
        problems(&all.chain(vars).collect::<Vec<_>>())
    }

    #[test]
    fn two_names_of_one_file_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_str().unwrap();
        std::fs::create_dir(format!("{root}/s")).unwrap();
        symlink("s", format!("{root}/link")).unwrap();
        std::fs::write(format!("{root}/s/x"), "").unwrap();
        symlink("x", format!("{root}/s/other")).unwrap();
        let at = |path: &str| format!("{root}/{path}");
        let (a, b) = ("AEGIS_A__KUBE_SNAPSHOT", "AEGIS_B__KUBE_SNAPSHOT");
        for (one, other) in [
            ("s/x", "s/../s/x"),
            ("s/x", "link/x"),
            ("s/new", "link/new"),
            ("s/x", "s/other"),
            ("s/x", "s/x.new"),
        ] {
            assert_eq!(
                problems_of_two([(a, &at(one)), (b, &at(other))]),
                [format!(
                    "{a}={:?} and {b}={:?}: both are the same file. Set another one for each.",
                    at(one),
                    at(other)
                )]
            );
        }
        assert_eq!(problems_of_two([(a, &at("s/x")), (b, &at("s/y"))]), [""; 0]);
        assert_eq!(problems_of_two([(a, &at("gone/x")), (b, &at("gone/y"))]), [""; 0]);

        let listen = |path: &str| format!("unix:{}", at(path));
        let (a, b) = ("AEGIS_A__LISTEN", "AEGIS_B__LISTEN");
        for vars in [
            [(a, &*listen("s/db")), (b, &listen("link/db"))],
            [(a, &listen("s/db")), ("AEGIS_A__KUBE_SNAPSHOT", &at("s/db"))],
            [(a, &listen("s/db")), ("AEGIS_B__KUBE_SNAPSHOT", &at("link/db"))],
            [(a, &format!("{},{}", listen("s/db"), listen("link/db"))), (b, "127.0.0.1:3")],
            [(a, &listen("s/db")), ("AEGIS_CONTROL", &listen("link/db"))],
            [("AEGIS_A__KUBE_SNAPSHOT", &at("s/db")), ("AEGIS_CONTROL", &listen("s/db"))],
        ] {
            let found = problems_of_two(vars);
            let [problem] = &found[..] else { panic!("{vars:?}: {found:?}") };
            assert!(problem.contains("both are the same file"), "{problem}");
        }
        let apart = [(a, &*listen("s/db")), ("AEGIS_A__KUBE_SNAPSHOT", &at("s/db.json"))];
        assert_eq!(problems_of_two(apart), [""; 0]);
    }

    #[test]
    fn all_are_told_at_once_by_plain_names_where_there_is_one_route() {
        let found = problems(&[
            ("AEGIS_LISTEN", "unix:/tmp/x,unix:/tmp/../tmp/x"),
            ("AEGIS_KUBE_SERVICE", "db"),
            ("AEGIS_KUBE_SNAPSHOT", "/tmp/./x"),
        ]);
        let same = "both are the same file. Set another one for each.";
        assert_eq!(
            found,
            [
                format!(
                    "AEGIS_LISTEN=\"unix:/tmp/x\" and AEGIS_LISTEN=\"unix:/tmp/../tmp/x\": {same}"
                ),
                format!(
                    "AEGIS_LISTEN=\"unix:/tmp/x\" and AEGIS_KUBE_SNAPSHOT=\"/tmp/./x\": {same}"
                ),
            ]
        );
    }
}
