//! The netlink connection: requests and the news of links, addresses and routes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::StreamExt as _;
use futures::channel::mpsc::UnboundedReceiver;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::SocketAddr;
use rtnetlink::{Handle, MulticastGroup};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::NetError;
use super::local::Defaults;
use super::observe::mac;

/// A netlink socket of this network namespace.
pub struct Netlink {
    pub(super) handle: Handle,
    news: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    tasks: [JoinHandle<()>; 2],
    /// Something changed and was not told yet.
    waits: bool,
    rests: Instant,
    /// Interfaces that had a default route since the start.
    pub(super) carried: BTreeSet<u32>,
    pub(super) defaults: Defaults,
    /// MAC addresses of the interfaces as they were listed last.
    pub(super) macs: BTreeMap<u32, Vec<u8>>,
}

/// A routing daemon changes routes all the time, and a look lists all of them: it rests for so long...
const PACE: Duration = Duration::from_millis(100);
/// ... or so many times as long as listing them took.
const REST: u32 = 10;

impl Netlink {
    /// Opens it; from now on no change is missed. Must be called inside a tokio runtime.
    pub fn new() -> Result<Self, NetError> {
        Self::of(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ])
    }

    /// That hears of these alone.
    pub(super) fn of(groups: &[MulticastGroup]) -> Result<Self, NetError> {
        let (watcher, _, news) = rtnetlink::new_multicast_connection(groups)?;
        let (requests, handle, _) = rtnetlink::new_connection()?;
        Ok(Self {
            handle,
            news,
            tasks: [tokio::spawn(watcher), tokio::spawn(requests)],
            waits: false,
            rests: Instant::now(),
            carried: BTreeSet::new(),
            defaults: Defaults::default(),
            macs: BTreeMap::new(),
        })
    }

    /// Resolves when anything changed since the last call: at once, but so many times a second at most. Only for an
    /// interface with another MAC address nothing rests: until the programs know it, XDP takes frames to it for
    /// another host's. Loses nothing when it is dropped half-way.
    pub async fn changed(&mut self) -> Result<(), NetError> {
        loop {
            tokio::select! {
                biased;
                message = self.news.next() => {
                    self.waits = true;
                    if self.readdressed(&message.ok_or(NetError::Closed)?.0) {
                        break;
                    }
                }
                () = tokio::time::sleep_until(self.rests), if self.waits => break,
            }
        }
        while self.news.try_recv().is_ok() {}
        (self.waits, self.rests) = (false, Instant::now() + PACE);
        Ok(())
    }

    fn readdressed(&self, message: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
        let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) = &message.payload else { return false };
        let known = self.macs.get(&link.header.index).map(Vec::as_slice);
        let mac = mac(link);
        known.is_some() && mac.is_some() && known != mac
    }

    /// Says how long it took to list what there is.
    pub(super) fn took(&mut self, time: Duration) {
        self.rests = Instant::now() + PACE.max(time * REST);
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}
