//! The one owner of state: whatever happens means "look again", and looking again is reading what changed
//! of source and host, planning, and applying. Every minute everything is read anew, the maps too.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use purelb_common::table::{CONFIG_KUBE_PROXY, TICK_SHIFT};
use purelb_plan::apply::apply;
use purelb_plan::observed::{Action, Observed};
use purelb_plan::plan::{Planner, Settings, in_use};
use purelb_plan::problem::Problem;
use purelb_plan::world::{Datapath, Hook, Mode};

use crate::args::{Choice, Node};
use crate::bpf::{BpfError, Links, Programs};
use crate::cluster::watch::News;
use crate::host::{self, KubeProxy};
use crate::net::{self, NetError, Netlink};
use crate::pulse;
use crate::snapshot::{Publisher, Snapshot, Uplink};
use crate::source::{Host, Look, Source};

mod drain;

use drain::Drain;
pub use drain::QUIET;

/// Everything is looked at this often even if nothing says that it changed...
const POLL: Duration = Duration::from_secs(5);
/// ... and the maps are read again this often, and what only time changes is looked at...
const RESYNC: Duration = Duration::from_secs(60);
/// ... but less often where that takes long, since changes wait for it: so many times as long as it took.
const REST: u32 = 200;

/// Why the agent cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The kernel side.
    #[error(transparent)]
    Bpf(#[from] BpfError),
    /// The network side.
    #[error(transparent)]
    Net(#[from] NetError),
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
    pub fn new(args: Node, source: Source, programs: Programs, ready: Arc<AtomicBool>) -> Result<Self, KeepError> {
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

    /// Resolves when the network changed.
    ///
    /// # Errors
    /// Netlink is gone.
    pub async fn network_changed(&mut self) -> Result<(), KeepError> {
        self.netlink.changed().await?;
        self.network = None;
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
        Ok(())
    }

    /// They are where the commands and the next agent look for them.
    fn look_at_pins(&self) -> Option<Problem> {
        let there = host::preflight(&self.args.instance.bpf_root).map_err(|e| e.to_string());
        let message = there.and_then(|()| self.programs.pin_again().map_err(|e| e.to_string())).err()?;
        tracing::warn!("the pins are gone: {message}");
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
        let network = match self.network.take() {
            Some(network) => network,
            None => self.netlink.snapshot(&datapath).await?,
        };
        problems.extend(network.problems.iter().cloned());
        problems.extend(host::check(&network.uplinks));
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
        self.source.host(&network.addresses, Host { kube_proxy, live, detached: self.drain == Drain::Over });
        let Some(world) = self.source.world() else { return Ok(false) };
        let unread = world.unread;
        let milliticks = u32::try_from(self.ticks_per_1000s).unwrap_or(u32::MAX);
        let settings = Settings { settle: pulse::ticks(self.ticks_per_1000s, self.args.settle), milliticks };
        let plan = self.planner.plan(world, &observed, self.programs.maps(), &settings, tick);
        self.observed = self.carry_out(&plan.actions, observed, &mut problems);
        if self.observed.is_none() {
            self.planner.forget();
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
        problems.extend(self.attach_problems.iter().cloned());
        self.network = Some(network);
        self.publish(problems);
        Ok(hung || !plan.actions.is_empty())
    }

    /// The maps after it, or `None` when a write was refused: then the next look reads and tries again.
    fn carry_out(&self, actions: &[Action], mut observed: Observed, problems: &mut Vec<Problem>) -> Option<Observed> {
        let mut refused = false;
        for action in actions {
            tracing::debug!(?action, "apply");
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
            tracing::info!(actions = actions.len(), "tables changed");
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
            tracing::info!(now = ?next, "datapath.mode");
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
        self.publisher.end(&self.snapshot).await;
    }
}

/// What [`Keeper::attach`] last made so.
#[derive(Debug, PartialEq, Eq)]
struct Hung {
    uplinks: Vec<net::Uplink>,
    exits: Vec<net::Uplink>,
    hook: Hook,
    links: Links,
}

/// When something that is done again and again is due.
#[derive(Debug)]
struct Pace {
    next: Instant,
}

impl Pace {
    fn new(first: Duration) -> Self {
        Self { next: Instant::now() + first }
    }

    /// It was done from `begin` until now.
    fn ended(&mut self, begin: Instant, usual: Duration) {
        let now = Instant::now();
        self.next = now + usual.max(now.duration_since(begin) * REST);
    }
}
