//! What goes through a node's hands in one piece, as nft sees it: what the agent says of itself proves nothing.

use super::Node;

/// Longer than any packet that nobody has joined.
const JOINED: &str = "meta length > 1600";

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pieces {
    /// TCP packets that the agent has joined and written to its TUN.
    Tcp,
    /// UDP packets that it has.
    Udp,
    /// Runs of datagrams that it has given its socket in one piece.
    Runs,
}

impl Pieces {
    fn counter(self) -> &'static str {
        match self {
            Pieces::Tcp => "joined-tcp",
            Pieces::Udp => "joined-udp",
            Pieces::Runs => "joined-runs",
        }
    }
}

/// Begins to count on a node whose agent runs.
pub fn watch(node: &Node) {
    node.ns.run_all(&format!(
        "nft add table inet joined
         nft add chain inet joined in {{ type filter hook prerouting priority -400 ; }}
         nft add chain inet joined out {{ type filter hook postrouting priority 400 ; }}
         nft add counter inet joined joined-tcp
         nft add counter inet joined joined-udp
         nft add counter inet joined joined-runs
         nft add rule inet joined in iifname warren0 meta l4proto tcp {JOINED} counter name joined-tcp
         nft add rule inet joined in iifname warren0 meta l4proto udp {JOINED} counter name joined-udp
         nft add rule inet joined out oifname eth0 udp dport {{ 8472, 51820-51829 }} {JOINED} counter name joined-runs"
    ));
}

/// How many there were since.
pub fn seen(node: &Node, pieces: Pieces) -> u64 {
    let text = node.ns.run(&format!("nft list counter inet joined {}", pieces.counter()));
    let count = text.split("packets ").nth(1).and_then(|rest| rest.split(' ').next());
    count.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("no counter in {text}"))
}
