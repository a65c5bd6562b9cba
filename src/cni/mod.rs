//! `warren-cni`: the CNI plugin that stands last in a chain after `bridge` or `ptp`, and what the agent needs to
//! put it there.
//!
//! The plugin is this same program under another name. A runtime starts it for every pod, so it has no tokio and
//! no clap on its way:
//!
//! 1. `call`: the verb and its arguments, from the environment
//! 2. `input`: the network configuration on standard input, with what the plugins before returned
//! 3. `attachment`: the pod's interface and the other end of its veth pair, asked of the kernel (`netlink`)
//! 4. `verbs`: what is to be done; [`data_path`] is what the agent says of itself
//! 5. the result, or an [`error`], on standard output
//!
//! It keeps no state of its own: addresses are the IPAM plugin's, devices go with the pod, and routes and rules
//! are the agent's. So there is nothing that a killed ADD leaves behind, and nothing that DEL or GC could miss.
//!
//! For the agent: [`conflist`] writes and changes lists of plugins, [`plugins`] asks each what it speaks, and
//! [`install`] puts the program in place.

mod attachment;
mod call;
pub mod conflist;
pub mod data_path;
pub mod error;
mod input;
pub mod install;
mod netlink;
pub mod plugins;
mod verbs;
mod version;

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::panic;
use std::process::ExitCode;

use serde_json::{Value, json};

use call::{Call, Verb};
use error::{CniError, Code};
use input::Input;
pub use version::SpecVersion;

/// The name of the plugin: of its file, and as the type in a list of plugins.
pub const PLUGIN: &str = "warren-cni";
/// More than any runtime sends; a result for a thousand routes has some 60 KiB.
const LARGEST_INPUT: u64 = 1 << 20;

/// Runs the plugin: everything it is told comes from the environment and standard input.
pub fn main() -> ExitCode {
    // Whatever happens, the runtime reads an error object; a backtrace would only fill its log.
    panic::set_hook(Box::new(|_| {}));
    let done = panic::catch_unwind(|| {
        let call = Call::from_environment();
        run(call, io::stdin().lock())
    });
    let (text, code) = match done {
        Ok(Ok(answer)) => (answer.map(|value| value.to_string()), ExitCode::SUCCESS),
        Ok(Err(failure)) => (Some(failure.object()), ExitCode::FAILURE),
        Err(_) => {
            let error = CniError::new(Code::Internal, "the plugin has a bug here; please report it");
            (Some(Failure { version: SpecVersion::NEWEST, error }.object()), ExitCode::FAILURE)
        }
    };
    if let Some(text) = text {
        // Nobody is left to be told when this fails.
        let _ = writeln!(io::stdout().lock(), "{text}");
    }
    code
}

/// Why a call failed, in the version that the runtime speaks.
#[derive(Debug)]
struct Failure {
    version: SpecVersion,
    error: CniError,
}

impl Failure {
    fn object(&self) -> String {
        let CniError { code, message, details } = &self.error;
        let mut object = json!({ "cniVersion": self.version.name(), "code": code.number(), "msg": message });
        if !details.is_empty() {
            object["details"] = details.as_str().into();
        }
        object.to_string()
    }
}

/// What is answered as far as nobody has to be asked, neither the kernel nor the agent: for fuzzing. `Err`: an error
/// object.
#[doc(hidden)]
pub fn answer_unasked(variables: &BTreeMap<String, String>, stdin: &[u8]) -> Result<String, String> {
    let call = Call::parse(|name| Ok(variables.get(name).cloned()));
    let answer = understand(call, stdin).and_then(|understood| match understood {
        None => Ok(version::answer()),
        Some((call, input)) => {
            let version = input.version;
            let failure = |error| Failure { version, error };
            verbs::check_version(&call, &input).map_err(failure)?;
            match (call.verb, input.previous) {
                (Verb::Add, Some(previous)) => {
                    let all: Vec<usize> = (0..previous.interfaces.len()).collect();
                    Ok(previous.result(version, 1420, &all))
                }
                (Verb::Add | Verb::Check, None) => Err(failure(verbs::no_result())),
                (Verb::Check | Verb::Del | Verb::Status | Verb::Gc | Verb::Version, _) => Ok(Value::Null),
            }
        }
    });
    answer.map(|answer| answer.to_string()).map_err(|failure| failure.object())
}

/// One call: what is to be printed, if anything.
fn run(call: Result<Call, CniError>, stdin: impl io::Read) -> Result<Option<Value>, Failure> {
    match understand(call, stdin)? {
        None => Ok(Some(version::answer())),
        Some((call, input)) => {
            let version = input.version;
            verbs::serve(&call, input).map_err(|error| Failure { version, error })
        }
    }
}

/// What is wanted. `None`: our versions, for which nothing else has to be known.
fn understand(call: Result<Call, CniError>, stdin: impl io::Read) -> Result<Option<(Call, Input)>, Failure> {
    // Before the input is read nobody knows what the runtime speaks.
    let early = |error| Failure { version: SpecVersion::NEWEST, error };
    let call = call.map_err(early)?;
    if call.verb == Verb::Version {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    let read = stdin.take(LARGEST_INPUT + 1).read_to_end(&mut bytes);
    read.map_err(|e| early(CniError::io("cannot read the network configuration", &e)))?;
    if bytes.len() as u64 > LARGEST_INPUT {
        let reason = format!("the network configuration has more than {LARGEST_INPUT} bytes");
        return Err(early(CniError::new(Code::Decode, reason)));
    }
    let input = Input::parse(&bytes, call.verb).map_err(early)?;
    Ok(Some((call, input)))
}

#[cfg(test)]
mod tests;
