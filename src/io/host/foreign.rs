//! Accept rules in other programs' FORWARD chains.
//!
//! An accept in a chain of ours ends only that chain: a later base chain of the same hook whose
//! policy is drop (Docker's, ufw's `ip filter FORWARD`) still drops. So one accept per interface and
//! direction goes to the head of every such chain. The rules have the shape that `iptables-nft`
//! writes itself (meta, cmp, counter, accept), or its `iptables -S` would refuse the whole table.
//! They are known again by their comment.

use std::collections::BTreeSet;

use nlink::netlink::nftables::{
    CmpOp, Family, Hook, MetaKey, NFT_MSG_NEWRULE, NFTA_CMP_DATA, NFTA_CMP_OP, NFTA_CMP_SREG,
    NFTA_COUNTER_BYTES, NFTA_COUNTER_PACKETS, NFTA_DATA_VALUE, NFTA_DATA_VERDICT, NFTA_EXPR_DATA,
    NFTA_EXPR_NAME, NFTA_IMMEDIATE_DATA, NFTA_IMMEDIATE_DREG, NFTA_LIST_ELEM, NFTA_META_DREG, NFTA_META_KEY,
    NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS, NFTA_RULE_TABLE, NFTA_RULE_USERDATA, NFTA_VERDICT_CODE, Policy,
    RawMessage, Register, RuleExpr, RuleInfo, Verdict, parse_expressions,
};
use nlink::netlink::{Connection, Nftables};

use super::links::PodBridge;
use super::nft::NAME;
use super::nla::{attribute, nested, string};
use super::{HostConfig, HostError, Report};

/// How every comment of ours begins.
const TAG: &str = "warren: ";
/// NF_ACCEPT, include/uapi/linux/netfilter.h.
const NF_ACCEPT: u32 = 1;
/// NLM_F_CREATE without NLM_F_APPEND: a new rule goes to the head of its chain.
const AT_HEAD: u16 = libc::NLM_F_CREATE as u16;
/// NFTNL_UDATA_RULE_COMMENT of libnftnl's udata.h: the type byte of a comment.
const COMMENT: u8 = 0;

/// Tables that never drop by default and may be huge; listing them at every change would cost.
const KNOWN_TO_ACCEPT: [&str; 2] = [NAME, "kube-proxy"];

/// One accept rule, identified by its comment.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Accept {
    inbound: bool,
    interface: String,
}

/// A base chain of somebody else on the forward hook.
struct ForwardChain {
    family: Family,
    table: String,
    chain: String,
    drops_by_policy: bool,
}

/// Puts our rules into every foreign forward chain that drops, takes them out of those that no
/// longer do.
pub(super) async fn apply(
    connection: &Connection<Nftables>,
    config: &HostConfig,
    bridges: &[PodBridge],
    report: &mut Report,
) -> Result<(), HostError> {
    let wanted = wanted(config, bridges);
    for chain in forward_chains(connection).await? {
        let place = chain.place();
        let rules = rules_of(connection, &chain).await?;
        let drops = chain.drops_by_policy || rules.iter().rfind(|r| !is_ours(r)).is_some_and(drops_all);
        let mut missing = if drops { wanted.clone() } else { BTreeSet::new() };
        let mut transaction = connection.transaction();
        let mut changed = false;
        for rule in rules.iter().filter(|rule| is_ours(rule)) {
            if missing.iter().any(|accept| says(rule, &accept.comment())) {
                missing.retain(|accept| !says(rule, &accept.comment()));
                continue;
            }
            transaction = transaction.del_rule(&chain.table, &chain.chain, chain.family, rule.handle);
            report.removed(format!("a rule in {place}"));
            changed = true;
        }
        for accept in &missing {
            transaction = transaction.raw(accept.message(&chain));
            report.added(format!("a rule in {place}, which drops: accept {}", accept.describe()));
            changed = true;
        }
        if changed {
            let doing = format!("let pod traffic through {place}");
            transaction.commit(connection).await.map_err(|e| HostError::nft(doing, e))?;
        }
    }
    Ok(())
}

/// Takes all our rules out of foreign chains; says which.
pub(super) async fn remove(
    connection: &Connection<Nftables>,
    removed: &mut Vec<String>,
) -> Result<(), HostError> {
    for chain in forward_chains(connection).await? {
        for rule in rules_of(connection, &chain).await?.iter().filter(|rule| is_ours(rule)) {
            let doing = format!("take our rule out of {}", chain.place());
            connection
                .del_rule_if_exists(&chain.table, &chain.chain, chain.family, rule.handle)
                .await
                .map_err(|e| HostError::nft(doing, e))?;
            removed.push(format!("a rule in {}", chain.place()));
        }
    }
    Ok(())
}

/// What to do about iptables' old kernel tables, which nftables cannot reach; `None` if there are none.
pub(super) fn legacy_warning(config: &HostConfig) -> Option<String> {
    let filter = |path: &str| std::fs::read_to_string(path).is_ok_and(|names| has_filter(&names));
    // /proc/net is the main thread's; thread-self is this thread's network namespace.
    let v4 = filter("/proc/thread-self/net/ip_tables_names");
    let v6 = filter("/proc/thread-self/net/ip6_tables_names");
    if !v4 && !v6 {
        return None;
    }
    let tool = if v4 { "iptables-legacy" } else { "ip6tables-legacy" };
    Some(format!(
        "legacy iptables has a filter table, out of nftables' reach: if its FORWARD chain drops, run \
         `{tool} -I FORWARD -i {0} -j ACCEPT` and `{tool} -I FORWARD -o {0} -j ACCEPT`, or move to iptables-nft",
        config.tun
    ))
}

/// The legacy tables in use, one a line.
fn has_filter(names: &str) -> bool {
    names.lines().any(|name| name.trim() == "filter")
}

fn wanted(config: &HostConfig, bridges: &[PodBridge]) -> BTreeSet<Accept> {
    let interfaces = std::iter::once(config.tun.as_str()).chain(bridges.iter().map(|b| b.name.as_str()));
    interfaces
        .flat_map(|name| [true, false].map(|inbound| Accept { inbound, interface: name.to_owned() }))
        .collect()
}

async fn forward_chains(connection: &Connection<Nftables>) -> Result<Vec<ForwardChain>, HostError> {
    let chains = connection.list_chains().await.map_err(|e| HostError::nft("list the nft chains", e))?;
    Ok(chains
        .into_iter()
        .filter(|chain| {
            matches!(chain.family, Family::Ip | Family::Ip6 | Family::Inet)
                && chain.hook == Some(Hook::Forward.number(chain.family))
                && !KNOWN_TO_ACCEPT.contains(&chain.table.as_str())
        })
        .map(|chain| ForwardChain {
            family: chain.family,
            drops_by_policy: chain.policy.and_then(Policy::from_u32) == Some(Policy::Drop),
            table: chain.table,
            chain: chain.name,
        })
        .collect())
}

async fn rules_of(
    connection: &Connection<Nftables>,
    chain: &ForwardChain,
) -> Result<Vec<RuleInfo>, HostError> {
    let rules = connection
        .list_rules(&chain.table, chain.family)
        .await
        .map_err(|e| HostError::nft(format!("list the rules of {}", chain.place()), e))?;
    Ok(rules.into_iter().filter(|rule| rule.chain == chain.chain).collect())
}

/// A chain may drop by its last rule instead of its policy (firewalld rejects that way).
fn drops_all(rule: &RuleInfo) -> bool {
    let expressions = parse_expressions(&rule.expression_bytes);
    !expressions.is_empty()
        && expressions.iter().all(|expression| {
            matches!(
                expression,
                RuleExpr::Counter { .. } | RuleExpr::Verdict(Verdict::Drop) | RuleExpr::Reject { .. }
            )
        })
        && expressions.iter().any(|expression| !matches!(expression, RuleExpr::Counter { .. }))
}

fn is_ours(rule: &RuleInfo) -> bool {
    says(rule, TAG)
}

/// Whether the rule's comment begins so. `iptables-save | iptables-restore` moves a comment from the
/// user data into an xt match: the text is then among the expression's bytes.
fn says(rule: &RuleInfo, text: &str) -> bool {
    if let Some(comment) = &rule.comment_text {
        return comment.starts_with(text);
    }
    rule.expression_bytes.windows(text.len()).any(|bytes| bytes == text.as_bytes())
}

impl ForwardChain {
    fn place(&self) -> String {
        format!("nft chain {} {} {}", self.family, self.table, self.chain)
    }
}

impl Accept {
    /// Its last word ends in a full stop, so that no comment is the beginning of another's.
    fn comment(&self) -> String {
        format!("{TAG}pod traffic {}.", self.describe())
    }

    fn describe(&self) -> String {
        format!("{} {}", if self.inbound { "from" } else { "to" }, self.interface)
    }

    /// `insert rule ... iifname NAME counter accept comment ...`.
    fn message(&self, chain: &ForwardChain) -> RawMessage {
        let number = |kind: u16, value: u32| attribute(kind, &value.to_be_bytes());
        let register = Register::R0.wire();
        let key = if self.inbound { MetaKey::IifName } else { MetaKey::OifName };
        let mut name = self.interface.clone().into_bytes();
        name.resize(libc::IFNAMSIZ, 0);
        let expressions = [
            expression("meta", &[number(NFTA_META_KEY, key as u32), number(NFTA_META_DREG, register)]),
            expression(
                "cmp",
                &[
                    number(NFTA_CMP_SREG, register),
                    number(NFTA_CMP_OP, CmpOp::Eq as u32),
                    nested(NFTA_CMP_DATA, &[attribute(NFTA_DATA_VALUE, &name)]),
                ],
            ),
            expression(
                "counter",
                &[attribute(NFTA_COUNTER_BYTES, &[0; 8]), attribute(NFTA_COUNTER_PACKETS, &[0; 8])],
            ),
            expression(
                "immediate",
                &[
                    number(NFTA_IMMEDIATE_DREG, Register::Verdict.wire()),
                    nested(
                        NFTA_IMMEDIATE_DATA,
                        &[nested(NFTA_DATA_VERDICT, &[number(NFTA_VERDICT_CODE, NF_ACCEPT)])],
                    ),
                ],
            ),
        ];
        let comment = self.comment();
        let mut userdata = vec![COMMENT, u8::try_from(comment.len() + 1).unwrap_or(u8::MAX)];
        userdata.extend(comment.as_bytes());
        userdata.push(0);
        let attributes = [
            string(NFTA_RULE_TABLE, &chain.table),
            string(NFTA_RULE_CHAIN, &chain.chain),
            nested(NFTA_RULE_EXPRESSIONS, &expressions),
            attribute(NFTA_RULE_USERDATA, &userdata),
        ];
        RawMessage::new(NFT_MSG_NEWRULE, chain.family).flags(AT_HEAD).attrs(attributes.concat())
    }
}

fn expression(name: &str, data: &[Vec<u8>]) -> Vec<u8> {
    nested(NFTA_LIST_ELEM, &[string(NFTA_EXPR_NAME, name), nested(NFTA_EXPR_DATA, data)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_legacy_filter_table_can_drop() {
        assert!(has_filter("nat\nfilter\n"));
        assert!(!has_filter("nat\nmangle\n") && !has_filter(""));
    }

    #[test]
    fn no_comment_is_the_beginning_of_another() {
        let accept = |interface: &str| Accept { inbound: true, interface: interface.to_owned() }.comment();
        assert!(!accept("veth10").starts_with(&accept("veth1")));
        // NFTNL_UDATA_COMMENT_MAXLEN, with the longest name there can be.
        assert!(accept("fifteen-letters").len() < 128);
    }
}
