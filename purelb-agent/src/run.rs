//! The composition root: builds the parts, runs the loop, turns errors into exit codes.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use notify::{RecursiveMode, Watcher as _};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::args::{Args, Command, LogFormat, Node};
use crate::source::{Folder, Look};
use crate::{bpf, commands, host, keeper, lock, snapshot};

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
            tracing::error!("{error:#}");
            commands::complain(&format!("purelb-agent: {error:#}"));
            ExitCode::from(1)
        }
    }
}

async fn run(command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Node(args) => node(args).await.map(|()| 0),
        Command::Status(q) => Ok(commands::status::run(&q)),
        Command::Services(q) => Ok(commands::services::run(&q)),
        Command::Explain(q) => Ok(commands::explain::run(&q)),
        Command::Drops(q) => Ok(commands::drops::run(&q).await),
        Command::Cleanup(q) => commands::cleanup::run(&q).await,
    }
}

async fn node(args: Node) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match args.log_format {
        LogFormat::Text => log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init(),
        LogFormat::Json => log.json().init(),
    }
    let Some(folder) = args.source.strip_prefix("dir:").map(PathBuf::from) else {
        bail!("--source {}: only dir:PATH is known; name a folder of manifests", args.source);
    };
    if OBJECT.is_empty() {
        bail!("built without the eBPF object: run `cargo xtask build-ebpf`, then build the agent again");
    }
    let state = args.state.clone().unwrap_or_else(|| folder.join("state"));
    host::preflight(&args.instance.bpf_root)?;
    let mut lock = lock::take(&args.instance.bpf_root)?;
    if let Err(error) = snapshot::begin(&args.instance.bpf_root) {
        tracing::warn!(%error, "cannot write the status file");
    }
    let root = args.instance.bpf_root.clone();
    // The verifier takes its time, and so do thousands of files: both at once.
    let reading = tokio::task::spawn_blocking({
        let mut source = Folder::new(&folder, &state, &args.node_name);
        move || {
            source.look(&Look::All);
            source
        }
    });
    let programs = bpf::load(&root, OBJECT).context("load the data path")?;
    let (news, mut notices) = mpsc::channel(NOTICES);
    let lost = Arc::new(AtomicBool::new(false));
    let mut watch = Watch::new(&folder, news, Arc::clone(&lost));
    let mut keeper = keeper::Keeper::new(args, reading.await?, programs)?;
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut beat = tokio::time::interval(Duration::from_secs(1));
    let mut sweep = tokio::time::interval(bpf::SWEEP);
    loop {
        tokio::select! {
            _ = term.recv() => break,
            _ = int.recv() => break,
            _ = beat.tick() => {
                keeper.beat()?;
                if watch.follow() {
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
            changed = keeper.network_changed() => { changed?; keeper.look(&Look::default()).await?; }
            Some(notice) = notices.recv() => {
                let mut look = Look::default();
                look.notice(notice);
                // A burst of file events is one look.
                tokio::time::sleep(BURST).await;
                while let Ok(notice) = notices.try_recv() {
                    look.notice(notice);
                }
                if lost.swap(false, Ordering::Relaxed) {
                    look = Look::All;
                }
                if !look.is_empty() {
                    keeper.look(&look).await?;
                }
            }
        }
    }
    keeper.end().await;
    tracing::info!("stopped; the data path goes on");
    Ok(())
}

type Notice = notify::Result<notify::Event>;

/// How many file events wait at most; when more come everything is looked at.
const NOTICES: usize = 4096;
/// Events of one change come together.
const BURST: Duration = Duration::from_millis(3);

/// Inotify on the folder; without it the poll alone notices changes.
struct Watch {
    folder: PathBuf,
    news: mpsc::Sender<Notice>,
    lost: Arc<AtomicBool>,
    watcher: Option<notify::RecommendedWatcher>,
    /// Which folder it was that is watched: device, inode, and when it was made, since inodes are used again.
    seen: Option<(u64, u64, Option<SystemTime>)>,
}

impl Watch {
    fn new(folder: &Path, news: mpsc::Sender<Notice>, lost: Arc<AtomicBool>) -> Self {
        let mut watch = Self { folder: folder.to_owned(), news, lost, watcher: None, seen: None };
        watch.follow();
        watch
    }

    /// Inotify watches a folder, not its path: one that was made later, replaced or linked to elsewhere is another.
    /// Whether it is another one now.
    fn follow(&mut self) -> bool {
        let now = std::fs::metadata(&self.folder).ok().map(|meta| (meta.dev(), meta.ino(), meta.created().ok()));
        let other = now != self.seen;
        if other {
            self.seen = now;
            self.watcher = now.and_then(|_| self.start());
        }
        other
    }

    fn start(&self) -> Option<notify::RecommendedWatcher> {
        let (news, lost) = (self.news.clone(), Arc::clone(&self.lost));
        let notice = move |event: Notice| {
            if let Err(mpsc::error::TrySendError::Full(_)) = news.try_send(event) {
                lost.store(true, Ordering::Relaxed);
            }
        };
        let mut watcher = notify::recommended_watcher(notice).ok()?;
        match watcher.watch(&self.folder, RecursiveMode::Recursive) {
            Ok(()) => Some(watcher),
            Err(error) => {
                tracing::warn!(%error, "no notices of file changes: the folder is polled");
                None
            }
        }
    }
}
