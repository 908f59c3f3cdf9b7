//! The device for remote addresses, `kube-lb0`: made where it is missing, and given exactly what is wanted. Only what
//! bears our mark is ever taken away.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use futures::TryStreamExt as _;
use purelb_plan::announce::remote::{Present, Step, steps};
use purelb_plan::problem::Problem;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressProtocol};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::{LinkMessageBuilder, LinkUnspec};

use super::address::{Entry, entry};
use super::{NetError, Netlink};

/// `IFA_PROTO` of addresses that are ours (kernel 5.18): "who put it there".
pub const MARK: u8 = 112;
/// That of local addresses.
pub const LOCAL_MARK: u8 = 113;
/// The device where nothing else is said.
pub const VIP_DEVICE: &str = "kube-lb0";
/// Alias of a device that we made; `cleanup` removes only such.
pub const ALIAS: &str = "purelb-ebpf";

/// As it is after [`Netlink::announce`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VipDevice {
    /// `dummy`, `ifb` or another kind; empty: there is none.
    pub kind: String,
    /// Ours on it, with their prefix lengths.
    pub addresses: BTreeMap<IpAddr, u8>,
    /// What the kernel refused.
    pub problems: Vec<Problem>,
    /// Something was changed.
    pub changed: bool,
}

impl Netlink {
    /// Makes the device hold what is wanted, and takes ours away from everywhere else. `release`: what is not wanted may
    /// go; else it stays, since not everything is known.
    ///
    /// # Errors
    /// Links or addresses cannot be listed.
    pub async fn announce(
        &mut self,
        device: &str,
        wanted: &BTreeMap<IpAddr, u8>,
        release: bool,
    ) -> Result<VipDevice, NetError> {
        let mut out = VipDevice::default();
        let mut link = self.link(device).await?;
        if link.is_none() && !wanted.is_empty() {
            out.changed = true;
            match self.make(device).await {
                Ok(()) => {
                    link = self.link(device).await?;
                    out.problems.extend(self.sign(device, link.as_ref()).await);
                }
                Err(error) => out.problems.push(refused(device, "the device", "cannot be made", &error)),
            }
        }
        let index = link.as_ref().map(|link| link.header.index);
        let mut present = BTreeSet::new();
        for message in self.addresses().await? {
            let Some(found) = read(&message) else { continue };
            if Some(message.header.index) == index {
                present.insert(found);
            } else if found.ours && release {
                // A device of another name, from before.
                out.changed = true;
                out.problems.extend(self.remove(device, message.header.index, found.ip, found.prefix).await);
            }
        }
        let Some(link) = link else { return Ok(out) };
        let index = link.header.index;
        out.kind = kind(&link);
        if !link.header.flags.contains(LinkFlags::Up) && !wanted.is_empty() {
            out.changed = true;
            let up = LinkMessageBuilder::<LinkUnspec>::new().index(index).up().build();
            if let Err(error) = self.handle.link().set(up).execute().await {
                out.problems.push(refused(device, "the device", "cannot be set up", &error));
            }
        }
        let adopts = matches!(out.kind.as_str(), "dummy" | "ifb");
        out.addresses = present.iter().filter(|p| p.ours).map(|p| (p.ip, p.prefix)).collect();
        for step in steps(&present, wanted) {
            match step {
                Step::Remove(..) if !release => {}
                Step::Remove(ip, prefix) => {
                    out.changed = true;
                    match self.remove(device, index, ip, prefix).await {
                        None if out.addresses.get(&ip) == Some(&prefix) => drop(out.addresses.remove(&ip)),
                        problem => out.problems.extend(problem),
                    }
                }
                Step::Add(ip, prefix) => {
                    out.changed = true;
                    let foreign = present.contains(&Present { ip, prefix, ours: false });
                    let mut add = self.handle.address().add(index, ip, prefix);
                    add.message_mut().attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(MARK)));
                    let add = if foreign && adopts { add.replace() } else { add };
                    match add.execute().await {
                        Ok(()) => drop(out.addresses.insert(ip, prefix)),
                        Err(error) => {
                            out.problems.push(refused(device, &format!("{ip}/{prefix}"), "cannot be added", &error));
                        }
                    }
                }
            }
        }
        Ok(out)
    }

    /// Takes away all that is ours, and the devices that we made and nobody else uses.
    ///
    /// # Errors
    /// Links or addresses cannot be listed.
    pub async fn retire(&mut self) -> Result<Vec<Problem>, NetError> {
        let mut problems = Vec::new();
        let mut used = BTreeSet::new();
        for message in self.addresses().await? {
            match read(&message) {
                Some(found) if is_marked(&message) => {
                    problems.extend(self.remove("", message.header.index, found.ip, found.prefix).await);
                }
                Some(_) => drop(used.insert(message.header.index)),
                None => {}
            }
        }
        let fail = |source| NetError::Dump { what: "links", source };
        let links: Vec<LinkMessage> = self.handle.link().get().execute().try_collect().await.map_err(fail)?;
        for link in links.iter().filter(|link| is_ours(link) && !used.contains(&link.header.index)) {
            if let Err(error) = self.handle.link().del(link.header.index).execute().await {
                problems.push(refused("", "the device", "cannot be removed", &error));
            }
        }
        Ok(problems)
    }

    async fn link(&self, name: &str) -> Result<Option<LinkMessage>, NetError> {
        let fail = |source| NetError::Dump { what: "links", source };
        let links: Vec<LinkMessage> = self.handle.link().get().execute().try_collect().await.map_err(fail)?;
        let named = |link: &LinkMessage| {
            link.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::IfName(own) if own == name))
        };
        Ok(links.into_iter().find(named))
    }

    pub(super) async fn addresses(&self) -> Result<Vec<AddressMessage>, NetError> {
        let fail = |source| NetError::Dump { what: "addresses", source };
        self.handle.address().get().execute().try_collect().await.map_err(fail)
    }

    /// A dummy device, or an ifb where the kernel has none: no ARP either, and routing daemons see both.
    async fn make(&self, name: &str) -> Result<(), rtnetlink::Error> {
        let of = |kind| LinkMessageBuilder::<LinkUnspec>::new_with_info_kind(kind).name(name).up().build();
        let made = match self.handle.link().add(of(InfoKind::Dummy)).execute().await {
            Err(error) if is_unknown(&error) => self.handle.link().add(of(InfoKind::Ifb)).execute().await,
            made => made,
        };
        if made.is_ok() {
            tracing::info!(event = "vipDeviceMade", iface = name, "the device for remote addresses is there");
        }
        made
    }

    /// The kernel takes no alias when it makes a device.
    async fn sign(&self, device: &str, link: Option<&LinkMessage>) -> Option<Problem> {
        let index = link?.header.index;
        let alias = LinkMessageBuilder::<LinkUnspec>::new().index(index).alias(ALIAS).build();
        let error = self.handle.link().set(alias).execute().await.err()?;
        Some(refused(device, "the device", "cannot be signed", &error))
    }

    async fn remove(&self, device: &str, index: u32, ip: IpAddr, prefix: u8) -> Option<Problem> {
        match self.remove_alone(index, ip, prefix).await {
            Ok(()) => None,
            // It went by itself.
            Err(error) if errno(&error) == Some(libc::EADDRNOTAVAIL) => None,
            Err(error) => Some(refused(device, &format!("{ip}/{prefix}"), "cannot be removed", &error)),
        }
    }
}

/// One of ours.
pub(super) fn is_mark(protocol: AddressProtocol) -> bool {
    matches!(u8::from(protocol), MARK | LOCAL_MARK)
}

/// The address bears a mark of ours.
pub(super) fn is_marked(message: &AddressMessage) -> bool {
    message.attributes.iter().any(|attribute| matches!(attribute, AddressAttribute::Protocol(of) if is_mark(*of)))
}

pub(super) fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.code.map(|code| -code.get()),
        _ => None,
    }
}

/// The kernel knows no such kind of device.
fn is_unknown(error: &rtnetlink::Error) -> bool {
    errno(error) == Some(libc::EOPNOTSUPP)
}

fn refused(device: &str, what: &str, how: &str, error: &rtnetlink::Error) -> Problem {
    Problem {
        object: format!("device {device}"),
        field: String::new(),
        message: format!("{what} {how}: {error}"),
        remedy: "see the device by `ip -d link` and `ip address`; it is tried again".to_owned(),
        origin: String::new(),
    }
}

fn kind(link: &LinkMessage) -> String {
    let infos = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    let kind = infos.into_iter().flatten().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind.to_string()),
        _ => None,
    });
    kind.unwrap_or_else(|| "other".to_owned())
}

fn is_ours(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::IfAlias(alias) if alias == ALIAS))
}

/// An address; `None`: one that the kernel gives itself.
fn read(message: &AddressMessage) -> Option<Present> {
    let Entry { ip, protocol, .. } = entry(message)?;
    let link_local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
    (!link_local).then_some(Present { ip, prefix: message.header.prefix_len, ours: protocol == MARK })
}
