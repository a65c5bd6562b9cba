//! The ordinary `wg` program against our UAPI socket. It looks in /var/run/wireguard only, so this runs
//! with a /run of its own, in a private mount namespace: root is needed, nothing outside is touched.
#![cfg(feature = "agent")]

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, UNIX_EPOCH};

use arc_swap::ArcSwap;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tokio::process::Command as Program;
use warren::datapath::{Counters, PeerTraffic};
use warren::io::clock;
use warren::io::kernel::bell;
use warren::io::lane::{Command, LaneOffloads, LaneReport};
use warren::snapshot::{Encap, LaneId, LocalNode, Mesh, Peer, PeerId, PeerLane, Snapshot};
use warren::status::{Handle, LaneHandle, NodeInfo, uapi};
use warren::tunnel::wireguard::SessionReport;

const INTERFACE: &str = "wtest-uapi0";
const KEY_B: [u8; 32] = [0x42; 32];
const KEY_B_TEXT: &str = "QkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkI=";
const KEY_C_TEXT: &str = "Q0NDQ0NDQ0NDQ0NDQ0NDQ0NDQ0NDQ0NDQ0NDQ0NDQ0M=";

#[test]
fn the_wg_program_shows_a_node_and_cannot_change_it() {
    assert!(nix::unistd::geteuid().is_root(), "a private mount namespace needs root: run this test as root");
    // A thread of its own, because it keeps the namespace.
    std::thread::spawn(|| {
        private_run();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(scene());
    })
    .join()
    .unwrap();
}

/// An empty /run that only this thread and its children see.
fn private_run() {
    let nothing: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing).expect("private mounts");
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), nothing).expect("an empty /run");
    assert!(!Path::new(uapi::DEFAULT_DIR).exists(), "/var/run leads to /run");
}

async fn scene() {
    let socket = uapi::bind(Path::new(uapi::DEFAULT_DIR), INTERFACE).unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = tokio::spawn(uapi::serve(socket, handle(), async {
        let _ = stopped.await;
    }));

    assert_eq!(wg(&["show", "interfaces"]).await, Ok(format!("{INTERFACE}\n")));
    shows().await;
    dumps().await;
    config().await;
    refused().await;

    stop.send(()).unwrap();
    server.await.unwrap().unwrap();
    assert_eq!(wg(&["show", "interfaces"]).await, Ok(String::new()), "the socket is gone");
}

async fn shows() {
    let shown = wg(&["show", INTERFACE]).await.unwrap();
    for part in [
        "listening port: 51820",
        &format!("peer: {KEY_B_TEXT}"),
        "endpoint: 192.0.2.2:51820",
        "allowed ips: 10.244.2.0/24, fd00:2::/64, 192.0.2.2/32",
        "latest handshake: 1 minute",
        "transfer: 3.00 KiB received, 5.00 KiB sent",
        "persistent keepalive: every 25 seconds",
        &format!("peer: {KEY_C_TEXT}"),
    ] {
        assert!(shown.contains(part), "{part:?} is missing in:\n{shown}");
    }
    assert!(!shown.contains("private key"), "{shown}");
}

async fn dumps() {
    let dump = wg(&["show", INTERFACE, "dump"]).await.unwrap();
    let rows: Vec<Vec<&str>> = dump.lines().map(|line| line.split('\t').collect()).collect();
    assert_eq!(rows.len(), 3, "{dump}");
    assert_eq!(rows[0], ["(none)", "(none)", "51820", "off"]);
    let b = rows[1..].iter().find(|row| row[0] == KEY_B_TEXT).expect(&dump);
    assert_eq!(b[1..3], ["(none)", "192.0.2.2:51820"]);
    // `wg` keeps allowed addresses in the order they came in.
    assert_eq!(b[3], "10.244.2.0/24,fd00:2::/64,192.0.2.2/32");
    let handshake = Duration::from_secs(b[4].parse().unwrap());
    let age = clock::wall().duration_since(UNIX_EPOCH + handshake).unwrap().as_secs();
    assert!((60..=70).contains(&age), "{age} s ago: {dump}");
    assert_eq!(b[5..], ["3072", "5120", "25"]);
    let c = rows[1..].iter().find(|row| row[0] == KEY_C_TEXT).expect(&dump);
    assert_eq!(c[2..], ["[2001:db8::3]:7", "10.244.3.0/24", "0", "0", "0", "off"], "no handshake yet");
}

async fn config() {
    let config = wg(&["showconf", INTERFACE]).await.unwrap();
    let lines: BTreeSet<&str> = config.lines().collect();
    for line in [
        "[Interface]",
        "ListenPort = 51820",
        &format!("PublicKey = {KEY_B_TEXT}"),
        "AllowedIPs = 10.244.2.0/24, fd00:2::/64, 192.0.2.2/32",
        "Endpoint = 192.0.2.2:51820",
        "PersistentKeepalive = 25",
    ] {
        assert!(lines.contains(line), "{line:?} is missing in:\n{config}");
    }
    assert!(!config.contains("PrivateKey"), "{config}");
}

async fn refused() {
    for change in [
        &["set", INTERFACE, "listen-port", "1234"][..],
        &["set", INTERFACE, "peer", KEY_B_TEXT, "remove"],
        &["set", INTERFACE, "peer", KEY_B_TEXT, "allowed-ips", "0.0.0.0/0"],
    ] {
        let error = wg(change).await.unwrap_err();
        assert!(error.contains("Operation not supported"), "{change:?}: {error}");
    }
    // A file with thousands of peers.
    let mut config = String::from("[Interface]\nListenPort = 1\n");
    for i in 0..5000u32 {
        let key = uapi_key(i);
        config += &format!("[Peer]\nPublicKey = {key}\nAllowedIPs = 10.{}.{}.0/24\n", i >> 8, i & 255);
    }
    std::fs::write("/run/many.conf", config).unwrap();
    let error = wg(&["setconf", INTERFACE, "/run/many.conf"]).await.unwrap_err();
    assert!(error.contains("Operation not supported"), "{error}");
    let dump = wg(&["show", INTERFACE, "dump"]).await.unwrap();
    assert_eq!(dump.lines().count(), 3, "nothing has changed: {dump}");
}

fn uapi_key(number: u32) -> String {
    let mut key = [7; 32];
    key[..4].copy_from_slice(&number.to_be_bytes());
    warren::status::view::key_text(&key)
}

/// What `wg` prints; an error is what it complains of.
async fn wg(args: &[&str]) -> Result<String, String> {
    let run = Program::new("wg").args(args).kill_on_drop(true).output();
    let output = tokio::time::timeout(Duration::from_secs(20), run)
        .await
        .expect("wg ends")
        .expect("the `wg` program runs (package wireguard-tools)");
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

fn peer(id: u32, key: [u8; 32], endpoint: &str, allowed: &[&str], addresses: &[&str]) -> Option<Arc<Peer>> {
    Some(Arc::new(Peer {
        id: PeerId(id),
        name: format!("node-{id}"),
        encap: Some(Encap::WireGuard),
        lanes: vec![PeerLane { key, port: 51820 }, PeerLane { key: [key[0] | 0x80; 32], port: 51821 }],
        endpoints: vec![endpoint.parse().unwrap()],
        vxlan: None,
        pod_ranges: allowed.iter().map(|range| range.parse().unwrap()).collect(),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        mtu: 1420,
        keepalive: if id == 0 { 25 } else { 0 },
        ordinary: false,
        takes_strangers: true,
        also: Vec::new(),
    }))
}

/// Two lanes that answer with fixed figures: 1 + 2 KiB received from node-0, 4 + 1 KiB sent.
fn handle() -> Handle {
    let peers = vec![
        peer(0, KEY_B, "203.0.113.1:1", &["10.244.2.0/24", "fd00:2::/64"], &["192.0.2.2"]),
        peer(1, [0x43; 32], "[2001:db8::3]:7", &["10.244.3.0/24"], &[]),
    ];
    let local =
        LocalNode { name: "node-a".to_owned(), address_v4: None, address_v6: None, vni: 1, mac: [2; 6] };
    let snapshot = Snapshot {
        generation: 1,
        local: Arc::new(local),
        mesh: Arc::new(Mesh { peers, ..Mesh::default() }),
        services: Arc::default(),
    };
    let lanes = [(0u8, 1, 4), (1, 2, 1)].map(|(id, received, sent)| lane(id, received << 10, sent << 10));
    let info = NodeInfo {
        instance: String::new(),
        name: "node-a".to_owned(),
        version: "0.0.0".to_owned(),
        tun: INTERFACE.to_owned(),
        settings: Vec::new(),
        started: clock::now(),
    };
    Handle::new(info, Arc::new(ArcSwap::from_pointee(snapshot)), lanes.into())
}

fn lane(id: u8, received: u64, sent: u64) -> LaneHandle {
    let (commands, asked) = sync_channel(4);
    let session = SessionReport {
        peer: PeerId(0),
        lane: LaneId(id),
        key: if id == 0 { KEY_B } else { [0xc2; 32] },
        endpoint: Some(format!("192.0.2.2:{}", 51820 + u16::from(id)).parse().unwrap()),
        established: true,
        handshake_age: Some(Duration::from_secs(60 + u64::from(id))),
        received,
        sent,
        idle: None,
    };
    let traffic = PeerTraffic { bytes_received: received, bytes_sent: sent, ..PeerTraffic::default() };
    let report = LaneReport {
        public_key: [id; 32],
        sessions: vec![session],
        traffic: vec![traffic],
        ..LaneReport::default()
    };
    std::thread::spawn(move || answer(&asked, &report));
    LaneHandle {
        id: LaneId(id),
        public_key: [id; 32],
        port: 51820 + u16::from(id),
        commands,
        bell: Arc::new(bell().unwrap()),
        counters: Arc::new(Counters::default()),
        offloads: LaneOffloads::default(),
    }
}

fn answer(asked: &Receiver<Command>, report: &LaneReport) {
    while let Ok(command) = asked.recv() {
        match command {
            Command::Report(to) => drop(to.try_send(report.clone())),
            Command::Initiate(_) | Command::Keys(_) => {}
        }
    }
}
