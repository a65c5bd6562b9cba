//! Accept rules in other programs' FORWARD chains.
//!
//! An accept in a chain of ours ends only that chain: a later base chain of the same hook whose
//! policy is drop (Docker's, ufw's `ip filter FORWARD`) still drops. So a few accepts go to the head of
//! every such chain: whatever enters or leaves by the tunnel, whatever pods send, and the answers to
//! them. Not what others send to pods: the firewall's owner has closed that, and it stays closed.
//!
//! In iptables' own chains the rules have the shape that `iptables-nft` writes itself (meta, cmp, the
//! conntrack match, counter, accept), or its `iptables -S` would refuse the whole table. They are
//! known again by their comment.

use std::collections::BTreeSet;

use nlink::netlink::nftables::{
    CmpOp, CtKey, Family, Hook, MetaKey, NFT_MSG_NEWRULE, NFTA_BITWISE_DREG, NFTA_BITWISE_LEN,
    NFTA_BITWISE_MASK, NFTA_BITWISE_SREG, NFTA_BITWISE_XOR, NFTA_CMP_DATA, NFTA_CMP_OP, NFTA_CMP_SREG,
    NFTA_COUNTER_BYTES, NFTA_COUNTER_PACKETS, NFTA_CT_DREG, NFTA_CT_KEY, NFTA_DATA_VALUE, NFTA_DATA_VERDICT,
    NFTA_EXPR_DATA, NFTA_EXPR_NAME, NFTA_IMMEDIATE_DATA, NFTA_IMMEDIATE_DREG, NFTA_LIST_ELEM, NFTA_META_DREG,
    NFTA_META_KEY, NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS, NFTA_RULE_TABLE, NFTA_RULE_USERDATA,
    NFTA_VERDICT_CODE, Policy, RawMessage, Register, RuleExpr, RuleInfo, Verdict, parse_expressions,
};
use nlink::netlink::{Connection, Nftables};

use super::links::PodBridge;
use super::nft::NAME;
use super::nla::{attribute, nested, string};
use super::{HostConfig, HostError, Report, services};

/// How every comment of ours begins.
const TAG: &str = "warren: ";
/// NF_ACCEPT, include/uapi/linux/netfilter.h.
const NF_ACCEPT: u32 = 1;
/// NLM_F_CREATE without NLM_F_APPEND: a new rule goes to the head of its chain.
const AT_HEAD: u16 = libc::NLM_F_CREATE as u16;
/// NFTNL_UDATA_RULE_COMMENT of libnftnl's udata.h: the type byte of a comment.
const COMMENT: u8 = 0;

/// ESTABLISHED and RELATED as `ct state` shows them (NF_CT_STATE_BIT,
/// include/uapi/linux/netfilter/nf_conntrack_common.h); XT_CONNTRACK_STATE_BIT gives the same numbers.
const ESTABLISHED_RELATED: u16 = 2 | 4;

/// NFTA_MATCH_* of linux/netfilter/nf_tables_compat.h.
const NFTA_MATCH_NAME: u16 = 1;
const NFTA_MATCH_REV: u16 = 2;
const NFTA_MATCH_INFO: u16 = 3;

/// Tables that never drop by default and may be huge; listing them at every change would cost.
const KNOWN_TO_ACCEPT: [&str; 3] = [NAME, services::NAME, "kube-proxy"];

/// One accept rule, identified by its comment.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Accept {
    way: Way,
    interface: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    /// All that comes in by the interface.
    From,
    /// All that goes out by it.
    To,
    /// What goes out by it and belongs to a flow that was let through before.
    AnswersTo,
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
        let mut wrong = Vec::new();
        for rule in rules.iter().filter(|rule| is_ours(rule)) {
            if missing.iter().any(|accept| says(rule, &accept.comment())) {
                missing.retain(|accept| !says(rule, &accept.comment()));
            } else {
                wrong.push(rule.handle);
                report.removed(format!("a rule in {place}"));
            }
        }
        for accept in &missing {
            report.added(format!("a rule in {place}, which drops: accept {}", accept.describe()));
        }
        if wrong.is_empty() && missing.is_empty() {
            continue;
        }
        let change = |style: Style| {
            let mut transaction = connection.transaction();
            for handle in &wrong {
                transaction = transaction.del_rule(&chain.table, &chain.chain, chain.family, *handle);
            }
            missing
                .iter()
                .fold(transaction, |transaction, accept| transaction.raw(accept.message(&chain, style)))
        };
        let style = chain.style();
        let mut outcome = change(style).commit(connection).await;
        if style == Style::Iptables && outcome.as_ref().is_err_and(|e| cannot_match(e.errno())) {
            outcome = change(Style::Nft).commit(connection).await;
        }
        outcome.map_err(|e| HostError::nft(format!("let pod traffic through {place}"), e))?;
    }
    Ok(())
}

/// Whether a kernel without CONFIG_NFT_COMPAT or xt_conntrack answers so; then no `iptables` lists the
/// chain either. After any other error the next look tries again: a rule of the other style would stay.
fn cannot_match(errno: Option<i32>) -> bool {
    matches!(errno, Some(libc::ENOENT | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT))
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
    let accept = |way: Way, interface: &str| Accept { way, interface: interface.to_owned() };
    let tunnel = [Way::From, Way::To].map(|way| accept(way, &config.tun));
    let pods = bridges.iter().flat_map(|b| [Way::From, Way::AnswersTo].map(|way| accept(way, &b.name)));
    tunnel.into_iter().chain(pods).collect()
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

/// Whose listing must be able to show a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Iptables,
    Nft,
}

impl ForwardChain {
    fn place(&self) -> String {
        format!("nft chain {} {} {}", self.family, self.table, self.chain)
    }

    /// `iptables-nft` knows the chains of capital names in the families of one IP version.
    fn style(&self) -> Style {
        let single = matches!(self.family, Family::Ip | Family::Ip6);
        if single && self.chain == "FORWARD" { Style::Iptables } else { Style::Nft }
    }
}

impl Accept {
    /// Its last word ends in a full stop, so that no comment is the beginning of another's.
    fn comment(&self) -> String {
        format!("{TAG}pod traffic {}.", self.describe())
    }

    fn describe(&self) -> String {
        match self.way {
            Way::From => format!("from {}", self.interface),
            Way::To => format!("to {}", self.interface),
            Way::AnswersTo => format!("to {} in established flows", self.interface),
        }
    }

    /// `insert rule ... iifname NAME [ct state established,related] counter accept comment ...`.
    fn message(&self, chain: &ForwardChain, style: Style) -> RawMessage {
        let mut expressions = match self.way {
            Way::From => interface(MetaKey::IifName, &self.interface),
            Way::To | Way::AnswersTo => interface(MetaKey::OifName, &self.interface),
        };
        if self.way == Way::AnswersTo {
            expressions.extend(match style {
                Style::Iptables => vec![conntrack_match()],
                Style::Nft => ct_state(),
            });
        }
        expressions.push(expression(
            "counter",
            &[attribute(NFTA_COUNTER_BYTES, &[0; 8]), attribute(NFTA_COUNTER_PACKETS, &[0; 8])],
        ));
        let verdict = nested(NFTA_DATA_VERDICT, &[number(NFTA_VERDICT_CODE, NF_ACCEPT)]);
        expressions.push(expression(
            "immediate",
            &[number(NFTA_IMMEDIATE_DREG, Register::Verdict.wire()), nested(NFTA_IMMEDIATE_DATA, &[verdict])],
        ));
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

/// `iifname NAME` or `oifname NAME`.
fn interface(key: MetaKey, name: &str) -> Vec<Vec<u8>> {
    let register = Register::R0.wire();
    let mut name = name.as_bytes().to_vec();
    name.resize(libc::IFNAMSIZ, 0);
    let meta = [number(NFTA_META_KEY, key as u32), number(NFTA_META_DREG, register)];
    vec![expression("meta", &meta), compare(CmpOp::Eq, &name)]
}

/// `ct state established,related`.
fn ct_state() -> Vec<Vec<u8>> {
    let register = Register::R0.wire();
    let ct = [number(NFTA_CT_KEY, CtKey::State as u32), number(NFTA_CT_DREG, register)];
    let value = |value: u32| attribute(NFTA_DATA_VALUE, &value.to_ne_bytes());
    let bitwise = [
        number(NFTA_BITWISE_SREG, register),
        number(NFTA_BITWISE_DREG, register),
        number(NFTA_BITWISE_LEN, 4),
        nested(NFTA_BITWISE_MASK, &[value(u32::from(ESTABLISHED_RELATED))]),
        nested(NFTA_BITWISE_XOR, &[value(0)]),
    ];
    vec![expression("ct", &ct), expression("bitwise", &bitwise), compare(CmpOp::Neq, &[0; 4])]
}

/// `-m conntrack --ctstate RELATED,ESTABLISHED`: `iptables-nft` does not understand nftables' own `ct`.
fn conntrack_match() -> Vec<u8> {
    /// struct xt_conntrack_mtinfo3 (linux/netfilter/xt_conntrack.h), aligned to 8 as XT_ALIGN does:
    /// eight addresses of 16 bytes, expiry, ports; then the flags and the state.
    const SIZE: usize = 168;
    const MATCH_FLAGS: usize = 146;
    const STATE_MASK: usize = 150;
    const XT_CONNTRACK_STATE: u16 = 1;
    let mut info = [0; SIZE];
    info[MATCH_FLAGS..MATCH_FLAGS + 2].copy_from_slice(&XT_CONNTRACK_STATE.to_ne_bytes());
    info[STATE_MASK..STATE_MASK + 2].copy_from_slice(&ESTABLISHED_RELATED.to_ne_bytes());
    let name = string(NFTA_MATCH_NAME, "conntrack");
    expression("match", &[name, number(NFTA_MATCH_REV, 3), attribute(NFTA_MATCH_INFO, &info)])
}

fn compare(op: CmpOp, with: &[u8]) -> Vec<u8> {
    let data = nested(NFTA_CMP_DATA, &[attribute(NFTA_DATA_VALUE, with)]);
    let register = number(NFTA_CMP_SREG, Register::R0.wire());
    expression("cmp", &[register, number(NFTA_CMP_OP, op as u32), data])
}

fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
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
    fn only_a_kernel_that_cannot_match_gets_the_other_style() {
        assert!(
            [libc::ENOENT, libc::EOPNOTSUPP, libc::EPROTONOSUPPORT].iter().all(|e| cannot_match(Some(*e)))
        );
        for passing in [libc::ERESTART, libc::ENOBUFS, libc::EINTR, libc::EPERM, libc::ETIMEDOUT] {
            assert!(!cannot_match(Some(passing)), "{passing}");
        }
        assert!(!cannot_match(None));
    }

    #[test]
    fn no_comment_is_the_beginning_of_another() {
        let accept =
            |interface: &str| Accept { way: Way::AnswersTo, interface: interface.to_owned() }.comment();
        assert!(!accept("veth10").starts_with(&accept("veth1")));
        // NFTNL_UDATA_COMMENT_MAXLEN, with the longest name there can be.
        assert!(accept("fifteen-letters").len() < 128);
        let to = Accept { way: Way::To, interface: "veth1".to_owned() }.comment();
        assert!(!accept("veth1").starts_with(&to));
    }
}
