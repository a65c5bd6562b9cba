//! Whether kube-proxy has its rules here. Two that translate the same addresses would both do half.
//!
//! | kube-proxy's mode | what it leaves |
//! |---|---|
//! | nftables | `table ip kube-proxy`, `table ip6 kube-proxy` |
//! | iptables, ipvs (by iptables-nft) | chain `KUBE-SERVICES` in `table ip nat`, `table ip6 nat` |
//! | iptables, ipvs (by iptables-legacy) | the same chain in the old kernel tables, out of nftables' sight |
//!
//! The kubelet's own chains (`KUBE-KUBELET-CANARY`, `KUBE-FIREWALL`) are no sign. Rules stay when
//! kube-proxy ends: `kube-proxy --cleanup` removes them.

use nlink::netlink::nftables::Family;
use nlink::netlink::{Connection, Nftables};

use super::HostError;
use super::legacy;

/// Made by kube-proxy alone, in every mode that uses iptables.
const CHAIN: &str = "KUBE-SERVICES";
const TABLE: &str = "kube-proxy";

/// What was found, and when it has to be looked for again.
#[derive(Debug, Default)]
pub(super) struct Look {
    generation: Option<u32>,
    nft: Option<String>,
    legacy: legacy::Nat,
}

impl Look {
    /// Where its rules are, in words. Looks only where something has changed since the last time.
    pub(super) async fn find(
        &mut self,
        connection: &Connection<Nftables>,
        generation: u32,
    ) -> Result<Option<String>, HostError> {
        if self.generation != Some(generation) {
            self.nft =
                in_nft(connection).await.map_err(|e| HostError::nft("look for kube-proxy's rules", e))?;
            self.generation = Some(generation);
        }
        self.legacy.look(CHAIN);
        Ok(self.place())
    }

    /// Whether it was there the last time.
    pub(super) fn found(&self) -> bool {
        self.place().is_some()
    }

    /// What a person should know of the last look.
    pub(super) fn warning(&self) -> Option<String> {
        let error = self.legacy.failure()?;
        Some(format!(
            "the tables of iptables-legacy cannot be looked at ({error}): whether kube-proxy has its rules there is not \
             known"
        ))
    }

    fn place(&self) -> Option<String> {
        let legacy = || self.legacy.found().map(|tool| format!("chain {CHAIN} of {tool}'s table nat"));
        self.nft.clone().or_else(legacy)
    }
}

async fn in_nft(connection: &Connection<Nftables>) -> Result<Option<String>, nlink::Error> {
    let tables = connection.list_tables().await?;
    for family in [Family::Ip, Family::Ip6] {
        let has = |name: &str| tables.iter().any(|table| table.family == family && table.name == name);
        if has(TABLE) {
            return Ok(Some(format!("nft table {family} {TABLE}")));
        }
        if has("nat") {
            let chains = connection.list_chains_in("nat", family).await?;
            if chains.iter().any(|chain| chain.name == CHAIN) {
                return Ok(Some(format!("chain {CHAIN} of nft table {family} nat")));
            }
        }
    }
    Ok(None)
}
