//! Hosts that deny `io_uring`, as container runtimes do: with a seccomp filter.

use std::time::{Duration, Instant};

use crate::support::backend::Backend;
use crate::support::client::{connect, expect_echo};
use crate::support::metrics::IO_DRIVER;
use crate::support::proxy::{Builder, Proxy};
use crate::support::sandbox::can_drop_privileges;
use crate::support::{Io, skip, uring_unavailable};

const SETUP: i64 = libc::SYS_io_uring_setup;
const ENTER: i64 = libc::SYS_io_uring_enter;
const REGISTER: i64 = libc::SYS_io_uring_register;
/// `IORING_REGISTER_RESTRICTIONS` and `IORING_REGISTER_ENABLE_RINGS`, arguments of the last.
const RESTRICT_AND_ENABLE: [u64; 2] = [11, 12];

fn echoes(proxy: &Proxy) {
    expect_echo(&connect(proxy.address()), 0, 1 << 20).unwrap();
}

#[test]
fn auto_runs_on_epoll_and_says_so_where_setup_is_denied() {
    for errno in [libc::EPERM, libc::ENOSYS] {
        let backend = Backend::echo();
        let proxy = Builder::on(Io::Auto).backends(&[backend.address()]).deny(SETUP, errno).start();
        assert_eq!(proxy.log_field("io driver", "driver"), "epoll");
        let reason = proxy.log_field("io driver", "reason");
        assert!(names_errno(&reason, errno), "errno {errno}: {reason}");
        assert_eq!(proxy.metric(IO_DRIVER, &[("driver", "epoll")]), 1);
        echoes(&proxy);
    }
}

#[test]
fn auto_works_where_any_part_of_io_uring_is_denied() {
    for syscall in [ENTER, REGISTER] {
        for errno in [libc::EPERM, libc::ENOSYS] {
            let backend = Backend::echo();
            let proxy =
                Builder::on(Io::Auto).backends(&[backend.address()]).deny(syscall, errno).start();
            echoes(&proxy);
        }
    }
}

/// The kernel charges rings to a user's locked memory, which many sidecars of a node share: there may be
/// enough for the probe and for the first worker, and not for the next.
#[test]
fn auto_runs_on_epoll_where_there_is_no_memory_for_every_ring() {
    if !can_drop_privileges() {
        return skip("rings are not charged to whoever has all privileges");
    }
    for kib in [64, 256] {
        let backend = Backend::echo();
        let proxy =
            Builder::on(Io::Auto).backends(&[backend.address()]).memory_locked_max(kib).start();
        if proxy.log_field("io driver", "driver") == "io_uring" {
            return skip("this kernel does not charge rings");
        }
        let reason = proxy.log_field("io driver", "reason");
        assert!(reason.contains("RLIMIT_MEMLOCK"), "{kib} KiB: {reason}");
        assert_eq!(proxy.metric(IO_DRIVER, &[("driver", "epoll")]), 1);
        echoes(&proxy);
    }
    let ended =
        Builder::on(Io::Uring).set("AEGIS_BACKENDS", "127.0.0.2:9").memory_locked_max(64).run();
    assert_eq!(ended.code, Some(1), "there may be memory at the next start: {ended:?}");
    assert!(ended.errors.contains("RLIMIT_MEMLOCK"), "{}", ended.errors);
}

#[test]
fn uring_by_name_fails_with_the_reason_where_it_is_denied() {
    for errno in [libc::EPERM, libc::ENOSYS] {
        let ended =
            Builder::on(Io::Uring).set("AEGIS_BACKENDS", "127.0.0.2:9").deny(SETUP, errno).run();
        assert_eq!(ended.code, Some(78), "a configuration that cannot work: {ended:?}");
        assert!(ended.errors.contains("io_uring"), "{}", ended.errors);
        assert!(names_errno(&ended.errors, errno), "errno {errno}: {}", ended.errors);
    }
}

#[test]
fn no_port_and_no_internet_socket_is_needed_to_try_io_uring() {
    if let Some(why) = uring_unavailable() {
        return skip(&format!("io_uring does not work on this host: {why}"));
    }
    // As where no local port is free for a moment, or the loopback interface is down.
    for family in [libc::AF_INET, libc::AF_INET6] {
        let ended = Builder::bare()
            .set("AEGIS_BACKENDS", "127.0.0.2:9")
            .argument("check")
            .deny_where(libc::SYS_socket, libc::EADDRNOTAVAIL, (0, family as u64))
            .run();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert!(ended.output.contains("driver: io_uring ("), "{}", ended.output);
    }
}

#[test]
fn auto_waits_for_descriptors_a_moment_and_then_says_what_it_lacked() {
    if let Some(why) = uring_unavailable() {
        return skip(&format!("io_uring does not work on this host: {why}"));
    }
    let begun = Instant::now();
    let ended = Builder::bare()
        .set("AEGIS_BACKENDS", "127.0.0.2:9")
        .argument("check")
        .deny_where(libc::SYS_socket, libc::ENFILE, (0, libc::AF_UNIX as u64))
        .run();
    let took = begun.elapsed();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.output.contains("Too many open files in system"), "{}", ended.output);
    assert!(took >= Duration::from_secs(1), "it gave up after {took:?}");
    assert!(took < Duration::from_secs(5), "it went on for {took:?}");
}

#[test]
fn auto_runs_on_io_uring_where_it_works() {
    if let Some(why) = uring_unavailable() {
        return skip(&format!("io_uring does not work on this host: {why}"));
    }
    let backend = Backend::echo();
    let proxy = Builder::on(Io::Auto).backends(&[backend.address()]).start();
    assert_eq!(proxy.log_field("io driver", "driver"), "io_uring");
    assert_eq!(proxy.metric(IO_DRIVER, &[("driver", "io_uring")]), 1);
    let reason = proxy.log_field("io driver", "reason");
    assert!(!reason.contains("restrictions"), "its rings are restricted: {reason}");
    echoes(&proxy);
}

/// A filter may know only those ways of registering that are usual.
#[test]
fn rings_that_cannot_be_restricted_serve_and_it_is_said() {
    if let Some(why) = uring_unavailable() {
        return skip(&format!("io_uring does not work on this host: {why}"));
    }
    for operation in RESTRICT_AND_ENABLE {
        let backend = Backend::echo();
        let proxy = Builder::on(Io::Auto)
            .backends(&[backend.address()])
            .deny_where(REGISTER, libc::EPERM, (1, operation))
            .start();
        assert_eq!(proxy.log_field("io driver", "driver"), "io_uring");
        let reason = proxy.log_field("io driver", "reason");
        assert!(reason.contains("without restrictions of its rings"), "{reason}");
        echoes(&proxy);
    }
}

/// Whether the text has the error's name or the system's words for it.
fn names_errno(text: &str, errno: i32) -> bool {
    let (name, words) = match errno {
        libc::EPERM => ("EPERM", "operation not permitted"),
        _ => ("ENOSYS", "function not implemented"),
    };
    text.contains(name) || text.to_lowercase().contains(words)
}
