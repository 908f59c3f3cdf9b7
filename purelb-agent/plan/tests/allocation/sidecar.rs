//! A sidecar that keeps its contract, and forgets everything now and then.
#![expect(clippy::unwrap_used, reason = "a model in a test may stop at the first surprise")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use purelb_plan::alloc::external::{Call, Fault, What};
use purelb_plan::ids::family;
use purelb_plan::observed::Family;

/// How many addresses it has of each family.
const ROOM: u8 = 4;

#[derive(Debug, Default)]
pub struct Sidecar {
    given: BTreeMap<String, BTreeSet<IpAddr>>,
    /// It did once.
    pub forgot: bool,
}

pub fn away() -> Fault {
    Fault { code: "Unavailable", message: "away".to_owned(), answered: false }
}

fn no(code: &'static str) -> Fault {
    Fault { code, message: "no".to_owned(), answered: true }
}

pub fn is_of(ip: IpAddr) -> bool {
    pool(family(ip)).any(|own| own == ip)
}

/// All of a family.
pub fn pool(of: Family) -> impl Iterator<Item = IpAddr> {
    (1..=ROOM).map(move |n| match of {
        Family::V4 => [10, 9, 0, n].into(),
        Family::V6 => format!("2001:db8:9::{n}").parse().unwrap(),
    })
}

impl Sidecar {
    pub fn serve(&mut self, call: &Call) -> Result<Vec<IpAddr>, Fault> {
        let own = self.given.get(&call.service).cloned().unwrap_or_default();
        match &call.what {
            What::Release(Some(ip)) => self.take(&call.service, *ip),
            What::Release(None) => drop(self.given.remove(&call.service)),
            What::Hold { ip, .. } if !is_of(*ip) => return Err(no("InvalidArgument")),
            What::Hold { ip, .. } if self.is_free(*ip) => self.give(&call.service, *ip),
            What::Hold { ip, .. } if own.contains(ip) => {}
            What::Hold { .. } => return Err(no("AlreadyExists")),
            What::Allocate(ask) => {
                let wanted = if ask.families.is_empty() { vec![Family::V4] } else { ask.families.clone() };
                let mut out = Vec::new();
                for of in wanted {
                    let same = own.iter().copied().find(|ip| family(*ip) == of);
                    let free = || pool(of).find(|ip| self.is_free(*ip));
                    out.push(same.or_else(free).ok_or_else(|| no("ResourceExhausted"))?);
                }
                out.iter().for_each(|ip| self.give(&call.service, *ip));
                return Ok(out);
            }
        }
        Ok(Vec::new())
    }

    pub fn take(&mut self, name: &str, ip: IpAddr) {
        if let Some(own) = self.given.get_mut(name) {
            own.remove(&ip);
        }
    }

    pub fn forget(&mut self) {
        self.given.clear();
        self.forgot = true;
    }

    pub fn keep(&mut self, known: impl Fn(&str) -> bool) {
        self.given.retain(|name, _| known(name));
    }

    pub fn has(&self, name: &str, ip: IpAddr) -> bool {
        self.given.get(name).is_some_and(|own| own.contains(&ip))
    }

    pub fn has_room(&self, of: Family) -> bool {
        pool(of).any(|ip| self.is_free(ip))
    }

    pub fn all(&self) -> Vec<(String, IpAddr)> {
        self.given.iter().flat_map(|(name, ips)| ips.iter().map(|ip| (name.clone(), *ip))).collect()
    }

    fn give(&mut self, name: &str, ip: IpAddr) {
        self.given.entry(name.to_owned()).or_default().insert(ip);
    }

    fn is_free(&self, ip: IpAddr) -> bool {
        !self.given.values().any(|own| own.contains(&ip))
    }
}
