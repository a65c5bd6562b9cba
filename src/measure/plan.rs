//! What is measured, in which order, and what it is called.

use std::fmt;

use clap::ValueEnum;
use serde::Serialize;

use super::message::{Flow, Protocol, Work, Wrap};

/// Payload of a datagram: what fits into any pod's MTU with room to spare, and what the comparison in bench/ sends.
const DATAGRAM: u16 = 1372;

/// By which way traffic goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// As it is between the two addresses: between pods the mesh, between nodes the network under it
    Path,
    /// A tunnel of its own between the two processes, encrypted
    #[value(name = "wireguard")]
    #[serde(rename = "wireguard")]
    WireGuard,
    /// The same, plain
    Vxlan,
}

impl Way {
    /// All, in the order of the table.
    pub(super) const ALL: [Way; 3] = [Way::Path, Way::WireGuard, Way::Vxlan];

    /// Its name.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Way::Path => "path",
            Way::WireGuard => "wireguard",
            Way::Vxlan => "vxlan",
        }
    }

    /// The tunnel that it needs.
    pub(super) const fn wrap(self) -> Option<Wrap> {
        match self {
            Way::Path => None,
            Way::WireGuard => Some(Wrap::WireGuard),
            Way::Vxlan => Some(Wrap::Vxlan),
        }
    }
}

/// One line of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Figure {
    /// What is done for it.
    pub work: Work,
    /// Whether the word "back" belongs to its name.
    back: bool,
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.work {
            Work::Tcp { streams: 1, .. } => f.write_str("TCP, 1 stream")?,
            Work::Tcp { streams, .. } => write!(f, "TCP, {streams} streams")?,
            Work::Udp { size, .. } => write!(f, "UDP, {size} bytes")?,
            Work::Ping { protocol: Protocol::Tcp, .. } => f.write_str("TCP")?,
            Work::Ping { protocol: Protocol::Udp, .. } => f.write_str("UDP")?,
        }
        match self.work {
            Work::Ping { beside: Some(_), .. } => f.write_str(", under load"),
            Work::Tcp { .. } | Work::Udp { .. } if self.back => f.write_str(", other direction"),
            Work::Tcp { .. } | Work::Udp { .. } | Work::Ping { .. } => Ok(()),
        }
    }
}

/// The figures of one way whose packets may be `mtu` bytes long; `main` is the direction of most of them.
pub(super) fn figures(streams: u8, main: Flow, mtu: u16, v6: bool) -> Vec<Figure> {
    let headers = if v6 { 48 } else { 28 };
    let size = mtu.saturating_sub(headers).clamp(64, DATAGRAM);
    let one = |flow| Work::Tcp { streams: 1, flow };
    let ping = |protocol, beside| Work::Ping { protocol, beside };
    let mut works = vec![one(main), one(main.turned())];
    if streams > 1 {
        works.push(Work::Tcp { streams, flow: main });
    }
    works.push(Work::Udp { size, flow: main });
    for beside in [None, Some(main)] {
        works.extend([ping(Protocol::Tcp, beside), ping(Protocol::Udp, beside)]);
    }
    let back = |work: &Work| match work {
        Work::Tcp { flow, .. } | Work::Udp { flow, .. } => *flow != main,
        Work::Ping { .. } => false,
    };
    works.into_iter().map(|work| Figure { work, back: back(&work) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::message::Task;

    #[test]
    fn every_figure_is_a_task_that_may_be_asked_for_and_has_its_own_name() {
        for main in [Flow::There, Flow::Back] {
            for streams in [1, 4, 64] {
                let figures = figures(streams, main, 1500, false);
                assert_eq!(figures.len(), if streams == 1 { 7 } else { 8 });
                let mut names: Vec<String> = figures
                    .iter()
                    .map(|figure| {
                        assert!(Task { work: figure.work, seconds: 1 }.flows().is_some(), "{figure:?}");
                        let kind = matches!(figure.work, Work::Ping { .. });
                        format!("{kind} {figure}")
                    })
                    .collect();
                names.sort();
                names.dedup();
                assert_eq!(names.len(), figures.len());
            }
        }
    }

    #[test]
    fn datagrams_fit_the_way() {
        let size = |mtu, v6| {
            let works = figures(1, Flow::There, mtu, v6).into_iter().map(|figure| figure.work);
            works.filter_map(|w| if let Work::Udp { size, .. } = w { Some(size) } else { None }).next()
        };
        assert_eq!(size(1500, false), Some(1372));
        assert_eq!(size(1420, true), Some(1372));
        assert_eq!(size(1340, false), Some(1312));
        assert_eq!(size(576, true), Some(528));
    }
}
