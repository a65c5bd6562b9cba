//! What a runtime may send that it should not: an error object each time, and nothing is touched.

use serde_json::json;

use super::runtime::{Runtime, mtu, refused};
use crate::lab::Lab;
use crate::lab::netns::Netns;

#[test]
fn every_bad_call_gets_an_error_object() {
    let lab = Lab::two();
    lab.write_nodes();
    let runtime = Runtime::new(&lab, &lab.nodes[0]);
    let agent = runtime.agent(&lab, &[]);
    runtime.configured();
    let pod = Netns::new("pod");
    let added = runtime.add(&pod);
    let good = runtime.input("1.1.0", &added.result);
    let text = good.to_string();
    let own = format!("/proc/{}/ns/net", runtime.node.ns.pid());
    let space = super::namespace(&pod);
    let huge = "x".repeat(3 << 20);
    let with_comment = json!({ "cniVersion": "1.1.0", "name": "n", "comment": huge }).to_string();
    let mut elsewhere = good.clone();
    elsewhere["prevResult"]["interfaces"] = json!([{ "name": "lo", "sandbox": space }]);
    elsewhere["prevResult"]["ips"] = json!([]);
    let mut old = good.clone();
    old["cniVersion"] = "0.2.0".into();
    let space = ("CNI_NETNS", space.as_str());
    for (verb, environment, input, code) in [
        ("ADD", &[space][..], &text[..text.len() / 2], 6),
        ("ADD", &[space], "", 6),
        ("ADD", &[space], &with_comment, 6),
        ("ADD", &[space], &old.to_string(), 1),
        ("ADD", &[space], r#"{"cniVersion":"1.1.0","name":"n"}"#, 7),
        ("ADD", &[space, ("CNI_IFNAME", "lo")], &elsewhere.to_string(), 7),
        ("ADD", &[space, ("CNI_IFNAME", "eth1")], &text, 7),
        ("ADD", &[space, ("CNI_IFNAME", "../../x")], &text, 4),
        ("ADD", &[space, ("CNI_IFNAME", "averyveryverylongname")], &text, 4),
        ("ADD", &[space, ("CNI_CONTAINERID", "../../etc/passwd")], &text, 4),
        ("ADD", &[space, ("CNI_CONTAINERID", "")], &text, 4),
        ("ADD", &[("CNI_NETNS", "/no/such/namespace")], &text, 4),
        ("ADD", &[("CNI_NETNS", "/etc/hostname")], &text, 4),
        ("ADD", &[("CNI_NETNS", &own)], &text, 4),
        ("ADD", &[], &text, 4),
        ("FROB", &[space], &text, 4),
        ("CHECK", &[], &text, 4),
        ("DEL", &[("CNI_CONTAINERID", "a b")], &text, 4),
        ("GC", &[], "{", 6),
        ("STATUS", &[], "[]", 6),
    ] {
        let output = runtime.call_with(verb, environment, input.as_bytes());
        let (found, said) = refused(&output);
        assert_eq!(found, code, "{verb} {environment:?}: {said}");
    }
    assert_eq!([mtu(&pod, "eth0"), mtu(&runtime.node.ns, "lo")], [agent.pod_mtu(), 65536]);
    // What is gone already is no reason to fail.
    for (verb, environment) in
        [("DEL", &[("CNI_NETNS", "/no/such/namespace")][..]), ("DEL", &[]), ("GC", &[])]
    {
        let output = runtime.call_with(verb, environment, text.as_bytes());
        assert!(output.status.success() && output.stdout.is_empty(), "{verb}: {output:?}");
    }
}
