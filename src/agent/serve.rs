//! What others may ask of a running agent: `warren status` and `wg show`.

use std::path::Path;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{error, warn};

use super::{list, or};
use crate::config::AgentConfig;
use crate::io::clock;
use crate::io::fleet::Fleet;
use crate::state::run::{Outputs, StateReport};
use crate::status::socket::OwnedSocket;
use crate::status::{Handle, LaneHandle, NodeInfo, pb, server, uapi};

/// A handle of an agent whose lanes do not run yet.
pub(super) fn handle(config: &AgentConfig, outputs: &Outputs) -> Handle {
    let info = NodeInfo {
        name: config.node.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        tun: config.tun_name.clone(),
        settings: vec![
            ("source".to_owned(), config.source.as_ref().map(ToString::to_string).unwrap_or_default()),
            ("encap".to_owned(), config.encap.name().to_owned()),
            ("port".to_owned(), config.port.to_string()),
            ("lanes".to_owned(), config.lanes.to_string()),
            ("processors".to_owned(), config.processors.to_string()),
            ("cluster-cidr".to_owned(), or(list(&config.cluster_ranges), "from the nodes seen")),
            ("service-cidr".to_owned(), or(list(&config.service_ranges), "from ServiceCIDR objects")),
            ("services".to_owned(), config.services.name().to_owned()),
            ("location".to_owned(), or(config.location.clone().unwrap_or_default(), "none")),
        ],
        instance: config.instance.clone(),
        started: clock::now(),
    };
    Handle::new(info, Arc::clone(&outputs.snapshot), Vec::new())
}

pub(super) fn lanes(fleet: &Fleet) -> Vec<LaneHandle> {
    let lanes = fleet.lanes.iter().map(|lane| LaneHandle {
        id: lane.id,
        public_key: lane.public_key,
        port: lane.port,
        commands: lane.commands.clone(),
        bell: Arc::clone(&lane.bell),
        counters: Arc::clone(&lane.counters),
        offloads: lane.offloads,
    });
    lanes.collect()
}

/// For `warren status`, from the beginning: whoever asks may want to know what the agent waits for.
pub(super) fn serve(handle: Handle, socket: OwnedSocket) -> JoinHandle<()> {
    tokio::spawn(async move {
        if let Err(error) = server::serve(socket, handle, std::future::pending()).await {
            error!("`warren status` does not work any more: {error}");
        }
    })
}

/// For `wg show`, once there is something to show.
pub(super) fn serve_wireguard(config: &AgentConfig, handle: Handle) -> Option<JoinHandle<()>> {
    match uapi::bind(Path::new(uapi::DEFAULT_DIR), &config.tun_name) {
        Ok(socket) => Some(tokio::spawn(async move {
            if let Err(error) = uapi::serve(socket, handle, std::future::pending()).await {
                warn!("`wg show` does not work any more: {error}");
            }
        })),
        // The mesh works without it.
        Err(error) => {
            warn!("`wg show` will not work: {error}");
            None
        }
    }
}

/// Hands what the state line finds wrong to whoever asks.
pub(super) async fn follow_reports(handle: Handle, mut report: watch::Receiver<Arc<StateReport>>) {
    loop {
        let now = Arc::clone(&report.borrow_and_update());
        handle.update(|live| {
            live.problems = now.problems.iter().map(pb::Problem::from).collect();
            live.state = Some(pb::StateView::from(&*now));
        });
        if report.changed().await.is_err() {
            return;
        }
    }
}
