//! What each verb does.

use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use serde_json::Value;

use super::attachment::Attachment;
use super::call::{Call, Verb};
use super::data_path::{self, DataPath, Health};
use super::error::{CniError, Code};
use super::input::{Input, Previous};
use crate::io::clock;

/// How long ADD waits for the agent, and how often it looks. A kubelet gives a pod four minutes, and tries again.
const PATIENCE: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(100);

pub(super) fn serve(call: &Call, input: Input) -> Result<Option<Value>, CniError> {
    check_version(call, &input)?;
    match call.verb {
        Verb::Add => add(call, input).map(Some),
        Verb::Check => check(call, &input).map(|()| None),
        Verb::Status => status(&input.run_dir).map(|()| None),
        // There is nothing of ours to remove: see the head of this room.
        Verb::Del | Verb::Gc | Verb::Version => Ok(None),
    }
}

pub(super) fn check_version(call: &Call, input: &Input) -> Result<(), CniError> {
    let (verb, since) = (call.verb.name(), call.verb.since());
    match input.version < since {
        true => {
            let reason =
                format!("CNI version {} of the configuration has no {verb}, {since} has", input.version);
            Err(CniError::new(Code::IncompatibleVersion, reason))
        }
        false => Ok(()),
    }
}

/// Gives the pod the MTU that its paths allow, at both ends, and hands the result on.
fn add(call: &Call, input: Input) -> Result<Value, CniError> {
    let previous = input.previous.ok_or_else(no_result)?;
    let mut attachment = Attachment::find(call, &previous)?;
    attachment.check_gateway(&previous)?;
    let data_path = wait(&input.run_dir)?;
    attachment.check_ranges(&previous, &data_path.pod_ranges)?;
    attachment.set_mtu(data_path.pod_mtu)?;
    let entries = attachment.entries(&previous);
    Ok(previous.result(input.version, data_path.pod_mtu, &entries))
}

/// Compares the result with the kernel, and both with what the agent knows.
fn check(call: &Call, input: &Input) -> Result<(), CniError> {
    let previous: &Previous = input.previous.as_ref().ok_or_else(no_result)?;
    let mut attachment = Attachment::find(call, previous)?;
    attachment.check_gateway(previous)?;
    let data_path = match data_path::look(&input.run_dir) {
        Health::Alive(data_path) => data_path,
        health @ (Health::Dead(_) | Health::Never) => return Err(not_ready(&health, Code::TryAgainLater)),
    };
    attachment.check_device(&data_path.device)?;
    attachment.check_ranges(previous, &data_path.pod_ranges)?;
    attachment.check(previous, data_path.pod_mtu)
}

/// Goes into the node's Ready condition.
fn status(run_dir: &Path) -> Result<(), CniError> {
    match data_path::look(run_dir) {
        Health::Alive(_) => Ok(()),
        health @ Health::Dead(_) => Err(not_ready(&health, Code::LimitedConnectivity)),
        health @ Health::Never => Err(not_ready(&health, Code::NotAvailable)),
    }
}

fn wait(run_dir: &Path) -> Result<DataPath, CniError> {
    let deadline = clock::now() + PATIENCE;
    loop {
        let health = data_path::look(run_dir);
        match health {
            Health::Alive(data_path) => return Ok(data_path),
            Health::Dead(_) | Health::Never if clock::now() >= deadline => {
                return Err(not_ready(&health, Code::TryAgainLater));
            }
            Health::Dead(_) | Health::Never => sleep(LOOK_EVERY),
        }
    }
}

fn not_ready(health: &Health, code: Code) -> CniError {
    let what = match health {
        Health::Dead(since) => {
            format!("the Warren agent on this node has not moved packets for {} s", since.as_secs())
        }
        Health::Alive(_) | Health::Never => "the Warren agent on this node is not ready yet".to_owned(),
    };
    CniError::new(code, what)
        .with("the log of the agent says why: of its pod on this node, or `journalctl -u warren`")
}

pub(super) fn no_result() -> CniError {
    CniError::new(Code::InvalidConfig, "there is no prevResult: warren-cni cannot stand alone").with(
        "it completes what `bridge` or `ptp` makes: put it after one of them in the list of plugins (a .conflist)",
    )
}
