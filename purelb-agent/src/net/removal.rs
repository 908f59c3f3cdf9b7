//! Takes an address away and nothing else.
//!
//! Of several IPv4 addresses of one network on an interface, with the same prefix length, the first one is primary. With
//! it the kernel takes away all others, unless `promote_secondaries` of the interface is set: then the next one takes its
//! place (`__inet_del_ifa` in net/ipv4/devinet.c). Systemd sets it, other hosts do not. A VIP comes to be the first where
//! the host's own address was away for a moment. So an address that may be the first is taken away with that setting
//! on, for the moment that this takes. What ends by itself does so without us: see `Links` for why ours is never first for long.

use std::net::IpAddr;

use futures::TryStreamExt as _;
use rtnetlink::packet_core::{DefaultNla, Emitable as _};
use rtnetlink::packet_route::link::{AfSpecInet, AfSpecUnspec, LinkAttribute, LinkMessage};

use super::Netlink;

/// `IFLA_INET_CONF` and `NLA_F_NESTED` (include/uapi/linux/if_link.h, netlink.h).
const INET_CONF: u16 = 1 | 1 << 15;
/// `IPV4_DEVCONF_PROMOTE_SECONDARIES` (include/uapi/linux/ip.h).
const PROMOTE_SECONDARIES: u16 = 20;

impl Netlink {
    /// Takes one away that may be the first of its network.
    pub(super) async fn remove_alone(&self, index: u32, ip: IpAddr, prefix: u8) -> Result<(), rtnetlink::Error> {
        let message = self.handle.address().add(index, ip, prefix).message_mut().clone();
        // Where it cannot be read it is set: at worst it stays so.
        let promotes = ip.is_ipv6() || self.promotes(index).await == Some(true);
        if !promotes {
            self.promote(index, true).await;
        }
        let removed = self.handle.address().del(message).execute().await;
        if !promotes {
            self.promote(index, false).await;
        }
        removed
    }

    async fn promotes(&self, index: u32) -> Option<bool> {
        let mut links = self.handle.link().get().match_index(index).execute();
        let link = links.try_next().await.ok()??;
        let specs = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::AfSpecUnspec(specs) => Some(specs),
            _ => None,
        });
        let inet = specs?.iter().find_map(|spec| match spec {
            AfSpecUnspec::Inet(inet) => Some(inet),
            _ => None,
        });
        inet?.iter().find_map(|one| match one {
            AfSpecInet::DevConf(conf) => Some(conf.promote_secondaries != 0),
            _ => None,
        })
    }

    /// By netlink, which a read-only /proc does not keep us from.
    async fn promote(&self, index: u32, on: bool) {
        let conf = DefaultNla::new(PROMOTE_SECONDARIES, u32::from(on).to_ne_bytes().to_vec());
        let mut nested = vec![0; conf.buffer_len()];
        conf.emit(&mut nested);
        let inet = AfSpecUnspec::Inet(vec![AfSpecInet::Other(DefaultNla::new(INET_CONF, nested))]);
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::AfSpecUnspec(vec![inet]));
        if let Err(error) = self.handle.link().set(message).execute().await {
            tracing::warn!(op = "promoteSecondaries", index, on, %error, "other addresses may go with one of ours");
        }
    }
}
