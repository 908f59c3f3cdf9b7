//! A service under change with its flows: endpoints come, turn unready, terminate, vanish; the table
//! grows and settles; flows open, speak, fall silent; the agent dies between two writes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use purelb_common::table::Config;
use purelb_plan::apply::Twin;
use purelb_plan::observed::Action;
use purelb_plan::plan::{Planner, Settings, plan};
use purelb_plan::world::{Datapath, Endpoint, EndpointState, Mode, Protocol, Service, ServicePort, World};

use crate::chance::Chance;
use crate::maps::{Addr, Maps, Name};

/// Ticks until a service settles.
pub const SETTLE: u32 = 1000;
/// Ticks that a client sticks to its endpoint.
const AFFINITY: u32 = 400;
/// Ticks that a SYN counts as half open.
const HALF_OPEN: u32 = 60;
/// Ticks that a silent UDP flow counts.
const UDP_IDLE: u32 = 300;
/// The one VIP.
pub const VIP: Addr = [192, 0, 2, 1];
/// Settings with a tick per second.
pub const SETTINGS: Settings = Settings { settle: SETTLE, milliticks: 1000 };

/// What a run looks like.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// ClientIP affinity.
    pub affinity: bool,
    /// kube-proxy answers where nobody else does; the tables are adopted while flows run, and now and then all is
    /// handed back to it for a while.
    pub pass: bool,
    /// Two ports of the VIP lead to the same pods.
    pub two_ports: bool,
    /// The agent dies between two writes now and then.
    pub crash: bool,
    /// Packets come between any two writes.
    pub between: bool,
    /// UDP instead of TCP.
    pub udp: bool,
    /// Now and then no more pins may be made.
    pub starved: bool,
}

/// What happened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Count {
    /// Packets of flows that the law is about.
    pub packets: u32,
    /// Those that went elsewhere.
    pub moved: u32,
    /// SYNs of a client that did not go where it sticks.
    pub unstuck: u32,
    /// Settlings.
    pub epochs: u32,
    /// Slots of the longest table.
    pub slots: usize,
}

/// An endpoint of this node.
#[must_use]
pub fn endpoint(addr: Addr, state: EndpointState) -> Endpoint {
    Endpoint {
        addr: IpAddr::from(addr),
        port_name: String::new(),
        protocol: Protocol::Tcp,
        port: 8080,
        node: Some("n".to_owned()),
        state,
        serving: true,
    }
}

/// A TCP port.
#[must_use]
pub fn tcp(port: u16) -> ServicePort {
    ServicePort { name: String::new(), port, protocol: Some(Protocol::Tcp) }
}

/// Empty maps of some size.
#[must_use]
pub fn empty() -> Twin {
    Twin::new(1 << 18)
}

struct Model {
    kind: Kind,
    chance: Chance,
    maps: Maps,
    config: Config,
    service: Service,
    mode: Mode,
    now: u32,
    flows: BTreeMap<Name, (Option<Addr>, u32)>,
    /// Flows of which the endpoint said nothing yet.
    young: BTreeSet<Name>,
    clients: BTreeMap<Addr, (Addr, u32)>,
    planned: bool,
    planner: Planner,
    begun: bool,
    count: Count,
}

/// Runs `steps` random steps.
#[must_use]
pub fn run(seed: u64, kind: Kind, steps: u32) -> Count {
    let config = Config {
        seed,
        half_open: HALF_OPEN,
        udp_idle: UDP_IDLE,
        tcp_idle: SETTLE,
        udp_pass: UDP_IDLE + 1,
        ..Config::default()
    };
    let service = Service {
        vips: [IpAddr::from(VIP)].into(),
        ports: match kind {
            Kind { udp: true, .. } => vec![ServicePort { protocol: Some(Protocol::Udp), ..tcp(80) }],
            Kind { two_ports: true, .. } => vec![tcp(80), tcp(443)],
            _ => vec![tcp(80)],
        },
        local_policy: !kind.pass,
        prefer_local: kind.pass,
        affinity: kind.affinity.then_some(AFFINITY),
        ..Service::default()
    };
    let maps = Maps::default();
    maps.twin.replace(empty());
    // Half of the runs see the clock wrap.
    let now = if seed.is_multiple_of(2) { 5000 } else { u32::MAX - 20_000 };
    let mut model = Model {
        kind,
        chance: Chance(seed),
        maps,
        config,
        service,
        mode: Mode::Auto,
        now,
        flows: BTreeMap::new(),
        young: BTreeSet::new(),
        clients: BTreeMap::new(),
        planned: false,
        planner: Planner::default(),
        begun: false,
        count: Count::default(),
    };
    for _ in 0..=model.chance.below(4) {
        model.add();
    }
    if kind.pass {
        // These run through kube-proxy already.
        for port in 0..200 {
            model.flows.insert(([198, 51, 100, port as u8 % 20], 5000 + port, 80), (None, now));
        }
    }
    model.agent();
    for _ in 0..steps {
        model.step();
    }
    model.count
}

impl Model {
    fn add(&mut self) {
        // A small pool, so that an address comes back as another pod.
        let addr = [10, 0, 0, self.chance.below(90) as u8];
        if !self.service.endpoints.iter().any(|e| e.addr == IpAddr::from(addr)) {
            let protocol = if self.kind.udp { Protocol::Udp } else { Protocol::Tcp };
            self.service.endpoints.push(Endpoint { protocol, ..endpoint(addr, EndpointState::Ready) });
        }
    }

    fn remove(&mut self) {
        let index = self.chance.below(self.service.endpoints.len() as u64) as usize;
        if index >= self.service.endpoints.len() {
            return;
        }
        let gone = self.service.endpoints.swap_remove(index).addr;
        self.flows.retain(|_, (owner, _)| owner.map(IpAddr::from) != Some(gone));
        self.clients.retain(|_, (owner, _)| IpAddr::from(*owner) != gone);
    }

    fn change(&mut self) {
        let index = self.chance.below(self.service.endpoints.len() as u64) as usize;
        let to = [EndpointState::Ready, EndpointState::Unready, EndpointState::Terminating];
        let to = self.chance.pick(&to).unwrap_or(EndpointState::Ready);
        if let Some(e) = self.service.endpoints.get_mut(index)
            && e.state != EndpointState::Terminating
        {
            e.state = to;
        }
    }

    fn step(&mut self) {
        self.now = self.now.wrapping_add(self.chance.pick(&[0, 1, 1, 5, 30, 120, 300, 300]).unwrap_or(0));
        match self.chance.below(1000) {
            0..60 => self.add(),
            60..120 => self.change(),
            120..165 => self.remove(),
            165..170 => (0..12).for_each(|_| self.add()),
            170..175 => (0..12).for_each(|_| self.remove()),
            175..190 if self.kind.pass => self.mode = Mode::Off,
            190..225 => self.mode = Mode::Auto,
            _ => {}
        }
        self.agent();
        self.maps.starved.set(self.kind.starved && self.chance.permille(300));
        for _ in 0..12 {
            self.speak();
        }
    }

    /// One pass of the agent, or two when it dies in the first.
    fn agent(&mut self) {
        let lives = if self.kind.crash && self.chance.permille(300) { 2 } else { 1 };
        for life in (0..lives).rev() {
            let world = World {
                node: "n".to_owned(),
                services: [("default/web".to_owned(), Arc::new(self.service.clone()))].into(),
                kube_proxy: self.kind.pass,
                live: self.kind.pass && !self.planned,
                datapath: Datapath { mode: self.mode, ..Datapath::default() },
                ..World::default()
            };
            // Now and then everything is looked at, as the agent does when time has passed; a new agent knows nothing.
            let all = self.chance.permille(300);
            if all {
                self.planner.forget();
            }
            let mut actions = {
                let twin = self.maps.twin.borrow();
                let actions = self.planner.plan(&world, &twin.observed, &*twin, &SETTINGS, self.now).actions;
                if all {
                    let stranger = plan(&world, &twin.observed, &*twin, &SETTINGS, self.now).actions;
                    assert_eq!(actions, stranger, "a planner that remembers plans something else");
                }
                actions
            };
            // What it remembers is how things are: whoever looks at everything finds nothing but the passing of time.
            if self.chance.permille(100) {
                let mut done = self.maps.twin.borrow().clone();
                actions.iter().for_each(|a| done.apply(a));
                let never = Settings { settle: u32::MAX / 2, ..SETTINGS };
                let rest = plan(&world, &done.observed, &done, &never, self.now).actions;
                assert_eq!(rest, [], "the planner overlooked something");
            }
            if life > 0 {
                actions.truncate(self.chance.below(actions.len() as u64 + 1) as usize);
                self.planner = Planner::default();
            }
            for action in &actions {
                self.maps.twin.borrow_mut().apply(action);
                if let Action::PutService(_, new) = action {
                    self.count.epochs += u32::from(new.span() == 0 && self.begun);
                    self.begun = new.span() != 0;
                }
                if self.kind.between && self.planned {
                    self.speak();
                    self.speak();
                }
            }
            self.planned |= life == 0;
        }
        let twin = self.maps.twin.borrow();
        let longest = twin.observed.services.values().map(|s| s.mask as usize + 1).max().unwrap_or(0);
        self.count.slots = self.count.slots.max(longest);
    }

    fn state(&self, addr: Addr) -> Option<EndpointState> {
        self.service.endpoints.iter().find(|e| e.addr == IpAddr::from(addr)).map(|e| e.state)
    }

    fn ready(&self, addr: Addr) -> bool {
        self.state(addr) == Some(EndpointState::Ready)
    }

    /// A SYN once more, before the endpoint's answer or long after. It may go elsewhere only when the endpoint takes
    /// no new flows, and what follows goes there.
    fn repeat(&mut self, name: Name, owner: Option<Addr>) {
        match self.maps.packet(&self.config, VIP, name, true, self.now) {
            Ok(to) => {
                // Affinity comes first, and between two writes the tables may know of another state.
                let stays = !self.kind.affinity && !self.kind.between && owner.is_some_and(|a| self.ready(a));
                self.count.moved += u32::from(stays && to != owner);
                self.flows.insert(name, (to, self.now));
            }
            Err(_) => drop(self.flows.remove(&name)),
        }
    }

    fn speak(&mut self) {
        let known: Vec<Name> = self.flows.keys().copied().collect();
        if known.is_empty() || self.chance.permille(350) {
            return self.open();
        }
        let Some(name) = self.chance.pick(&known) else { return };
        let Some(&(owner, used)) = self.flows.get(&name) else { return };
        let idle = self.now.wrapping_sub(used);
        if idle > if self.kind.udp { UDP_IDLE } else { SETTLE } {
            self.flows.remove(&name);
            return;
        }
        let young = self.young.contains(&name) && self.chance.permille(500);
        if !self.kind.udp && idle <= HALF_OPEN && (young || self.chance.permille(50)) {
            return self.repeat(name, owner);
        }
        self.young.remove(&name);
        self.count.packets += 1;
        let to = if self.kind.udp {
            self.maps.datagram(&self.config, VIP, name, self.now)
        } else {
            self.maps.packet(&self.config, VIP, name, false, self.now)
        };
        if self.kind.udp && owner.is_some_and(|a| self.state(a) == Some(EndpointState::Unready)) {
            // Such a flow is decided anew.
            self.flows.remove(&name);
            if let Ok(to) = to {
                self.flows.insert(name, (to, self.now));
            }
        } else if to != Ok(owner) {
            if self.count.moved < 3 {
                eprintln!("{name:?} went to {to:?} instead of {owner:?} at {}", self.now);
            }
            self.count.moved += 1;
            self.flows.remove(&name);
        } else if self.chance.permille(100) {
            self.maps.reset(&self.config, VIP, name, self.now);
            self.flows.remove(&name);
        } else {
            if let Some(pod) = owner.filter(|_| !self.kind.udp) {
                let _ = self.maps.answer(&self.config, name, pod, self.now);
            }
            self.flows.insert(name, (owner, self.now));
        }
    }

    fn open(&mut self) {
        let port = if self.kind.two_ports && self.chance.permille(500) { 443 } else { 80 };
        let client = [198, 51, 100, self.chance.below(20) as u8];
        let name = (client, 1000 + self.chance.below(300) as u16, port);
        if self.flows.contains_key(&name) {
            return;
        }
        let to = if self.kind.udp {
            self.maps.datagram(&self.config, VIP, name, self.now)
        } else {
            self.maps.packet(&self.config, VIP, name, true, self.now)
        };
        let Ok(to) = to else { return };
        let alive = to.is_none_or(|a| self.service.endpoints.iter().any(|e| e.addr == IpAddr::from(a)));
        if !alive {
            // The agent is about to write that it is gone.
            return;
        }
        self.flows.insert(name, (to, self.now));
        if !self.kind.udp {
            self.young.insert(name);
        }
        if let Some(&(owner, used)) = self.clients.get(&client)
            && self.kind.affinity
            && !self.kind.two_ports
            && !self.kind.between
            && !self.kind.starved
            && !self.kind.udp
            && self.mode == Mode::Auto
            && self.ready(owner)
            && self.now.wrapping_sub(used) < AFFINITY
        {
            self.count.unstuck += u32::from(to != Some(owner));
        }
        if let Some(owner) = to {
            self.clients.insert(client, (owner, self.now));
        }
    }
}
