//! Local addresses: what the election is told, and what is told of it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use purelb_plan::announce::lease::MOST_CLAIMS;
use purelb_plan::announce::local::wants;
use purelb_plan::announce::owner::Stop;
use purelb_plan::problem::Problem;
use purelb_plan::world::World;

use crate::announcer::{Announcer, Ended, Held, PREFIX, Wish};
use crate::cluster::daemon_set::DaemonSet;
use crate::cluster::slots::{Slots, Won};
use crate::metrics::{Announced, Announcing};
use crate::net::{self, local::Networks};
use crate::snapshot;

/// kube-proxy may take so long to come after the machine has started.
pub const KUBE_PROXY_COMES: Duration = Duration::from_secs(60);

/// This node's part in who answers for local addresses.
#[derive(Debug)]
pub struct Local {
    announcer: Announcer,
    /// On a cluster.
    slots: Option<Slots>,
    /// What runs this agent.
    runs: Option<DaemonSet>,
    said: BTreeMap<String, Won>,
    wish: Wish,
    metrics: Announcing,
    /// The series of what is announced.
    series: BTreeSet<Announced>,
}

impl Local {
    /// With an election that runs.
    #[must_use]
    pub fn new(announcer: Announcer, slots: Option<Slots>, runs: Option<DaemonSet>, metrics: Announcing) -> Self {
        let (said, wish, series) = (BTreeMap::new(), Wish::default(), BTreeSet::new());
        Self { announcer, slots, runs, said, wish, metrics, series }
    }

    /// Resolves when something of it changed.
    ///
    /// # Errors
    /// It ended by itself.
    pub async fn changed(&mut self) -> Result<(), Ended> {
        self.announcer.changed().await
    }

    /// Says what there is. `fenced`: interfaces whose programs keep the fence.
    pub fn wish(&mut self, world: &World, network: &net::Snapshot, fenced: BTreeSet<u32>, ready: bool) {
        let announcing = world.announcing.as_ref().filter(|_| !world.excluded);
        let mut wanted = wants(world);
        if world.unread {
            // What stands in a file that cannot be read may still be meant.
            let before = self.wish.wants.take().unwrap_or_default();
            wanted.extend(before.into_iter().filter(|(ip, _)| !wanted.contains_key(ip)).collect::<Vec<_>>());
        }
        let skips = world.services.values().filter(|service| service.skip_dad).flat_map(|service| &service.vips);
        self.wish = Wish {
            skip_dad: skips.filter(|ip| ip.is_ipv6() && wanted.contains_key(*ip)).copied().collect(),
            wants: Some(wanted),
            networks: announcing.map_or_else(Networks::new, |_| network.local.clone()),
            ready: ready || self.wish.ready,
            options: announcing.map(|announcing| announcing.options).unwrap_or_default(),
            garp: announcing.and_then(|announcing| announcing.garp),
            fenced,
        };
        self.announcer.wish(self.wish.clone());
    }

    /// What is on interfaces, whoever wants it, or is about to be.
    #[must_use]
    pub fn on(&self, network: &net::Snapshot) -> BTreeSet<IpAddr> {
        self.announcer.held.borrow().keys().chain(&network.held).copied().collect()
    }

    /// Writes into Services who announces them, where that is not what they say.
    pub fn say(&mut self, world: &World) {
        let held = self.announcer.held.borrow().clone();
        self.count(world, &held);
        let Some(slots) = &self.slots else { return };
        let mut said = BTreeMap::new();
        for (name, service) in &world.services {
            // What was here before is on its interface until the contrary is known.
            let open = |held: &Held| held.iface.is_none() && held.fault.is_none();
            if service.vips.iter().any(|vip| held.get(vip).is_some_and(open)) {
                continue;
            }
            let won = won(&service.vips, &held);
            let mine = service.slots.iter().filter(|slot| slot.node == world.node);
            let stands: BTreeSet<_> = mine.map(|slot| (slot.ip, slot.iface.clone())).collect();
            let differs = stands != won.on.iter().cloned().collect();
            if (differs || !won.failed.is_empty()) && self.said.get(name) != Some(&won) {
                slots.say(name, won.clone());
            }
            if differs || !won.failed.is_empty() {
                said.insert(name.clone(), won);
            }
        }
        // Once it stands there it may be said again: somebody may take it away.
        self.said = said;
    }

    fn count(&mut self, world: &World, held: &BTreeMap<IpAddr, Held>) {
        let on = |vip: &&IpAddr| held.get(*vip).is_some_and(|held| held.iface.is_some());
        let series = if held.is_empty() {
            BTreeSet::new()
        } else {
            let all = world.services.iter().flat_map(|(name, service)| service.vips.iter().map(move |vip| (name, vip)));
            let of = |(name, vip): (&String, &IpAddr)| Announced {
                service: name.clone(),
                node: world.node.clone(),
                ip: vip.to_string(),
            };
            all.filter(|(_, vip)| on(vip)).map(of).collect()
        };
        for gone in self.series.difference(&series) {
            self.metrics.announced.remove(gone);
        }
        for new in &series {
            self.metrics.announced.get_or_create(new).set(1);
        }
        self.series = series;
    }

    /// What `status` shows.
    #[must_use]
    pub fn shown(&self) -> snapshot::Election {
        let state = self.announcer.state.borrow();
        let held = self.announcer.held.borrow();
        snapshot::Election {
            phase: state.phase.to_owned(),
            members: state.members,
            purelbs: state.purelbs,
            subnets: self.wish.networks.keys().map(ToString::to_string).collect(),
            addresses: held.iter().filter_map(|(ip, held)| Some((ip.to_string(), held.iface.clone()?))).collect(),
        }
    }

    /// What is wrong.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        let problem = |object: String, message: String, remedy: &str| Problem {
            object,
            field: String::new(),
            message,
            remedy: remedy.to_owned(),
            origin: String::new(),
        };
        let held = self.announcer.held.borrow();
        let faults = held.iter().filter_map(|(ip, held)| Some((ip, held.fault.clone()?)));
        let remedy = "see `ip address` here and `arping` in the network; it is tried again";
        let mut problems: Vec<_> =
            faults.map(|(ip, fault)| problem(format!("local address {ip}"), fault, remedy)).collect();
        let state = self.announcer.state.borrow();
        if let Some(fault) = state.fault.clone().filter(|_| !self.wish.networks.is_empty()) {
            let remedy = "local addresses are withdrawn while the node's Lease cannot be renewed";
            problems.push(problem("election".to_owned(), fault, remedy));
        }
        let remedy = "what cannot be read counts for nothing; delete the Lease if no agent writes it";
        let odd = state.odd.iter();
        problems.extend(odd.map(|(node, odd)| problem(format!("Lease {PREFIX}{node}"), odd.clone(), remedy)));
        for (node, why) in &state.stuck {
            let message = format!("{node} is silent, and what it had cannot be taken over: {why}");
            let remedy =
                "see the agent of that node: what it writes half-way nobody else may write; its addresses wait";
            problems.push(problem("election".to_owned(), message, remedy));
        }
        if state.unclaimed > 0 {
            let unclaimed = state.unclaimed;
            let message = format!(
                "{unclaimed} local addresses should be on this node for its endpoints and are on none: a Lease has room \
                 for {MOST_CLAIMS} of them"
            );
            let remedy =
                "give fewer Services the policy Local or node affinity, or spread their endpoints over more nodes";
            problems.push(problem("election".to_owned(), message, remedy));
        }
        problems
    }

    /// The agent ends for good, since what runs it is being deleted.
    pub async fn is_deleted(&self) -> bool {
        match &self.runs {
            Some(runs) => runs.is_going().await,
            None => false,
        }
    }

    /// The agent ends.
    pub async fn stop(&mut self, how: Stop) {
        self.announcer.stop(how).await;
    }
}

fn won(vips: &BTreeSet<IpAddr>, held: &BTreeMap<IpAddr, Held>) -> Won {
    let mut won = Won::default();
    for (ip, held) in vips.iter().filter_map(|vip| held.get_key_value(vip)) {
        match (&held.iface, &held.fault) {
            (Some(iface), _) => {
                won.on.push((*ip, iface.clone()));
                if !held.adopted {
                    won.fresh.insert(*ip);
                }
            }
            (None, Some(fault)) => won.failed.push((*ip, fault.clone())),
            (None, None) => {}
        }
    }
    won
}
