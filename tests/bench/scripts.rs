//! What the scripts of `bench/` call, seen by programs that stand in for those that build and measure.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

/// A tree with some scripts of this one, and stand-ins for others.
pub(crate) struct Tree(TempDir);

impl Tree {
    pub(crate) fn of(scripts: &[&str], stand_ins: &[(&str, &str)]) -> Tree {
        let tree = Tree(tempfile::tempdir().expect("a folder"));
        for script in scripts {
            let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(script));
            tree.put(script, &text.unwrap_or_else(|e| panic!("{script}: {e}")));
        }
        for (name, body) in stand_ins {
            tree.put(name, &format!("#!/usr/bin/env bash\n{body}\n"));
        }
        tree
    }

    fn put(&self, name: &str, text: &str) {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("make a folder");
        fs::write(&path, text).expect("write a script");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make it a program");
    }

    /// What lies in `bin` comes before other programs.
    pub(crate) fn run(&self, command: &str, variables: &[(&str, &str)]) -> Output {
        let path = format!("{}/bin:{}", self.0.path().display(), std::env::var("PATH").unwrap_or_default());
        let mut shell = Command::new("bash");
        shell.args(["-c", command]).current_dir(self.0.path()).env("PATH", path);
        shell.env_remove("WARREN").env_remove("BENCH_BUILD").env_remove("CARGO_TARGET_DIR");
        shell.envs(variables.iter().copied()).output().expect("bash")
    }

    /// What the stand-ins have written down.
    fn calls(&self) -> String {
        fs::read_to_string(self.0.path().join("calls")).unwrap_or_default()
    }
}

/// Writes down what is called, with which Warren.
const CARGO: &str = r#"echo "${WARREN:-}|${BENCH_BUILD:-}|cargo $*" >>calls; [[ $1 != bench ]] || echo "[]""#;
const BUILD_STATIC: &str = r#"echo "build-static" >>calls; echo /somewhere/dist/warren"#;

fn measuring(command: &str, variables: &[(&str, &str)]) -> (String, String) {
    let tree = Tree::of(
        &["bench/run", "bench/kube-proxy", "bench/shipped"],
        &[
            ("bin/cargo", CARGO),
            ("deploy/build-static", BUILD_STATIC),
            ("tests/peers.sh", "echo peers >>calls"),
        ],
    );
    let output = tree.run(command, variables);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command}: {said}");
    (tree.calls(), said)
}

#[test]
fn what_is_measured_is_what_is_shipped() {
    for (command, measures) in [
        ("bench/run --no-services --rounds 2", "test --quiet --bench side_by_side -- --rounds 2"),
        ("bench/kube-proxy connections", "test --quiet --bench kube_proxy -- connections"),
    ] {
        let (calls, said) = measuring(command, &[]);
        assert_eq!(calls.matches("build-static\n").count(), 1, "{command}: {calls}");
        let line = format!("/somewhere/dist/warren|deploy/build-static|cargo {measures}\n");
        assert!(calls.contains(&line), "{command}: {calls}");
        assert!(!calls.contains("cargo bench"), "a release that nobody ships: {calls}");
        assert!(said.contains("building Warren as it is shipped"), "{command}: {said}");
    }
}

#[test]
fn what_is_given_is_measured_and_said_without_its_folders() {
    for command in ["bench/run --no-services", "bench/kube-proxy throughput"] {
        let (calls, _) = measuring(command, &[("WARREN", "/of/mine/warren-2")]);
        assert!(!calls.contains("build-static"), "{command}: {calls}");
        assert!(calls.contains("/of/mine/warren-2|WARREN=warren-2|cargo test "), "{command}: {calls}");
    }
    let (calls, _) = measuring("cd bench; ./run --no-services", &[("WARREN", "mine/warren")]);
    let line = calls.lines().find(|line| line.contains("side_by_side")).unwrap_or_default();
    assert!(line.contains("/bench/mine/warren|WARREN=warren|"), "as seen from where it was given: {calls}");
}

#[test]
fn the_services_of_a_run_are_of_the_same_build() {
    let (calls, _) = measuring("bench/run --services --only bare --rounds 1 || true", &[]);
    assert_eq!(calls.matches("build-static\n").count(), 1, "{calls}");
    let line =
        "/somewhere/dist/warren|deploy/build-static|cargo test --quiet --bench kube_proxy -- connections";
    assert!(calls.contains(line), "{calls}");
}

#[test]
fn what_a_shell_happens_to_say_of_a_build_is_not_believed() {
    let said = |command, variables: &[(&str, &str)]| {
        let mut all = vec![("BENCH_BUILD", "deploy/build-static"), ("is_shipped", "yes")];
        all.extend(variables);
        measuring(command, &all).0
    };
    for command in ["bench/run --services --rounds 1", "bench/kube-proxy connections"] {
        let calls = said(command, &[("WARREN", "/of/mine/warren-2")]);
        assert!(calls.contains("/of/mine/warren-2|WARREN=warren-2|cargo test "), "{command}: {calls}");
        assert!(!calls.contains("build-static|cargo test "), "{command}: {calls}");
    }
    let calls = measuring("bench/kube-proxy connections", &[("BENCH_BUILD", "WARREN=mine")]).0;
    assert!(calls.contains("|deploy/build-static|cargo test ") && !calls.contains("mine"), "{calls}");
}

#[test]
fn no_agent_is_built_where_none_is_measured() {
    for figure in ["changes", "instructions", "rules"] {
        let (calls, said) = measuring(&format!("bench/kube-proxy {figure} --note x"), &[]);
        assert!(calls.contains("|cargo bench --quiet --bench services -- "), "{figure}: {calls}");
        assert!(calls.contains(&format!("||cargo test --quiet --bench kube_proxy -- {figure} ")), "{calls}");
        assert!(!calls.contains("build-static") && !said.contains("shipped"), "{figure}: {calls}{said}");
    }
}

#[test]
fn pages_are_made_without_building_what_is_measured() {
    let (calls, _) = measuring("bench/run --render bench/results/some.json", &[]);
    assert_eq!(calls, "||cargo test --quiet --bench side_by_side -- --render bench/results/some.json\n");
}
