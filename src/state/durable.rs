//! Small files that must be there whole or not at all: atomic replacement, and a seal that tells a torn or
//! foreign file from a good one.

use std::fs::{self, File, OpenOptions};
use std::hash::Hasher;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use siphasher::sip::SipHasher24;

/// What became of a file that was asked for.
#[derive(Debug, PartialEq, Eq)]
pub enum Loaded<T> {
    /// There is none.
    Missing,
    /// It is good.
    Good(T),
    /// It is not obeyed: why, and where it was moved (if it could be).
    SetAside {
        /// Why.
        reason: String,
        /// Where it is now.
        moved_to: Option<PathBuf>,
    },
}

/// Replaces a file: a reader sees the old or the new one, also after a power cut.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let temporary = draft_of(path)?;
    write_new(&temporary, bytes, mode)?;
    fs::rename(&temporary, path)?;
    sync_folder(path)
}

/// What [`replace`] leaves if it is killed.
pub fn draft_of(path: &Path) -> io::Result<PathBuf> {
    sibling(path, ".tmp")
}

/// Makes a file unless there is one. `false`: there was one, and it is untouched.
pub fn create(path: &Path, bytes: &[u8], mode: u32) -> io::Result<bool> {
    // Two processes may do this at once, so the temporary file is this one's own.
    let temporary = sibling(path, &format!(".{}.tmp", std::process::id()))?;
    write_new(&temporary, bytes, mode)?;
    let linked = fs::hard_link(&temporary, path); // unlike rename, it never replaces
    fs::remove_file(&temporary)?;
    match linked {
        Ok(()) => sync_folder(path).map(|()| true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads a file of at most `limit` bytes; `None` if there is none. Symbolic links are not followed.
pub fn read(path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let file = match file {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() > limit {
        return Err(io::Error::other(format!("not a regular file of at most {limit} bytes")));
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

/// Makes a folder, and those above it, that only its owner may enter.
pub fn private_folder(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Puts a first line before the body that says what it is, how long, and its checksum.
pub fn seal(kind: &str, version: u32, body: &[u8]) -> Vec<u8> {
    let mut out = format!("warren-{kind} {version} {} {:016x}\n", body.len(), checksum(body)).into_bytes();
    out.extend_from_slice(body);
    out
}

/// The body of a sealed file, or why it cannot be trusted.
pub fn unseal<'a>(kind: &str, version: u32, bytes: &'a [u8]) -> Result<&'a [u8], String> {
    let foreign = || format!("is not a file of this kind (warren-{kind})");
    let end = bytes.iter().take(100).position(|byte| *byte == b'\n').ok_or_else(foreign)?;
    let (line, body) = (bytes.get(..end).unwrap_or_default(), bytes.get(end + 1..).unwrap_or_default());
    let line = std::str::from_utf8(line).map_err(|_| foreign())?;
    let mut words = line.split(' ');
    if words.next().and_then(|word| word.strip_prefix("warren-")) != Some(kind) {
        return Err(foreign());
    }
    let written: u32 = words.next().and_then(|word| word.parse().ok()).ok_or_else(foreign)?;
    if written != version {
        return Err(format!("has version {written}, this program reads {version}"));
    }
    let length: usize = words.next().and_then(|word| word.parse().ok()).ok_or_else(foreign)?;
    if body.len() != length {
        return Err(format!("is torn: {} bytes of {length}", body.len()));
    }
    let sum = words.next().and_then(|word| u64::from_str_radix(word, 16).ok()).ok_or_else(foreign)?;
    if sum != checksum(body) { Err("is damaged: its checksum is wrong".to_owned()) } else { Ok(body) }
}

/// Moves a file that is not obeyed out of the way, so that a person can look at it.
pub fn set_aside<T>(path: &Path, reason: String) -> Loaded<T> {
    let mut name = path.as_os_str().to_owned();
    name.push(".bad");
    let moved_to = PathBuf::from(name);
    let moved = fs::rename(path, &moved_to).is_ok();
    Loaded::SetAside { reason, moved_to: moved.then_some(moved_to) }
}

/// Against accidents, not against forgers: who can write here can write a right checksum too.
fn checksum(body: &[u8]) -> u64 {
    let mut hasher = SipHasher24::new_with_keys(0x7761_7272_656e, 0x7365_616c);
    hasher.write(body);
    hasher.finish()
}

/// A hidden neighbour of the file: the folder source does not look at it.
fn sibling(path: &Path, suffix: &str) -> io::Result<PathBuf> {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| io::Error::other("no file name"))?;
    Ok(path.with_file_name(format!(".{name}{suffix}")))
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    match fs::remove_file(path) {
        Ok(()) => {} // left behind by a process that was killed
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    if written.is_err() {
        let _ = fs::remove_file(path); // the first error is the one to tell
    }
    written
}

fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn files_are_replaced_whole_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        assert_eq!(read(&path, 10).unwrap(), None);
        assert!(create(&path, b"one", 0o600).unwrap());
        assert!(!create(&path, b"two", 0o600).unwrap());
        assert_eq!(read(&path, 10).unwrap().as_deref(), Some(&b"one"[..]));
        replace(&path, b"three", 0o600).unwrap();
        assert_eq!(read(&path, 10).unwrap().as_deref(), Some(&b"three"[..]));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(read(&path, 4).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_seal_tells_what_is_wrong() {
        let sealed = seal("x", 1, b"body");
        assert_eq!(unseal("x", 1, &sealed), Ok(&b"body"[..]));
        assert!(unseal("y", 1, &sealed).unwrap_err().contains("kind"));
        assert!(unseal("x", 2, &sealed).unwrap_err().contains("version 1"));
        assert!(unseal("x", 1, &sealed[..sealed.len() - 1]).unwrap_err().contains("torn"));
        let mut flipped = sealed.clone();
        *flipped.last_mut().unwrap() ^= 1;
        assert!(unseal("x", 1, &flipped).unwrap_err().contains("checksum"));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = unseal("x", 1, &bytes);
        }
    }
}
