//! This node's own end of every tunnel: where it may be reached, and the MTU there.

use std::net::{IpAddr, SocketAddr};

use tracing::warn;

use super::{AgentError, Tasks};
use crate::config::{AgentConfig, UnderlayMtu};
use crate::io::underlay;
use crate::state::annotations::{MAX_ENDPOINTS, is_reachable};
use crate::state::compile::Settings;

/// Looks at the underlay, for what is not fixed by flags.
pub(super) struct Ends {
    /// A netlink socket for questions.
    pub(super) netlink: rtnetlink::Handle,
    tun: String,
    port: u16,
    fixed_endpoints: bool,
    fixed_mtu: bool,
    _connection: Tasks,
}

impl Ends {
    pub(super) fn open(config: &AgentConfig) -> Result<Ends, AgentError> {
        let (connection, netlink, _) = rtnetlink::new_connection()
            .map_err(|source| AgentError::Io { what: "cannot open a route netlink socket", source })?;
        Ok(Ends {
            netlink,
            tun: config.tun_name.clone(),
            port: config.port,
            fixed_endpoints: !config.endpoints.is_empty(),
            fixed_mtu: config.underlay_mtu != UnderlayMtu::Auto,
            _connection: Tasks(vec![tokio::spawn(connection)]),
        })
    }

    /// Brings endpoints and MTU up to date; whether anything changed.
    pub(super) async fn look(&mut self, settings: &mut Settings, announced: &[IpAddr]) -> bool {
        let found = match underlay::look(&self.netlink, announced, &self.tun).await {
            Ok(found) => found,
            Err(error) => {
                warn!("{error}");
                return false;
            }
        };
        let before = settings.clone();
        if !self.fixed_mtu {
            settings.underlay_mtu = found.mtu;
        }
        if !self.fixed_endpoints {
            let from = if announced.is_empty() { &found.addresses[..] } else { announced };
            // Others read so many and no more, and refuse the list for one that cannot be reached.
            let from = from.iter().filter(|ip| is_reachable(**ip)).take(MAX_ENDPOINTS);
            settings.announcement.endpoints = from.map(|ip| SocketAddr::new(*ip, self.port)).collect();
        }
        before != *settings
    }
}
