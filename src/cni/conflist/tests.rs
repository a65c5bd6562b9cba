//! Tests of [`super`]: what is decided by which files, and that files of others come back byte for byte.

use super::*;

const OWN: &str = "05-warren.conflist";
const RUN: &str = "/run/warren";

fn ranges() -> Vec<IpNet> {
    ["10.244.1.0/24", "fd00:1::/64"].map(|range| range.parse().unwrap()).to_vec()
}

fn file(name: &str, text: &str) -> ConfFile {
    ConfFile { name: name.to_owned(), text: text.to_owned() }
}

fn own(version: SpecVersion, extras: &[&'static str]) -> String {
    Own { version, ranges: &ranges(), mtu: 1420, run_dir: RUN, extras }.render()
}

const BRIDGE_LIST: &str = r#"{
  "name": "kindly",
  "cniVersion": "0.4.0",
  "plugins": [
    {"type":"bridge",  "bridge": "cbr0", "isGateway": true, "unknown": [1.50, null],
      "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.1.0/24"}]]}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ],
  "disableCheck": true
}
"#;

#[test]
fn our_own_list_has_what_every_plugin_needs() {
    let list: Value = serde_json::from_str(&own(SpecVersion::V1_1_0, &["portmap", "bandwidth"])).unwrap();
    assert_eq!((&list["cniVersion"], &list["name"]), (&json!("1.1.0"), &json!("warren")));
    let types: Vec<&str> =
        list["plugins"].as_array().unwrap().iter().map(|p| p["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["bridge", "portmap", "bandwidth", "warren-cni"]);
    let bridge = &list["plugins"][0];
    assert_eq!(
        (&bridge["mtu"], &bridge["ipMasq"], &bridge["isGateway"]),
        (&json!(1420), &json!(false), &json!(true))
    );
    let wanted = json!([[{ "subnet": "10.244.1.0/24" }], [{ "subnet": "fd00:1::/64" }]]);
    assert_eq!(bridge["ipam"]["ranges"], wanted);
    assert_eq!(bridge["ipam"]["routes"], json!([{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }]));
    assert_eq!(list["plugins"][3], json!({ "type": "warren-cni", "runDir": RUN }));

    let single =
        Own { version: SpecVersion::V1_0_0, ranges: &ranges()[1..], mtu: 1280, run_dir: RUN, extras: &[] };
    let list: Value = serde_json::from_str(&single.render()).unwrap();
    assert_eq!(list["plugins"][0]["ipam"]["routes"], json!([{ "dst": "::/0" }]));
    assert_eq!(list["plugins"].as_array().unwrap().len(), 2);
}

#[test]
fn what_is_decided() {
    let conf =
        |kind: &str, more: &str| format!(r#"{{"cniVersion":"1.0.0","name":"n","type":"{kind}"{more}}}"#);
    let ipam =
        |subnet: &str| format!(r#","isGateway":true,"ipam":{{"type":"host-local","subnet":"{subnet}"}}"#);
    let fits = file("10-b.conf", &conf("bridge", &ipam("10.244.1.0/25")));
    let chained = file("10-b.conflist", BRIDGE_LIST);
    let ours = file(OWN, &own(SpecVersion::V1_0_0, &[]));
    let loopback = file("99-loopback.conf", &conf("loopback", ""));
    let multus = file("00-multus.conf", &conf("multus", ""));
    let foreign = file("87-podman.conf", &conf("bridge", &ipam("10.88.0.0/16")));
    let wrapped = file(OWN, &wrap(&fits, RUN).unwrap());
    for (files, verdict) in [
        (vec![], Verdict::Own),
        (vec![loopback.clone(), multus.clone()], Verdict::Own),
        (vec![foreign.clone()], Verdict::Own),
        // The runtime would take the first of them, whatever we do to the second.
        (vec![file("10-a.conf", &foreign.text), chained.clone()], Verdict::Own),
        (vec![file("06-a.conf", "{"), fits.clone()], Verdict::Own),
        (vec![fits.clone(), loopback.clone()], Verdict::Wrap(fits.clone())),
        (vec![wrapped, fits.clone()], Verdict::Wrap(fits.clone())),
        (vec![multus, chained.clone()], Verdict::Chain(chained.clone())),
        // Pods are in ours already.
        (vec![ours, chained.clone()], Verdict::Own),
    ] {
        assert_eq!(judge(&files, OWN, &ranges()), verdict, "{files:?}");
    }
    for (files, word) in [
        (
            vec![file(
                "10-flannel.conflist",
                r#"{"cniVersion":"1.0.0","name":"cbr0","plugins":[{"type":"flannel"}]}"#,
            )],
            "flannel",
        ),
        (
            vec![file("10-b.conf", &conf("bridge", &ipam("10.244.1.0/24").replace("true", "false")))],
            "isGateway",
        ),
        (vec![file("10-b.conf", &conf("bridge", r#","ipam":{"type":"dhcp"}"#))], "host-local"),
        (vec![file("10-b.conf", &conf("bridge", &ipam("usePodCidr")))], "host-local"),
        (vec![file("10-b.conf", &conf("bridge", &ipam("10.244.1.0/24")).replace("1.0.0", "0.2.0"))], "0.2.0"),
        (vec![file("01-x.conf", &conf("bridge", &ipam("10.88.0.0/16")))], "comes before"),
        (vec![file("01-x.conf", "{")], "stumbles"),
        (vec![file("01-b.conf", &conf("bridge", &ipam("10.244.1.0/25")))], "make it a .conflist"),
        (vec![file(OWN, "{}")], "in the way"),
        (vec![file(OWN, BRIDGE_LIST)], "in the way"),
        (vec![file("01-x.conflist", r#"{"cniVersion":"1.0.0","name":"n","plugins":[]}"#)], "stumbles"),
    ] {
        let Verdict::Refuse(why) = judge(&files, OWN, &ranges()) else { panic!("{files:?}") };
        assert!(why.contains(word), "{why}");
    }
    // A broken file that the runtime never comes to is nobody's business.
    assert_eq!(judge(&[file("50-x.conf", "{")], OWN, &ranges()), Verdict::Own);
}

#[test]
fn a_list_of_others_is_changed_in_one_place_and_comes_back() {
    let chained = chain(BRIDGE_LIST, RUN).unwrap();
    let ours = ",\n    {\"runDir\":\"/run/warren\",\"type\":\"warren-cni\"}";
    let at = chained.find(ours).expect("our part, in the style of the file");
    assert_eq!(format!("{}{}", &chained[..at], &chained[at + ours.len()..]), BRIDGE_LIST);
    assert_eq!(chain(&chained, RUN).unwrap(), chained, "once is enough");
    assert_eq!(unchain(&chained).unwrap(), BRIDGE_LIST);
    assert_eq!(unchain(BRIDGE_LIST).unwrap(), BRIDGE_LIST);
    let moved = chain(&chained, "/run/other").unwrap();
    assert!(moved.contains("/run/other") && !moved.contains("/run/warren"));
    assert_eq!(unchain(&moved).unwrap(), BRIDGE_LIST);

    let dense = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"}]}"#;
    assert_eq!(unchain(&chain(dense, RUN).unwrap()).unwrap(), dense);
    // Somebody has put us there by himself, in his own words.
    let by_hand = dense.replace("]}", r#", {"type": "warren-cni", "x": 1}]}"#);
    assert_eq!(chain(&by_hand, RUN).unwrap(), by_hand);
    // Somebody put us first.
    let first = r#"{"plugins":[ {"type":"warren-cni"}, {"type":"ptp"}]}"#;
    assert_eq!(unchain(first).unwrap(), r#"{"plugins":[ {"type":"ptp"}]}"#);
    for bad in ["", "[]", "{}", r#"{"plugins":[]}"#, r#"{"plugins":{}}"#] {
        assert_eq!(
            (chain(bad, RUN).is_none(), unchain(bad).is_some_and(|t| t != bad)),
            (true, false),
            "{bad}"
        );
    }
}

#[test]
fn a_single_plugins_file_is_kept_whole_inside_a_list() {
    let text = "{ \"cniVersion\": \"0.3.1\", \"name\": \"a\\\"b\", \"type\": \"bridge\", \"odd\": 1.0 }\n";
    let single = file("10-b.conf", text);
    let wrapped = file(OWN, &wrap(&single, RUN).unwrap());
    assert!(is_ours(&wrapped) && !is_ours(&single));
    let list: Value = serde_json::from_str(&wrapped.text).unwrap();
    assert_eq!((&list["name"], &list["cniVersion"]), (&json!("a\"b"), &json!("0.3.1")));
    assert!(wrapped.text.contains(text.trim()), "{}", wrapped.text);
    assert_eq!(list["plugins"][1]["type"], "warren-cni");
}

proptest::proptest! {
    /// Whatever stands in a file of others: no panic, and what we put in can be taken out again.
    #[test]
    fn no_text_panics(text in "[ -~\n]{0,60}", at in 0usize..400, byte in 0u8..128) {
        let mut torn = BRIDGE_LIST.as_bytes().to_vec();
        let length = torn.len();
        torn[at % length] = byte;
        let torn = String::from_utf8(torn).unwrap();
        for text in [text, torn] {
            let _ = judge(&[file("10-x.conflist", &text), file("11-x.conf", &text)], OWN, &ranges());
            let _ = wrap(&file("1.conf", &text), RUN);
            if let Some(chained) = chain(&text, RUN) {
                proptest::prop_assert_eq!(unchain(&chained), Some(text));
            }
        }
    }
}
