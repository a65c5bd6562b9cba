//! UDP flows that the kernel's connection table remembers otherwise than they would go now.
//!
//! Translation is decided by a flow's first packet. A client that has sent to a node port before the
//! Service was there, or still sends after it is gone, would be led the old way for as long as it does not
//! pause. So the entries of a changed UDP port or address are forgotten: the next packet begins anew. TCP
//! begins anew by itself. And those that kube-proxy has left (`inherited`) are forgotten with their endpoints.

use std::collections::BTreeSet;
use std::net::IpAddr;

use nlink::netlink::netfilter::{ConntrackEntry, ConntrackFilter, IpProtocol};
use nlink::netlink::{Connection, Netfilter};
use tokio::sync::mpsc;
use tracing::debug;

use super::inherited::Search;
use super::{HostConfig, MARK};

/// What has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Changed {
    /// Node ports.
    pub(super) ports: BTreeSet<u16>,
    /// External addresses.
    pub(super) externals: BTreeSet<(IpAddr, u16)>,
}

impl Changed {
    fn is_empty(&self) -> bool {
        self.ports.is_empty() && self.externals.is_empty()
    }

    /// Whether this entry would go another way now, as far as can be seen.
    fn concerns(&self, entry: &ConntrackEntry, loops: [IpAddr; 2]) -> bool {
        let (Some(to), Some(port)) = (entry.orig.dst_ip, entry.orig.dst_port) else { return false };
        // What came out of the tunnel is never translated here.
        if entry.mark.is_some_and(|mark| mark & MARK != 0) {
            return false;
        }
        // Not translated, or by us: what others have translated (masquerade, kube-proxy before us) goes on.
        let plain = entry.reply.src_ip == Some(to) && entry.reply.dst_ip == entry.orig.src_ip;
        let ours = entry.reply.src_ip.is_some_and(|from| loops.contains(&from));
        (plain || ours) && (self.ports.contains(&port) || self.externals.contains(&(to, port)))
    }
}

/// Hands what has changed to a task that sees to it: listing the connection table may take a while.
#[derive(Debug)]
pub(super) struct Forgetter(mpsc::UnboundedSender<Task>);

#[derive(Debug)]
enum Task {
    /// Forget what these concern; the loop's own addresses.
    Forget(Changed, [IpAddr; 2]),
    /// Forget what kube-proxy has left and nobody will answer.
    Search(Search),
}

impl Forgetter {
    /// Starts the task; it ends with this. Without conntrack in the kernel nothing is translated either.
    pub(super) fn start() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        if let Ok(connection) = Connection::<Netfilter>::new() {
            tokio::spawn(forget(connection, receiver));
        }
        Self(sender)
    }

    pub(super) fn forget(&self, changed: Changed, config: &HostConfig) {
        if !changed.is_empty() {
            let _ = self.0.send(Task::Forget(changed, [config.loop_v4.into(), config.loop_v6.into()]));
        }
    }

    pub(super) fn search(&self, search: Search) {
        let _ = self.0.send(Task::Search(search));
    }
}

async fn forget(connection: Connection<Netfilter>, mut tasks: mpsc::UnboundedReceiver<Task>) {
    while let Some(first) = tasks.recv().await {
        let (mut changed, mut own, mut search) = (Changed::default(), None, None);
        let mut task = Some(first);
        // One listing serves all that has come meanwhile.
        while let Some(next) = task {
            match next {
                Task::Forget(more, loops) => {
                    changed.ports.extend(more.ports);
                    changed.externals.extend(more.externals);
                    own = Some(loops);
                }
                Task::Search(next) => search = Some(next),
            }
            task = tasks.try_recv().ok();
        }
        let udp = ConntrackFilter::new().proto(IpProtocol::Udp);
        let entries = match connection.get_conntrack_matching(&udp).await {
            Ok(entries) => entries,
            Err(error) => {
                debug!("the connection table cannot be listed: {error}");
                continue;
            }
        };
        let mut left = 0;
        for entry in &entries {
            let kept = search.as_ref().and_then(|search| search.heirs.keep(entry));
            left += usize::from(kept == Some(true));
            if kept != Some(false) && !own.is_some_and(|loops| changed.concerns(entry, loops)) {
                continue;
            }
            // Gone meanwhile, or replaced by one that is right.
            if let Err(error) = connection.del_conntrack_entry(entry).await {
                debug!("an entry of the connection table stays: {error}");
            }
        }
        if let Some(search) = search {
            search.found(left);
        }
    }
}

#[cfg(test)]
mod tests {
    use nlink::netlink::netfilter::ConntrackTuple;

    use super::*;

    #[test]
    fn only_what_would_go_another_way_is_forgotten() {
        let changed =
            Changed { ports: [30_007].into(), externals: [("198.51.100.9".parse().unwrap(), 80)].into() };
        let loops = ["169.254.87.87", "fd57::1"].map(|ip| ip.parse().unwrap());
        for (to, port, answers, mark, expected) in [
            ("192.0.2.1", 30_007, "192.0.2.1", 0, true),
            ("192.0.2.1", 30_007, "169.254.87.87", 0, true),
            ("192.0.2.1", 30_007, "10.244.1.5", 0, false),
            ("192.0.2.1", 30_007, "192.0.2.1", MARK, false),
            ("192.0.2.1", 30_008, "192.0.2.1", 0, false),
            ("198.51.100.9", 80, "198.51.100.9", 0x4000, true),
            ("198.51.100.8", 80, "198.51.100.8", 0, false),
        ] {
            let client: IpAddr = "203.0.113.7".parse().unwrap();
            let tuple = |src: IpAddr, dst: IpAddr| {
                let mut tuple = ConntrackTuple::default();
                (tuple.src_ip, tuple.dst_ip, tuple.dst_port) = (Some(src), Some(dst), Some(port));
                tuple
            };
            let mut entry = ConntrackEntry::default();
            entry.orig = tuple(client, to.parse().unwrap());
            entry.reply = tuple(answers.parse().unwrap(), client);
            entry.mark = Some(mark);
            assert_eq!(changed.concerns(&entry, loops), expected, "{to}:{port} {answers} {mark:#x}");
        }
    }
}
