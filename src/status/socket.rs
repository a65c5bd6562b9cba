//! A unix socket of ours in the file system: taken over from a dead agent, refused while a live one has
//! it, removed at the end.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Why a socket could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// An agent has this run directory.
    #[error(
        "another agent is running: it has {}; stop it first (in another network namespace, and only there, a second \
         one can run, with its own --run-dir, --state-dir and --tun-name)",
        .path.display()
    )]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// A program answers on a socket whose directory is shared with others.
    #[error("another program answers on {}: another agent, or another WireGuard of that name?", .path.display())]
    Taken {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is no socket has the name.
    #[error("{} is in the way and is not a socket: move it away", .path.display())]
    NotASocket {
        /// What is in the way.
        path: PathBuf,
    },
    /// The kernel allows no longer names (`sun_path`, unix(7)).
    #[error("{} is too long for a unix socket (107 bytes at most): choose a shorter directory", .path.display())]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("cannot {what} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A listening socket, removed from the file system when dropped.
#[derive(Debug)]
pub struct OwnedSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode: what bears the name later may be someone else's.
    identity: (u64, u64),
    _lock: Option<File>,
}

/// Whether a lock file beside the socket decides who is first when two start at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// `NAME.lock` beside `NAME.sock`, held until the end; the file itself stays.
    Held,
    /// None: a directory that is shared with other programs.
    None,
}

/// `sockaddr_un.sun_path` has 108 bytes, the last one is the terminator (unix(7)).
const LONGEST_PATH: usize = 107;
/// What the socket is called until its permissions are right.
const UNFINISHED: &str = "new";

impl OwnedSocket {
    /// Listens at `path`, mode 0600, from its first moment; makes the directory with `dir_mode` if it is missing.
    pub fn bind(path: &Path, dir_mode: u32, lock: Lock) -> Result<OwnedSocket, SocketError> {
        let fail = |what| move |source| SocketError::Io { what, path: path.to_owned(), source };
        let unfinished = path.with_extension(UNFINISHED);
        if path.as_os_str().len().max(unfinished.as_os_str().len()) > LONGEST_PATH {
            return Err(SocketError::TooLong { path: path.to_owned() });
        }
        if let Some(dir) = path.parent() {
            let made = fs::DirBuilder::new().recursive(true).mode(dir_mode).create(dir);
            made.map_err(fail("make the directory of"))?;
        }
        let exclusive = lock == Lock::Held;
        let lock = exclusive.then(|| take_lock(path)).transpose()?;
        refuse_if_alive(path, exclusive)?;
        remove_if_there(&unfinished).map_err(fail("replace"))?;
        // Bound under another name, and renamed when its permissions are right: nobody can connect before.
        let listener = UnixListener::bind(&unfinished).map_err(fail("listen on"))?;
        let finish = || -> io::Result<(u64, u64)> {
            fs::set_permissions(&unfinished, fs::Permissions::from_mode(0o600))?;
            listener.set_nonblocking(true)?;
            let meta = fs::symlink_metadata(&unfinished)?;
            fs::rename(&unfinished, path)?;
            Ok((meta.dev(), meta.ino()))
        };
        let identity = finish().map_err(|source| {
            let _ = fs::remove_file(&unfinished);
            SocketError::Io { what: "listen on", path: path.to_owned(), source }
        })?;
        Ok(OwnedSocket { listener, path: path.to_owned(), identity, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The listener for an async server; `self` keeps the name alive meanwhile. Needs a tokio runtime.
    pub fn listener(&self) -> io::Result<tokio::net::UnixListener> {
        tokio::net::UnixListener::from_std(self.listener.try_clone()?)
    }
}

impl Drop for OwnedSocket {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.identity);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn take_lock(path: &Path) -> Result<File, SocketError> {
    let lock = path.with_extension("lock");
    let fail = |source| SocketError::Io { what: "lock", path: lock.clone(), source };
    let file = File::options().create(true).truncate(false).write(true).open(&lock).map_err(fail)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(SocketError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(source)) => Err(fail(source)),
    }
}

/// A socket that nobody listens on is what a killed agent leaves; anything else is not ours to remove.
fn refuse_if_alive(path: &Path, exclusive: bool) -> Result<(), SocketError> {
    let fail = |source| SocketError::Io { what: "look at", path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(fail(e)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(SocketError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {
            return Ok(());
        }
        // A full backlog (EAGAIN) is somebody too.
        Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(fail(e)),
        Ok(_) | Err(_) => {}
    }
    let path = path.to_owned();
    Err(if exclusive { SocketError::InUse { path } } else { SocketError::Taken { path } })
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_socket_is_private_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/warren.sock");
        let socket = OwnedSocket::bind(&path, 0o700, Lock::Held).unwrap();
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_live_owner_is_respected_and_a_dead_one_replaced() {
        for lock in [Lock::Held, Lock::None] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("warren.sock");
            drop(UnixListener::bind(&path).unwrap()); // std leaves the file: like a killed agent
            assert!(path.exists());
            let first = OwnedSocket::bind(&path, 0o700, lock).unwrap();
            let second = OwnedSocket::bind(&path, 0o700, lock).unwrap_err();
            let says = match lock {
                Lock::Held => "another agent is running",
                Lock::None => "another program answers",
            };
            assert!(second.to_string().contains(says), "{second}");
            UnixStream::connect(&path).unwrap();
            drop(first);
            drop(OwnedSocket::bind(&path, 0o700, lock).unwrap());
        }
    }

    #[test]
    fn an_agent_without_our_lock_is_respected_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("warren.sock");
        let _other = UnixListener::bind(&path).unwrap();
        assert!(matches!(OwnedSocket::bind(&path, 0o700, Lock::Held), Err(SocketError::InUse { .. })));
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn what_is_not_a_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("warren.sock");
        fs::write(&path, "precious").unwrap();
        let error = OwnedSocket::bind(&path, 0o700, Lock::None).unwrap_err();
        assert!(matches!(error, SocketError::NotASocket { .. }), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_successor_keeps_its_socket_when_the_predecessor_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("warren0.sock");
        let old = OwnedSocket::bind(&path, 0o700, Lock::None).unwrap();
        fs::remove_file(&path).unwrap();
        let new = OwnedSocket::bind(&path, 0o700, Lock::None).unwrap();
        drop(old);
        assert!(path.exists());
        drop(new);
    }

    #[test]
    fn a_path_that_is_too_long_is_named() {
        let path = PathBuf::from(format!("/tmp/{}/warren.sock", "x".repeat(120)));
        assert!(matches!(OwnedSocket::bind(&path, 0o700, Lock::None), Err(SocketError::TooLong { .. })));
    }
}
