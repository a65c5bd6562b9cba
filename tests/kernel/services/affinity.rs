//! Session affinity: how long it lasts, and what ends it.

use std::net::SocketAddr;
use std::time::Duration;

use super::{SOON, asked, pods, service, services, vips};
use crate::lab::agent::Mesh;
use crate::lab::service::{BOTH, PORT, Service, Who};
use crate::lab::{Underlay, wait_for};

/// The time of the Service's affinity, in seconds.
const TIMEOUT: u64 = 2;
/// Four endpoints: that this many choices all fall on the same one is as likely as 1 in 10^6.
const CHOICES: u32 = 10;

const ALL: [(&str, u8, u8); 4] = [("a", 1, 10), ("b", 1, 11), ("c", 2, 10), ("d", 2, 11)];

fn write(mesh: &Mesh, without: &str) {
    let there: Vec<(u8, u8)> =
        ALL.iter().filter(|(name, ..)| *name != without).map(|(_, node, host)| (*node, *host)).collect();
    let spec = format!(
        "  sessionAffinity: ClientIP\n  sessionAffinityConfig:\n    clientIP:\n      timeoutSeconds: {TIMEOUT}\n"
    );
    Service { spec, ..service("web", 1, pods(mesh, &there)) }.write(&mesh.lab);
}

#[test]
fn affinity_lasts_as_long_as_its_time_and_its_endpoint() {
    for encap in ["wireguard", "vxlan"] {
        affinity_lasts_as_long_as_its_time_and_its_endpoint_over(encap);
    }
}

fn affinity_lasts_as_long_as_its_time_and_its_endpoint_over(encap: &str) {
    let mesh = services(2, encap, Underlay::V4);
    let _servers = ALL.map(|(name, node, host)| {
        let node = &mesh.lab.nodes[usize::from(node) - 1];
        Who::start(name, &node.pods[usize::from(host) - 10], &node.inner(host))
    });
    write(&mesh, "nobody");
    for (over, family) in BOTH.into_iter().zip([0, 1]) {
        let target = SocketAddr::new(vips(1)[family], PORT);
        let ask = || asked(&mesh.lab.nodes[0].pods[0], None, target, over).server;
        let lasts = |server: &str, what: &str| {
            // Twice as long as its time, with no pause that is.
            for _ in 0..8 {
                assert_eq!(ask(), server, "{what}, {over:?}");
                std::thread::sleep(Duration::from_millis(1000 * TIMEOUT / 4));
            }
        };
        let first = ask();
        lasts(&first, "each question begins the time anew");

        // It goes, and comes back: the client has another one by then, and keeps that.
        write(&mesh, &first);
        let second = wait_for("the client moves on", SOON, || Some(ask()).filter(|server| *server != first));
        write(&mesh, "nobody");
        lasts(&second, "after the first one came back");

        // After its time, anybody may answer.
        let mut choices = 0;
        let third = loop {
            std::thread::sleep(Duration::from_millis(1000 * TIMEOUT + 300));
            let server = ask();
            choices += 1;
            if server != second {
                break server;
            }
            assert!(choices < CHOICES, "{over:?}: the time never ends");
        };
        assert_eq!(ask(), third, "{over:?}");
    }
}
