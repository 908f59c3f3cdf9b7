//! The composition root: builds the parts, runs the loop, turns errors into exit codes.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use notify::{RecursiveMode, Watcher as _};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::args::{Args, Command, LogFormat, Node};
use crate::{bpf, commands, keeper};

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
        Command::Status(q) => commands::status::run(&q),
        Command::Services(q) => commands::services::run(&q),
        Command::Explain(q) => commands::explain::run(&q),
        Command::Drops(q) => commands::drops::run(&q).await,
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
    let programs = bpf::load(&args.instance.bpf_root, OBJECT).context("load the data path")?;
    let (look, mut looks) = mpsc::channel(1);
    let _watcher = watch(&folder, look);
    let mut keeper = keeper::Keeper::new(args, folder, state, programs)?;
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut poll = tokio::time::interval(keeper::POLL);
    let mut beat = tokio::time::interval(Duration::from_secs(1));
    keeper.heartbeat()?;
    loop {
        tokio::select! {
            _ = term.recv() => break,
            _ = int.recv() => break,
            _ = beat.tick() => keeper.heartbeat()?,
            _ = poll.tick() => keeper.look_again().await?,
            changed = keeper.network_changed() => { changed?; keeper.look_again().await?; }
            Some(()) = looks.recv() => {
                // A burst of file events is one look.
                tokio::time::sleep(Duration::from_millis(10)).await;
                while looks.try_recv().is_ok() {}
                keeper.look_again().await?;
            }
        }
    }
    tracing::info!("stopped; the data path goes on");
    Ok(())
}

/// Inotify on the folder; without it the poll alone notices changes.
fn watch(folder: &Path, look: mpsc::Sender<()>) -> Option<notify::RecommendedWatcher> {
    let notice = move |event: notify::Result<notify::Event>| {
        if event.is_ok_and(|e| !e.kind.is_access()) {
            // A full channel already says "look again".
            let _ = look.try_send(());
        }
    };
    let mut watcher = notify::recommended_watcher(notice).ok()?;
    match watcher.watch(folder, RecursiveMode::Recursive) {
        Ok(()) => Some(watcher),
        Err(error) => {
            tracing::warn!(%error, "no notices of file changes: the folder is polled");
            None
        }
    }
}
