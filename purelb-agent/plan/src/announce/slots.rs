//! The annotations `purelb.io/announcing-IPv4` and `-IPv6` of a Service: which node says that it announces which address,
//! on which interface. For people and tools; no proof rests on it (`reference/purelb-spec.md` 3.1).

use std::collections::BTreeSet;
use std::net::IpAddr;

/// Key of the slots of IPv4 addresses.
pub const ANNOUNCING_V4: &str = "purelb.io/announcing-IPv4";
/// Key of the slots of IPv6 addresses.
pub const ANNOUNCING_V6: &str = "purelb.io/announcing-IPv6";

/// One address, and who announces it. Ordered as it is written: address, node, interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot {
    /// The address.
    pub ip: IpAddr,
    /// The node.
    pub node: String,
    /// Its interface; may hold commas.
    pub iface: String,
}

/// What becomes of an annotation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// The new text; none deletes the key.
    pub text: Option<String>,
    /// The nodes from which a slot was taken, for the event `AnnounceSlotSteal`.
    pub stolen_from: Vec<(IpAddr, String)>,
}

/// Reads `node,iface,ip node,iface,ip ...`. What is malformed, zoned or of an older form is left out.
#[must_use]
pub fn parse(text: &str) -> Vec<Slot> {
    text.split_whitespace().filter_map(slot).collect()
}

/// Writes slots in order, the first of each address. Nothing to write: no annotation.
#[must_use]
pub fn encode(slots: &[Slot]) -> Option<String> {
    let mut sorted: Vec<&Slot> = slots.iter().collect();
    sorted.sort();
    sorted.dedup_by_key(|slot| slot.ip);
    let words: Vec<_> =
        sorted.iter().map(|Slot { ip, node, iface }| format!("{node},{iface},{}", ip.to_canonical())).collect();
    (!words.is_empty()).then(|| words.join(" "))
}

/// What `node` should make of an annotation, of one family: `won` are the addresses that it answers for and their
/// interfaces, `ingress` all that the Service has. It replaces any slot of what it won, removes its own of what it did
/// not, and those of addresses that are gone. Nobody who neither won anything nor has a slot there writes: `None`. Also when
/// the annotation is as it should be.
#[must_use]
pub fn reconcile(
    text: Option<&str>,
    node: &str,
    won: &[(IpAddr, String)],
    ingress: &BTreeSet<IpAddr>,
) -> Option<Change> {
    let found = parse(text.unwrap_or_default());
    let is_mine = found.iter().any(|slot| slot.node == node);
    if won.is_empty() && !is_mine {
        return None;
    }
    let is_won = |ip: IpAddr| won.iter().any(|(mine, _)| *mine == ip);
    let others = |slot: &&Slot| slot.node != node && ingress.contains(&slot.ip) && !is_won(slot.ip);
    let mut slots: Vec<Slot> = found.iter().filter(others).cloned().collect();
    slots.extend(won.iter().map(|(ip, iface)| Slot { ip: *ip, node: node.to_owned(), iface: iface.clone() }));
    let new = encode(&slots);
    let stolen = found.iter().filter(|slot| slot.node != node && is_won(slot.ip));
    let stolen_from = stolen.map(|slot| (slot.ip, slot.node.clone())).collect();
    (new.as_deref() != text).then_some(Change { text: new, stolen_from })
}

fn slot(word: &str) -> Option<Slot> {
    let (node, rest) = word.split_once(',')?;
    let (iface, ip) = rest.rsplit_once(',')?;
    // A zone does not parse.
    let ip: IpAddr = ip.parse().ok()?;
    (!node.is_empty() && !iface.is_empty()).then(|| Slot {
        ip: ip.to_canonical(),
        node: node.into(),
        iface: iface.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(text: &str) -> BTreeSet<IpAddr> {
        text.split(' ').map(|ip| ip.parse().unwrap()).collect()
    }

    fn won(ip: &str) -> Vec<(IpAddr, String)> {
        vec![(ip.parse().unwrap(), "eth0".to_owned())]
    }

    #[test]
    fn first_and_last_comma() {
        let slots = parse("n1,bond0,x,192.0.2.1  n2,eth0,::ffff:192.0.2.2");
        assert_eq!((slots[0].node.as_str(), slots[0].iface.as_str()), ("n1", "bond0,x"));
        assert_eq!(encode(&slots).unwrap(), "n1,bond0,x,192.0.2.1 n2,eth0,192.0.2.2", "read again as it was written");
        for bad in
            ["n1", "n1,eth0", "n1,192.0.2.1", ",eth0,192.0.2.1", "n1,,192.0.2.1", "n1,eth0,fe80::1%eth0", "a,b,c", ""]
        {
            assert_eq!(parse(bad), [], "{bad}");
        }
    }

    #[test]
    fn in_order_and_one_slot_an_address() {
        let slots = parse("n2,eth0,192.0.2.10 n9,eth0,192.0.2.9 n1,eth1,192.0.2.10 n1,eth0,192.0.2.10");
        assert_eq!(encode(&slots).unwrap(), "n9,eth0,192.0.2.9 n1,eth0,192.0.2.10");
        assert_eq!(encode(&[]), None);
    }

    #[test]
    fn the_winner_writes_and_nobody_else() {
        let ingress = ips("192.0.2.1 192.0.2.2");
        let text = Some("n2,eth0,192.0.2.1 n3,eth0,192.0.2.2 n3,eth0,192.0.2.3");
        assert_eq!(reconcile(text, "n1", &[], &ingress), None, "a loser");
        let change = reconcile(text, "n1", &won("192.0.2.1"), &ingress).unwrap();
        assert_eq!(
            change.text.as_deref(),
            Some("n1,eth0,192.0.2.1 n3,eth0,192.0.2.2"),
            "another's stays, a gone one goes"
        );
        assert_eq!(change.stolen_from, [("192.0.2.1".parse().unwrap(), "n2".to_owned())]);
        assert_eq!(reconcile(change.text.as_deref(), "n1", &won("192.0.2.1"), &ingress), None, "as it should be");
        let change = reconcile(change.text.as_deref(), "n1", &[], &ingress).unwrap();
        assert_eq!(
            change,
            Change { text: Some("n3,eth0,192.0.2.2".to_owned()), stolen_from: Vec::new() },
            "it lets go"
        );
        let change = reconcile(Some("n1,eth0,192.0.2.1"), "n1", &[], &ingress).unwrap();
        assert_eq!(change.text, None, "the key goes");
        assert_eq!(reconcile(None, "n1", &won("192.0.2.2"), &ingress).unwrap().text.unwrap(), "n1,eth0,192.0.2.2");
    }
}
