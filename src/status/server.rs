//! The gRPC server on the agent's unix socket.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::handle::Handle;
use super::pb;
use super::pb::status_server::{Status as StatusService, StatusServer};
use super::socket::{Lock, OwnedSocket, SocketError};

/// The socket's name in the run directory.
pub const SOCKET_NAME: &str = "warren.sock";
/// One request's time: the lanes' deadline and room for a large answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Requests at once on one connection; more wait.
const REQUESTS_PER_CONNECTION: usize = 8;
/// How long requests in progress may take to finish when the agent ends.
const FAREWELL: Duration = Duration::from_secs(1);
/// Requests carry a name at most.
const LARGEST_REQUEST: usize = 64 << 10;

/// Where the agent with this run directory listens.
pub fn socket_path(run_dir: &Path) -> PathBuf {
    run_dir.join(SOCKET_NAME)
}

/// Takes the socket of this run directory: the agent's first step, because it tells whether another is running.
pub fn bind(run_dir: &Path) -> Result<OwnedSocket, SocketError> {
    OwnedSocket::bind(&socket_path(run_dir), 0o755, Lock::Held)
}

/// Why the server ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The listener could not be used.
    #[error("status socket: {0}")]
    Listen(#[from] std::io::Error),
    /// gRPC's transport failed.
    #[error("status server: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// Answers until `shutdown` is ready; the socket is removed then.
pub async fn serve(
    socket: OwnedSocket,
    handle: Handle,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let incoming = UnixListenerStream::new(socket.listener()?);
    let service = StatusServer::new(Answers { handle }).max_decoding_message_size(LARGEST_REQUEST);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = Server::builder()
        .timeout(REQUEST_TIMEOUT)
        .concurrency_limit_per_connection(REQUESTS_PER_CONNECTION)
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, async {
            let _ = stopped.await; // a sender that is gone means the same
        });
    let ending = async {
        shutdown.await;
        let _ = stop.send(());
        // A client that keeps its connection and says nothing must not keep the agent alive.
        tokio::time::sleep(FAREWELL).await;
    };
    tokio::select! {
        served = serving => served?,
        () = ending => {}
    }
    Ok(())
}

struct Answers {
    handle: Handle,
}

impl Answers {
    async fn view(&self) -> Result<pb::NodeView, Status> {
        let view = self.handle.collect_async().await;
        view.map_err(|e| Status::internal(format!("putting the view together: {e}")))
    }
}

#[tonic::async_trait]
impl StatusService for Answers {
    async fn get(&self, _: Request<pb::GetRequest>) -> Result<Response<pb::GetResponse>, Status> {
        Ok(Response::new(pb::GetResponse { view: Some(self.view().await?) }))
    }

    async fn peers(&self, request: Request<pb::PeersRequest>) -> Result<Response<pb::PeersResponse>, Status> {
        let part = request.into_inner().name;
        let view = self.view().await?;
        Ok(Response::new(pb::PeersResponse {
            node: view.node,
            collected_unix_ms: view.collected_unix_ms,
            peers: view.peers.into_iter().filter(|peer| peer.name.contains(&part)).collect(),
            silent_lanes: view.lanes.iter().filter(|lane| !lane.answered).map(|lane| lane.id).collect(),
        }))
    }
}
