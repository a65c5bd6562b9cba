//! Other people's plugins: which are installed, and which versions of CNI each speaks.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use tokio::time::timeout;

use super::SpecVersion;

/// A plugin answers in milliseconds; a loaded machine may need longer.
const PATIENCE: Duration = Duration::from_secs(5);
const MOST_BYTES: u64 = 1 << 16;
/// What every release of the usual plugins since 2019 speaks (v0.8.0 of containernetworking/plugins), those of Debian 11
/// and Ubuntu 22.04 no more than that. The next one has no verb that this one lacks.
pub const ASSUMED: SpecVersion = SpecVersion::V0_4_0;

/// What became of asking a plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spoken {
    /// These, of those that we speak.
    Versions(Vec<SpecVersion>),
    /// It is there and cannot be asked from here, as long as it stays the same: in a container it may lack its
    /// libraries. What it probably speaks, and why that is a guess.
    Assumed(SpecVersion, String),
}

impl Spoken {
    /// Whether it speaks this one.
    pub fn has(&self, version: SpecVersion) -> bool {
        match self {
            Spoken::Versions(versions) => versions.contains(&version),
            Spoken::Assumed(newest, _) => version <= *newest,
        }
    }
}

/// Whether there is a program of this name.
pub fn is_installed(folder: &Path, plugin: &str) -> bool {
    let file = std::fs::metadata(folder.join(plugin));
    file.is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

/// Asks a plugin (VERSION); it gets nothing of our environment and little time. An error: why it did not answer this
/// time, on a machine with too much to do perhaps; the next time it may.
pub async fn ask(folder: &Path, plugin: &str) -> Result<Spoken, String> {
    let assumed = |why: String| Ok(Spoken::Assumed(ASSUMED, why));
    match timeout(PATIENCE, run(&folder.join(plugin), folder)).await {
        Ok(Ok((status, output))) => match versions(&output) {
            Some(versions) => Ok(Spoken::Versions(versions)),
            None if status.code().is_some() => assumed("its answer makes no sense".to_owned()),
            None => Err(format!("it did not come to its end: {status}")),
        },
        // It was there a moment ago: what is not is the loader that it names.
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound && is_installed(folder, plugin) => {
            assumed("it needs libraries of the machine, which are not in this container".to_owned())
        }
        Ok(Err(error)) if is_lasting(&error) => assumed(format!("it cannot be run here: {error}")),
        Ok(Err(error)) => Err(format!("it could not be run: {error}")),
        Err(_) => Err(format!("it did not answer within {} s", PATIENCE.as_secs())),
    }
}

/// What lies in the file, and not in what the machine has left at the moment (execve(2)).
fn is_lasting(error: &io::Error) -> bool {
    error
        .raw_os_error()
        .is_some_and(|code| [libc::ENOEXEC, libc::EACCES, libc::EPERM, libc::EINVAL].contains(&code))
}

async fn run(program: &Path, folder: &Path) -> io::Result<(ExitStatus, Vec<u8>)> {
    let mut child = Command::new(program)
        .env_clear()
        .env("CNI_COMMAND", "VERSION")
        .env("CNI_PATH", folder)
        // Older ones want them for every verb.
        .envs(["CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS"].map(|name| (name, OsStr::new("version"))))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        let question = format!("{{\"cniVersion\":\"{}\"}}", SpecVersion::NEWEST);
        let _ = stdin.write_all(question.as_bytes()).await; // it need not read it
    }
    let mut output = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MOST_BYTES).read_to_end(&mut output).await?;
    }
    let status = child.wait().await?;
    Ok((status, output))
}

fn versions(output: &[u8]) -> Option<Vec<SpecVersion>> {
    let answer: Value = serde_json::from_slice(output).ok()?;
    let spoken = answer.get("supportedVersions")?.as_array()?;
    Some(spoken.iter().filter_map(|version| SpecVersion::parse(version.as_str()?)).collect())
}

/// Names of others in our messages: short, and no control characters.
pub(super) fn printable(text: &str) -> String {
    text.chars().take(64).map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_plugins() {
        let read = |text: &str| versions(text.as_bytes());
        let usual = r#"{"cniVersion":"1.0.0","supportedVersions":["0.1.0","0.4.0","1.0.0","7"]}"#;
        assert_eq!(read(usual), Some(vec![SpecVersion::V0_4_0, SpecVersion::V1_0_0]));
        assert_eq!(read(r#"{"supportedVersions":"1.0.0"}"#), None);
        assert_eq!(read("bash: error"), None);
    }

    #[tokio::test]
    async fn a_plugin_that_is_no_program_is_guessed_at() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("bridge"), "no program").unwrap();
        assert!(!is_installed(dir.path(), "bridge"));
        let spoken = ask(dir.path(), "bridge").await.expect("it will not be another one");
        assert!(spoken.has(SpecVersion::V0_4_0) && !spoken.has(SpecVersion::V1_0_0), "{spoken:?}");
    }

    /// As a plugin of the machine is in an image that holds nothing else: the kernel does not find its loader.
    #[tokio::test]
    async fn a_plugin_whose_libraries_are_not_here_is_guessed_at_and_that_is_said() {
        let dir = tempfile::tempdir().unwrap();
        script(dir.path(), "#!/no/such/loader\n");
        let Ok(Spoken::Assumed(version, why)) = ask(dir.path(), "bridge").await else {
            panic!("it cannot answer")
        };
        assert_eq!(version, SpecVersion::V0_4_0);
        assert!(why.contains("libraries"), "{why}");
    }

    #[tokio::test]
    async fn what_may_be_well_the_next_time_is_no_guess() {
        let dir = tempfile::tempdir().unwrap();
        // As if the machine had no memory left for it.
        script(dir.path(), "#!/bin/sh\nkill -KILL $$\n");
        let why = ask(dir.path(), "bridge").await.expect_err("it may answer the next time");
        assert!(why.contains("signal"), "{why}");
        // Without its libraries a program ends so, and with an error object an old one that knows no VERSION.
        for text in ["exit 127", "echo '{\"code\": 4}'; exit 1"] {
            script(dir.path(), &format!("#!/bin/sh\n{text}\n"));
            let spoken = ask(dir.path(), "bridge").await;
            assert!(matches!(spoken, Ok(Spoken::Assumed(..))), "{text}: {spoken:?}");
        }
    }

    /// A plugin `bridge`, never open for writing under its own name.
    fn script(folder: &Path, text: &str) {
        let draft = folder.join("draft");
        std::fs::write(&draft, text).unwrap();
        std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(draft, folder.join("bridge")).unwrap();
    }
}
