//! Nodes with the real state machine and clocks of their own, an API server, and the ways between them, all of which fail at
//! random. A data path answers for what is on its node's interface until its fence, whatever became of the process.
#![expect(clippy::unwrap_used, reason = "a model in a test may stop at the first surprise")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use purelb_plan::announce::election::{elect, score};
use purelb_plan::announce::owner::{Effect, Event, Identity, OnApiLoss, Owner, Phase, Settings, Want};

use crate::api::{Api, unknown};
use crate::chance::Chance;

#[path = "faults.rs"]
mod faults;

/// What happened, to see that the model is not too tame.
#[derive(Clone, Debug, Default)]
pub struct Count {
    pub steps: u64,
    pub holds: u64,
    pub calls: u64,
    pub revoked: u64,
    pub conflicts: u64,
    pub unknown: u64,
    pub late: u64,
    pub fenced: u64,
    pub adopted: u64,
    pub refused: u64,
    pub claims: u64,
    pub deleted: u64,
    pub frozen: u64,
    pub doubles: u64,
}

/// A machine with its kernel: what is in it outlives the process.
pub struct Host {
    pub node: String,
    place: String,
    offset: i64,
    ppm: i64,
    pub link: BTreeSet<IpAddr>,
    fence: u64,
    pub subnets: BTreeSet<IpNet>,
    pub process: Option<Owner>,
    life: u64,
    pending: BTreeMap<u64, Effect>,
    inbox: Vec<(u64, Event)>,
    frozen: bool,
    /// The whole machine sleeps, and its clock does not.
    paused: bool,
    stall: u64,
    cut: u64,
    /// Last delivery of each Lease.
    order: BTreeMap<String, u64>,
    wake: u64,
    pub renewals: u64,
}

enum Message {
    Request { host: usize, life: u64, id: u64, call: Effect, lost: bool, back: u64 },
    Answer { host: usize, life: u64, id: u64, event: Event },
    Timeout { host: usize, life: u64, id: u64 },
    Tell { host: usize, life: u64, event: Event },
    Watch { host: usize, life: u64, node: String, event: Event },
    Unlink { host: usize, life: u64, ip: IpAddr },
    Wake { host: usize },
    Thaw { host: usize },
    Start { host: usize },
}

pub struct Model {
    pub chance: Chance,
    pub now: u64,
    pub d: u64,
    pub hosts: Vec<Host>,
    api: Api,
    queue: BTreeMap<(u64, u64), Message>,
    ids: u64,
    down: u64,
    pub wants: BTreeMap<IpAddr, Want>,
    /// No fault happens by itself.
    pub calm: bool,
    /// Effects other than renewals and the fence.
    pub busy: u64,
    pub count: Count,
    pub on_api_loss: OnApiLoss,
    /// A process that stopped is started again.
    pub comes_back: bool,
    trace: bool,
}

impl Model {
    /// So many nodes, each with these subnets; all processes start.
    pub fn new(seed: u64, d: u64, nodes: &[&[&str]], ips: &[&str]) -> Self {
        let mut model = Self {
            chance: Chance(seed),
            now: 1_000_000,
            d,
            hosts: Vec::new(),
            api: Api::default(),
            queue: BTreeMap::new(),
            ids: 0,
            down: 0,
            wants: ips.iter().map(|ip| (ip.parse().unwrap(), Want::default())).collect(),
            calm: true,
            busy: 0,
            count: Count::default(),
            on_api_loss: OnApiLoss::Withdraw,
            comes_back: true,
            trace: std::env::var_os("OWNER_TRACE").is_some(),
        };
        for (at, subnets) in nodes.iter().enumerate() {
            model.add(&format!("n{at}"), subnets);
        }
        model
    }

    pub fn add(&mut self, node: &str, subnets: &[&str]) {
        let host = self.hosts.len();
        self.hosts.push(Host {
            node: node.to_owned(),
            place: format!("place{host}"),
            offset: self.chance.below(1_000_000) as i64 - 900_000,
            ppm: self.chance.below(10_001) as i64 - 5_000,
            link: BTreeSet::new(),
            fence: 0,
            subnets: subnets.iter().map(|net| net.parse().unwrap()).collect(),
            process: None,
            life: 0,
            pending: BTreeMap::new(),
            inbox: Vec::new(),
            frozen: false,
            paused: false,
            stall: 0,
            cut: 0,
            order: BTreeMap::new(),
            wake: u64::MAX,
            renewals: 0,
        });
        let delay = self.chance.below(300);
        self.push(delay, Message::Start { host });
    }

    /// Until this time.
    pub fn run(&mut self, until: u64) {
        while let Some(entry) = self.queue.first_entry().filter(|entry| entry.key().0 <= until) {
            self.now = self.now.max(entry.key().0);
            let message = entry.remove();
            self.deliver(message);
        }
        self.now = until;
    }

    /// Whose data paths answer for an address.
    pub fn answers(&self, ip: IpAddr) -> Vec<usize> {
        (0..self.hosts.len()).filter(|host| self.is_answering(*host, ip)).collect()
    }

    /// Who should answer when all is well.
    pub fn should(&self, ip: IpAddr) -> Option<String> {
        let stands = |host: &&Host| {
            let member = host.process.as_ref().filter(|owner| *owner.phase() == Phase::In);
            member.is_some_and(|owner| owner.subnets().iter().any(|net| net.contains(&ip)))
        };
        let candidates = self.hosts.iter().filter(stands).map(|host| (host.node.as_str(), score(&host.node, ip)));
        elect(candidates, &self.wants[&ip].preference).winner.map(str::to_owned)
    }

    fn local(&self, host: usize, now: u64) -> u64 {
        let Host { offset, ppm, .. } = &self.hosts[host];
        let now = now as i64;
        (offset + now + now * ppm / 1_000_000) as u64
    }

    fn is_answering(&self, host: usize, ip: IpAddr) -> bool {
        let at = &self.hosts[host];
        !at.paused && at.link.contains(&ip) && self.local(host, self.now) < at.fence
    }

    fn push(&mut self, delay: u64, message: Message) {
        self.ids += 1;
        self.queue.insert((self.now + delay, self.ids), message);
    }

    fn tell(&mut self, host: usize, delay: u64, event: Event) {
        let life = self.hosts[host].life;
        self.push(delay, Message::Tell { host, life, event });
    }

    fn deliver(&mut self, message: Message) {
        match message {
            Message::Request { host, life, id, call, lost, back } => {
                if self.now < self.down || self.now < self.hosts[host].cut {
                    return;
                }
                let node = self.hosts[host].node.clone();
                let (event, changed) = self.api.serve(&node, &call);
                if let Some(changed) = changed {
                    self.publish(&changed);
                }
                if !lost {
                    self.push(back, Message::Answer { host, life, id, event });
                }
            }
            Message::Answer { host, life, id, event } => {
                let cut = self.now < self.hosts[host].cut || self.now < self.down;
                if self.hosts[host].life == life && !cut && self.hosts[host].pending.remove(&id).is_some() {
                    self.step(host, event);
                }
            }
            Message::Timeout { host, life, id } => {
                if self.hosts[host].life == life
                    && let Some(call) = self.hosts[host].pending.remove(&id)
                {
                    self.count.unknown += 1;
                    self.step(host, unknown(&call));
                }
            }
            Message::Tell { host, life, event } => {
                // A watch tells the newest.
                let event = match event {
                    Event::Wants(_) => Event::Wants(self.wants.clone()),
                    Event::Subnets(_) => Event::Subnets(self.hosts[host].subnets.clone()),
                    other => other,
                };
                if self.hosts[host].life == life {
                    self.step(host, event);
                }
            }
            Message::Watch { host, life, node, event } => {
                let until = self.hosts[host].stall.max(self.hosts[host].cut).max(self.down);
                if self.hosts[host].life != life {
                    return;
                }
                if self.now < until {
                    let at = until.max(self.hosts[host].order.get(&node).copied().unwrap_or_default());
                    self.hosts[host].order.insert(node.clone(), at);
                    self.push(at - self.now, Message::Watch { host, life, node, event });
                } else if self.calm || !(self.chance.permille(50) && self.is_old(&node, &event)) {
                    self.step(host, event);
                }
            }
            Message::Unlink { host, life, ip } => {
                if self.hosts[host].life != life {
                } else if self.hosts[host].frozen {
                    self.push(50, Message::Unlink { host, life, ip });
                } else {
                    self.hosts[host].link.remove(&ip);
                    self.step(host, Event::Withdrawn(ip));
                }
            }
            Message::Wake { host } => {
                if self.hosts[host].wake <= self.now {
                    self.hosts[host].wake = u64::MAX;
                    self.step(host, Event::Tick);
                }
            }
            Message::Thaw { host } => {
                let at = &mut self.hosts[host];
                (at.frozen, at.paused) = (false, false);
                // The data path answers before any process runs.
                self.judge(host);
                for (life, event) in std::mem::take(&mut self.hosts[host].inbox) {
                    if life == self.hosts[host].life {
                        self.step(host, event);
                    }
                }
                self.step(host, Event::Tick);
                self.judge(host);
            }
            Message::Start { host } => self.start(host),
        }
    }

    /// A newer version of the Lease is on its way too.
    fn is_old(&self, node: &str, event: &Event) -> bool {
        match (event, self.api.objects.get(node)) {
            (Event::Observed(lease), Some(there)) => there.version > lease.version,
            (Event::Deleted { .. }, there) => there.is_some(),
            _ => true,
        }
    }

    fn start(&mut self, host: usize) {
        if self.hosts[host].process.is_some() {
            return;
        }
        let now = self.local(host, self.now);
        let at = &mut self.hosts[host];
        at.life += 1;
        let session = format!("{}-{}", at.place, at.life);
        let me = Identity { node: at.node.clone(), instance: "pod".to_owned(), place: at.place.clone(), session };
        let settings = Settings { duration: self.d, hold: 60_000, on_api_loss: self.on_api_loss };
        let (owner, effects) = Owner::start(me, settings, &at.link, at.fence, now);
        at.process = Some(owner);
        at.order.clear();
        let subnets = at.subnets.clone();
        if self.trace {
            println!("{} host {host} {} starts {effects:?}", self.now, self.hosts[host].node);
        }
        self.apply(host, effects);
        let (a, b, c) = (self.chance.below(50), self.chance.below(50), self.chance.below(self.d / 4));
        self.tell(host, a, Event::Subnets(subnets));
        self.tell(host, b, Event::Wants(self.wants.clone()));
        self.tell(host, c, Event::Ready);
    }

    fn step(&mut self, host: usize, event: Event) {
        let now = self.local(host, self.now);
        let at = &mut self.hosts[host];
        if at.frozen {
            at.inbox.push((at.life, event));
            return;
        }
        let Some(owner) = at.process.as_mut() else { return };
        self.count.steps += 1;
        let said = self.trace.then(|| format!("{event:?}"));
        let effects = owner.step(now, event);
        if let Some(said) = said.filter(|said| said != "Tick" || !effects.is_empty()) {
            println!("{} host {host} {said}\n      => {effects:?} {:?}", self.now, owner.phase());
        }
        self.apply(host, effects);
    }

    fn apply(&mut self, host: usize, effects: Vec<Effect>) {
        let life = self.hosts[host].life;
        for effect in effects {
            match effect {
                Effect::Hold(ip) => {
                    self.busy += 1;
                    self.count.holds += 1;
                    self.hosts[host].link.insert(ip);
                    self.judge(host);
                }
                Effect::Withdraw(ip) => {
                    self.busy += 1;
                    let delay = self.chance.below(15);
                    self.push(delay, Message::Unlink { host, life, ip });
                }
                Effect::Fence(until) => {
                    self.hosts[host].fence = until;
                    self.judge(host);
                }
                Effect::Stopped => {
                    self.kill(host);
                    if self.comes_back {
                        let delay = if self.calm { 100 } else { self.chance.below(2 * self.d) };
                        self.start_after(host, delay);
                    }
                }
                call => self.call(host, life, call),
            }
        }
        let Some(owner) = &self.hosts[host].process else { return };
        let at = &self.hosts[host];
        let (due, wide) = (owner.due(), 1_000_000 + at.ppm);
        let due = due.saturating_sub(self.local(host, self.now)).min(1_000_000_000);
        let wake = self.now + (due as i64 * 1_000_000 / wide) as u64 + 1;
        if wake != at.wake {
            self.hosts[host].wake = wake;
            self.push(wake - self.now, Message::Wake { host });
        }
    }

    fn call(&mut self, host: usize, life: u64, call: Effect) {
        self.count.calls += 1;
        match &call {
            Effect::Renew { says, .. } => {
                self.hosts[host].renewals += 1;
                let ours = says.ours.as_ref().unwrap();
                self.count.claims += u64::from(!ours.claims.is_empty());
                let first = self.hosts[host].process.as_ref().is_some_and(|owner| *owner.phase() == Phase::Entering);
                self.count.adopted += u64::from(first && !says.subnets.is_empty());
            }
            _ => self.busy += 1,
        }
        self.ids += 1;
        let id = self.ids;
        self.hosts[host].pending.insert(id, call.clone());
        let (there, back) = (self.latency(), self.latency());
        let lost = !self.calm && self.chance.permille(15);
        if self.calm || !self.chance.permille(15) {
            self.push(there, Message::Request { host, life, id, call, lost, back });
        }
        self.count.late += u64::from(there > self.d * 4 / 10);
        self.push(self.d * 4 / 10, Message::Timeout { host, life, id });
    }

    fn latency(&mut self) -> u64 {
        let usual = 2 + self.chance.below(20);
        match self.chance.below(1000) {
            _ if self.calm => usual,
            0..930 => usual,
            930..985 => 200 + self.chance.below(self.d / 7),
            _ => self.chance.below(self.d * 3 / 2),
        }
    }

    /// The Lease changed: all watches say so, in order for each Lease.
    fn publish(&mut self, node: &str) {
        let event = self.api.event(node);
        let mut all: Vec<_> = (0..self.hosts.len()).collect();
        self.chance.shuffle(&mut all);
        for host in all {
            if self.hosts[host].process.is_none() {
                continue;
            }
            let slow = if !self.calm && self.chance.permille(10) { self.chance.below(500) } else { 0 };
            let delay = 2 + self.chance.below(25) + slow;
            let order = self.hosts[host].order.entry(node.to_owned()).or_default();
            *order = (self.now + delay).max(*order);
            let (delay, life) = (*order - self.now, self.hosts[host].life);
            self.push(delay, Message::Watch { host, life, node: node.to_owned(), event: event.clone() });
        }
    }

    /// The law: at most one data path answers for an address.
    fn judge(&self, host: usize) {
        for ip in &self.hosts[host].link {
            let owners = self.answers(*ip);
            assert!(owners.len() < 2, "{ip} has two owners at {}: hosts {owners:?}", self.now);
        }
    }

    /// What became of it, into the count.
    pub fn total(&mut self) -> Count {
        self.count.revoked = self.api.revoked;
        self.count.conflicts = self.api.conflicts;
        self.count.clone()
    }

    /// A node waits while another agent has its name.
    pub fn note(&mut self) {
        let refused =
            |host: &&Host| host.process.as_ref().is_some_and(|owner| matches!(owner.phase(), Phase::Refused(..)));
        self.count.refused += self.hosts.iter().filter(refused).count() as u64;
        let fenced = (0..self.hosts.len()).filter(|host| {
            let at = &self.hosts[*host];
            !at.link.is_empty() && self.local(*host, self.now) >= at.fence
        });
        self.count.fenced += fenced.count() as u64;
    }
}
