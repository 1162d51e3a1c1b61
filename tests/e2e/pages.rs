//! The pages that people read: what they name is there.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const README_WORDS_MAX: usize = 1000;

#[test]
fn readme_is_short() {
    let words = fs::read_to_string(root().join("README.md")).unwrap().split_whitespace().count();
    assert!(words < README_WORDS_MAX, "{words} words: move what is not for a first look to docs/");
}

#[test]
fn every_link_leads_to_a_file_and_a_heading() {
    for (page, text) in pages() {
        for link in between(&text, "](", ")").filter(|link| !link.contains("://")) {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => page.clone(),
                file => page.parent().unwrap().join(file),
            };
            assert!(target.exists(), "{}: {link}: no such file", page.display());
            if !heading.is_empty() {
                let headings = headings(&fs::read_to_string(&target).unwrap());
                assert!(
                    headings.iter().any(|h| h == heading),
                    "{}: {link}: {headings:?}",
                    page.display()
                );
            }
        }
    }
}

#[test]
fn every_page_of_docs_is_listed_in_the_readme() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    for page in pages().into_keys().filter(|page| *page != root().join("README.md")) {
        let path = page.strip_prefix(root()).unwrap().display().to_string();
        assert!(readme.contains(&format!("]({path})")), "README.md does not lead to {path}");
    }
}

#[test]
fn every_path_of_the_repository_that_a_page_names_exists() {
    const FOLDERS: &[&str] =
        &["src/", "tests/", "benches/", "examples/", "helm/", "manifests/", "docs/"];
    for (page, text) in pages() {
        let paths = between(&text, "`", "`")
            .filter(|name| FOLDERS.iter().any(|folder| name.starts_with(folder)))
            .filter(|name| !name.contains(char::is_whitespace));
        for path in paths {
            // A module is named without its ending.
            let exists =
                [path, &format!("{path}.rs")].iter().any(|path| root().join(path).exists());
            assert!(exists, "{}: {path} does not exist", page.display());
        }
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The text of each page, by its path.
fn pages() -> BTreeMap<PathBuf, String> {
    let folders = [root().to_owned(), root().join("docs")];
    let files = folders.iter().flat_map(|folder| fs::read_dir(folder).unwrap());
    let paths = files.map(|entry| entry.unwrap().path());
    let pages = paths.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    pages.map(|path| (path.clone(), fs::read_to_string(path).unwrap())).collect()
}

/// What stands between `open` and the next `close` on the same line, outside of blocks of code.
fn between<'a>(text: &'a str, open: &'a str, close: &'a str) -> impl Iterator<Item = &'a str> {
    let prose = text.split("```").step_by(2).flat_map(str::lines);
    prose.flat_map(move |line| {
        let mut rest = line;
        std::iter::from_fn(move || {
            let (_, from) = rest.split_once(open)?;
            let (found, after) = from.split_once(close)?;
            rest = after;
            Some(found)
        })
    })
}

/// The names by which a page's headings can be linked to, as GitHub makes them.
fn headings(text: &str) -> Vec<String> {
    let lines = text.lines().filter(|line| line.starts_with('#'));
    let titles = lines.map(|line| line.trim_start_matches('#').trim().to_lowercase());
    let named = |c: char| c.is_alphanumeric() || "-_ ".contains(c);
    titles
        .map(|title| title.chars().filter(|&c| named(c)).collect::<String>().replace(' ', "-"))
        .collect()
}
