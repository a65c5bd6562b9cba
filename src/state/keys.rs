//! The node's private keys: one X25519 key for each lane, made once, never leaving the state folder.
//!
//! One file a lane, in the text form that `wg genkey` writes. A file that is missing is made; one that
//! cannot be read or understood stops the agent: a new key over a damaged one would be another node's.
//!
//! While keys change ([`KeyRing`]), a lane has a second file: `lane-0.next.key` or `lane-0.last.key`.

mod ring;

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use thiserror::Error;
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

pub use ring::{KeyRing, Phase};

use super::{annotations, durable};
use crate::snapshot::{MAX_LANES, PublicKey};
use crate::tunnel::vxlan::mac_from_key;

/// The key pair of one lane. The secret is wiped from memory when it is dropped, and never printed.
#[derive(Clone)]
pub struct LaneKey {
    secret: StaticSecret,
    public: PublicKey,
}

impl LaneKey {
    /// The private key, for the tunnel.
    pub fn secret(&self) -> &StaticSecret {
        &self.secret
    }

    /// The public key, for the announcement.
    pub fn public(&self) -> PublicKey {
        self.public
    }
}

impl fmt::Debug for LaneKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LaneKey({}, secret withheld)", STANDARD.encode(self.public))
    }
}

/// Why the keys cannot be used, and what to do.
#[derive(Debug, Error)]
pub enum KeyError {
    /// Others may read it.
    #[error("{path} may be read by others (mode {mode:04o}); run: chmod {wanted} {path}")]
    TooOpen {
        /// The file or folder.
        path: String,
        /// Its mode.
        mode: u32,
        /// The mode that it should have.
        wanted: &'static str,
    },
    /// It belongs to another user.
    #[error("{path} belongs to user {owner}, the agent runs as {user}; run: chown {user} {path}")]
    Owner {
        /// The file or folder.
        path: String,
        /// Whose it is.
        owner: u32,
        /// Who we are.
        user: u32,
    },
    /// It holds no key.
    #[error(
        "{path} holds no private key ({reason}). Put the right one back; or, if this node may get a new \
         identity, remove the file"
    )]
    Corrupt {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The system refused.
    #[error("{path}: {error}")]
    Io {
        /// The file or folder.
        path: String,
        /// What the system said.
        error: io::Error,
    },
    /// A number of lanes that no node can have.
    #[error("{0} lanes; a node has 1 to {MAX_LANES}")]
    Lanes(usize),
}

/// The keys of all lanes, lane 0 first; those that do not exist yet are made.
fn load_or_create(state_folder: &Path, lanes: usize) -> Result<Vec<LaneKey>, KeyError> {
    if lanes == 0 || lanes > MAX_LANES {
        return Err(KeyError::Lanes(lanes));
    }
    let folder = state_folder.join("keys");
    durable::private_folder(&folder).map_err(at(&folder))?;
    let opened =
        OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_DIRECTORY).open(&folder);
    let metadata = opened.and_then(|folder| folder.metadata()).map_err(at(&folder))?;
    check(&folder, &metadata, "0700")?;
    let keys = (0..lanes).map(|lane| one(&path_of(&folder, lane))).collect::<Result<Vec<_>, _>>()?;
    for (index, key) in keys.iter().enumerate() {
        // A copied file: with one key on two lanes each would steal the other's sessions.
        if let Some(first) = keys.iter().take(index).position(|other| other.public == key.public) {
            let reason = format!("the same key as lane {first}");
            return Err(KeyError::Corrupt { path: path_of(&folder, index).display().to_string(), reason });
        }
    }
    Ok(keys)
}

fn path_of(folder: &Path, lane: usize) -> PathBuf {
    folder.join(format!("lane-{lane}.key"))
}

fn one(path: &Path) -> Result<LaneKey, KeyError> {
    if let Some(key) = load(path)? {
        return Ok(key);
    }
    let secret = StaticSecret::random();
    let mut text = Zeroizing::new(String::with_capacity(45));
    STANDARD.encode_string(secret.as_bytes(), &mut text);
    text.push('\n');
    if !durable::create(path, text.as_bytes(), 0o600).map_err(at(path))? {
        // Somebody was faster; theirs is the node's key then.
        let theirs = load(path)?;
        return theirs.ok_or_else(|| at(path)(io::Error::from(io::ErrorKind::NotFound)));
    }
    Ok(pair(secret))
}

fn load(path: &Path) -> Result<Option<LaneKey>, KeyError> {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(at(path)(error)),
    };
    let metadata = file.metadata().map_err(at(path))?;
    let corrupt =
        |reason: &str| KeyError::Corrupt { path: path.display().to_string(), reason: reason.to_owned() };
    if !metadata.is_file() {
        return Err(corrupt("not a regular file"));
    }
    check(path, &metadata, "0600")?;
    let text = contents(file).map_err(at(path))?;
    let Some(text) = text.strip_suffix(b"\n").or(Some(&text)).filter(|text| text.len() == 44) else {
        return Err(corrupt("44 characters of base64 were expected"));
    };
    // The decoder wants room for whole groups of three bytes, although the last is padding.
    let mut bytes = Zeroizing::new([0_u8; 33]);
    match STANDARD.decode_slice(text, bytes.as_mut_slice()) {
        Ok(32) => {}
        Ok(_) | Err(_) => return Err(corrupt("not base64 of 32 bytes")),
    }
    let mut key = Zeroizing::new([0_u8; 32]);
    key.copy_from_slice(bytes.get(..32).unwrap_or(&[0; 32]));
    if *key == [0; 32] {
        return Err(corrupt("all zero"));
    }
    Ok(Some(pair(StaticSecret::from(*key))))
}

/// The whole file, if it is as short as a key's; a little more otherwise.
fn contents(file: File) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut text = Zeroizing::new(Vec::with_capacity(64)); // never grows: no copy is left behind
    file.take(64).read_to_end(&mut text)?;
    Ok(text)
}

fn pair(secret: StaticSecret) -> LaneKey {
    let public = x25519_dalek::PublicKey::from(&secret).to_bytes();
    LaneKey { secret, public }
}

fn check(path: &Path, metadata: &fs::Metadata, wanted: &'static str) -> Result<(), KeyError> {
    let path = path.display().to_string();
    let user = nix::unistd::geteuid().as_raw();
    if metadata.uid() != user {
        return Err(KeyError::Owner { path, owner: metadata.uid(), user });
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 { Err(KeyError::TooOpen { path, mode, wanted }) } else { Ok(()) }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> KeyError {
    let path = path.display().to_string();
    move |error| KeyError::Io { path, error }
}

/// The inner MAC address of this node's VXLAN end: made from its first key, the same for ever after.
pub fn vxlan_mac(state_folder: &Path, first: &PublicKey) -> io::Result<[u8; 6]> {
    let path = state_folder.join("vxlan-mac");
    let made = mac_from_key(first);
    let text = durable::read(&path, 64)?.unwrap_or_default();
    let saved = std::str::from_utf8(&text).ok().and_then(|text| annotations::mac(text.trim()).ok());
    if let Some(saved) = saved {
        return Ok(saved);
    }
    durable::replace(&path, format!("{}\n", annotations::mac_text(made)).as_bytes(), 0o644)?;
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn keys_are_made_once_and_more_lanes_get_more() {
        let dir = tempfile::tempdir().unwrap();
        let publics = |lanes| {
            let keys = load_or_create(dir.path(), lanes).unwrap();
            keys.iter().map(LaneKey::public).collect::<Vec<_>>()
        };
        let first = publics(2);
        assert_ne!(first[0], first[1]);
        assert_eq!(publics(2), first);
        assert_eq!(publics(3)[..2], first);
        assert_eq!(mode(&dir.path().join("keys")), 0o700);
        assert_eq!(mode(&dir.path().join("keys/lane-0.key")), 0o600);
        assert!(load_or_create(dir.path(), 0).is_err() && load_or_create(dir.path(), MAX_LANES + 1).is_err());
    }

    #[test]
    fn a_damaged_file_is_never_written_over() {
        let dir = tempfile::tempdir().unwrap();
        load_or_create(dir.path(), 2).unwrap();
        let path = dir.path().join("keys/lane-0.key");
        let other = fs::read(dir.path().join("keys/lane-1.key")).unwrap();
        let zero = STANDARD.encode([0; 32]).into_bytes();
        for text in [&b""[..], b"x", &[b'!'; 44], &[b'A'; 60], &zero, &other] {
            fs::write(&path, text).unwrap();
            let error = load_or_create(dir.path(), 2).unwrap_err();
            assert!(matches!(error, KeyError::Corrupt { .. }), "{error}");
            assert_eq!(fs::read(&path).unwrap(), text);
            assert!(text.len() < 44 || !error.to_string().contains(std::str::from_utf8(text).unwrap()));
        }
    }

    #[test]
    fn keys_that_others_may_read_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        load_or_create(dir.path(), 1).unwrap();
        let (folder, file) = (dir.path().join("keys"), dir.path().join("keys/lane-0.key"));
        chmod(&file, 0o640);
        let error = load_or_create(dir.path(), 1).unwrap_err().to_string();
        assert!(error.contains("chmod 0600") && error.contains("0640"), "{error}");
        chmod(&file, 0o600);
        chmod(&folder, 0o755);
        assert!(load_or_create(dir.path(), 1).unwrap_err().to_string().contains("chmod 0700"));
        chmod(&folder, 0o700);
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", &file).unwrap();
        assert!(matches!(load_or_create(dir.path(), 1), Err(KeyError::Io { .. })));
    }

    #[test]
    fn a_key_is_not_printed() {
        let dir = tempfile::tempdir().unwrap();
        let keys = load_or_create(dir.path(), 1).unwrap();
        let text = fs::read_to_string(dir.path().join("keys/lane-0.key")).unwrap();
        assert!(!format!("{keys:?}").contains(text.trim()));
        assert_eq!(text.len(), 45);
    }
}
