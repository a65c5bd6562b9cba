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

    async fn rotate_keys(
        &self,
        request: Request<pb::RotateKeysRequest>,
    ) -> Result<Response<pb::RotateKeysResponse>, Status> {
        let overlap = request.into_inner().overlap_seconds;
        let overlap = (overlap > 0).then(|| Duration::from_secs(overlap.into()));
        let stands = self.handle.rotate(overlap).await.map_err(Status::failed_precondition)?;
        Ok(Response::new(pb::RotateKeysResponse { stands }))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;
    use crate::status::client::{self, ClientError, PeersArgs, Target, fetch_peers, fetch_view};
    use crate::status::fake;

    #[tokio::test]
    async fn the_whole_way_round() {
        let dir = tempfile::tempdir().unwrap();
        let path = socket_path(dir.path());
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let socket = bind(dir.path()).unwrap();
        let task = tokio::spawn(serve(socket, fake::living_handle(), async {
            let _ = stopped.await;
        }));

        let view = fetch_view(&path).await.unwrap();
        assert_eq!((view.node.as_str(), view.peers.len(), view.lanes.len()), ("node-a", 3, 2));
        assert!(view.ready && view.lanes.iter().all(|lane| lane.answered));
        let peers = fetch_peers(&path, "node-c").await.unwrap();
        assert_eq!(peers.peers.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["node-c"]);
        assert_eq!(fetch_peers(&path, "").await.unwrap().peers.len(), 3);
        for (name, found) in [("node-c", true), ("zzz", false)] {
            let target = Target { run_dir: dir.path().to_owned(), socket: None, json: true };
            let args = PeersArgs { name: name.to_owned(), verbose: false, target };
            let done = tokio::task::spawn_blocking(move || client::peers(&args)).await.unwrap();
            assert_eq!(done.is_ok(), found, "{name}: {done:?}");
        }
        let json = serde_json::to_value(&view).unwrap();
        assert_eq!(json["peers"][0]["name"], "node-b");
        assert_eq!(json["peers"][2]["handshake_age_ms"], serde_json::Value::Null);

        // A client that says nothing does not keep the server from ending.
        let _silent = UnixStream::connect(&path).unwrap();
        stop.send(()).unwrap();
        tokio::time::timeout(FAREWELL * 3, task).await.unwrap().unwrap().unwrap();
        assert!(!path.exists());
        assert!(matches!(fetch_view(&path).await, Err(ClientError::NotRunning { .. })));
    }

    #[tokio::test]
    async fn thousands_of_peers_fit_into_an_answer() {
        let mut snapshot = fake::snapshot();
        let peers = (0..5000).map(|id| {
            let like = fake::peer(id % 100, &format!("a-node-with-quite-a-long-name.example-{id}"));
            Some(std::sync::Arc::new(crate::snapshot::Peer { id: crate::snapshot::PeerId(id), ..like }))
        });
        snapshot.mesh =
            std::sync::Arc::new(crate::snapshot::Mesh { peers: peers.collect(), ..Default::default() });
        let handle = fake::living_handle_of(snapshot);
        let dir = tempfile::tempdir().unwrap();
        let socket = bind(dir.path()).unwrap();
        let task = tokio::spawn(serve(socket, handle, std::future::pending()));
        assert_eq!(fetch_view(&socket_path(dir.path())).await.unwrap().peers.len(), 5000);
        task.abort();
    }

    #[tokio::test]
    async fn no_agent_is_told_with_the_socket_and_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = socket_path(dir.path());
        for stale in [false, true] {
            if stale {
                drop(UnixListener::bind(&path).unwrap());
            }
            let error = fetch_view(&path).await.unwrap_err();
            assert!(matches!(error, ClientError::NotRunning { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains(&path.display().to_string()) && text.contains("warren agent"), "{text}");
        }
    }

    #[test]
    fn a_second_agent_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _first = bind(dir.path()).unwrap();
        assert!(matches!(bind(dir.path()), Err(SocketError::InUse { .. })));
    }
}
