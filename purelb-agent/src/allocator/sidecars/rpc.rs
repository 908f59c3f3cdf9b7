//! One call to a sidecar over its socket.

use std::error::Error;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use purelb_ipam::v1::ipam_client::IpamClient;
use purelb_ipam::v1::{self, allocate_request::Selector, release_request::Target};
use purelb_plan::alloc::external::{Call, Fault, What};
use purelb_plan::observed::Family;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use crate::metrics::Rpcs;

/// No call takes longer, as with PureLB.
const LIMIT: Duration = Duration::from_secs(10);
/// More addresses in one answer are a fault of the sidecar, as with PureLB.
const MOST: usize = 16;
/// So many ranges of it are shown, ...
const RANGES: usize = 64;
/// ... each of so many characters.
const LONGEST: usize = 100;

/// Connects when it is used, and again when the sidecar was away.
pub(super) fn channel(socket: &str) -> Channel {
    // The scheme alone makes it a path: there is nothing in it that could be wrong.
    let endpoint = Endpoint::from_shared(format!("unix://{socket}")).unwrap_or_else(|_| Endpoint::from_static("unix:"));
    endpoint.connect_lazy()
}

/// Addresses, where they are asked for.
pub(super) async fn call(channel: Channel, call: &Call, rpcs: &Rpcs) -> Result<Vec<IpAddr>, Fault> {
    let mut client = IpamClient::new(channel);
    let (pool, service) = (call.group.clone(), call.service.clone());
    let allocate = |key: &Option<String>, selector| v1::AllocateRequest {
        pool: pool.clone(),
        service: service.clone(),
        sharing_key: key.clone().unwrap_or_default(),
        selector: Some(selector),
    };
    match &call.what {
        What::Allocate(ask) => {
            let wants = |of| ask.families.contains(&of);
            let families = v1::FamilyRequest { want_ipv4: wants(Family::V4), want_ipv6: wants(Family::V6) };
            let request = allocate(&ask.key, Selector::Families(families));
            parsed(timed(&call.socket, "Allocate", rpcs, client.allocate(request)).await?)
        }
        What::Hold { ip, key } => {
            let request = allocate(key, Selector::Explicit(v1::ExplicitIPs { ips: vec![ip.to_string()] }));
            timed(&call.socket, "Allocate", rpcs, client.allocate(request)).await.map(|_| Vec::new())
        }
        What::Release(ip) => {
            let target = ip.map_or(Target::All(true), |ip| Target::Ip(ip.to_string()));
            let request = v1::ReleaseRequest { pool, service, target: Some(target) };
            timed(&call.socket, "Release", rpcs, client.release(request)).await.map(|_| Vec::new())
        }
    }
}

/// The figures of a group.
pub(super) async fn stats(
    channel: Channel,
    group: &str,
    socket: &str,
    rpcs: &Rpcs,
) -> Result<v1::StatsResponse, Fault> {
    let request = v1::StatsRequest { pool: group.to_owned() };
    let mut stats = timed(socket, "Stats", rpcs, IpamClient::new(channel).stats(request)).await?;
    stats.display_addresses.truncate(RANGES);
    for text in &mut stats.display_addresses {
        *text = text.chars().take(LONGEST).collect();
    }
    Ok(stats)
}

async fn timed<T>(
    socket: &str,
    method: &'static str,
    rpcs: &Rpcs,
    request: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Fault> {
    let begun = Instant::now();
    let result = match tokio::time::timeout(LIMIT, request).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(fault(socket, &status)),
        Err(_) => {
            let message = format!("no answer on {socket} in {LIMIT:?}");
            Err(Fault { code: "DeadlineExceeded", message, answered: false })
        }
    };
    rpcs.ended(socket, method, result.as_ref().err().map_or("OK", |fault| fault.code), begun.elapsed());
    result
}

fn fault(socket: &str, status: &Status) -> Fault {
    let mut cause = status.source();
    while let Some(deeper) = cause.and_then(Error::source) {
        cause = Some(deeper);
    }
    match cause {
        Some(cause) => Fault { code: "Unavailable", message: format!("{socket}: {cause}"), answered: false },
        None => Fault { code: name(status.code()), message: status.message().to_owned(), answered: true },
    }
}

/// As Go's gRPC writes them, and so PureLB's metrics.
const fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Canceled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}

fn parsed(answer: v1::AllocateResponse) -> Result<Vec<IpAddr>, Fault> {
    let fault = |message: String| Err(Fault { code: "InvalidAnswer", message, answered: true });
    match answer.ips.len() {
        0 => return fault("it has no address".to_owned()),
        1..=MOST => {}
        count => return fault(format!("it has {count} addresses, and {MOST} are the most")),
    }
    let mut out = Vec::new();
    for v1::AllocatedIp { ip } in answer.ips {
        let text: String = ip.chars().take(LONGEST).collect();
        match text.parse::<IpAddr>() {
            Ok(ip) => out.push(ip.to_canonical()),
            Err(_) => return fault(format!("{text:?} is no address")),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(ips: &[&str]) -> Result<Vec<IpAddr>, String> {
        let ips = ips.iter().map(|ip| v1::AllocatedIp { ip: (*ip).to_owned() }).collect();
        parsed(v1::AllocateResponse { ips }).map_err(|fault| fault.message)
    }

    #[test]
    fn answers_that_nobody_can_use() {
        assert_eq!(answer(&["::ffff:10.0.0.1", "2001:db8::1"]).unwrap().len(), 2);
        assert_eq!(answer(&["::ffff:10.0.0.1"]), Ok(vec![[10, 0, 0, 1].into()]));
        assert!(answer(&[]).is_err_and(|why| why.contains("no address")));
        assert!(answer(&["10.0.0.1"; 16]).is_ok());
        assert!(answer(&["10.0.0.1"; 17]).is_err_and(|why| why.contains("17 addresses")));
        for bad in ["", "web", "10.0.0.1/32", "fe80::1%eth0"] {
            assert!(answer(&["10.0.0.1", bad]).is_err_and(|why| why.contains("is no address")), "{bad}");
        }
        assert!(answer(&["x".repeat(5_000).as_str()]).is_err_and(|why| why.len() < 200));
    }
}
