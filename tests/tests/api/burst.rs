//! Ten thousand changes as fast as the API server takes them while agent and allocator run, and thousands more at once
//! when both were stopped for a while: tables and addresses end right, memory stays bounded, and afterwards it is quiet.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use purelb_tests::cluster::tenant::{Allocator, given};
use purelb_tests::cluster::{Client, Cluster};
use purelb_tests::lab::kube::NAMESPACE;
use purelb_tests::lab::{Lab, Options};
use purelb_tests::load::LongLived;
use purelb_tests::random::Random;
use purelb_tests::{process, sys};
use serde_json::{Value, json};

/// Clients that change things at the same time, each its own Services.
const CLIENTS: u64 = 6;
/// Services of each, that stay, ...
const SERVICES: u64 = 8;
/// ... and names of Services that come and go.
const NAMES: u64 = 8;
/// Endpoints of each.
const ENDPOINTS: u64 = 4;

/// One client, and what it made of its Services.
struct Writer {
    own: u64,
    random: Random,
    /// By Service: which endpoints are ready, and whether it has port 81.
    wanted: BTreeMap<String, (BTreeSet<u64>, bool)>,
    /// Of those that come and go.
    there: BTreeSet<String>,
}

impl Writer {
    fn make(own: u64, admin: &Client) -> Result<Self> {
        let mut writer =
            Self { own, random: Random(0x9e37_79b9 + own), wanted: BTreeMap::new(), there: BTreeSet::new() };
        for number in 0..SERVICES {
            let name = format!("w{own}-{number}");
            admin.create(&service(&name))?;
            let ready = BTreeSet::from([0]);
            let mut slice = endpoints(&ready);
            slice["apiVersion"] = "discovery.k8s.io/v1".into();
            slice["kind"] = "EndpointSlice".into();
            slice["metadata"] =
                json!({"name": name, "namespace": NAMESPACE, "labels": {"kubernetes.io/service-name": name}});
            slice["addressType"] = "IPv4".into();
            slice["ports"] = json!([
                {"name": "a", "port": 8080, "protocol": "TCP"}, {"name": "b", "port": 9090, "protocol": "TCP"},
            ]);
            admin.create(&slice)?;
            writer.wanted.insert(name, (ready, false));
        }
        Ok(writer)
    }

    /// One change.
    fn step(&mut self, admin: &Client) -> Result<()> {
        let (own, number) = (self.own, self.random.below(SERVICES));
        let name = format!("w{own}-{number}");
        match self.random.below(10) {
            0 => {
                let number = self.random.below(NAMES);
                let name = format!("gone{own}-{number}");
                if self.there.remove(&name) {
                    return admin.delete("Service", NAMESPACE, &name);
                }
                admin.create(&service(&name))?;
                self.there.insert(name);
            }
            1 | 2 => {
                let both = self.random.below(2) == 0;
                admin.patch("Service", NAMESPACE, &name, &json!({"spec": {"ports": ports(both)}}))?;
                self.wanted.entry(name).or_default().1 = both;
            }
            3 => {
                let label = json!({"metadata": {"labels": {"x": self.random.0.to_string()}}});
                admin.patch("Service", NAMESPACE, &name, &label)?;
            }
            _ => {
                let mask = self.random.below(1 << ENDPOINTS).max(1);
                let ready = (0..ENDPOINTS).filter(|n| mask & 1 << n != 0).collect();
                admin.patch("EndpointSlice", NAMESPACE, &name, &endpoints(&ready))?;
                self.wanted.entry(name).or_default().0 = ready;
            }
        }
        Ok(())
    }
}

fn ports(both: bool) -> Value {
    let port = |name: &str, port: u16| json!({"name": name, "port": port, "protocol": "TCP"});
    if both { json!([port("a", 80), port("b", 81)]) } else { json!([port("a", 80)]) }
}

fn service(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": NAMESPACE, "annotations": {"purelb.io/service-group": "burst"}},
        "spec": {
            "type": "LoadBalancer", "externalTrafficPolicy": "Local", "allocateLoadBalancerNodePorts": false,
            "ports": ports(false),
        },
    })
}

fn address(n: u64) -> String {
    format!("198.19.1.{}", 200 + n)
}

fn endpoints(ready: &BTreeSet<u64>) -> Value {
    let endpoint = |n: u64| {
        let ready = ready.contains(&n);
        json!({
            "addresses": [address(n)], "nodeName": "node1",
            "conditions": {"ready": ready, "serving": ready, "terminating": false},
        })
    };
    json!({"endpoints": (0..ENDPOINTS).map(endpoint).collect::<Vec<_>>()})
}

/// All of them at once, until so many changes were made; how long it took.
fn burst(cluster: &Cluster, writers: &mut [Writer], changes: usize) -> Result<Duration> {
    let (left, began) = (AtomicUsize::new(changes), Instant::now());
    thread::scope(|scope| {
        let busy: Vec<_> = writers
            .iter_mut()
            .map(|writer| {
                let left = &left;
                scope.spawn(move || -> Result<()> {
                    let admin = cluster.admin()?;
                    let one_less = |left: usize| left.checked_sub(1);
                    while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok() {
                        writer.step(&admin)?;
                    }
                    Ok(())
                })
            })
            .collect();
        busy.into_iter().try_for_each(|one| one.join().map_err(|_| anyhow!("a client panicked"))?)
    })?;
    Ok(began.elapsed())
}

/// Waits until everybody has an address.
fn served(admin: &Client, writers: &[Writer]) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    sys::wait_for("all Services have addresses", Duration::from_secs(60), || {
        found = given(admin, NAMESPACE)?;
        let all = writers.iter().flat_map(|writer| writer.wanted.keys().chain(&writer.there));
        let missing: Vec<_> = all.filter(|name| !found.contains_key(*name)).collect();
        ensure!(missing.is_empty(), "{} of them have none: {missing:?}", missing.len());
        Ok(true)
    })?;
    Ok(found)
}

/// Waits until the tables have what the writers made last, and nothing of what is gone.
fn programmed(lab: &Lab, writers: &[Writer], ips: &BTreeMap<String, String>) -> Result<()> {
    let mut wanted = BTreeMap::new();
    for (name, (ready, both)) in writers.iter().flat_map(|writer| &writer.wanted) {
        let ip = ips.get(name).with_context(|| format!("{name} has no address"))?;
        for port in if *both { 80..=81 } else { 80..=80 } {
            wanted.insert((ip.clone(), port), ready.iter().map(|n| address(*n)).collect::<BTreeSet<_>>());
        }
    }
    let node = lab.nodes.first().context("no node")?;
    let waited = sys::wait_for("the tables have all of it", Duration::from_secs(60), || {
        let all = node.agent.query(&["services"])?;
        let mut found = BTreeMap::new();
        for row in all.as_array().context("no array")? {
            let vip = row["vip"].as_str().unwrap_or_default().to_owned();
            let endpoints = row["endpoints"].as_array().into_iter().flatten();
            let ready = endpoints
                .filter(|endpoint| endpoint["state"].as_str().is_some_and(|s| s.eq_ignore_ascii_case("ready")));
            let ready = ready.map(|endpoint| endpoint["addr"].as_str().unwrap_or_default().to_owned());
            let ready: BTreeSet<_> = ready.collect();
            // Those that come and go have no endpoints.
            if vip.starts_with("10.70.") && !ready.is_empty() {
                found.insert((vip, row["port"].as_u64().unwrap_or_default()), ready);
            }
        }
        let wrong = wanted.iter().find(|(key, ready)| found.get(key) != Some(ready));
        let wrong = wrong.map(|(key, ready)| format!("{key:?} has {:?} and not {ready:?}", found.get(key)));
        ensure!(found == wanted, "{wrong:?}, {} of {} rows", found.len(), wanted.len());
        Ok(true)
    });
    waited.with_context(|| node.agent.log_tail())
}

/// Memory and CPU of a process.
struct Use {
    name: &'static str,
    pid: u32,
    /// Of its container in `deploy/base`, MB.
    limit: f64,
}

impl Use {
    /// It holds no more than half of what it may.
    fn bounded(&self) -> Result<f64> {
        let (now, peak) = (process::megabytes(self.pid, "RssAnon")?, process::megabytes(self.pid, "VmHWM")?);
        eprintln!("{}: {now:.0} MB of its own, {peak:.0} MB at most", self.name);
        ensure!(peak < self.limit / 2.0, "the {} held {peak:.0} MB", self.name);
        Ok(now)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.pid)?), signal).context("signal it")
    }
}

/// Nothing is written and little is computed.
fn quiet(admin: &Client, uses: &[Use]) -> Result<()> {
    let versions = || -> Result<Vec<Value>> {
        let all = admin.list("Service", NAMESPACE)?.into_iter().chain(admin.list("ServiceGroup", "")?);
        Ok(all.map(|object| object["metadata"]["resourceVersion"].clone()).collect())
    };
    // Groups are told what is in use of them at the next beat.
    sys::pause(6_000);
    let before = (versions()?, uses.iter().map(|one| process::cpu(one.pid)).collect::<Result<Vec<_>>>()?);
    sys::pause(6_000);
    ensure!(versions()? == before.0, "something is written though nothing changes");
    for (one, before) in uses.iter().zip(before.1) {
        let share = (process::cpu(one.pid)? - before) / 6.0;
        eprintln!("{}: {:.1} % of a CPU", one.name, share * 100.0);
        ensure!(share < 0.1, "the {} uses {:.0} % of a CPU though nothing changes", one.name, share * 100.0);
    }
    Ok(())
}

fn uses(lab: &Lab, allocator: &Allocator) -> Result<[Use; 2]> {
    let agent = lab.nodes.first().and_then(|node| node.agent.pid()).context("no agent")?;
    let allocator = allocator.pid().context("no allocator")?;
    Ok([Use { name: "agent", pid: agent, limit: 512.0 }, Use { name: "allocator", pid: allocator, limit: 256.0 }])
}

#[test]
fn ten_thousand_changes() -> Result<()> {
    let (lab, admin, allocator) = Lab::on_cluster(Options::new("tcx"))?;
    admin.apply(&json!({
        "apiVersion": "purelb.io/v2", "kind": "ServiceGroup",
        "metadata": {"name": "burst", "namespace": "purelb-system"},
        "spec": {"remote": {"v4pool": {"pool": "10.70.0.0/24", "subnet": "10.70.0.0/24"}}},
    }))?;
    lab.pod(&admin, 0, 0, "web", true)?;
    let web = lab.service(&admin, "web", json!({}))?;
    let ready: Vec<_> =
        lab.nodes[0].pods[0].addresses.iter().filter(|ip| ip.is_ipv4()).map(|ip| (*ip, "ready")).collect();
    lab.wait_endpoints(0, web[0], &ready)?;
    let running = LongLived::start(&lab.client, SocketAddr::new(web[0], 80), 2)?;

    let cluster = lab.cluster.as_ref().context("no cluster")?;
    let mut writers = (0..CLIENTS).map(|own| Writer::make(own, &admin)).collect::<Result<Vec<_>>>()?;
    let first = served(&admin, &writers)?;
    let uses = uses(&lab, &allocator)?;
    let stays = |now: &BTreeMap<String, String>| {
        let moved = first.iter().find(|(name, ip)| now.get(*name) != Some(ip));
        moved.map_or(Ok(()), |(name, ip)| Err(anyhow!("{name} had {ip} and has {:?}", now.get(name))))
    };

    let took = burst(cluster, &mut writers, 10_000)?;
    eprintln!("10000 changes in {took:?}");
    let now = served(&admin, &writers)?;
    stays(&now)?;
    programmed(&lab, &writers, &now)?;
    let held: Vec<_> = uses.iter().map(Use::bounded).collect::<Result<_>>()?;
    quiet(&admin, &uses)?;

    // All of it comes at once to who was away for a moment, as far as the API server kept it for him.
    uses.iter().try_for_each(|one| one.signal(Signal::SIGSTOP))?;
    let burst = burst(cluster, &mut writers, 3_000);
    uses.iter().try_for_each(|one| one.signal(Signal::SIGCONT))?;
    eprintln!("3000 changes in {:?}", burst?);
    let now = served(&admin, &writers)?;
    stays(&now)?;
    programmed(&lab, &writers, &now)?;
    for (one, before) in uses.iter().zip(held) {
        let now = one.bounded()?;
        ensure!(now < before + 20.0, "the {} held {before:.0} MB after the first burst, and {now:.0} now", one.name);
    }
    quiet(&admin, &uses)?;
    running.finish().map(drop)
}
