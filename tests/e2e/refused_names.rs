//! Names in Kubernetes that cannot be: the charts refuse them, and so does the program by itself.

use crate::support::proxy::Builder;

/// Bad configuration, after `EX_CONFIG` of `sysexits.h`.
const EXIT_CONFIG: i32 = 78;

#[test]
fn services_that_cannot_be_are_refused_by_name() {
    let long = "a".repeat(200);
    let label_and_one = "a".repeat(64);
    for name in [
        "UPPER",
        "a,b",
        "../../x",
        &long,
        &label_and_one,
        "$(AEGIS_ADMIN)",
        "none",
        "",
        ".",
        "a.",
        ".a",
        "-a",
        "a-",
        "a b",
        "é",
    ] {
        let ended = Builder::bare()
            .set("AEGIS_DISCOVERY", "kubernetes")
            .set("AEGIS_KUBE_SERVICE", name)
            .argument("check")
            .run();
        assert_eq!(ended.code, Some(EXIT_CONFIG), "{name:?}");
        assert!(
            ended.errors.contains(&format!("AEGIS_KUBE_SERVICE={name:?}")),
            "{name:?}: {}",
            ended.errors
        );
    }
}

#[test]
fn namespaces_and_ports_that_cannot_be_are_refused_by_name() {
    for (variable, values) in [
        ("AEGIS_KUBE_NAMESPACE", ["DB", "a.b", "$(X)", "", "a b"]),
        ("AEGIS_KUBE_PORT", ["0", "65536", "-1", "A", "$(X)"]),
    ] {
        for value in values {
            let ended = Builder::bare()
                .set("AEGIS_KUBE_SERVICE", "db")
                .set(variable, value)
                .argument("check")
                .run();
            assert_eq!(ended.code, Some(EXIT_CONFIG), "{variable}={value:?}");
            assert!(
                ended.errors.contains(&format!("{variable}={value:?}")),
                "{variable}: {}",
                ended.errors
            );
        }
    }
}
