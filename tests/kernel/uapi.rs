//! The `wg` program reads an agent as it reads any WireGuard device, and changes nothing.

use crate::lab::Lab;
use crate::lab::agent::Mesh;

#[test]
fn wg_shows_the_mesh() {
    let mesh = Mesh::start(Lab::two(), &["--encap", "wireguard"]);
    mesh.exchange(0, 1);
    let [one, two] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
    let lanes = mesh.lab.published(two, "warren.dev/lanes").expect("lanes are published");
    let key = lanes.split(':').next().unwrap_or_default();

    // `wg` derives the interface's own public key from the private key, which it is not given.
    let text = one.ns.run("wg show warren0");
    for expected in [
        format!("peer: {}", key),
        format!("endpoint: {}:51820", mesh.lab.outer(two)),
        "listening port: 51820".to_owned(),
        "10.244.2.0/24".to_owned(),
        "fd00:10:244:2::/64".to_owned(),
        "latest handshake: ".to_owned(),
    ] {
        assert!(text.contains(&expected), "`wg show` has {expected:?}: {text}");
    }

    let dump = one.ns.run("wg show warren0 dump");
    let lines: Vec<Vec<&str>> = dump.lines().map(|line| line.split('\t').collect()).collect();
    assert_eq!(lines.iter().map(Vec::len).collect::<Vec<_>>(), [4, 8], "interface and one peer: {dump}");
    let (received, sent) = (lines[1][5].parse::<u64>().unwrap_or(0), lines[1][6].parse::<u64>().unwrap_or(0));
    // `exchange` moves 8 MiB there and back, by both families, from both ends.
    assert!(received > 30_000_000 && sent > 30_000_000, "bytes are counted: {dump}");

    let config = one.ns.run("wg showconf warren0");
    assert!(config.contains(&format!("PublicKey = {}", key)), "{config}");
    assert!(!config.contains("PrivateKey"), "the private key stays where it is: {config}");
}

#[test]
fn wg_cannot_change_the_mesh() {
    let mesh = Mesh::start(Lab::two(), &["--encap", "wireguard"]);
    let node = &mesh.lab.nodes[0];
    let before = node.ns.run("wg showconf warren0");
    for change in ["wg set warren0 listen-port 1234", "wg set warren0 fwmark 7"] {
        let refused = node.ns.attempt(change);
        assert!(!refused.status.success(), "`{change}` is refused");
        assert!(!refused.stderr.is_empty(), "`{change}`: the reason is told");
    }
    assert_eq!(node.ns.run("wg showconf warren0"), before);
    assert!(crate::lab::traffic::pings(mesh.pod(0), mesh.pod(1), 0, std::time::Duration::from_secs(5)));
}
