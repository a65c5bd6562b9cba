//! Links, addresses and routes of any namespace, through netlink: what the `bridge` CNI plugin would do.

use std::fs::{self, File};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, RawFd};

use futures_util::TryStreamExt;
use nix::sched::{CloneFlags, setns};
use rtnetlink::packet_route::address::AddressHeaderFlags;
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute};
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::DemoError;

/// Runs `work` on a thread that lives in `namespace`; the caller stays where it is.
pub(super) fn within<T: Send>(
    namespace: &File,
    work: impl FnOnce() -> Result<T, DemoError> + Send,
) -> Result<T, DemoError> {
    std::thread::scope(|scope| {
        let visit = scope.spawn(|| {
            setns(namespace, CloneFlags::CLONE_NEWNET)
                .map_err(|e| DemoError::system("entering a network namespace", e))?;
            work()
        });
        match visit.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Changes links, addresses and routes of `namespace`.
pub(super) fn configure<T: Send>(
    namespace: &File,
    work: impl AsyncFnOnce(Links) -> Result<T, DemoError> + Send,
) -> Result<T, DemoError> {
    within(namespace, || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(|e| DemoError::system("starting a runtime", e))?;
        runtime.block_on(async {
            let (connection, handle, _) =
                rtnetlink::new_connection().map_err(|e| DemoError::system("opening netlink", e))?;
            tokio::spawn(connection);
            work(Links(handle)).await
        })
    })
}

/// Sets a sysctl of the namespace that the calling thread is in (see [`within`]).
pub(super) fn sysctl(name: &str, value: &str) -> Result<(), DemoError> {
    let path = format!("/proc/sys/{name}");
    fs::write(&path, value).map_err(|e| DemoError::system(format!("writing {value} to {path}"), e))
}

/// One side of a veth pair that is yet to be made.
pub(super) struct End<'a> {
    /// Device name.
    pub name: &'a str,
    /// The namespace it is born in, if not the current one.
    pub namespace: Option<&'a File>,
}

/// The links of one namespace.
pub(super) struct Links(Handle);

impl Links {
    /// Makes a bridge, up, no spanning tree, as `cbr0` of the `bridge` plugin is. Its MAC is ours to choose, as
    /// there: left alone it is the lowest of its ports', and changes under everyone's feet when a pod goes
    /// (`br_stp_recalculate_bridge_id` in the kernel's net/bridge/br_stp_if.c).
    pub(super) async fn add_bridge(&self, name: &str, mac: [u8; 6], mtu: u16) -> Result<(), DemoError> {
        let message = LinkBridge::new(name).mtu(mtu.into()).address(mac.to_vec()).up().build();
        self.0.link().add(message).execute().await.map_err(wrong(format!("adding bridge {name}")))
    }

    /// Makes a veth pair, the far end born where it will live. Only the near end is up: `veth_newlink` in the
    /// kernel's drivers/net/veth.c configures the far one before it knows its partner.
    pub(super) async fn add_veth(&self, near: &str, far: End<'_>, mtu: u16) -> Result<(), DemoError> {
        let mut peer = LinkUnspec::new_with_name(far.name).mtu(mtu.into());
        if let Some(namespace) = far.namespace {
            let descriptor: RawFd = namespace.as_raw_fd();
            peer = peer.setns_by_fd(descriptor);
        }
        let message = LinkVeth::new(near, far.name)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build())))
            .mtu(mtu.into())
            .up()
            .build();
        let doing = format!("adding veth {near} - {}", far.name);
        self.0.link().add(message).execute().await.map_err(wrong(doing))
    }

    /// Makes `port` a port of `bridge`; with `hairpin` a pod can reach itself through its Service.
    pub(super) async fn attach(&self, port: &str, bridge: &str, hairpin: bool) -> Result<(), DemoError> {
        let (index, master) = (self.index(port).await?, self.index(bridge).await?);
        let doing = || format!("attaching {port} to {bridge}");
        let message = LinkUnspec::new_with_index(index).controller(master).build();
        self.0.link().set(message).execute().await.map_err(wrong(doing()))?;
        if hairpin {
            let message = LinkBridgePort::new(index).hairpin(true).build();
            self.0.link().set_port(message).execute().await.map_err(wrong(doing()))?;
        }
        Ok(())
    }

    /// Sets a device up.
    pub(super) async fn up(&self, name: &str) -> Result<(), DemoError> {
        let message = LinkUnspec::new_with_name(name).up().build();
        self.0.link().set(message).execute().await.map_err(wrong(format!("setting {name} up")))
    }

    /// Sets a device's MTU.
    pub(super) async fn set_mtu(&self, name: &str, mtu: u16) -> Result<(), DemoError> {
        let message = LinkUnspec::new_with_name(name).mtu(mtu.into()).build();
        self.0
            .link()
            .set(message)
            .execute()
            .await
            .map_err(wrong(format!("setting the MTU of {name} to {mtu}")))
    }

    /// Removes a device.
    pub(super) async fn remove(&self, name: &str) -> Result<(), DemoError> {
        let index = self.index(name).await?;
        self.0.link().del(index).execute().await.map_err(wrong(format!("removing {name}")))
    }

    /// Adds an address, usable at once: nobody else can have it here, so no duplicate detection (a second saved).
    pub(super) async fn add_address(&self, name: &str, address: IpAddr, length: u8) -> Result<(), DemoError> {
        let index = self.index(name).await?;
        let mut request = self.0.address().add(index, address, length);
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        request.execute().await.map_err(wrong(format!("adding {address}/{length} to {name}")))
    }

    /// Adds a default route.
    pub(super) async fn add_default_route(&self, gateway: IpAddr) -> Result<(), DemoError> {
        let message = match gateway {
            IpAddr::V4(via) => RouteMessageBuilder::<std::net::Ipv4Addr>::new().gateway(via).build(),
            IpAddr::V6(via) => RouteMessageBuilder::<std::net::Ipv6Addr>::new().gateway(via).build(),
        };
        let doing = format!("adding a default route via {gateway}");
        self.0.route().add(message).execute().await.map_err(wrong(doing))
    }

    async fn index(&self, name: &str) -> Result<u32, DemoError> {
        let found = self.0.link().get().match_name(name).execute().try_next().await;
        match found.map_err(wrong(format!("looking for {name}")))? {
            Some(link)
                if link.attributes.iter().any(|a| matches!(a, LinkAttribute::IfName(n) if n == name)) =>
            {
                Ok(link.header.index)
            }
            Some(_) | None => Err(DemoError::Usage(format!("there is no device {name}"))),
        }
    }
}

fn wrong(doing: String) -> impl FnOnce(rtnetlink::Error) -> DemoError {
    move |source| DemoError::Network { doing, source: Box::new(source) }
}
