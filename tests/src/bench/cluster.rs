//! Agent and allocator on a real API server: how soon thousands of Services have addresses, how soon a change of an
//! EndpointSlice is in the tables, and what both hold.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::folder::{ENDPOINTS, NODE, PORT, pod};
use super::pins::Pins;
use super::report::{Row, Section};
use super::system::at;
use crate::cluster::tenant::ingress;
use crate::cluster::{Client, Cluster};
use crate::lab::kube::NAMESPACE;
use crate::lab::{Lab, Options as LabOptions};
use crate::process::{cpu, megabytes};
use crate::random::Random;
use crate::sys;

/// How much is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Services in all.
    pub services: u32,
    /// Slices that are changed.
    pub changes: u32,
    /// How long nothing happens.
    pub idle: Duration,
}

/// Created at once.
const BURST: u32 = 1_000;
/// With so many the API server is idle.
const FEW: u32 = 100;
/// Clients that make objects side by side.
const CLIENTS: u32 = 8;
/// A change that did not come in this time never does.
const STUCK: Duration = Duration::from_secs(8);

/// Measures it all.
///
/// # Errors
/// Something does not start, or does nothing more.
pub fn measure(options: &Options, bar: &ProgressBar) -> Result<Section> {
    ensure!(options.services >= BURST, "--services must be {BURST} at least");
    bar.set_length(u64::from(options.services) + 2 * u64::from(options.changes) + options.idle.as_secs());
    bar.set_message("starting a control plane");
    let (lab, admin, allocator) = Lab::on_cluster(LabOptions { pods: 0, logs: false, ..LabOptions::new("xdp") })?;
    let cluster = lab.cluster.as_ref().context("no cluster")?;
    let node = lab.nodes.first().context("no node")?;
    let pool = json!({"pool": "198.19.128.0/18", "subnet": "198.19.128.0/18"});
    admin.apply(&json!({
        "apiVersion": "purelb.io/v2", "kind": "ServiceGroup",
        "metadata": {"name": "bench", "namespace": "purelb-system"}, "spec": {"remote": {"v4pool": pool}},
    }))?;

    bar.set_message("few Services");
    make(cluster, 0..FEW, bar)?;
    let vips = served(&admin, FEW)?;
    let pins = wait_for_pins(&lab, &vips)?;
    let few = changes(&admin, &pins, &vips, options.changes, bar)?;

    bar.set_message("many at once");
    let began = Instant::now();
    make(cluster, FEW..FEW + BURST, bar)?;
    let made = began.elapsed().as_secs_f64();
    served(&admin, FEW + BURST)?;
    let burst = began.elapsed().as_secs_f64();

    bar.set_message("all of them");
    make(cluster, FEW + BURST..options.services, bar)?;
    let vips = served(&admin, options.services)?;
    let pins = wait_for_pins(&lab, &vips)?;
    let agent = node.agent.pid().context("the agent does not run")?;
    let giver = allocator.pid().context("the allocator does not run")?;
    bar.set_message("all is told");
    told(&admin)?;
    bar.set_message("nothing changes");
    let (versions, before) = (newest(&admin)?, (cpu(agent)?, cpu(giver)?, Instant::now()));
    thread::sleep(options.idle);
    bar.inc(options.idle.as_secs());
    let seconds = before.2.elapsed().as_secs_f64();
    let share = |now: f64, then: f64| (now - then) / seconds * 100.0;
    let idle = [share(cpu(agent)?, before.0), share(cpu(giver)?, before.1)];
    let written = u32::from(newest(&admin)? != versions);
    bar.set_message("changing slices");
    let many = changes(&admin, &pins, &vips, options.changes, bar)?;

    let rows = vec![
        Row {
            name: format!("{BURST} Services created at once: all have addresses"),
            value: burst,
            unit: "s",
            limit: Some(15.0),
            detail: format!("{made:.1} s of it until all were created"),
            more: json!({"created": made}),
        },
        delay(&format!("slice changed to slots stored, p99, {FEW} Services"), &few, 100.0),
        delay(&format!("slice changed to slots stored, p99, {} Services", options.services), &many, 150.0),
        memory("resident memory of the agent", agent)?,
        memory("resident memory of the allocator", giver)?,
        share_of("CPU of the agent, nothing changes", idle[0], options.idle),
        share_of("CPU of the allocator, nothing changes", idle[1], options.idle),
        Row {
            name: "writes but Leases, nothing changes".to_owned(),
            value: f64::from(written),
            unit: "",
            limit: Some(0.0),
            detail: "to Services and ServiceGroups".to_owned(),
            more: json!({}),
        },
    ];
    let method = format!(
        "{} Services with {ENDPOINTS} endpoints; etcd, kube-apiserver and kube-controller-manager on the same CPUs; a \
         change counts from the API server's answer to the last slot, read from the pins",
        options.services
    );
    Ok(Section { name: "cluster", method, rows })
}

/// Services and their slices, by several clients.
fn make(cluster: &Cluster, numbers: std::ops::Range<u32>, bar: &ProgressBar) -> Result<()> {
    thread::scope(|scope| {
        let makers: Vec<_> = (0..CLIENTS)
            .map(|own| {
                let numbers = numbers.clone().filter(move |number| number % CLIENTS == own);
                scope.spawn(move || -> Result<()> {
                    let client = cluster.admin()?;
                    for number in numbers {
                        client.create(&service(number))?;
                        client.create(&slice(number, None))?;
                        bar.inc(1);
                    }
                    Ok(())
                })
            })
            .collect();
        makers.into_iter().try_for_each(|maker| maker.join().map_err(|_| anyhow!("a client panicked"))?)
    })
}

fn service(number: u32) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": format!("web-{number}"), "namespace": NAMESPACE,
            // Of the policy Local there can be 2,768: each takes a port for health checks.
            "annotations": {"purelb.io/service-group": "bench", "purelb.io/prefer-local": "true"},
        },
        "spec": {
            "type": "LoadBalancer", "allocateLoadBalancerNodePorts": false,
            "ports": [{"name": "http", "port": PORT, "protocol": "TCP"}],
        },
    })
}

fn slice(number: u32, unready: Option<u32>) -> Value {
    let endpoint = |n: u32| {
        let ready = unready != Some(n);
        json!({
            "addresses": [pod(number, n).to_string()], "nodeName": NODE,
            "conditions": {"ready": ready, "serving": ready, "terminating": false},
        })
    };
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("web-{number}"), "namespace": NAMESPACE,
            "labels": {"kubernetes.io/service-name": format!("web-{number}")},
        },
        "addressType": "IPv4",
        "endpoints": (0..ENDPOINTS).map(endpoint).collect::<Vec<_>>(),
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    })
}

/// Waits until so many have an address: which.
fn served(admin: &Client, count: u32) -> Result<BTreeMap<u32, Ipv4Addr>> {
    let mut found = BTreeMap::new();
    sys::wait_for(&format!("{count} Services have addresses"), Duration::from_secs(120), || {
        found.clear();
        for service in admin.list("Service", NAMESPACE)? {
            let name = service["metadata"]["name"].as_str().unwrap_or_default();
            let number = name.strip_prefix("web-").and_then(|number| number.parse::<u32>().ok());
            if let (Some(number), Some(ip)) = (number, ingress(&service).first()) {
                found.insert(number, ip.parse().context("VIP")?);
            }
        }
        Ok(found.len() == count as usize)
    })?;
    Ok(found)
}

/// Waits until no event is written any more: so many a second are, and thousands wait.
fn told(admin: &Client) -> Result<()> {
    let mut before = None;
    sys::wait_for("all events are written", Duration::from_secs(300), || {
        thread::sleep(Duration::from_secs(5));
        let now = Some(admin.list("Event", NAMESPACE)?.len());
        Ok(std::mem::replace(&mut before, now) == now)
    })
}

fn wait_for_pins(lab: &Lab, vips: &BTreeMap<u32, Ipv4Addr>) -> Result<Pins> {
    let node = lab.nodes.first().context("no node")?;
    let pins = Pins::open(node.agent.bpf_root()).context("the agent has no pins")?;
    for vip in vips.values() {
        let there = || Ok(pins.at(*vip)?.is_some_and(|service| service.mask > 0));
        sys::wait_for(&format!("{vip} is in the tables"), Duration::from_secs(60), there)?;
    }
    Ok(pins)
}

/// Milliseconds from the API server's answer to the last slot, for one change after the other.
fn changes(
    admin: &Client,
    pins: &Pins,
    vips: &BTreeMap<u32, Ipv4Addr>,
    count: u32,
    bar: &ProgressBar,
) -> Result<Vec<f64>> {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let mut delays = Vec::new();
    for change in 0..count {
        thread::sleep(Duration::from_millis(20 + random.below(180)));
        let number =
            if u32::try_from(vips.len())? > count { change * (u32::try_from(vips.len())? / count) } else { change };
        let Some(vip) = vips.get(&(number % u32::try_from(vips.len())?)) else { continue };
        let number = number % u32::try_from(vips.len())?;
        let service = pins.at(*vip)?.context("the Service is gone")?;
        let leaving = random.below(u64::from(ENDPOINTS)) as u32;
        let mut ids = pins.currents(&service)?;
        ids.sort_unstable();
        ids.dedup();
        let address = pod(number, leaving).octets();
        let mut id = None;
        for candidate in ids {
            if pins.address(candidate)? == address {
                id = Some(candidate);
            }
        }
        let Some(id) = id else { continue };
        let patch = json!({"endpoints": slice(number, Some(leaving))["endpoints"]});
        admin.patch("EndpointSlice", NAMESPACE, &format!("web-{number}"), &patch)?;
        let answered = Instant::now();
        while answered.elapsed() < STUCK && pins.currents(&service)?.contains(&id) {
            thread::sleep(Duration::from_micros(200));
        }
        delays.push(answered.elapsed().as_secs_f64() * 1000.0);
        bar.inc(1);
    }
    Ok(delays)
}

fn delay(name: &str, delays: &[f64], limit: f64) -> Row {
    let mut sorted = delays.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (p50, p99, worst) = (at(&sorted, 0.5), at(&sorted, 0.99), at(&sorted, 1.0));
    Row {
        name: name.to_owned(),
        value: p99,
        unit: "ms",
        limit: Some(limit),
        detail: format!("p50 {p50:.1} ms, worst {worst:.1} ms, {} changes", sorted.len()),
        more: json!({"p50": p50, "worst": worst, "changes": sorted.len()}),
    }
}

fn share_of(name: &str, value: f64, time: Duration) -> Row {
    let detail = format!("of one CPU, over {} s", time.as_secs());
    Row { name: name.to_owned(), value, unit: "%", limit: Some(1.0), detail, more: json!({"seconds": time.as_secs()}) }
}

fn memory(name: &str, pid: u32) -> Result<Row> {
    let (own, peak) = (megabytes(pid, "RssAnon")?, megabytes(pid, "VmHWM")?);
    Ok(Row {
        name: name.to_owned(),
        value: megabytes(pid, "VmRSS")?,
        unit: "MB",
        limit: Some(150.0),
        detail: format!("its own {own:.0} MB; peak {peak:.0} MB"),
        more: json!({"anonymous": own, "peak": peak}),
    })
}

/// resourceVersions of all Services and ServiceGroups.
fn newest(admin: &Client) -> Result<Vec<Value>> {
    let mut all = admin.list("Service", "")?;
    all.extend(admin.list("ServiceGroup", "")?);
    Ok(all.into_iter().map(|object| object["metadata"]["resourceVersion"].clone()).collect())
}
