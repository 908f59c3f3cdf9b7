//! What is withdrawn goes first, and what serves it after that. A remote address is served for a moment longer, since the
//! router still sends to it; a local one as long as it is on an interface, where the kernel answers for it: the fence
//! knows it by its table entry alone, and an agent that is killed in between would leave it there without one.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use purelb_plan::announce::lease::covers;
use purelb_plan::world::{Service, World};

/// The name of what serves local addresses that no Service has or had, as those that an agent finds when it starts. No
/// Service is named so.
const NOBODY: &str = "/";

/// Services with addresses that were announced.
#[derive(Debug)]
pub struct Linger {
    /// How long a remote address is served after it was withdrawn.
    pub time: Duration,
    /// As they were at the last look.
    last: BTreeMap<String, Arc<Service>>,
    going: BTreeMap<String, Going>,
}

#[derive(Debug)]
struct Going {
    service: Arc<Service>,
    /// Those that the Service has no more, and until when each is served; none: until it is on no interface.
    vips: BTreeMap<IpAddr, Option<Instant>>,
}

/// What is announced from this node, whoever wants it.
#[derive(Clone, Copy, Debug)]
pub struct Announced<'a> {
    /// On the device for remote addresses.
    pub remote: &'a BTreeMap<IpAddr, u8>,
    /// On other interfaces, or about to be.
    pub local: &'a BTreeSet<IpAddr>,
}

impl Announced<'_> {
    fn has(&self, vip: &IpAddr) -> bool {
        self.remote.contains_key(vip) || self.local.contains(vip)
    }
}

impl Linger {
    /// Nothing was announced yet.
    #[must_use]
    pub const fn new(time: Duration) -> Self {
        Self { time, last: BTreeMap::new(), going: BTreeMap::new() }
    }

    /// The world, with what is only just gone.
    pub fn world<'a>(&mut self, world: &'a World, announced: Announced<'_>, now: Instant) -> Cow<'a, World> {
        for (name, old) in &self.last {
            let new = world.services.get(name);
            if new.is_some_and(|new| Arc::ptr_eq(new, old)) {
                continue;
            }
            let until = |vip: &IpAddr| (!announced.local.contains(vip)).then(|| now + self.time);
            let gone = |vip: &&IpAddr| announced.has(vip) && new.is_none_or(|new| !new.vips.contains(*vip));
            let vips: BTreeMap<_, _> = old.vips.iter().filter(gone).map(|vip| (*vip, until(vip))).collect();
            if !vips.is_empty() {
                self.going.insert(name.clone(), Going { service: Arc::clone(old), vips });
            }
        }
        let is_announced = |service: &Arc<Service>| service.vips.iter().any(|vip| announced.has(vip));
        let last = world.services.iter().filter(|(_, service)| is_announced(service));
        self.last = last.map(|(name, service)| (name.clone(), Arc::clone(service))).collect();
        let owned: BTreeSet<IpAddr> = self.last.values().flat_map(|service| &service.vips).copied().collect();
        self.going.retain(|_, going| {
            let stays = |vip: &IpAddr, until: &Option<Instant>| match until {
                Some(until) => *until > now && !taken(world, &owned, announced, vip),
                None => announced.local.contains(vip) && !owned.contains(vip),
            };
            going.vips.retain(|vip, until| stays(vip, until));
            !going.vips.is_empty()
        });
        let served = |vip: &&IpAddr| owned.contains(*vip) || self.going.values().any(|g| g.vips.contains_key(*vip));
        let is_stray = |vip: &&IpAddr| !served(vip) && !world.node_addresses.contains(*vip);
        let strays: BTreeSet<IpAddr> = announced.local.iter().filter(is_stray).copied().collect();
        let is_local = |vip: &&IpAddr| world.announcing.is_some() && covers(&world.local_networks, **vip);
        let leaving: BTreeSet<IpAddr> = announced.local.iter().filter(|vip| !is_local(vip)).copied().collect();
        if self.going.is_empty() && strays.is_empty() && leaving.is_empty() {
            return Cow::Borrowed(world);
        }
        let mut world = world.clone();
        world.leaving = leaving;
        for (name, going) in &self.going {
            let mut service = (**world.services.get(name).unwrap_or(&going.service)).clone();
            if !world.services.contains_key(name) {
                service.vips.clear();
            }
            service.vips.extend(going.vips.keys());
            world.services.insert(name.clone(), Arc::new(service));
        }
        if !strays.is_empty() {
            let service = Service { vips: strays, ..Service::default() };
            world.services.insert(NOBODY.to_owned(), Arc::new(service));
        }
        Cow::Owned(world)
    }

    /// When the first of the remote ones is over.
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        self.going.values().flat_map(|going| going.vips.values().flatten()).min().copied()
    }
}

/// Another Service has it by now. One that was withdrawn is on no device, so only the Services themselves tell.
fn taken(world: &World, owned: &BTreeSet<IpAddr>, announced: Announced<'_>, vip: &IpAddr) -> bool {
    owned.contains(vip) || (!announced.has(vip) && world.services.values().any(|service| service.vips.contains(vip)))
}

#[cfg(test)]
mod tests {
    use purelb_plan::world::Announcing;

    use super::*;

    fn service(vips: &[[u8; 4]]) -> Arc<Service> {
        Arc::new(Service { vips: vips.iter().map(|ip| (*ip).into()).collect(), ..Service::default() })
    }

    #[test]
    fn what_was_announced_is_served_a_moment_longer() {
        let (time, now) = (Duration::from_secs(3), Instant::now());
        let mut linger = Linger::new(time);
        let remote: BTreeMap<IpAddr, u8> = [([10, 0, 0, 1].into(), 32), ([10, 0, 0, 2].into(), 32)].into();
        let announced = Announced { remote: &remote, local: &BTreeSet::new() };
        let mut world = World::default();
        world.services.insert("x/a".into(), service(&[[10, 0, 0, 1], [10, 0, 0, 2]]));
        world.services.insert("x/b".into(), service(&[[10, 0, 0, 9]]));
        assert_eq!(*linger.world(&world, announced, now), world);
        // One address goes, then the Service; the one that was not announced goes at once.
        world.services.insert("x/a".into(), service(&[[10, 0, 0, 2]]));
        world.services.remove("x/b");
        let seen = linger.world(&world, announced, now).into_owned();
        assert_eq!(seen.services["x/a"].vips.len(), 2);
        assert!(!seen.services.contains_key("x/b"));
        assert_eq!(linger.next(), Some(now + time));
        let later = now + time;
        assert_eq!(*linger.world(&world, announced, later), world, "over");
        world.services.clear();
        let seen = linger.world(&world, announced, later).into_owned();
        assert_eq!(seen.services["x/a"].vips, [[10, 0, 0, 2].into()].into());
        // Withdrawn, and another Service has it by now.
        world.services.insert("x/c".into(), service(&[[10, 0, 0, 2]]));
        let withdrawn = Announced { remote: &BTreeMap::new(), local: &BTreeSet::new() };
        assert_eq!(*linger.world(&world, withdrawn, later), world);
    }

    #[test]
    fn a_local_address_is_served_as_long_as_it_is_on_an_interface() {
        let now = Instant::now();
        let later = now + Duration::from_secs(3600);
        let mut linger = Linger::new(Duration::from_secs(3));
        let (none, ip): (_, IpAddr) = (BTreeMap::new(), [10, 0, 0, 1].into());
        let (there, gone) = (BTreeSet::from([ip]), BTreeSet::new());
        let on = Announced { remote: &none, local: &there };
        let mut world = World { announcing: Some(Announcing::default()), ..World::default() };
        world.local_networks.insert("10.0.0.0/24".parse().unwrap());
        world.services.insert("x/a".into(), service(&[[10, 0, 0, 1]]));
        assert_eq!(*linger.world(&world, on, now), world);
        world.services.clear();
        for now in [now, later] {
            let seen = linger.world(&world, on, now).into_owned();
            assert_eq!(seen.services["x/a"].vips, there);
            assert_eq!((linger.next(), seen.leaving.len()), (None, 0), "no clock ends it");
        }
        let off = Announced { remote: &none, local: &gone };
        assert_eq!(*linger.world(&world, off, later), world);
        // Found on an interface by an agent that starts, with a Service that is gone; and with a network that is gone.
        let mut linger = Linger::new(Duration::from_secs(3));
        assert_eq!(linger.world(&world, on, now).services[NOBODY].vips, there);
        world.local_networks.clear();
        assert_eq!(linger.world(&world, on, now).leaving, there);
        world.services.insert("x/c".into(), service(&[[10, 0, 0, 1]]));
        let seen = linger.world(&world, on, now).into_owned();
        assert_eq!((seen.services, seen.leaving), (world.services.clone(), there.clone()), "another Service has it");
    }
}
