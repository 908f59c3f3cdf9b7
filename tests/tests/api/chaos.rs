//! Everything at once, by chance: Services that come, go and change, requests that are late or lost, leaders that stop,
//! die and lose their Lease, groups that are made anew. No address twice, none moves, none is lost. Invariants I12 and I14.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use purelb_tests::cluster::proxy::{Fate, Proxy, Rule};
use purelb_tests::cluster::tenant::{Allocator, ingress, said};
use purelb_tests::cluster::witness::Witness;
use purelb_tests::cluster::{Cluster, Tenant};
use purelb_tests::random::Random;
use purelb_tests::sys;
use serde_json::{Value, json};

/// So long it goes on.
const TIME: Duration = Duration::from_secs(45);
/// Names that Services have, and IPv4 addresses that there are.
const NAMES: u64 = 50;
const ADDRESSES: usize = 64;

struct Chaos<'a> {
    tenant: Tenant<'a>,
    proxy: Proxy,
    allocators: Vec<Option<Allocator>>,
    random: Random,
    witness: Witness,
}

impl Chaos<'_> {
    fn start(&self) -> Result<Option<Allocator>> {
        self.tenant.allocator_behind(&self.proxy, &["--cool-down", "0s"]).map(Some)
    }

    fn groups(&self) -> Result<()> {
        // Without any of its own all groups of the cluster would be its: this one is never deleted.
        self.tenant.group("spare", json!({"local": {"v4pool": {"pool": "10.62.0.0/32", "subnet": "10.0.0.0/8"}}}))?;
        let spec = json!({"local": {
            "v4pools": [
                {"pool": "10.60.0.0/27", "subnet": "10.0.0.0/8"}, {"pool": "10.61.0.0/27", "subnet": "10.0.0.0/8"},
            ],
            "v6pool": {"pool": "2001:db8:60::/122", "subnet": "2001:db8:60::/64"},
        }});
        self.tenant.group("default", spec).map(drop)
    }

    fn check(&mut self) -> Result<()> {
        self.witness.check(&self.tenant)
    }

    /// One thing happens. What the API server refuses, because of what happened before, is fine.
    fn step(&mut self) -> Result<()> {
        let name = format!("s{}", self.random.below(NAMES));
        let (what, often) = (self.random.below(24), self.random.below(3) == 0);
        let dual = json!({"ipFamilyPolicy": "PreferDualStack"});
        match (what, self.tenant.get(&name).ok()) {
            (0..=13, None) => {
                let spec = if often { dual } else { json!({}) };
                drop(self.tenant.create(&name, json!({}), spec));
            }
            (14, None) => {
                let pin = format!("10.60.0.{}", self.random.below(32));
                drop(self.tenant.create(&name, json!({"purelb.io/addresses": pin}), json!({})));
            }
            (0..=5, Some(_)) => {
                drop(self.tenant.delete(&name));
                if what > 2 {
                    drop(self.tenant.create(&name, json!({}), dual));
                }
            }
            (6..=13, Some(service)) => {
                self.witness.changed(&service);
                for spec in self.change(what, often, &service) {
                    drop(self.tenant.admin.patch("Service", &self.tenant.namespace, &name, &json!({"spec": spec})));
                }
            }
            (15..=16, Some(_)) => {
                let label = json!({"metadata": {"labels": {"x": self.random.0.to_string()}}});
                drop(self.tenant.admin.patch("Service", &self.tenant.namespace, &name, &label));
            }
            (17, _) if often => drop(self.tenant.admin.delete("Lease", &self.tenant.namespace, "purelb-allocator")),
            (18 | 19, _) => self.trouble()?,
            (20, _) if often => {
                let one = usize::try_from(self.random.below(2))?;
                let new = self.start()?;
                if let Some(place) = self.allocators.get_mut(one) {
                    *place = new;
                }
            }
            (21, _) => {
                let signal = if often { Signal::SIGSTOP } else { Signal::SIGCONT };
                self.allocators.iter().flatten().try_for_each(|one| one.signal(signal))?;
            }
            (22, _) if often => {
                drop(self.tenant.admin.delete("ServiceGroup", &self.tenant.namespace, "default"));
                self.groups()?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Changes of type or families.
    fn change(&self, what: u64, back: bool, service: &Value) -> Vec<Value> {
        match what {
            6..=8 => {
                let away =
                    json!({"type": "ClusterIP", "loadBalancerClass": null, "allocateLoadBalancerNodePorts": null});
                let again = json!({"type": "LoadBalancer", "loadBalancerClass": self.tenant.class()});
                if back { vec![away, again] } else { vec![away] }
            }
            9..=11 => vec![json!({
                "ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"],
                "clusterIPs": [service["spec"]["clusterIPs"][0]],
            })],
            _ => vec![json!({"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv4", "IPv6"]})],
        }
    }

    fn trouble(&mut self) -> Result<()> {
        const WRITE: &str = "PATCH /api/v1";
        let late = |seconds| Fate::Delay(Duration::from_secs(seconds));
        let all = [
            vec![],
            vec![Rule(WRITE, late(3))],
            vec![Rule(WRITE, late(11))],
            vec![Rule(WRITE, Fate::Death)],
            vec![Rule(WRITE, Fate::Answer(500))],
            vec![Rule("services\\?.*watch=true", Fate::Silence)],
            vec![Rule("PUT ", late(2))],
        ];
        let one = usize::try_from(self.random.below(7))?;
        all.get(one).map_or(Ok(()), |rules| self.proxy.rules(rules))
    }
}

#[test]
fn chaos() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "chaos")?;
    let proxy = Proxy::start(tenant.cluster)?;
    let seed = 0x1234_5678_9abc_def1 ^ u64::from(std::process::id());
    eprintln!("seed {seed}");
    let mut chaos = Chaos { tenant, proxy, allocators: Vec::new(), random: Random(seed), witness: Witness::default() };
    chaos.groups()?;
    chaos.allocators = vec![chaos.start()?, chaos.start()?];
    let end = Instant::now() + TIME;
    while Instant::now() < end {
        chaos.step()?;
        chaos.check()?;
    }
    chaos.proxy.rules(&[])?;
    chaos.allocators.iter().flatten().try_for_each(|one| one.signal(Signal::SIGCONT))?;
    // Those that there are now and as many as fit beside them: nothing is lost.
    let all = chaos.tenant.admin.list("Service", "chaos")?;
    let balanced = all.iter().filter(|service| service["spec"]["type"] == "LoadBalancer").count();
    chaos.tenant.create_many("fill-", ADDRESSES - balanced)?;
    sys::wait_for("all addresses are given", Duration::from_secs(120), || {
        chaos.check()?;
        let all = chaos.tenant.admin.list("Service", "chaos")?;
        let wants = |service: &&Value| service["spec"]["type"] == "LoadBalancer" && ingress(service).is_empty();
        // Who asks for one address by name waits until that is free.
        let pinned = |reason: &String| reason == "SharingKeyConflict";
        let missing: Vec<_> = all.iter().filter(wants).map(said).filter(|reason| !pinned(reason)).collect();
        ensure!(missing.is_empty(), "some have none: {missing:?}");
        Ok(true)
    })
}
