//! What the kernel says of an address of an interface.

use std::net::IpAddr;

use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};

/// One address.
pub(super) struct Entry {
    /// The address itself, not that of the other end of a link.
    pub ip: IpAddr,
    /// `IFA_PROTO`: who put it there; 0 where nothing is said.
    pub protocol: u8,
    /// All flags, where the message has them.
    pub flags: AddressFlags,
}

/// Reads it; none where it names no address.
pub(super) fn entry(message: &AddressMessage) -> Option<Entry> {
    let (mut local, mut address, mut protocol, mut flags) = (None, None, 0, AddressFlags::empty());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Protocol(of) => protocol = u8::from(*of),
            AddressAttribute::Flags(found) => flags = *found,
            _ => {}
        }
    }
    Some(Entry { ip: local.or(address)?, protocol, flags })
}
