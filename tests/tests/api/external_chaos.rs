//! Sidecars and everything at once, by chance: Services that come, go and change, a sidecar that is away, silent, forgetful
//! or says no, leaders that stop and die, a group that goes, comes back and has ranges meanwhile. Nothing is given twice or
//! taken away, and in the end the sidecar knows of every address that is in use.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use purelb_tests::cluster::proxy::{Fate, Proxy, Rule};
use purelb_tests::cluster::tenant::{Allocator, ingress, said};
use purelb_tests::cluster::witness::Witness;
use purelb_tests::cluster::{Cluster, Tenant};
use purelb_tests::random::Random;
use purelb_tests::sidecar::{Mood, Sidecar};
use purelb_tests::sys;
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::Code;

/// So long it goes on.
const TIME: Duration = Duration::from_secs(60);
const NAMES: u64 = 30;

struct Chaos {
    tenant: Tenant<'static>,
    proxy: Proxy,
    sidecar: Sidecar,
    allocators: Vec<Allocator>,
    random: Random,
    witness: Witness,
}

impl Chaos {
    fn far(&self) -> Result<()> {
        let spec = json!({"provider": "lab", "socket": self.sidecar.socket, "announce": "remote"});
        self.tenant.group("far", json!({"external": spec})).map(drop)
    }

    fn start(&self) -> Result<Allocator> {
        self.tenant.allocator_behind(&self.proxy, &["--cool-down", "0s"])
    }

    fn check(&mut self) -> Result<()> {
        self.witness.check(&self.tenant)
    }

    /// One thing happens. What the API server refuses, because of what happened before, is fine.
    fn step(&mut self) -> Result<()> {
        let name = format!("s{}", self.random.below(NAMES));
        let (what, often) = (self.random.below(26), self.random.below(3) == 0);
        let dual = json!({"ipFamilyPolicy": "PreferDualStack"});
        let far = json!({"purelb.io/service-group": "far"});
        match (what, self.tenant.get(&name).ok()) {
            (0..=12, None) => {
                let group = if what < 2 { json!({}) } else { far };
                drop(self.tenant.create(&name, group, if often { dual } else { json!({}) }));
            }
            (0..=4, Some(_)) => {
                drop(self.tenant.delete(&name));
                if what > 2 {
                    drop(self.tenant.create(&name, far, dual));
                }
            }
            (5..=12, Some(service)) => {
                self.witness.changed(&service);
                for change in self.change(what, often, &service) {
                    drop(self.tenant.admin.patch("Service", &self.tenant.namespace, &name, &change));
                }
            }
            (13..=18, _) => self.mood(what, often)?,
            (19, _) => {
                const WRITE: &str = "PATCH /api/v1";
                let late = Fate::Delay(Duration::from_secs(3));
                let all = [vec![], vec![Rule(WRITE, late)], vec![Rule(WRITE, Fate::Death)], vec![Rule("PUT ", late)]];
                let one = usize::try_from(self.random.below(4))?;
                all.get(one).map_or(Ok(()), |rules| self.proxy.rules(rules))?;
            }
            (20, _) if often => {
                let (one, new) = (usize::try_from(self.random.below(2))?, self.start()?);
                if let Some(place) = self.allocators.get_mut(one) {
                    *place = new;
                }
            }
            (21 | 22, _) => {
                let signal = if what == 21 && often { Signal::SIGSTOP } else { Signal::SIGCONT };
                self.allocators.iter().try_for_each(|one| one.signal(signal))?;
            }
            (23, _) if often => {
                drop(self.tenant.admin.delete("ServiceGroup", &self.tenant.namespace, "far"));
                self.far()?;
            }
            (24, _) if often => {
                let ranges = json!({"v4pool": {"pool": "10.71.0.0/28", "subnet": "10.0.0.0/8"}});
                drop(self.tenant.admin.delete("ServiceGroup", &self.tenant.namespace, "far"));
                self.tenant.group("far", json!({"local": ranges}))?;
                sys::pause(300);
                drop(self.tenant.admin.delete("ServiceGroup", &self.tenant.namespace, "far"));
                self.far()?;
            }
            _ => sys::pause(100),
        }
        Ok(())
    }

    fn change(&self, what: u64, back: bool, service: &Value) -> Vec<Value> {
        let away = json!({"type": "ClusterIP", "loadBalancerClass": null, "allocateLoadBalancerNodePorts": null});
        let again = json!({"type": "LoadBalancer", "loadBalancerClass": self.tenant.class()});
        let single = json!({
            "ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"], "clusterIPs": [service["spec"]["clusterIPs"][0]],
        });
        let both = json!({"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv4", "IPv6"]});
        let specs = match what {
            5 | 6 if back => vec![away, again],
            5 | 6 => vec![away],
            7 | 8 if back => vec![single, both],
            7 | 8 => vec![single],
            9 | 10 => vec![both],
            _ => {
                let group = if back { json!("far") } else { json!("default") };
                return vec![json!({"metadata": {"annotations": {"purelb.io/service-group": group}}})];
            }
        };
        specs.into_iter().map(|spec| json!({"spec": spec})).collect()
    }

    fn mood(&mut self, what: u64, often: bool) -> Result<()> {
        let mood = match what {
            13 if often => Mood::Silent,
            14 if often => Mood::GivesNothing(Code::Unavailable),
            15 if often => Mood::Keeps(Code::Unavailable),
            16 if often => Mood::Gives(vec!["10.70.0.1".to_owned()]),
            17 if often => {
                self.sidecar.stop();
                self.sidecar.forget();
                return self.sidecar.serve();
            }
            18 if often => {
                self.sidecar.stop();
                sys::pause(200);
                return self.sidecar.serve();
            }
            _ => Mood::Good,
        };
        self.sidecar.mood(mood);
        Ok(())
    }
}

#[test]
fn chaos() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "wild")?;
    let proxy = Proxy::start(tenant.cluster)?;
    let folder = TempDir::with_prefix("purelb-sidecar-")?;
    let own = |net: &str| (1..=64).map(|n| format!("{net}{n}")).collect::<Vec<_>>();
    let (v4, v6) = (own("10.70.0."), own("2001:db8:70::"));
    let refs = |all: &'static [String]| all.iter().map(String::as_str).collect::<Vec<_>>();
    let (v4, v6) = (refs(v4.leak()), refs(v6.leak()));
    let sidecar = Sidecar::start(&folder.path().join("ipam.sock"), &v4, &v6)?;
    let seed = 0x1234_5678_9abc_def1 ^ u64::from(std::process::id());
    eprintln!("seed {seed}");
    let mut chaos =
        Chaos { tenant, proxy, sidecar, allocators: Vec::new(), random: Random(seed), witness: Witness::default() };
    let near = json!({
        "v4pool": {"pool": "10.72.0.0/26", "subnet": "10.0.0.0/8"},
        "v6pool": {"pool": "2001:db8:72::/122", "subnet": "2001:db8:72::/64"},
    });
    chaos.tenant.group("default", json!({"local": near}))?;
    chaos.far()?;
    chaos.allocators = vec![chaos.start()?, chaos.start()?];
    let end = Instant::now() + TIME;
    while Instant::now() < end {
        chaos.step()?;
        chaos.check()?;
    }
    chaos.proxy.rules(&[])?;
    chaos.sidecar.mood(Mood::Good);
    chaos.allocators.iter().try_for_each(|one| one.signal(Signal::SIGCONT))?;
    // A new one begins from what is written alone.
    chaos.allocators = vec![chaos.start()?];
    sys::wait_for("who asks has one, and the sidecar knows", Duration::from_secs(150), || {
        chaos.check()?;
        for service in chaos.tenant.admin.list("Service", "wild")? {
            let name = service["metadata"]["name"].as_str().unwrap_or_default();
            let (balanced, has) = (service["spec"]["type"] == "LoadBalancer", ingress(&service));
            ensure!(balanced != has.is_empty(), "{name}: {}", said(&service));
            let known = chaos.sidecar.given("far", &format!("wild/{name}"));
            for ip in has.iter().filter(|ip| ip.starts_with("10.70.") || ip.starts_with("2001:db8:70:")) {
                ensure!(
                    known.split(' ').any(|one| one == ip),
                    "{name} has {has:?}, and the sidecar knows of {known:?}"
                );
            }
        }
        Ok(true)
    })
}
