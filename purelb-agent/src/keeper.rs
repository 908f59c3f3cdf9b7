//! The one owner of state: whatever happens means "look again", and looking again is reading the
//! source, the host and the maps, planning, and applying.

use std::path::PathBuf;
use std::time::Duration;

use purelb_common::table::{CONFIG_REVSVC, Config, TICK_SHIFT};
use purelb_plan::plan::{Settings, plan};
use purelb_plan::problem::Problem;
use purelb_plan::world::{Datapath, Mode};

use crate::args::Node;
use crate::bpf::{BpfError, Programs};
use crate::host;
use crate::net::{NetError, Netlink};
use crate::snapshot::{self, Snapshot, Uplink};
use crate::source::convert;
use crate::source::dir::Dir;

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
    dir: Dir,
    programs: Programs,
    netlink: Netlink,
    datapath: Datapath,
    attached: Vec<(crate::net::Uplink, Datapath)>,
    snapshot: Snapshot,
    written: Vec<u8>,
    ticks_per_1000s: u64,
}

impl Keeper {
    /// Adopts what is pinned; writes nothing else yet.
    ///
    /// # Errors
    /// The kernel or netlink refuses.
    pub fn new(args: Node, folder: PathBuf, state: PathBuf, programs: Programs) -> Result<Self, KeepError> {
        let netlink = Netlink::new()?;
        let clock = programs.maps().clock()?;
        let snapshot = Snapshot { node: args.node_name.clone(), pid: std::process::id(), ..Snapshot::default() };
        Ok(Self {
            dir: Dir::new(folder, state),
            args,
            programs,
            netlink,
            datapath: Datapath::default(),
            attached: Vec::new(),
            snapshot,
            written: Vec::new(),
            ticks_per_1000s: (u64::from(clock.hz) * 1000) >> TICK_SHIFT,
        })
    }

    fn ticks(&self, milliseconds: u64) -> u32 {
        u32::try_from((milliseconds * self.ticks_per_1000s / 1_000_000).max(1)).unwrap_or(u32::MAX)
    }

    /// Resolves when the network changed.
    ///
    /// # Errors
    /// Netlink is gone.
    pub async fn network_changed(&mut self) -> Result<(), KeepError> {
        Ok(self.netlink.changed().await?)
    }

    /// Tells the programs that the agent lives.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn heartbeat(&self) -> Result<(), KeepError> {
        let maps = self.programs.maps();
        let (local_port_min, local_port_max) = host::local_ports();
        let old = maps.config()?;
        maps.set_config(&Config {
            heartbeat: maps.clock()?.tick,
            heartbeat_limit: self.ticks(self.args.heartbeat),
            // One cluster, one table: the seed is a constant until the cluster hands one out.
            seed: 0x7075_7265_6c62,
            insert_budget: 125_000,
            sample: 1,
            half_open: self.ticks(20_000),
            udp_idle: self.ticks(60_000),
            tcp_idle: self.ticks(7_200_000),
            udp_pass: self.ticks(180_000),
            flags: old.flags & CONFIG_REVSVC,
            local_port_min,
            local_port_max,
            ..old
        })?;
        Ok(())
    }

    /// Reads everything, plans, applies, publishes.
    ///
    /// # Errors
    /// The kernel or netlink refuses what it never should.
    pub async fn look_again(&mut self) -> Result<(), KeepError> {
        let listing = self.dir.scan();
        let mut problems = host::check();
        let Some(listing) = listing else {
            problems.push(Problem {
                object: format!("source {}", self.args.source),
                field: String::new(),
                message: "is missing or holds no manifest; nothing is concluded from that".to_owned(),
                remedy: "put the manifests there".to_owned(),
                origin: String::new(),
            });
            self.snapshot.problems = problems;
            self.publish();
            return Ok(());
        };
        let (mut world, faults) = convert::world(&self.args.node_name, &listing);
        problems.extend(faults);
        self.datapath = world.datapath.clone();
        let network = self.netlink.snapshot(&self.datapath).await?;
        world.node_addresses.extend(&network.addresses);
        world.kube_proxy = self.args.kube_proxy;
        world.live = self.args.live;
        problems.extend(network.problems.iter().cloned());

        let maps = self.programs.maps();
        let settings = Settings { settle: self.ticks(self.args.settle), milliticks: self.ticks_per_1000s as u32 };
        let planned = plan(&world, &maps.observe()?, &settings, maps.clock()?.tick);
        for action in &planned.actions {
            tracing::debug!(?action, "apply");
            // A map that is full must not take the others' changes with it; the next look tries again.
            if let Err(error) = maps.apply(action) {
                problems.push(Problem {
                    object: "tables".to_owned(),
                    field: String::new(),
                    message: format!("a change was refused: {error}"),
                    remedy: "serve fewer VIPs and Services on this node".to_owned(),
                    origin: String::new(),
                });
            }
        }
        if !planned.actions.is_empty() {
            tracing::info!(actions = planned.actions.len(), services = planned.services.len(), "tables changed");
        }
        problems.extend(planned.problems);
        self.attach(&network, &mut problems);
        problems.sort();
        problems.dedup();
        self.snapshot.problems = problems;
        self.snapshot.services = planned.services;
        self.snapshot.ready = true;
        self.publish();
        Ok(())
    }

    /// Programs on the uplinks, only when something about them changed.
    fn attach(&mut self, network: &crate::net::Snapshot, problems: &mut Vec<Problem>) {
        let uplinks: Vec<_> = if self.datapath.mode == Mode::Off { Vec::new() } else { network.uplinks.clone() };
        let now: Vec<_> = uplinks.iter().map(|u| (u.clone(), self.datapath.clone())).collect();
        let settled = self.attached == now && self.snapshot.uplinks.iter().all(|u| u.attached);
        if settled && self.snapshot.ready {
            return;
        }
        let status = self.programs.attach(&uplinks, &self.datapath);
        problems.extend(status.iter().filter_map(|s| s.problem.clone()));
        problems.extend(self.programs.attach_exits(&uplinks, &network.exits));
        self.snapshot.uplinks = status
            .into_iter()
            .map(|s| Uplink { name: s.name, hook: s.hook, why: s.why, attached: s.attached })
            .collect();
        self.attached = now;
    }

    fn publish(&mut self) {
        let text = serde_json::to_vec(&self.snapshot).unwrap_or_default();
        if text == self.written {
            return;
        }
        match snapshot::write(&self.args.instance.bpf_root, &self.snapshot) {
            Ok(()) => self.written = text,
            Err(error) => tracing::warn!(%error, "cannot write the status file"),
        }
    }
}

/// How often the folder is looked at even without a notice of inotify.
pub const POLL: Duration = Duration::from_secs(2);
