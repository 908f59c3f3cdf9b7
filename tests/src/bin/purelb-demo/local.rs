//! The third part: three nodes in one network, of which one answers for a local address.

use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use purelb_tests::answers::Answers;
use purelb_tests::lab::Options;
use purelb_tests::lan::{Lan, ips, silence};
use purelb_tests::sys;

use crate::screen::Screen;

/// How long the agents' Leases last.
const LEASE: &str = "5s";

/// Starts the lab and waits until its addresses are served.
pub fn prepare() -> JoinHandle<Result<Lan>> {
    thread::spawn(|| Lan::serving(3, LEASE, Options { logs: false, ..Options::new("xdp") }))
}

/// Its steps.
pub fn show(lan: JoinHandle<Result<Lan>>, screen: &mut Screen) -> Result<()> {
    let mut lan = lan.join().map_err(|_| anyhow!("the thread that starts the lab panicked"))??;
    let ips = ips()?;
    let ip = *ips.first().context("an address")?;
    println!("\nthree nodes in one network; the pool begins with {} and {}", ips[0], ips[1]);

    screen.step(
        "A local address is on the interface of one node, which alone answers ARP and neighbour discovery",
        |screen| {
            let node = lan.owner(ip, &[])?;
            screen.command(&format!("ip address show dev lan0 # on {}", node.name));
            screen.shown(&node.netns.ip("-br address show dev lan0")?, 4);
            screen.command("purelb-agent status -o json | jq .election");
            let status = node.agent.query(&["status"])?;
            let election = status.get("election").context("an election")?;
            screen.shown(&serde_json::to_string_pretty(election)?, 24);
            let asker = lan.ask()?;
            sys::pause(1_000);
            lan.served()?;
            let answers = asker.finish()?;
            for ip in &ips {
                ensure!(answers.owners(*ip).len() == 1, "not one answers for {ip}: {:x?}", answers.owners(*ip));
            }
            Ok(())
        },
    );
    screen.step("Its node gets the label that keeps load balancers away: the address moves", |screen| {
        screen.say("node.kubernetes.io/exclude-from-external-load-balancers");
        let (name, answers) = lan.hand_over()?;
        moved(screen, &lan, &name, &answers, Duration::from_secs(2))
    });
    screen.step("The node that has it dies: another one takes over when its Lease is proven void", |screen| {
        let (name, answers) = lan.bereave()?;
        moved(screen, &lan, &name, &answers, Duration::from_secs(13))
    });
    if !screen.failed.is_empty() {
        println!("{}", lan.lab.logs());
    }
    Ok(())
}

fn moved(screen: &Screen, lan: &Lan, from: &str, answers: &Answers, limit: Duration) -> Result<()> {
    let ips = ips()?;
    let to = &lan.owner(ips[0], &[from])?.name;
    let silence = silence(answers, &ips).context("two nodes answered at once")?;
    screen
        .say(&format!("from {from} to {to}: nobody answered for {silence:.2?} (Leases of {LEASE}), at no moment two"));
    ensure!(silence < limit, "that is too long");
    lan.served()
}
