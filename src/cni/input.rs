//! The network configuration on standard input, and the result of the plugins before us in it.

use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde_json::{Map, Value};

use super::SpecVersion;
use super::call::{Verb, is_identifier};
use super::error::{CniError, Code};

/// The agent's, unless it was told otherwise.
pub(super) const DEFAULT_RUN_DIR: &str = "/run/warren";
/// A pod has a few of each; every one of them costs a question to the kernel or a comparison.
const MOST_INTERFACES: usize = 64;
const MOST_ADDRESSES: usize = 256;

/// What the runtime says.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Input {
    pub(super) version: SpecVersion,
    /// The agent's run directory.
    pub(super) run_dir: PathBuf,
    pub(super) previous: Option<Previous>,
}

impl Input {
    /// Of what the verb has no use for nothing is read: a DEL that fails keeps a pod from going.
    pub(super) fn parse(bytes: &[u8], verb: Verb) -> Result<Input, CniError> {
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|e| CniError::new(Code::Decode, format!("the network configuration is no JSON: {e}")))?;
        let Value::Object(mut config) = value else {
            return Err(CniError::new(Code::Decode, "the network configuration is no JSON object"));
        };
        let version = version(&config)?;
        let name = text(&config, "name")?.unwrap_or_default();
        if !is_identifier(name) {
            let reason = "the network's name is not letters and digits, then also . _ -";
            return Err(CniError::new(Code::InvalidConfig, reason));
        }
        if !verb.reads_its_input() {
            return Ok(Input { version, run_dir: DEFAULT_RUN_DIR.into(), previous: None });
        }
        let run_dir = PathBuf::from(text(&config, "runDir")?.unwrap_or(DEFAULT_RUN_DIR));
        if !run_dir.is_absolute() {
            return Err(CniError::new(Code::InvalidConfig, "runDir is not an absolute path"));
        }
        let previous = match config.remove("prevResult") {
            None | Some(Value::Null) => None,
            Some(result) => Some(Previous::parse(result)?),
        };
        Ok(Input { version, run_dir, previous })
    }
}

/// What the plugins before us returned: kept as it came, and read as far as we need it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Previous {
    whole: Map<String, Value>,
    pub(super) interfaces: Vec<Interface>,
    pub(super) addresses: Vec<Address>,
}

/// An interface of the result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) name: String,
    pub(super) mac: String,
    pub(super) mtu: Option<u32>,
    /// Whether it is the container's; the others are the host's.
    pub(super) inside: bool,
}

/// An address of the result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) net: IpNet,
    pub(super) gateway: Option<IpAddr>,
    /// Which interface has it.
    pub(super) interface: Option<usize>,
}

impl Previous {
    fn parse(result: Value) -> Result<Previous, CniError> {
        let Value::Object(whole) = result else { return Err(wrong("prevResult", "is no object")) };
        if text(&whole, "cniVersion")?.is_some() {
            version(&whole)?;
        }
        let interfaces = list(&whole, "interfaces", MOST_INTERFACES)?;
        let interfaces: Vec<Interface> = interfaces.iter().map(Interface::parse).collect::<Result<_, _>>()?;
        let addresses = list(&whole, "ips", MOST_ADDRESSES)?;
        let addresses: Vec<Address> = addresses
            .iter()
            .map(|value| Address::parse(value, interfaces.len()))
            .collect::<Result<_, _>>()?;
        Ok(Previous { whole, interfaces, addresses })
    }

    /// The addresses of an interface of the result.
    pub(super) fn addresses_of(&self, interface: usize) -> impl Iterator<Item = &Address> {
        self.addresses.iter().filter(move |address| address.interface == Some(interface))
    }

    /// The result to hand on: as it came, in the wanted version, with the MTU of these interfaces.
    pub(super) fn result(self, version: SpecVersion, mtu: u16, changed: &[usize]) -> Value {
        let mut whole = self.whole;
        whole.insert("cniVersion".to_owned(), version.name().into());
        if version >= SpecVersion::V1_1_0 {
            for interface in changed {
                let entry = whole.get_mut("interfaces").and_then(|all| all.get_mut(*interface));
                if let Some(Value::Object(entry)) = entry {
                    entry.insert("mtu".to_owned(), mtu.into());
                }
            }
        }
        // Usually right already: libcni converts a result for the plugin that gets it.
        let addresses = whole.get_mut("ips").and_then(Value::as_array_mut).into_iter().flatten();
        for (entry, address) in addresses.filter_map(Value::as_object_mut).zip(&self.addresses) {
            if version >= SpecVersion::V1_0_0 {
                entry.remove("version");
            } else {
                let family = if address.net.addr().is_ipv4() { "4" } else { "6" };
                entry.insert("version".to_owned(), family.into());
            }
        }
        Value::Object(whole)
    }
}

impl Interface {
    fn parse(value: &Value) -> Result<Interface, CniError> {
        let Value::Object(entry) = value else { return Err(wrong("interfaces", "holds no objects")) };
        let mtu = match entry.get("mtu") {
            None | Some(Value::Null) => None,
            Some(value) => {
                let mtu = value.as_u64().and_then(|mtu| u32::try_from(mtu).ok());
                Some(mtu.ok_or_else(|| wrong("mtu", "is no number of bytes"))?)
            }
        };
        Ok(Interface {
            name: text(entry, "name")?.unwrap_or_default().to_owned(),
            mac: text(entry, "mac")?.unwrap_or_default().to_owned(),
            mtu: mtu.filter(|mtu| *mtu > 0),
            inside: text(entry, "sandbox")?.is_some_and(|sandbox| !sandbox.is_empty()),
        })
    }
}

impl Address {
    fn parse(value: &Value, interfaces: usize) -> Result<Address, CniError> {
        let Value::Object(entry) = value else { return Err(wrong("ips", "holds no objects")) };
        let net = text(entry, "address")?.and_then(|text| text.parse().ok());
        let net = net.ok_or_else(|| wrong("address", "is not like 10.244.1.7/24"))?;
        let gateway = match text(entry, "gateway")? {
            None | Some("") => None,
            Some(text) => Some(text.parse().map_err(|_| wrong("gateway", "is no address"))?),
        };
        let interface = match entry.get("interface") {
            None | Some(Value::Null) => None,
            Some(value) => {
                let index = value.as_u64().and_then(|index| usize::try_from(index).ok());
                let index = index.filter(|index| *index < interfaces);
                Some(index.ok_or_else(|| wrong("interface", "is none of the result's interfaces"))?)
            }
        };
        Ok(Address { net, gateway, interface })
    }
}

/// Where none is said, 0.1.0 is meant (SPEC.md of those days).
fn version(object: &Map<String, Value>) -> Result<SpecVersion, CniError> {
    let name = text(object, "cniVersion")?.unwrap_or("0.1.0");
    SpecVersion::parse(name).ok_or_else(|| {
        let [oldest, .., newest] = SpecVersion::ALL;
        // Whatever was sent as a version comes back in the answer.
        let name: String = name.chars().take(32).collect();
        CniError::new(Code::IncompatibleVersion, format!("CNI version {name:?} is not one of ours"))
            .with(format!("{oldest} to {newest} are"))
    })
}

fn text<'a>(object: &'a Map<String, Value>, key: &str) -> Result<Option<&'a str>, CniError> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => {
            Err(wrong(key, "is no text"))
        }
    }
}

fn list<'a>(object: &'a Map<String, Value>, key: &str, most: usize) -> Result<&'a [Value], CniError> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(items)) if items.len() <= most => Ok(items),
        Some(Value::Array(_)) => Err(wrong(key, &format!("has more than {most} entries"))),
        Some(Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_)) => {
            Err(wrong(key, "is no list"))
        }
    }
}

fn wrong(key: &str, reason: &str) -> CniError {
    CniError::new(Code::Decode, format!("{key} {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(value: &Value) -> Result<Input, CniError> {
        Input::parse(value.to_string().as_bytes(), Verb::Add)
    }

    fn config(previous: Value) -> Value {
        json!({ "cniVersion": "1.0.0", "name": "net", "type": "warren-cni", "prevResult": previous })
    }

    #[test]
    fn refusals_have_the_right_code() {
        for (bytes, code) in [
            (&b""[..], Code::Decode),
            (b"{", Code::Decode),
            (b"[]", Code::Decode),
            (b"\xff", Code::Decode),
            (b"{\"cniVersion\":\"1.0.0\",\"name\":\"n\"", Code::Decode),
            (b"{\"cniVersion\":1,\"name\":\"n\"}", Code::Decode),
            (b"{\"cniVersion\":\"9.0.0\",\"name\":\"n\"}", Code::IncompatibleVersion),
            (b"{\"cniVersion\":\"0.2.0\",\"name\":\"n\"}", Code::IncompatibleVersion),
            (b"{\"name\":\"n\"}", Code::IncompatibleVersion),
            (b"{\"cniVersion\":\"1.0.0\"}", Code::InvalidConfig),
            (b"{\"cniVersion\":\"1.0.0\",\"name\":\"../x\"}", Code::InvalidConfig),
            (b"{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"runDir\":\"run\"}", Code::InvalidConfig),
        ] {
            let error = Input::parse(bytes, Verb::Add).expect_err("refused");
            assert_eq!(error.code, code, "{}: {error}", String::from_utf8_lossy(bytes));
        }
        let deep = "[".repeat(10_000);
        assert_eq!(Input::parse(deep.as_bytes(), Verb::Add).unwrap_err().code, Code::Decode);
        for previous in [
            json!(7),
            json!({ "interfaces": 7 }),
            json!({ "interfaces": [7] }),
            json!({ "interfaces": [{ "name": 7 }] }),
            json!({ "interfaces": [{ "name": "eth0", "mtu": -1 }] }),
            json!({ "interfaces": vec![json!({ "name": "x" }); MOST_INTERFACES + 1] }),
            json!({ "ips": [{ "address": "10.0.0.1" }] }),
            json!({ "ips": [{ "address": "10.0.0.1/24", "interface": 0 }] }),
            json!({ "ips": [{ "address": "10.0.0.1/24", "interface": -1 }] }),
            json!({ "ips": [{ "address": "10.0.0.1/24", "gateway": "x" }] }),
        ] {
            assert_eq!(
                parse(&config(previous.clone())).expect_err("refused").code,
                Code::Decode,
                "{previous}"
            );
        }
        let foreign = config(json!({ "cniVersion": "2.0.0" }));
        assert_eq!(parse(&foreign).unwrap_err().code, Code::IncompatibleVersion);
    }

    #[test]
    fn a_result_goes_through_as_it_came() {
        let previous = json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                { "name": "br", "mac": "02:00:00:00:00:01" },
                { "name": "veth1", "mac": "02:00:00:00:00:02", "socketPath": "" },
                { "name": "eth0", "mac": "02:00:00:00:00:03", "mtu": 1500, "sandbox": "/run/netns/x" },
            ],
            "ips": [{ "address": "10.244.1.2/24", "gateway": "10.244.1.1", "interface": 2 },
                    { "address": "fd00::2/64", "interface": 2 }],
            "routes": [{ "dst": "0.0.0.0/0", "table": 7 }],
            "dns": { "search": ["x"] },
            "unknown": { "kept": [1, 2.5, null] },
        });
        let read = || parse(&config(previous.clone())).unwrap().previous.unwrap();
        assert_eq!((read().interfaces.len(), read().addresses_of(2).count()), (3, 2));
        assert_eq!(read().interfaces[2].mtu, Some(1500));

        let mut wanted = previous.clone();
        wanted["interfaces"][1]["mtu"] = 1420.into();
        wanted["interfaces"][2]["mtu"] = 1420.into();
        assert_eq!(read().result(SpecVersion::V1_1_0, 1420, &[1, 2]), wanted);

        let mut wanted = previous.clone();
        wanted["cniVersion"] = "0.4.0".into();
        wanted["ips"][0]["version"] = "4".into();
        wanted["ips"][1]["version"] = "6".into();
        assert_eq!(read().result(SpecVersion::V0_4_0, 1420, &[1, 2]), wanted);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
            let _ = Input::parse(&bytes, Verb::Add);
        }

        /// Something that is nearly right gets further than noise.
        #[test]
        fn no_torn_or_changed_configuration_panics(
            cut in 0usize..400, at in 0usize..400, byte in proptest::prelude::any::<u8>(),
        ) {
            let mut bytes = config(json!({
                "interfaces": [{ "name": "v", "mac": "m" }, { "name": "eth0", "sandbox": "/n", "mtu": 9 }],
                "ips": [{ "address": "10.244.1.2/24", "gateway": "10.244.1.1", "interface": 1 }],
            })).to_string().into_bytes();
            let length = bytes.len();
            bytes[at % length] = byte;
            let _ = Input::parse(&bytes, Verb::Add);
            bytes.truncate(cut % length);
            proptest::prop_assert!(Input::parse(&bytes, Verb::Del).is_err());
        }
    }
}
