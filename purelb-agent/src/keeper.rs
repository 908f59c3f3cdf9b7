//! The one owner of state: whatever happens means "look again", and looking again is reading what changed
//! of source and host, planning, and applying. Every minute everything is read anew, the maps too.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use purelb_common::table::{CONFIG_KUBE_PROXY, TICK_SHIFT};
use purelb_plan::announce::owner::Stop;
use purelb_plan::announce::remote;
use purelb_plan::apply::apply;
use purelb_plan::observed::{Action, Observed};
use purelb_plan::plan::{Planner, Settings, in_use};
use purelb_plan::problem::Problem;
use purelb_plan::world::{Announcing, Datapath, Hook, Mode};

use crate::announcer::Ended;
use crate::args::{Choice, Node};
use crate::bpf::{BpfError, Links, Programs};
use crate::cluster::watch::News;
use crate::host::{self, KubeProxy};
use crate::net::{self, NetError, Netlink, VipDevice};
use crate::pulse;
use crate::snapshot::{self, Publisher, Snapshot, Uplink};
use crate::source::{Host, Look, Source};

mod drain;
mod linger;
mod local;
mod pace;

use drain::Drain;
pub use drain::QUIET;
use linger::{Announced, Linger};
use local::KUBE_PROXY_COMES;
pub use local::Local;
use pace::Pace;

/// Everything is looked at this often even if nothing says that it changed...
const POLL: Duration = Duration::from_secs(5);
/// ... and the maps are read again this often, and what only time changes is looked at; less often where that takes long.
const RESYNC: Duration = Duration::from_secs(60);

/// Why the agent cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The kernel side.
    #[error(transparent)]
    Bpf(#[from] BpfError),
    /// The network side.
    #[error(transparent)]
    Net(#[from] NetError),
    /// Local addresses.
    #[error(transparent)]
    Ended(#[from] Ended),
}

/// Holds everything that lives as long as the agent.
pub struct Keeper {
    args: Node,
    source: Source,
    kube_proxy: KubeProxy,
    /// Tables were written before, or are by now: what is new was not served by others.
    written: bool,
    /// The tables that are there now were planned by this agent.
    planned: bool,
    drain: Drain,
    linger: Linger,
    /// The device for remote addresses, and what was wanted of it.
    vips: Option<(Wanted, VipDevice)>,
    local: Local,
    programs: Programs,
    netlink: Netlink,
    network: Option<net::Snapshot>,
    planner: Planner,
    /// The maps as we left them; `None`: they must be read.
    observed: Option<Observed>,
    polled: Pace,
    resynced: Pace,
    hung: Option<Hung>,
    attach_problems: Vec<Problem>,
    /// What is wrong with the pins.
    pins: Option<Problem>,
    snapshot: Snapshot,
    ready: Arc<AtomicBool>,
    publisher: Publisher,
    ticks_per_1000s: u64,
    started: Instant,
}

impl Keeper {
    /// Adopts what is pinned; writes nothing yet. `ready`: is told when the tables are right.
    ///
    /// # Errors
    /// The kernel or netlink refuses.
    pub fn new(
        args: Node,
        source: Source,
        programs: Programs,
        local: Local,
        ready: Arc<AtomicBool>,
    ) -> Result<Self, KeepError> {
        let netlink = Netlink::new()?;
        let (clock, config) = (programs.maps().clock()?, programs.maps().config()?);
        let settle = Duration::from_millis(args.settle / 2).max(Duration::from_secs(1));
        let snapshot = Snapshot { node: args.node_name.clone(), pid: std::process::id(), ..Snapshot::default() };
        Ok(Self {
            kube_proxy: KubeProxy::new(args.kube_proxy, config.flags & CONFIG_KUBE_PROXY != 0),
            // An agent that died between its first maps and its first heartbeat left tables that nothing was served by,
            // and so did one that had to take its programs down.
            written: config.heartbeat_limit != 0 && programs.hang_somewhere(),
            planned: false,
            drain: Drain::No,
            linger: Linger::new(Duration::from_millis(args.withdraw_wait)),
            vips: None,
            local,
            source,
            programs,
            netlink,
            network: None,
            planner: Planner::default(),
            observed: None,
            polled: Pace::new(Duration::ZERO),
            resynced: Pace::new(RESYNC.min(settle)),
            hung: None,
            attach_problems: Vec::new(),
            pins: None,
            snapshot,
            ready,
            publisher: Publisher::new(&args.instance.bpf_root),
            args,
            ticks_per_1000s: (u64::from(clock.hz) * 1000) >> TICK_SHIFT,
            started: Instant::now(),
        })
    }

    /// Takes in what the watches of a cluster saw.
    pub fn hear(&mut self, news: Vec<News>) {
        if let Source::Cluster(cluster) = &mut self.source {
            cluster.hear(news);
        }
    }

    /// Whether the watches of a cluster are to begin anew.
    pub fn renews(&mut self) -> bool {
        self.source.renews()
    }

    /// Resolves when the network, the election or the local addresses changed.
    ///
    /// # Errors
    /// Netlink is gone.
    pub async fn changed(&mut self) -> Result<(), KeepError> {
        tokio::select! {
            changed = self.netlink.changed() => {
                changed?;
                self.network = None;
            }
            changed = self.local.changed() => changed?,
        }
        Ok(())
    }

    /// Once a second: tells the programs that the agent lives, as soon as it has a list (D17), and publishes
    /// what waited for it.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn beat(&mut self) -> Result<(), KeepError> {
        self.programs.flush_log();
        if self.snapshot.ready {
            let fallback = pulse::fallback(self.args.reply_fallback, self.started.elapsed());
            let kube_proxy = self.kube_proxy.here();
            pulse::beat(self.programs.maps(), &self.args, self.ticks_per_1000s, fallback, kube_proxy)?;
        }
        self.publisher.flush(&self.snapshot);
        Ok(())
    }

    /// When [`Self::look_at_all`] is due.
    #[must_use]
    pub const fn next_poll(&self) -> Instant {
        self.polled.next
    }

    /// The poll.
    ///
    /// # Errors
    /// As [`Self::look`].
    pub async fn look_at_all(&mut self) -> Result<(), KeepError> {
        let begin = Instant::now();
        let resync = begin >= self.resynced.next;
        self.network = None;
        self.pins = self.look_at_pins();
        if resync {
            self.observed = None;
            self.planner.forget();
        }
        let changed = self.look(&Look::All).await?;
        let settle = Duration::from_millis(self.args.settle / 2).max(Duration::from_secs(1));
        if resync {
            self.resynced.ended(begin, RESYNC.min(settle));
        }
        // What a look costs that finds nothing is what counts.
        self.polled.ended(if resync || changed { Instant::now() } else { begin }, POLL);
        if matches!(self.drain, Drain::Since(_)) {
            self.polled.next = Instant::now() + drain::PACE;
        }
        if let Some(next) = self.linger.next() {
            self.polled.next = self.polled.next.min(next);
        }
        Ok(())
    }

    /// They are where the commands and the next agent look for them.
    fn look_at_pins(&self) -> Option<Problem> {
        let there = host::preflight(&self.args.instance.bpf_root).map_err(|e| e.to_string());
        let message = there.and_then(|()| self.programs.pin_again().map_err(|e| e.to_string())).err()?;
        tracing::warn!(event = "pinsGone", error = message, "the pins are gone");
        Some(Problem {
            object: "pins".to_owned(),
            field: String::new(),
            message: format!("are gone, and packets may meet no program: {message}"),
            remedy: "make the bpf file system writable there; they are pinned again within seconds".to_owned(),
            origin: String::new(),
        })
    }

    /// Reads what may have changed, plans, applies; whether there was anything to apply.
    ///
    /// # Errors
    /// The kernel or netlink refuses what it never should.
    pub async fn look(&mut self, look: &Look) -> Result<bool, KeepError> {
        self.source.look(look);
        let mut problems = self.source.problems();
        problems.extend(self.pins.clone());
        let Some(datapath) = self.source.world().map(|w| w.datapath.clone()) else {
            problems.extend(host::check(&[]));
            self.publish(problems);
            return Ok(false);
        };
        let announcing = self.source.world().and_then(|world| world.announcing.clone());
        let current = |network: &net::Snapshot| network.of.0 == datapath && network.of.1 == announcing;
        let network = match self.network.take().filter(current) {
            Some(network) => network,
            None => {
                // What is on the device may be other than it was left, too.
                self.vips = self.vips.take().map(|(wanted, device)| (Wanted { seen: false, ..wanted }, device));
                self.netlink.snapshot(&datapath, announcing.as_ref()).await?
            }
        };
        problems.extend(network.problems.iter().cloned());
        problems.extend(host::check(&network.uplinks));
        problems.extend(host::twins(&network.twins));
        let kube_proxy = self.kube_proxy.here();
        let observed = match self.observed.take() {
            Some(observed) => observed,
            None => self.programs.maps().observe()?,
        };
        let tick = self.programs.maps().clock()?.tick;
        self.drain(datapath.mode == Mode::Off, &observed, tick);
        let live = match self.args.live {
            Choice::Yes => !self.planned,
            Choice::No => false,
            Choice::Auto => kube_proxy && !self.written,
        };
        let host = Host { kube_proxy, live, detached: self.drain == Drain::Over };
        let networks = net::local::subnets(&network.local);
        self.source.host(&network.addresses, &networks, host);
        let Some(world) = self.source.world() else { return Ok(false) };
        let unread = world.unread;
        let milliticks = u32::try_from(self.ticks_per_1000s).unwrap_or(u32::MAX);
        let settings = Settings { settle: pulse::ticks(self.ticks_per_1000s, self.args.settle), milliticks };
        let announced = self.vips.as_ref().map(|(_, device)| device.addresses.clone()).unwrap_or_default();
        let local = self.local.on(&network);
        let served = self.linger.world(world, Announced { remote: &announced, local: &local }, Instant::now());
        let (booting, mute) = (self.booting(kube_proxy), self.source.is_mute());
        let mut addresses = remote::wanted(world);
        // Ready means ready to forward; what is announced already is no news to anybody.
        addresses.retain(|ip, _| !mute && (!booting || announced.contains_key(ip)));
        let wanted = Wanted {
            addresses,
            device: announcing.map_or_else(|| Announcing::default().device, |announcing| announcing.device),
            release: !unread && !booting,
            seen: true,
        };
        let plan = self.planner.plan(&served, &observed, self.programs.maps(), &settings, tick);
        self.observed = self.carry_out(&plan.actions, observed, &mut problems);
        if self.observed.is_none() {
            self.planner.forget();
        }
        if !plan.actions.is_empty() && !plan.problems.is_empty() {
            // What found no room may find what was let go of.
            self.polled.next = self.polled.next.min(Instant::now() + POLL);
        }
        problems.extend(plan.problems);
        self.snapshot.services = plan.services;
        // With no program anywhere the next tables begin anew; and what stands in a file that is read later passed as
        // long, so it begins as the others did.
        let begun = self.drain != Drain::Over && !(live && unread);
        (self.written, self.planned) = (begun, begun);
        if !self.snapshot.ready {
            // The tables are right now, so they may count as fresh; and fresh maps learn their seed.
            self.snapshot.ready = true;
            self.ready.store(true, Ordering::Relaxed);
            self.beat()?;
        }
        // Without a word of an LBNodeAgent, and with a file that was never read, the settings are unknown.
        let links = match self.drain {
            Drain::Over => Links::Gone,
            Drain::Since(_) => Links::Stay("datapath.mode is off: until what runs through it has ended"),
            Drain::No if unread && datapath == Datapath::default() => {
                Links::Stay("as it was: the LBNodeAgent may not have been read")
            }
            Drain::No => Links::AsSet,
        };
        let hung = self.attach(&network, &datapath, links);
        let moved = self.announce(wanted, &mut problems).await?;
        self.elect(&network, booting);
        problems.extend(self.local.problems());
        problems.extend(self.attach_problems.iter().cloned());
        self.network = Some(network);
        self.publish(problems);
        Ok(hung || moved || !plan.actions.is_empty())
    }

    /// Remote addresses, once the tables are right: whether anything was changed.
    async fn announce(&mut self, wanted: Wanted, problems: &mut Vec<Problem>) -> Result<bool, KeepError> {
        if let Some(next) = self.linger.next() {
            self.polled.next = self.polled.next.min(next);
        }
        let fresh = match &self.vips {
            Some((before, device)) => {
                // Nothing is there and nothing shall be: that is not worth two lists at every look.
                let idle = device.addresses.is_empty() && wanted.addresses.is_empty();
                let same = Wanted { seen: before.seen || idle, ..before.clone() } == wanted;
                same && device.problems.is_empty()
            }
            None => false,
        };
        if !fresh {
            let device = self.netlink.announce(&wanted.device, &wanted.addresses, wanted.release).await?;
            if device.changed {
                let (addresses, iface) = (device.addresses.len(), &wanted.device);
                tracing::info!(event = "announcingNonLocal", iface, addresses, "remote addresses changed");
            }
            self.vips = Some((wanted, device));
        }
        let Some((wanted, device)) = &mut self.vips else { return Ok(false) };
        problems.extend(device.problems.iter().cloned());
        self.snapshot.vip_device = (!device.kind.is_empty()).then(|| snapshot::VipDevice {
            name: wanted.device.clone(),
            kind: device.kind.clone(),
            addresses: device.addresses.iter().map(|(ip, prefix)| format!("{ip}/{prefix}")).collect(),
        });
        Ok(!fresh && std::mem::take(&mut device.changed))
    }

    /// After boot kube-proxy may have no rules yet for what pods of other nodes answer.
    fn booting(&self, kube_proxy: bool) -> bool {
        matches!(self.source, Source::Cluster(_))
            && !kube_proxy
            && self.args.kube_proxy == Choice::Auto
            && host::uptime() < KUBE_PROXY_COMES * 5
            && self.started.elapsed() < KUBE_PROXY_COMES
    }

    /// Tells the election what there is, now that the tables are right, and Services who announces them.
    fn elect(&mut self, network: &net::Snapshot, booting: bool) {
        let hangs = |name: &str| {
            self.drain == Drain::No && self.snapshot.uplinks.iter().any(|uplink| uplink.attached && uplink.name == name)
        };
        // Where another interface without a program answers for an address, only the address's own end is a fence.
        let open = network.twins.iter().filter(|twin| !hangs(&twin.name) && host::answers_for_others(&twin.name));
        let open: BTreeSet<u32> = open.map(|twin| twin.of).collect();
        let fenced = network.uplinks.iter().filter(|link| hangs(&link.name) && !open.contains(&link.index));
        let fenced = fenced.map(|link| link.index).collect();
        let Some(world) = self.source.world() else { return };
        self.local.wish(world, network, fenced, !booting);
        self.local.say(world);
        self.snapshot.election = Some(self.local.shown());
    }

    /// The maps after it, or `None` when a write was refused: then the next look reads and tries again.
    fn carry_out(&self, actions: &[Action], mut observed: Observed, problems: &mut Vec<Problem>) -> Option<Observed> {
        let mut refused = false;
        for action in actions {
            tracing::debug!(op = "apply", ?action, "apply");
            match self.programs.maps().apply(action) {
                Ok(()) => apply(&mut observed, action),
                // A map that is full must not take the others' changes with it.
                Err(error) => {
                    refused = true;
                    problems.push(Problem {
                        object: "tables".to_owned(),
                        field: String::new(),
                        message: format!("a change was refused: {error}"),
                        remedy: "serve fewer VIPs and Services on this node".to_owned(),
                        origin: String::new(),
                    });
                }
            }
        }
        if !actions.is_empty() {
            tracing::info!(event = "tablesChanged", actions = actions.len(), "tables changed");
        }
        (!refused).then_some(observed)
    }

    /// With `datapath.mode: off` and the tables handed over: whether something still needs the programs.
    fn drain(&mut self, off: bool, observed: &Observed, tick: u32) {
        let quiet = pulse::ticks(self.ticks_per_1000s, QUIET.as_millis() as u64);
        let maps = self.programs.maps();
        let in_use = || in_use(observed, maps, tick, quiet) > 0;
        let next = self.drain.next(off, self.programs.hang_somewhere(), Instant::now(), in_use);
        if next != self.drain {
            tracing::info!(event = "datapathMode", now = ?next, "datapath.mode");
            self.drain = next;
            self.polled.next = Instant::now() + drain::PACE;
        }
    }

    /// Programs on the uplinks and exits, when something about them changed or failed before; whether it is other
    /// ones than before.
    fn attach(&mut self, network: &net::Snapshot, datapath: &Datapath, links: Links) -> bool {
        let uplinks: &[_] = if links == Links::Gone { &[] } else { &network.uplinks };
        let (of, exits) = (network.uplinks.clone(), network.exits.clone());
        let now = Some(Hung { uplinks: of, exits, hook: datapath.hook, links });
        let hang = links == Links::Gone || self.programs.all_hang(uplinks, &network.exits);
        if self.hung == now && self.attach_problems.is_empty() && hang {
            return false;
        }
        let status = self.programs.attach(&network.uplinks, datapath.hook, links);
        self.attach_problems = status.iter().filter_map(|s| s.problem.clone()).collect();
        self.attach_problems.extend(self.programs.attach_exits(uplinks, &network.exits, links));
        self.snapshot.uplinks = status
            .into_iter()
            .map(|s| Uplink { name: s.name, hook: s.hook, why: s.why, attached: s.attached })
            .collect();
        let other = self.hung != now;
        self.hung = now;
        other
    }

    fn publish(&mut self, mut problems: Vec<Problem>) {
        problems.sort();
        problems.dedup();
        self.snapshot.problems = problems;
        self.publisher.offer(&self.snapshot);
    }

    /// The last words, when the agent ends.
    pub async fn end(mut self) {
        let leaves = self.source.world().is_some_and(|world| world.evicting || world.excluded);
        let leaves = leaves || self.local.is_deleted().await;
        let how = if leaves { Stop::HandOver } else { Stop::Hold };
        tracing::info!(event = "leaveElection", ?how, "local addresses");
        self.local.stop(how).await;
        if leaves {
            self.leave().await;
        }
        self.publisher.end(&self.snapshot).await;
    }
}

impl Keeper {
    /// Withdraws the remote addresses, and serves them until the routers know. The data path goes on after that, too.
    async fn leave(&mut self) {
        let Some((wanted, device)) = self.vips.take() else { return };
        if !device.addresses.is_empty() {
            match self.netlink.announce(&wanted.device, &BTreeMap::new(), true).await {
                Ok(_) => tokio::time::sleep(self.linger.time).await,
                Err(error) => tracing::warn!(op = "withdrawRemote", %error, "remote addresses stay"),
            }
        }
    }
}

/// What the device for remote addresses should be.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    addresses: BTreeMap<IpAddr, u8>,
    device: String,
    /// What is not wanted may go.
    release: bool,
    /// It was not read since the network changed.
    seen: bool,
}

/// What [`Keeper::attach`] last made so.
#[derive(Debug, PartialEq, Eq)]
struct Hung {
    uplinks: Vec<net::Uplink>,
    exits: Vec<net::Uplink>,
    hook: Hook,
    links: Links,
}
