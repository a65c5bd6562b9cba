//! The environment of a call: the verb and its arguments.

use std::path::PathBuf;

use super::error::{CniError, Code};
use super::{PLUGIN, SpecVersion};

/// What the runtime wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    Add,
    Del,
    Check,
    Status,
    Gc,
    Version,
}

impl Verb {
    const ALL: [Verb; 6] = [Verb::Add, Verb::Del, Verb::Check, Verb::Status, Verb::Gc, Verb::Version];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Verb::Add => "ADD",
            Verb::Del => "DEL",
            Verb::Check => "CHECK",
            Verb::Status => "STATUS",
            Verb::Gc => "GC",
            Verb::Version => "VERSION",
        }
    }

    /// The version that brought it.
    pub(super) const fn since(self) -> SpecVersion {
        match self {
            Verb::Add | Verb::Del | Verb::Version => SpecVersion::V0_3_0,
            Verb::Check => SpecVersion::V0_4_0,
            Verb::Status | Verb::Gc => SpecVersion::V1_1_0,
        }
    }

    /// Whether more of the network configuration matters than that it is one.
    pub(super) const fn reads_its_input(self) -> bool {
        match self {
            Verb::Add | Verb::Check | Verb::Status => true,
            Verb::Del | Verb::Gc | Verb::Version => false,
        }
    }

    const fn is_about_a_container(self) -> bool {
        match self {
            Verb::Add | Verb::Del | Verb::Check => true,
            Verb::Status | Verb::Gc | Verb::Version => false,
        }
    }

    const fn needs_namespace(self) -> bool {
        match self {
            Verb::Add | Verb::Check => true,
            Verb::Del | Verb::Status | Verb::Gc | Verb::Version => false,
        }
    }
}

/// One call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) verb: Verb,
    /// The interface in the container; empty where the verb is about none.
    pub(super) interface: String,
    /// The container's network namespace.
    pub(super) namespace: Option<PathBuf>,
    /// Whether that may be our own.
    pub(super) namespace_may_be_ours: bool,
}

impl Call {
    pub(super) fn from_environment() -> Result<Call, CniError> {
        Call::parse(|name| {
            std::env::var_os(name).map(|value| value.into_string().map_err(|_| unreadable(name))).transpose()
        })
    }

    /// The variables of SPEC.md, "Parameters". The container's id is checked though we do not need it: a runtime
    /// that sends a bad one should hear of it from whoever is asked first.
    pub(super) fn parse(
        variable: impl Fn(&str) -> Result<Option<String>, CniError>,
    ) -> Result<Call, CniError> {
        let needed = |name: &str| {
            let value = variable(name)?.filter(|value| !value.is_empty());
            value.ok_or_else(|| wrong(format!("{name} is not set")).with(about()))
        };
        let word = needed("CNI_COMMAND")?;
        let Some(verb) = Verb::ALL.into_iter().find(|verb| verb.name() == word) else {
            let word: String = word.chars().take(32).collect();
            return Err(wrong(format!("CNI_COMMAND is {word:?}, which is not a verb of CNI")).with(about()));
        };
        let mut call = Call { verb, interface: String::new(), namespace: None, namespace_may_be_ours: false };
        if !verb.is_about_a_container() {
            return Ok(call);
        }
        if !is_identifier(&needed("CNI_CONTAINERID")?) {
            let reason = "CNI_CONTAINERID is not letters and digits, then also . _ -";
            return Err(wrong(reason));
        }
        call.interface = needed("CNI_IFNAME")?;
        if !is_interface_name(&call.interface) {
            return Err(wrong("CNI_IFNAME is no name of an interface: 1 to 15 bytes, no space, / or :"));
        }
        call.namespace = match verb.needs_namespace() {
            true => Some(needed("CNI_NETNS")?),
            false => variable("CNI_NETNS")?,
        }
        .map(PathBuf::from);
        let same = variable("CNI_NETNS_OVERRIDE")?.unwrap_or_default();
        call.namespace_may_be_ours = same == "1" || same.eq_ignore_ascii_case("true");
        Ok(call)
    }
}

/// Container ids and names of networks (SPEC.md, "Parameters" and "Configuration format").
pub(super) fn is_identifier(text: &str) -> bool {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric()) && text.bytes().all(fine)
}

/// SPEC.md, and `dev_valid_name` of the kernel's net/core/dev.c.
fn is_interface_name(text: &str) -> bool {
    let fine = |c: char| c != '/' && c != ':' && !c.is_whitespace() && !c.is_control();
    text.len() < libc::IFNAMSIZ && !matches!(text, "" | "." | "..") && text.chars().all(fine)
}

fn wrong(message: impl Into<String>) -> CniError {
    CniError::new(Code::InvalidEnvironment, message)
}

fn unreadable(name: &str) -> CniError {
    wrong(format!("{name} is not UTF-8"))
}

/// For a person who tries it by hand.
fn about() -> String {
    format!(
        "{PLUGIN} is a CNI plugin: a container runtime runs it, after `bridge` or `ptp` in a list of plugins. \
         `warren install-cni --help` says more"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(variables: &[(&str, &str)]) -> Result<Call, CniError> {
        let find = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        Call::parse(|name| Ok(find(name)))
    }

    #[test]
    fn each_verb_needs_its_variables() {
        let (id, name, space) =
            (("CNI_CONTAINERID", "a1.b_-"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "/run/netns/x"));
        for (verb, variables, good) in [
            ("ADD", &[id, name, space][..], true),
            ("ADD", &[id, name], false),
            ("ADD", &[id, space], false),
            ("ADD", &[name, space], false),
            ("CHECK", &[id, name, space], true),
            ("CHECK", &[id, name], false),
            ("DEL", &[id, name], true),
            ("DEL", &[id], false),
            ("STATUS", &[], true),
            ("GC", &[], true),
            ("VERSION", &[], true),
            ("add", &[id, name, space], false),
            ("", &[id, name, space], false),
        ] {
            let all = [&[("CNI_COMMAND", verb)], variables].concat();
            let parsed = parse(&all);
            assert_eq!(parsed.is_ok(), good, "{all:?}: {parsed:?}");
            if let Err(error) = parsed {
                assert_eq!(error.code, Code::InvalidEnvironment);
            }
        }
        assert!(parse(&[]).unwrap_err().details.contains("container runtime"));
    }

    #[test]
    fn odd_names_are_refused() {
        for (text, good) in [
            ("a", true),
            ("0a-._", true),
            ("", false),
            ("../x", false),
            ("-a", false),
            ("a/b", false),
            ("ä", false),
        ] {
            assert_eq!(is_identifier(text), good, "{text}");
        }
        for (text, good) in [
            ("eth0", true),
            ("123456789012345", true),
            ("1234567890123456", false),
            ("", false),
            (".", false),
            ("..", false),
            ("a/b", false),
            ("a b", false),
            ("a:1", false),
            ("a\u{1}", false),
        ] {
            assert_eq!(is_interface_name(text), good, "{text}");
        }
    }
}
