//! Services and ServiceGroups as the allocator sees them.

use std::collections::BTreeSet;
use std::net::IpAddr;

use purelb_api::service_group as api;
use purelb_plan::alloc::claim::{Claim, Condition, annotation};
use purelb_plan::alloc::group::{Announce, External, PoolSpec, Pools, Spec};
use purelb_plan::observed::Family;
use purelb_plan::problem::Problem;

use super::objects as o;
use super::parse::{Key, fault, label};
use super::state::ServiceState;

/// Type of the condition that says whether a Service has what it asks for.
pub const ALLOCATED: &str = "purelb.io/Allocated";

/// Where objects live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// In files that nobody but their owner writes.
    Folder,
    /// In an API server that gives every Service a cluster address and takes annotations out.
    Cluster,
}

/// A Service with its state, and what is wrong with what it asks for.
#[must_use]
pub fn claim(
    key: &Key,
    origin: &str,
    s: &o::Service,
    state: Option<&ServiceState>,
    home: Home,
) -> (Claim, Vec<Problem>) {
    let mut problems = Vec::new();
    // Another object under the same name has nothing of what the former one was given.
    let state = state.filter(|state| state.uid == s.metadata.uid);
    let mut annotations = s.metadata.annotations.clone();
    if home == Home::Folder {
        // Nobody can take it out of a manifest, and everything is looked at again anyway.
        annotations.remove(annotation::RE_EVALUATE);
    }
    for (key, value) in state.iter().flat_map(|state| &state.annotations) {
        match value {
            Some(value) => drop(annotations.insert(key.clone(), value.clone())),
            None => drop(annotations.remove(key)),
        }
    }
    let mut families = Vec::new();
    for (index, word) in s.spec.ip_families.iter().enumerate() {
        match word.as_str() {
            "IPv4" => families.push(Family::V4),
            "IPv6" => families.push(Family::V6),
            other => {
                let problem = fault(&label(key), origin, format!("{other:?} is unknown"), "use IPv4 or IPv6");
                problems.push(Problem { field: format!("spec.ipFamilies[{index}]"), ..problem });
            }
        }
    }
    let ingress = &s.status.load_balancer.ingress;
    let given = state.and_then(ServiceState::given);
    let claim = Claim {
        uid: s.metadata.uid.clone(),
        created: s.metadata.creation_timestamp.clone(),
        namespace: key.1.split_once('/').map_or_else(String::new, |(namespace, _)| namespace.to_owned()),
        load_balancer: s.spec.r#type == "LoadBalancer",
        class: s.spec.load_balancer_class.clone().filter(|class| !class.is_empty()),
        unready: match s.spec.cluster_ip.as_deref() {
            Some("None") => true,
            None | Some("") => home == Home::Cluster,
            Some(_) => false,
        },
        families,
        ports: s.spec.ports.iter().map(|p| (p.protocol.clone().unwrap_or_else(|| "TCP".to_owned()), p.port)).collect(),
        annotations,
        load_balancer_ip: s.spec.load_balancer_ip.clone(),
        ingress: match given {
            Some(given) => once(given.iter().copied()),
            None => once(ingress.iter().filter_map(|i| i.ip.as_deref()?.parse().ok())),
        },
        host_names: given.is_none() && ingress.iter().any(|i| i.ip.is_none() && i.hostname.is_some()),
        condition: match home {
            Home::Folder => state.and_then(|state| state.condition.clone()).map(|c| Condition {
                status: c.status,
                reason: c.reason,
                message: c.message,
            }),
            Home::Cluster => s.status.conditions.iter().find(|c| c.r#type == ALLOCATED).map(|c| Condition {
                status: c.status == "True",
                reason: c.reason.clone(),
                message: c.message.clone(),
            }),
        },
    };
    (claim, problems)
}

/// Whoever wrote it, none stands there twice.
fn once(ips: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut seen = BTreeSet::new();
    ips.filter(|ip| seen.insert(*ip)).collect()
}

/// A ServiceGroup.
#[must_use]
pub fn spec(origin: &str, s: &api::ServiceGroupSpec) -> Spec {
    Spec {
        origin: origin.to_owned(),
        local: s
            .local
            .as_ref()
            .map(|local| Pools { skip_ipv6_dad: local.skip_ipv6_dad, ..pools("spec.local", &local.pools) }),
        remote: s.remote.as_ref().map(|remote| pools("spec.remote", &remote.pools)),
        external: s.external.as_ref().map(|external| External {
            provider: external.provider.clone(),
            socket: external.socket.clone(),
            announce: match external.announce {
                api::Announce::Local => Announce::Local,
                api::Announce::Remote => Announce::Remote,
            },
        }),
        exclude: s.exclude.clone(),
        namespaces: s.namespaces.clone(),
        enforce_namespaces: s.enforce_namespaces,
        namespace_default: s.namespace_default,
    }
}

fn pools(at: &str, p: &api::Pools) -> Pools {
    Pools {
        v4: list(at, "v4pool", &p.v4pools, p.v4pool.as_ref()),
        v6: list(at, "v6pool", &p.v6pools, p.v6pool.as_ref()),
        skip_ipv6_dad: false,
        multi_pool: p.multi_pool,
        balance_pools: p.balance_pools,
    }
}

/// The one that stands alone comes last.
fn list(at: &str, field: &str, many: &[api::AddressPool], one: Option<&api::AddressPool>) -> Vec<PoolSpec> {
    let pool = |field: String, pool: &api::AddressPool| PoolSpec {
        field,
        pool: pool.pool.clone(),
        subnet: pool.subnet.clone(),
        aggregation: pool.aggregation.clone(),
    };
    let many = many.iter().enumerate().map(|(index, p)| pool(format!("{at}.{field}s[{index}]"), p));
    many.chain(one.map(|p| pool(format!("{at}.{field}"), p))).collect()
}

#[cfg(test)]
mod tests {
    use super::super::parse::Kind;
    use super::*;

    /// Found by the fuzzer: an address of a state file was taken as often as it stands there.
    #[test]
    fn no_address_twice() {
        let ip: IpAddr = [192, 0, 2, 1].into();
        let key = (Kind::Service, "x/a".to_owned());
        let mut service = o::Service::default();
        let state = ServiceState { ingress: vec![ip, ip], ..ServiceState::default() };
        assert_eq!(claim(&key, "", &service, Some(&state), Home::Folder).0.ingress, [ip]);
        let named = o::Ingress { ip: Some(ip.to_string()), hostname: None };
        service.status.load_balancer.ingress = vec![named.clone(), named];
        assert_eq!(claim(&key, "", &service, None, Home::Cluster).0.ingress, [ip]);
    }
}
