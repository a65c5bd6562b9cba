//! The file and the environment: the layers below the flags.

use std::ffi::OsString;
use std::io;
use std::path::Path;

use clap::{CommandFactory, Parser};
use serde_json::Value;

use super::ConfigError;
use super::flags::{AgentArgs, Cli};
use crate::state::durable;
use crate::state::problem::{nearest, one_line, quote};

/// Largest configuration file.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Environment variables that look like ours and are not: probably typing mistakes. Others may be
/// Kubernetes' own (every Service named `warren...` makes some) and are left alone.
pub fn environment_warnings(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Vec<String> {
    let known: Vec<String> = Cli::command()
        .get_subcommands()
        .flat_map(|command| command.get_arguments())
        .filter_map(|argument| argument.get_env()?.to_str().map(str::to_owned))
        .collect();
    let mut warnings: Vec<String> = variables
        .into_iter()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
        .filter(|(name, _)| name.starts_with("WARREN_") && !known.contains(name))
        .filter_map(|(name, value)| {
            let meant = match name.as_str() {
                // Beside a Service named `warren` Kubernetes sets it, to an address; a person means a port.
                "WARREN_PORT" if value.to_str()?.parse::<u16>().is_ok() => "WARREN_LISTEN_PORT",
                "WARREN_PORT" => return None,
                _ => nearest(&name, known.iter().map(String::as_str))?,
            };
            Some(format!("environment variable {name} is not known; did you mean {meant}?"))
        })
        .collect();
    warnings.sort();
    warnings
}

/// The agent's arguments alone, so that the file goes through the same parser as the command line.
#[derive(Debug, Parser)]
#[command(name = "file", no_binary_name = true, disable_help_flag = true)]
pub(super) struct FileArgs {
    #[command(flatten)]
    args: AgentArgs,
}

/// What may not stand in the file: it makes no sense there.
const NOT_IN_FILE: [&str; 3] = ["config", "cleanup", "stay"];

/// Reads the file.
pub(super) fn read_file(path: &Path) -> Result<AgentArgs, ConfigError> {
    let name = path.display().to_string();
    let read = std::fs::canonicalize(path).and_then(|real| durable::read(&real, MAX_FILE_BYTES));
    let bytes = match read {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Err(ConfigError::Read { path: name, error: io::ErrorKind::NotFound.into() }),
        Err(error) => return Err(ConfigError::Read { path: name, error }),
    };
    let text = String::from_utf8(bytes)
        .map_err(|_| ConfigError::Syntax { path: name.clone(), reason: "not UTF-8".to_owned() })?;
    parse_file(&name, &text)
}

/// Reads the file's text.
pub(super) fn parse_file(path: &str, text: &str) -> Result<AgentArgs, ConfigError> {
    let syntax = |reason: String| ConfigError::Syntax { path: path.to_owned(), reason };
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_depth: 8, max_aliases: 0, max_documents: 1 },
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::Error,
        strict_booleans: true, // YAML 1.2: `on` and `off` are words, as --masquerade has them
        with_snippet: false,
    };
    let value: Value =
        serde_saphyr::from_str_with_options(text, options).map_err(|e| syntax(one_line(&e.to_string())))?;
    let settings = match value {
        Value::Null => serde_json::Map::new(),
        Value::Object(settings) => settings,
        Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            return Err(syntax("must be settings like `encap: auto`".to_owned()));
        }
    };
    let known: Vec<String> = FileArgs::command()
        .get_arguments()
        .filter_map(|argument| argument.get_long().map(str::to_owned))
        .filter(|name| !NOT_IN_FILE.contains(&name.as_str()))
        .collect();
    let mut arguments = Vec::with_capacity(settings.len());
    for (key, value) in &settings {
        if !known.contains(key) {
            let hint = nearest(key, known.iter().map(String::as_str));
            let hint = hint.map(|meant| format!("; did you mean {meant}?")).unwrap_or_default();
            return Err(ConfigError::UnknownKey { path: path.to_owned(), key: quote(key), hint });
        }
        let text = scalar_or_list(value)
            .ok_or_else(|| syntax(format!("{key} must be one value or a list of them")))?;
        arguments.push(format!("--{key}={text}"));
    }
    let parsed = FileArgs::try_parse_from(arguments).map_err(|error| {
        // The first paragraph says what is wrong; the rest tells about a command line.
        let text = error.to_string();
        let reason = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
        syntax(reason.replace("'--", "'"))
    })?;
    Ok(parsed.args)
}

fn scalar_or_list(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(on) => Some(on.to_string()),
        Value::Array(items) if items.iter().any(Value::is_array) => None,
        Value::Array(items) => {
            items.iter().map(scalar_or_list).collect::<Option<Vec<_>>>().map(|items| items.join(","))
        }
        Value::Null | Value::Object(_) => None,
    }
}

/// Each setting from `first` where it has it, else from `second`.
pub(super) fn merge(first: AgentArgs, second: AgentArgs) -> AgentArgs {
    macro_rules! either {
        ($($field:ident),*) => {
            AgentArgs { cleanup: first.cleanup, stay: first.stay, $($field: first.$field.or(second.$field),)* }
        };
    }
    either!(
        config,
        source,
        node,
        cluster_cidr,
        service_cidr,
        location,
        kubeconfig,
        api_server,
        kubelet_kubeconfig,
        probe_bind_address,
        encap,
        port,
        vxlan_port,
        vni,
        lanes,
        pin_lanes,
        endpoint,
        keepalive,
        rotate_keys,
        underlay_mtu,
        services,
        nodeport_addresses,
        nodeport_localhost,
        external_ips,
        healthz_bind_address,
        proxy_mode_bind_address,
        cni_conf_dir,
        cni_bin_dir,
        cni_conf_name,
        tun_name,
        masquerade,
        state_dir,
        run_dir,
        standby,
        instance,
        log,
        no_tun_gso,
        no_udp_gso,
        no_udp_gro,
        no_coalescing,
        no_ack_coalescing
    )
}
