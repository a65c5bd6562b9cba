//! What can go wrong between us and the node's kernel, and what a person does about it.

use std::io;

/// Why the node's network could not be brought to the wanted state.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// The kernel refused for lack of CAP_NET_ADMIN.
    #[error("no permission to {doing}: run as root, or give the container CAP_NET_ADMIN")]
    NoPermission {
        /// What was tried.
        doing: String,
    },
    /// The tunnel device is not there; the packet line has to open it (again) first.
    #[error("the tunnel device {name} does not exist: open its queues first")]
    NoTun {
        /// Its name.
        name: String,
    },
    /// A name that no Linux interface can have.
    #[error("`{name}` cannot be an interface name: 1 to 15 characters, no space, no slash")]
    BadName {
        /// The name.
        name: String,
    },
    /// IPv6 needs 1,280 bytes (RFC 8200 section 5); below that the kernel takes IPv6 off the device.
    #[error("MTU {mtu} is too small: IPv6 needs 1280; raise the underlay's MTU or drop the IPv6 pod range")]
    MtuTooSmall {
        /// The MTU asked for.
        mtu: u32,
    },
    /// The kernel has no nftables.
    #[error("the kernel has no nftables (CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET): load module nf_tables")]
    NoNftables,
    /// A kernel setting is wrong and cannot be changed from here.
    #[error(
        "sysctl {key} must be {value} and cannot be written ({source}): set it on the host, e.g. `sysctl -w {key}={value}`, or mount the node's /proc/sys/net at /host/proc/sys/net"
    )]
    Sysctl {
        /// Its dotted name.
        key: String,
        /// The value it must have.
        value: String,
        /// Why writing failed.
        source: io::Error,
    },
    /// Links, addresses, routes or rules.
    #[error("cannot {doing}: {source}")]
    Netlink {
        /// What was tried.
        doing: String,
        /// The kernel's answer.
        source: rtnetlink::Error,
    },
    /// nftables.
    #[error("cannot {doing}: {source}")]
    Nft {
        /// What was tried.
        doing: String,
        /// The kernel's answer.
        source: nlink::Error,
    },
    /// A socket or a file.
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was tried.
        doing: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl HostError {
    pub(super) fn io(doing: impl Into<String>, source: io::Error) -> Self {
        HostError::Io { doing: doing.into(), source }
    }

    pub(super) fn netlink(doing: impl Into<String>, source: rtnetlink::Error) -> Self {
        let doing = doing.into();
        match errno(&source) {
            Some(libc::EPERM | libc::EACCES) => HostError::NoPermission { doing },
            _ => HostError::Netlink { doing, source },
        }
    }

    pub(super) fn nft(doing: impl Into<String>, source: nlink::Error) -> Self {
        let doing = doing.into();
        if source.is_permission_denied() {
            return HostError::NoPermission { doing };
        }
        HostError::Nft { doing, source }
    }
}

/// The errno of a kernel answer, positive.
pub(super) fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(message.raw_code().abs()),
        _ => None,
    }
}
