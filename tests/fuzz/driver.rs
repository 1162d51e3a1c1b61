//! Edits inputs of a corpus for a bounded time and shrinks the one that fails.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use fastrand::Rng;

/// Checks one input; the generator decides where to split it. It panics if something is wrong.
pub type Check = fn(&[u8], &mut Rng);

const FIXED_SEED: u64 = 7;
const SECONDS: f64 = 5.0;

/// Runs half the time with a fixed seed and half with a random one.
pub fn run(corpus: &str, dictionary: &[&[u8]], check: Check) {
    let seconds = std::env::var("AEGIS_FUZZ")
        .map_or(SECONDS, |value| value.parse().expect("AEGIS_FUZZ is a number of seconds"));
    let entries = read(corpus);
    for seed in [FIXED_SEED, fastrand::u64(..)] {
        let end = Instant::now() + Duration::from_secs_f64(seconds / 2.0);
        let mut random = Rng::with_seed(seed);
        let mut inputs = 0_u64;
        for entry in &entries {
            try_one(corpus, entry, check, seed, inputs, random.u64(..));
            inputs += 1;
        }
        while Instant::now() < end {
            let input = edited(&entries, dictionary, &mut random);
            try_one(corpus, &input, check, seed, inputs, random.u64(..));
            inputs += 1;
        }
        // Written past the capture of the test's output.
        writeln!(std::io::stderr(), "MEASURED: fuzz {corpus}: {inputs} inputs, seed {seed}")
            .expect("standard error takes a line");
    }
}

fn read(corpus: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(corpus);
    let mut paths: Vec<_> = std::fs::read_dir(&dir)
        .expect("the corpus is there")
        .map(|entry| entry.expect("the corpus can be listed").path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} is empty", dir.display());
    paths.iter().map(|path| std::fs::read(path).expect("an entry can be read")).collect()
}

fn edited(entries: &[Vec<u8>], dictionary: &[&[u8]], random: &mut Rng) -> Vec<u8> {
    let mut input = entries[random.usize(..entries.len())].clone();
    if random.u8(..4) == 0 {
        let other = &entries[random.usize(..entries.len())];
        input.truncate(random.usize(..=input.len()));
        input.extend_from_slice(&other[random.usize(..=other.len())..]);
    }
    for _ in 0..random.usize(..5) {
        let at = random.usize(..=input.len());
        let end = random.usize(at..=input.len().min(at + 8));
        match random.u8(..9) {
            0..4 => {
                let token = dictionary[random.usize(..dictionary.len())];
                input.splice(at..at, token.iter().copied());
            }
            4..6 => drop(input.drain(at..end)),
            6 => input.extend_from_within(at..end),
            7 if at < input.len() => input[at] = random.u8(..),
            _ => input.truncate(at.max(input.len() / 2)),
        }
    }
    input
}

fn fails(input: &[u8], check: Check, splits: u64) -> bool {
    catch_unwind(AssertUnwindSafe(|| check(input, &mut Rng::with_seed(splits)))).is_err()
}

fn try_one(corpus: &str, input: &[u8], check: Check, seed: u64, inputs: u64, splits: u64) {
    if !fails(input, check, splits) {
        return;
    }
    let mut small = input.to_vec();
    let mut at = 0;
    while at < small.len() {
        let mut smaller = small.clone();
        smaller.remove(at);
        if fails(&smaller, check, splits) { small = smaller } else { at += 1 }
    }
    panic!(
        "input {inputs} of seed {seed}, split by seed {splits}, fails: b\"{small}\"\n\
         To keep it, write these bytes to tests/fuzz/corpus/{corpus}/a-telling-name.",
        small = small.escape_ascii()
    );
}

/// The input in random pieces.
pub fn split<'a>(mut input: &'a [u8], random: &mut Rng) -> Vec<&'a [u8]> {
    let mut pieces = Vec::new();
    while !input.is_empty() {
        let (piece, rest) = input.split_at(random.usize(1..=input.len()));
        pieces.push(piece);
        input = rest;
    }
    pieces
}
