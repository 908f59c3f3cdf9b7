//! The composition root: builds the parts, runs the loop, turns errors into exit codes.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use kube::Client;
use purelb_plan::announce::owner::OnApiLoss;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::allocator::{Figures, cluster, folder};
use crate::announcer::{self, Announcer};
use crate::args::{Allocation, Allocator, Args, Command, Node, Place, Standalone, folders, place};
use crate::cluster::connect::{self, Connection};
use crate::cluster::daemon_set::DaemonSet;
use crate::cluster::hearing::Hearing;
use crate::cluster::slots::Slots;
use crate::cluster::{Cluster, watch as watches};
use crate::http::{self, Pages};
use crate::keeper::{Keeper, Local};
use crate::metrics::{Announcing, DataPath};
use crate::source::watch::{Notice, Watch};
use crate::source::{Folder, Look, Source};
use crate::{args, bpf, commands, host, lock, log, snapshot};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/purelb-ebpf.o"));

/// Runs a command.
#[must_use]
pub fn main(args: Args) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(run(args.command)),
        Err(error) => Err(error.into()),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            tracing::error!(op = "run", error = format!("{error:#}"), "ended");
            commands::complain(&format!("purelb-agent: {error:#}"));
            ExitCode::from(1)
        }
    }
}

async fn run(command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Node(args) => {
            log::begin(args.log_format);
            node(args, Pages::new()).await.map(|()| 0)
        }
        Command::Allocator(args) => {
            log::begin(args.log_format);
            allocator(args).await.map(|()| 0)
        }
        Command::Standalone(Standalone { node: args, allocation }) => {
            log::begin(args.log_format);
            let (source, state) = (args.source.clone(), args.state.clone());
            let mut pages = Pages::new();
            let figures = Figures::new(&mut pages);
            let allocating = tokio::spawn(async move { allocate(&source, state, &allocation, figures).await });
            tokio::select! {
                ended = node(args, pages) => ended.map(|()| 0),
                ended = allocating => ended?.map(|()| 0),
            }
        }
        Command::Status(q) => Ok(commands::status::run(&q)),
        Command::Services(q) => Ok(commands::services::run(&q)),
        Command::Pools(q) => Ok(commands::pools::run(&q).await),
        Command::Validate(q) => Ok(commands::validate::run(&q).await),
        Command::Explain(q) => Ok(commands::explain::run(&q)),
        Command::Drops(q) => Ok(commands::drops::run(&q).await),
        Command::Cleanup(q) => commands::cleanup::run(&q).await,
    }
}

async fn allocator(args: Allocator) -> anyhow::Result<()> {
    let mut pages = Pages::new();
    let figures = Figures::new(&mut pages);
    http::serve(pages, &args.http).await;
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let ended = async {
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
    };
    let Place::Kube = place(&args.source, args.state.clone())? else {
        return tokio::select! {
            () = ended => Ok(()),
            ended = allocate(&args.source, args.state, &args.allocation, figures) => ended,
        };
    };
    let Connection { client, namespace, installed } = connect::connect(&args.kube).await?;
    let identity = host::identity()?;
    let install = installed.then(|| namespace.clone());
    let office = cluster::Office { client, namespace, install, identity, settings: (&args.allocation).into() };
    let (stop, stopped) = watch::channel(false);
    let work = cluster::run(office, figures, stopped);
    tokio::pin!(work);
    tokio::select! {
        () = &mut work => return Ok(()),
        () = ended => {}
    }
    stop.send_replace(true);
    work.await;
    tracing::info!(event = "shutdown", "stopped");
    Ok(())
}

async fn allocate(
    source: &str,
    state: Option<PathBuf>,
    allocation: &Allocation,
    figures: Figures,
) -> anyhow::Result<()> {
    let (folder, state) = folders(source, state)?;
    let place = state.display().to_string();
    folder::run(folder, state, allocation, figures)
        .await
        .with_context(|| format!("give addresses: what is given is kept in {place}; --state names another folder"))
}

/// What tells a node that its source changed.
enum Feed {
    Folder(Watch),
    Cluster(watches::Feed, Client),
}

/// What it told.
enum Heard {
    Notice(Notice),
    News(Vec<watches::News>),
}

impl Feed {
    /// The next change. Loses none when it is dropped half-way.
    async fn next(&mut self) -> Heard {
        match self {
            Self::Folder(watch) => match watch.notice().await {
                Some(notice) => Heard::Notice(notice),
                None => std::future::pending().await,
            },
            Self::Cluster(feed, _) => Heard::News(feed.next().await),
        }
    }

    /// What to look at then.
    async fn take(&mut self, heard: Heard, keeper: &mut Keeper) -> Look {
        match (self, heard) {
            (Self::Folder(watch), Heard::Notice(notice)) => watch.burst(notice).await,
            (Self::Cluster(feed, _), Heard::News(mut news)) => {
                feed.burst(&mut news).await;
                keeper.hear(news);
                Look::All
            }
            _ => Look::default(),
        }
    }

    /// Whether the source is another one than before.
    fn follow(&mut self, keeper: &mut Keeper) -> bool {
        match self {
            Self::Folder(watch) => watch.follow(),
            Self::Cluster(feed, client) => {
                if keeper.renews() {
                    *feed = watches::Feed::new(client, &watches::of_node());
                }
                false
            }
        }
    }
}

/// The source of a node, still being read, and what tells of its changes.
async fn source(args: &Node, pages: &mut Pages) -> anyhow::Result<(JoinHandle<Source>, Feed)> {
    match place(&args.source, args.state.clone())? {
        Place::Kube => {
            let Connection { client, namespace, installed } = connect::connect(&args.kube).await?;
            let (kinds, install) = (watches::of_node(), installed.then_some(namespace));
            let hearing = match args.deaf_after {
                args::OrOff::After(after) => {
                    Some(Hearing::start(client.clone(), Duration::from_millis(after), args.http.port))
                }
                args::OrOff::Off => None,
            };
            pages.hearing.clone_from(&hearing);
            let cluster = Cluster::new(&args.node_name, &kinds, install).with_hearing(hearing);
            let feed = watches::Feed::new(&client, &kinds);
            let source = Source::Cluster(Box::new(cluster));
            Ok((tokio::spawn(std::future::ready(source)), Feed::Cluster(feed, client)))
        }
        Place::Folder(folder, state) => {
            let mut source = Folder::new(&folder, &state, &args.node_name);
            let watch = Watch::new(&folder, &state);
            let reading = tokio::task::spawn_blocking(move || {
                source.look(&Look::All);
                Source::Folder(Box::new(source))
            });
            Ok((reading, Feed::Folder(watch)))
        }
    }
}

/// This node's part in who answers for local addresses.
async fn local(args: &Node, metrics: Announcing) -> anyhow::Result<Local> {
    let (place, slots, runs) = match place(&args.source, args.state.clone())? {
        Place::Kube => {
            let Connection { client, namespace, .. } = connect::connect(&args.kube).await?;
            let named = args.daemonset.as_ref().filter(|name| !name.is_empty());
            let runs = named.map(|name| DaemonSet::new(client.clone(), &namespace, name));
            (announcer::Place::Kube(args.kube.clone()), Some(Slots::new(client, &args.node_name)), runs)
        }
        Place::Folder(_, state) => (announcer::Place::Folder(state), None, None),
    };
    let settings = announcer::Settings {
        node: args.node_name.clone(),
        instance: args.pod_uid.clone(),
        place,
        duration: args.lease_duration,
        hold: args.lease_hold.max(args.lease_duration),
        on_api_loss: match args.on_api_loss {
            args::OnApiLoss::Withdraw => OnApiLoss::Withdraw,
            args::OnApiLoss::Hold => OnApiLoss::Hold,
        },
        bpf_root: args.instance.bpf_root.clone(),
    };
    Ok(Local::new(Announcer::start(settings, &metrics)?, slots, runs, metrics))
}

async fn node(args: Node, mut pages: Pages) -> anyhow::Result<()> {
    if OBJECT.is_empty() {
        bail!("built without the eBPF object: run `cargo xtask build-ebpf`, then build the agent again");
    }
    host::preflight(&args.instance.bpf_root)?;
    let mut lock = lock::take(&args.instance.bpf_root)?;
    if let Err(error) = snapshot::begin(&args.instance.bpf_root) {
        tracing::warn!(op = "writeSnapshot", %error, "cannot write the status file");
    }
    let root = args.instance.bpf_root.clone();
    // The verifier takes its time, and so do thousands of files: both at once.
    let (reading, mut feed) = source(&args, &mut pages).await?;
    let programs = bpf::load(&root, OBJECT).context("load the data path")?;
    let (ready, http) = (pages.check("this node's tables"), args.http);
    pages.registry.register_collector(Box::new(DataPath::new(&root)));
    let announcing = Announcing::new(&mut pages.registry);
    http::serve(pages, &http).await;
    let local = local(&args, announcing).await?;
    let mut keeper = Keeper::new(args, reading.await?, programs, local, ready)?;
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut beat = tokio::time::interval(Duration::from_secs(1));
    let mut sweep = tokio::time::interval(bpf::SWEEP);
    loop {
        tokio::select! {
            _ = term.recv() => break,
            _ = int.recv() => break,
            _ = beat.tick() => {
                keeper.beat()?;
                if feed.follow(&mut keeper) {
                    keeper.look(&Look::All).await?;
                }
            }
            () = tokio::time::sleep_until(keeper.next_poll().into()) => {
                if !lock.holds(&root) && host::preflight(&root).is_ok() {
                    lock = lock::take(&root)?;
                }
                keeper.look_at_all().await?;
            }
            _ = sweep.tick() => drop(tokio::task::spawn_blocking({
                let root = root.clone();
                move || bpf::sweep(&root)
            })),
            changed = keeper.changed() => { changed?; keeper.look(&Look::default()).await?; }
            heard = feed.next() => {
                let look = feed.take(heard, &mut keeper).await;
                if !look.is_empty() {
                    keeper.look(&look).await?;
                }
            }
        }
    }
    keeper.end().await;
    tracing::info!(event = "shutdown", "stopped; the data path goes on");
    Ok(())
}
