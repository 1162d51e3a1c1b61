//! The parts of the bench that decide: frames, ratios, accounting.
#![allow(dead_code, missing_docs)]

#[path = "../benches/compare/frame.rs"]
mod frame;
#[path = "../benches/compare/stats.rs"]
mod stats;
#[path = "../benches/compare/usage.rs"]
mod usage;

use std::io::{self, Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use frame::{FRAME_MAX, Frame, HEADER, Incoming, Outgoing};
use stats::{Metric, Run, Summary, paired};
use usage::Processes;

/// Takes a few bytes a call.
struct Narrow(Vec<u8>, usize);

impl Write for Narrow {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let some = bytes.len().min(self.1);
        self.0.extend_from_slice(&bytes[..some]);
        Ok(some)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn encoded(frame: Frame, step: usize) -> Vec<u8> {
    let mut stream = Narrow(Vec::new(), step);
    assert!(Outgoing::new(frame).write(&mut stream).unwrap());
    stream.0
}

const FRAMES: [Frame; 3] = [
    Frame { id: 7, len: 34, reply: 0 },
    Frame { id: u64::MAX, len: 64, reply: 128 },
    Frame { id: 1 << 40, len: FRAME_MAX as u32, reply: 34 },
];

#[test]
fn frames_come_out_as_they_went_in_however_they_are_cut() {
    for step in [1, 15, 17, 4096, usize::MAX] {
        let bytes: Vec<u8> = FRAMES.iter().flat_map(|frame| encoded(*frame, step)).collect();
        let (mut incoming, mut seen) = (Incoming::default(), Vec::new());
        for mut chunk in bytes.chunks(step.min(bytes.len())) {
            while !chunk.is_empty() {
                seen.extend(incoming.read(&mut chunk).unwrap());
            }
        }
        assert_eq!(seen, FRAMES, "in steps of {step}");
    }
}

#[test]
fn each_wrong_byte_is_noticed() {
    let right = encoded(FRAMES[1], usize::MAX);
    for at in 0..right.len() {
        let mut wrong = right.clone();
        wrong[at] ^= 1;
        let seen = Incoming::default().read(&mut &wrong[..]);
        // A header may be wrong and possible: then it is another frame, or not complete.
        assert_ne!(seen, Ok(Some(FRAMES[1])), "byte {at}");
        assert!(seen.is_err() || at < HEADER, "byte {at}: {seen:?}");
    }
}

fn runs(metric: Metric, values: &[f64]) -> Vec<Run> {
    let run = |value: &f64| match metric {
        Metric::Throughput => Run { throughput: Some(*value), ..Run::default() },
        _ => Run { p99: Some(*value), ..Run::default() },
    };
    values.iter().map(run).collect()
}

#[test]
fn medians_are_in_the_middle() {
    assert_eq!(Summary::of([]), None);
    let of = |values: &[f64]| Summary::of(values.iter().copied()).unwrap();
    assert_eq!(of(&[3.0]), Summary { median: 3.0, min: 3.0, max: 3.0 });
    assert_eq!(of(&[9.0, 1.0, 2.0]), Summary { median: 2.0, min: 1.0, max: 9.0 });
    assert_eq!(of(&[4.0, 1.0, 2.0, 9.0]), Summary { median: 3.0, min: 1.0, max: 9.0 });
}

#[test]
fn the_better_peer_is_the_one_that_is_harder_to_beat() {
    let own = runs(Metric::P99, &[10.0, 20.0, 30.0]);
    let one = runs(Metric::P99, &[20.0, 10.0, 30.0]);
    let two = runs(Metric::P99, &[40.0, 40.0, 15.0]);
    let harder = Some(Summary { median: 1.0, min: 0.5, max: 2.0 });
    assert_eq!(paired(Metric::P99, &own, &[&one, &two]), harder);
    assert_eq!(paired(Metric::P99, &own, &[&two, &one]), harder);
}

#[test]
fn noise_alone_makes_nobody_worse_than_its_equals() {
    let own = runs(Metric::P99, &[10.0, 10.0, 9.0, 11.0, 10.0]);
    let one = runs(Metric::P99, &[9.0, 11.0, 10.0, 10.0, 10.0]);
    let two = runs(Metric::P99, &[11.0, 9.0, 10.0, 10.0, 10.0]);
    let median = paired(Metric::P99, &own, &[&one, &two]).unwrap().median;
    assert!((median - 1.0).abs() < 1e-9, "{median}");
}

#[test]
fn of_throughputs_the_higher_is_the_better() {
    let own = runs(Metric::Throughput, &[30.0]);
    let (one, two) = (runs(Metric::Throughput, &[20.0]), runs(Metric::Throughput, &[15.0]));
    let summary = paired(Metric::Throughput, &own, &[&one, &two]).unwrap();
    assert_eq!(summary, Summary { median: 1.5, min: 1.5, max: 1.5 });
    assert!(Metric::Throughput.meets(1.5, 1.3) && !Metric::Throughput.meets(1.2, 1.3));
    assert!(Metric::P99.meets(0.8, 0.8) && !Metric::P99.meets(0.9, 0.8));
}

#[test]
fn rounds_with_a_value_missing_do_not_count() {
    let own = runs(Metric::P99, &[10.0, 20.0]);
    let other = runs(Metric::P99, &[20.0]);
    let half = Summary { median: 0.5, min: 0.5, max: 0.5 };
    assert_eq!(paired(Metric::P99, &own, &[&other]), Some(half));
    assert_eq!(paired(Metric::P99, &own, &[]), None);
    assert_eq!(paired(Metric::Cpu, &own, &[&other]), None);
}

/// Of a process of its own: of this one, the threads of other tests begin and end meanwhile.
#[test]
fn work_shows_and_so_does_memory() {
    let mut child =
        Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let processes = Processes(vec![child.id()]);
    let (mut to, mut from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let before = processes.usage();
    for _ in 0..1000 {
        to.write_all(b"x").unwrap();
        from.read_exact(&mut [0]).unwrap();
    }
    // It goes to sleep now, if it never had to before.
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut used = processes.usage() - before;
    while used.switches == 0 && Instant::now() < deadline {
        used = processes.usage() - before;
    }
    assert!(used.switches > 0 && used.cpu_ns > 100_000, "{used:?}");
    assert!(processes.memory() > 10_000);
    drop(to);
    child.wait().unwrap();
}

#[test]
fn children_belong_to_it() {
    let mut child = Command::new("sleep").arg("60").spawn().unwrap();
    let all = Processes::of(std::process::id());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(all.0.contains(&child.id()), "{all:?}");
}
