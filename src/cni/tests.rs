//! Whole calls without a kernel: what is printed for which input.

use super::*;

fn call(verb: Verb) -> Call {
    Call {
        verb,
        interface: "eth0".into(),
        namespace: Some("/no/such/netns".into()),
        namespace_may_be_ours: false,
    }
}

/// Code and message of the error object.
fn refusal(verb: Verb, input: &str) -> (u64, String) {
    let failure = run(Ok(call(verb)), input.as_bytes()).expect_err(input);
    let object: Value = serde_json::from_str(&failure.object()).expect("an error is JSON");
    assert!(object["cniVersion"].is_string(), "{object}");
    (object["code"].as_u64().expect("a code"), object["msg"].as_str().expect("a message").to_owned())
}

#[test]
fn version_needs_no_input() {
    let answer = run(Ok(call(Verb::Version)), io::empty()).unwrap().unwrap();
    assert_eq!(answer["supportedVersions"], json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
}

#[test]
fn bad_input_is_answered_with_an_error_object() {
    let dir = tempfile::tempdir().unwrap();
    let with = |version: &str, more: &str| {
        let run_dir = dir.path().display();
        format!(r#"{{"cniVersion":"{version}","name":"n","type":"warren-cni","runDir":"{run_dir}"{more}}}"#)
    };
    let previous = r#","prevResult":{"interfaces":[{"name":"eth0","sandbox":"/x"}]}"#;
    for (verb, input, code, word) in [
        (Verb::Add, String::new(), 6, "JSON"),
        (Verb::Del, "{\"cniVersion\":".to_owned(), 6, "JSON"),
        (Verb::Add, " ".repeat(2 << 20), 6, "more than"),
        (Verb::Add, with("1.2.0", ""), 1, "1.2.0"),
        (Verb::Add, with("1.0.0", ""), 7, "prevResult"),
        (Verb::Check, with("1.0.0", ""), 7, "prevResult"),
        (Verb::Check, with("0.3.1", previous), 1, "CHECK"),
        (Verb::Gc, with("1.0.0", ""), 1, "GC"),
        (Verb::Status, with("1.0.0", ""), 1, "STATUS"),
        (Verb::Add, with("1.0.0", r#","prevResult":{}"#), 7, "no interface eth0"),
        (Verb::Add, with("1.0.0", previous), 4, "CNI_NETNS"),
        (Verb::Check, with("1.1.0", previous), 4, "CNI_NETNS"),
        (Verb::Status, with("1.1.0", ""), 50, "not ready"),
    ] {
        let (found, message) = refusal(verb, &input);
        assert_eq!(found, code, "{message}");
        assert!(message.contains(word), "{message}");
    }
}

#[test]
fn nothing_of_ours_is_ever_left_to_remove() {
    for (verb, version) in [(Verb::Del, "0.3.0"), (Verb::Del, "1.1.0"), (Verb::Gc, "1.1.0")] {
        let input = format!(r#"{{"cniVersion":"{version}","name":"n","cni.dev/valid-attachments":[]}}"#);
        assert_eq!(run(Ok(call(verb)), input.as_bytes()).expect("done"), None);
        // Whatever else is wrong: ADD and CHECK refuse it, and a pod can go.
        let many = vec![json!({ "name": "x" }); 65];
        for (key, value) in [
            ("prevResult", json!(7)),
            ("prevResult", json!({ "interfaces": many, "cniVersion": "9.0.0" })),
            ("runDir", json!("run")),
            ("runDir", json!(7)),
        ] {
            let mut input: Value = serde_json::from_str(&input).expect("JSON");
            input[key] = value;
            assert_eq!(run(Ok(call(verb)), input.to_string().as_bytes()).expect("done"), None, "{input}");
            input["cniVersion"] = "1.1.0".into();
            for other in [Verb::Add, Verb::Check, Verb::Status] {
                refusal(other, &input.to_string());
            }
        }
    }
}

#[test]
fn the_nodes_own_namespace_is_never_touched() {
    let own = Call { namespace: Some("/proc/self/ns/net".into()), ..call(Verb::Add) };
    let input =
        r#"{"cniVersion":"1.0.0","name":"n","prevResult":{"interfaces":[{"name":"eth0","sandbox":"/x"}]}}"#;
    let failure = run(Ok(own), input.as_bytes()).expect_err("refused");
    assert_eq!(failure.error.code, Code::InvalidEnvironment);
    assert!(failure.error.message.contains("own network namespace"));
    for (path, word) in [("/dev/null", "no network namespace"), ("/etc/hosts", "no network namespace")] {
        let other = Call { namespace: Some(path.into()), ..call(Verb::Add) };
        let failure = run(Ok(other), input.as_bytes()).expect_err("refused");
        assert!(failure.error.message.contains(word), "{}", failure.error);
    }
}

#[test]
fn status_follows_the_agent() {
    let dir = tempfile::tempdir().unwrap();
    let input = format!(r#"{{"cniVersion":"1.1.0","name":"n","runDir":"{}"}}"#, dir.path().display());
    data_path::DataPath::now("a", "warren0", 1420, &[]).write(dir.path()).unwrap();
    assert_eq!(run(Ok(call(Verb::Status)), input.as_bytes()).expect("alive"), None);
    let text = std::fs::read_to_string(data_path::path(dir.path())).unwrap();
    let mut value: Value = serde_json::from_str(&text).unwrap();
    let now = value["alive_ms"].as_u64().unwrap();
    // On a machine that was started a moment ago there is no such past.
    if let Some(then) = now.checked_sub(31_000) {
        value["alive_ms"] = then.into();
        std::fs::write(data_path::path(dir.path()), value.to_string()).unwrap();
        assert_eq!(refusal(Verb::Status, &input).0, 51);
    }
    value["boot"] = "another".into();
    std::fs::write(data_path::path(dir.path()), value.to_string()).unwrap();
    assert_eq!(refusal(Verb::Status, &input).0, 50);
}
