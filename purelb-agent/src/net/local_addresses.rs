//! Local addresses on the interfaces that the election gives them to (PureLB's behaviour, 5.5). Ours bear a mark; what
//! bears none is somebody else's and stays.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Instant;

use ipnet::IpNet;
use purelb_plan::world::AddressOptions;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, CacheInfo};

use super::address::{Entry, entry};
use super::vip_device::{LOCAL_MARK, errno};
use super::{NetError, Netlink};

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Present {
    /// The interface.
    pub index: u32,
    /// The address.
    pub ip: IpAddr,
    /// Its prefix length.
    pub prefix: u8,
    /// It is a local address that we put there.
    pub ours: bool,
    /// The kernel found it on another host, and does not use it.
    pub failed: bool,
    /// It is as an agent of PureLB's kind makes it: for a time, and without a route.
    pub brief: bool,
    /// Of IPv4 addresses of one network the first one on its interface, on which the kernel hangs the
    /// others, is somebody else's: when this one goes it goes alone.
    pub behind: bool,
}

impl Present {
    fn network(&self) -> Option<IpNet> {
        IpNet::new(self.ip, self.prefix).ok().map(|net| net.trunc())
    }
}

/// Those of ours before which one of the host's own addresses stands second. That one has no connected route, and ends
/// with the one in front.
#[must_use]
pub fn in_front(present: &[Present]) -> BTreeSet<Present> {
    let pressed: BTreeSet<_> =
        present.iter().filter(|one| !one.ours && !one.behind).map(|one| (one.index, one.network())).collect();
    present.iter().filter(|one| one.ours && pressed.contains(&(one.index, one.network()))).copied().collect()
}

/// Where and how an address is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placing {
    /// The interface.
    pub index: u32,
    /// Prefix length.
    pub prefix: u8,
    /// Lifetimes and flags.
    pub options: AddressOptions,
}

/// What became of adding one.
#[derive(Debug)]
pub enum Added {
    /// It is there.
    Yes,
    /// Somebody else put it there.
    Foreign,
    /// The kernel refuses.
    No(rtnetlink::Error),
}

impl Netlink {
    /// For the addresses of interfaces alone: it hears of no routes.
    ///
    /// # Errors
    /// No socket.
    pub fn of_addresses() -> Result<Self, NetError> {
        Self::of(&[MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr])
    }

    /// All addresses, on whichever interface.
    ///
    /// # Errors
    /// They cannot be listed.
    pub async fn present(&mut self) -> Result<Vec<Present>, NetError> {
        let begin = Instant::now();
        let present = read_all(&self.addresses().await?);
        self.took(begin.elapsed());
        Ok(present)
    }

    /// Puts an address there, or renews its lifetimes where it is ours: `again`.
    pub async fn add_local(&self, ip: IpAddr, place: &Placing, again: bool) -> Added {
        let Placing { index, prefix, options } = *place;
        let mut add = self.handle.address().add(index, ip, prefix);
        let mut flags = AddressFlags::empty();
        flags.set(AddressFlags::Noprefixroute, options.no_prefix_route);
        // Duplicates are looked for before, without a second of silence.
        flags.set(AddressFlags::Nodad, ip.is_ipv6());
        let attributes = &mut add.message_mut().attributes;
        attributes.push(AddressAttribute::Flags(flags));
        attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(LOCAL_MARK)));
        if options.valid > 0 || options.preferred > 0 {
            let forever = |seconds: u32| if seconds == 0 { u32::MAX } else { seconds };
            let mut lifetimes = CacheInfo::default();
            lifetimes.ifa_valid = forever(options.valid);
            // Deprecated, so that the node's own connections never come from it; IPv4 knows no such thing.
            lifetimes.ifa_preferred = if ip.is_ipv6() { 0 } else { forever(options.preferred) };
            attributes.push(AddressAttribute::CacheInfo(lifetimes));
        }
        let add = if again { add.replace() } else { add };
        match add.execute().await {
            Ok(()) => Added::Yes,
            Err(error) if errno(&error) == Some(libc::EEXIST) => Added::Foreign,
            Err(error) => Added::No(error),
        }
    }

    /// Takes one of ours away; that it is gone already is fine.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn remove_local(&self, present: &Present) -> Result<(), rtnetlink::Error> {
        let Present { index, ip, prefix, behind, .. } = *present;
        let removed = if behind {
            let message = self.handle.address().add(index, ip, prefix).message_mut().clone();
            self.handle.address().del(message).execute().await
        } else {
            self.remove_alone(index, ip, prefix).await
        };
        match removed {
            Err(error) if !matches!(errno(&error), Some(libc::EADDRNOTAVAIL | libc::ENODEV)) => Err(error),
            _ => Ok(()),
        }
    }
}

fn read_all(messages: &[AddressMessage]) -> Vec<Present> {
    let mut all: Vec<(Present, bool)> = messages.iter().filter_map(read).collect();
    // Whose the first of each network is; of IPv6 none is before another.
    let first = all.iter().filter(|(_, first)| *first);
    let first: BTreeMap<_, _> = first.map(|(one, _)| ((one.index, one.network()), one.ours)).collect();
    for (one, _) in &mut all {
        one.behind = first.get(&(one.index, one.network())).is_none_or(|ours| !ours);
    }
    all.into_iter().map(|(one, _)| one).collect()
}

/// An address, and whether it is the first of its network.
fn read(message: &AddressMessage) -> Option<(Present, bool)> {
    let Entry { ip, protocol, flags } = entry(message)?;
    let present = Present {
        index: message.header.index,
        ip,
        prefix: message.header.prefix_len,
        ours: protocol == LOCAL_MARK,
        failed: flags.contains(AddressFlags::Dadfailed),
        brief: flags.contains(AddressFlags::Noprefixroute) && !flags.contains(AddressFlags::Permanent),
        behind: true,
    };
    Some((present, ip.is_ipv4() && !flags.contains(AddressFlags::Secondary)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(index: u32, ip: [u8; 4], prefix: u8, ours: bool, second: bool) -> AddressMessage {
        let mut message = AddressMessage::default();
        (message.header.index, message.header.prefix_len) = (index, prefix);
        message.attributes.push(AddressAttribute::Local(IpAddr::from(ip)));
        if ours {
            message.attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(LOCAL_MARK)));
        }
        let flags = if second { AddressFlags::Secondary } else { AddressFlags::empty() };
        message.attributes.push(AddressAttribute::Flags(flags));
        message
    }

    #[test]
    fn who_is_first() {
        let own = |second| message(1, [192, 0, 2, 7], 24, false, second);
        let vip = |last, second| message(1, [192, 0, 2, last], 24, true, second);
        let present = read_all(&[own(false), vip(8, true), message(2, [192, 0, 2, 9], 24, true, false)]);
        assert_eq!(present.iter().map(|one| one.behind).collect::<Vec<_>>(), [true, true, false]);
        assert!(in_front(&present).is_empty(), "alone on another interface, and nobody is pressed");
        let present = read_all(&[vip(8, false), vip(9, true), own(true), message(1, [192, 0, 2, 10], 32, true, false)]);
        assert!(present.iter().all(|one| !one.behind));
        let front: Vec<_> = in_front(&present).into_iter().map(|one| one.ip.to_string()).collect();
        assert_eq!(front, ["192.0.2.8", "192.0.2.9"], "all that may come before it");
    }
}
