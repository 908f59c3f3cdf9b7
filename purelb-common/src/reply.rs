//! The way back: whose reply leaves by the uplink, and what a client's own connection to an endpoint
//! changes about it (4.3 of the design: a pod's own traffic leaves untouched).

use crate::decide::{Tables, age};
use crate::hash::Address;
use crate::parse;
use crate::table::{CLOSED, CONFIG_REVSVC, Config, FIN_ENDPOINT, Reply, ReplyKey, RevKey};
use crate::verdict::Reason;

const FIN: u32 = parse::FIN as u32;
const SYN: u32 = parse::SYN as u32;
const RST: u32 = parse::RST as u32;
const ACK: u32 = parse::ACK as u32;
const TCP: u16 = 6;

/// A reply that leaves by the uplink: the VIP and port its source becomes, and why.
#[inline(always)]
pub fn reply<A: Address, T: Tables<A>, const PROTO: u16>(
    tables: &T,
    config: &Config,
    key: &ReplyKey<A>,
    flags: u32,
    tick: u32,
) -> Option<(A, u16, Reason)> {
    let seen = match tables.reply::<PROTO>(key) {
        Some(r) => Some(r),
        // Another reply of the flow may be promoted at this moment, on another CPU: then its entry is no longer half-open,
        // and was no reply entry yet.
        None if PROTO == TCP => match promote(tables, key, flags, tick) {
            None => tables.reply::<PROTO>(key),
            found => found,
        },
        None => None,
    };
    if let Some(r) = seen {
        let alive = tables.endpoint(r.endpoint).is_some_and(|e| { e.generation } == { r.generation });
        if alive {
            let mut state = r.state;
            if PROTO == TCP && flags & RST != 0 {
                state = CLOSED;
            } else if PROTO == TCP && flags & FIN != 0 {
                state |= FIN_ENDPOINT;
            }
            if flags & (RST | SYN) == 0 && (state != { r.state } || tick != { r.used }) {
                // A SYN that follows must look again at what this flow leaves.
                if state == CLOSED && state != { r.state } {
                    tables.remove_half_open(key);
                }
                tables.mark_reply::<PROTO>(key, state, tick);
            } else if flags & RST != 0 && state != { r.state } && tables.reply::<PROTO>(key).is_some() {
                tables.mark_reply::<PROTO>(key, state, r.used);
                tables.remove_half_open(key);
            }
            return Some((r.vip, r.port, Reason::ReplyTranslated));
        }
    }
    // UDP has no SYN that could tell a client of the pod itself, so only TCP is guessed; and what the pod
    // itself opens from that port is no reply.
    if PROTO == TCP && config.flags & CONFIG_REVSVC != 0 && flags & (SYN | ACK) != SYN {
        let rev = tables.reverse(&RevKey { pod: key.pod, port: key.pod_port, proto: PROTO })?;
        if !tables.direct(key) && !tables.in_cluster(key.client) {
            return Some((rev.vip, rev.port, Reason::ReplyByService));
        }
    }
    None
}

/// The half-open entry becomes a reply entry at the first answer that is neither SYN nor RST, so a
/// spoofed flood never evicts a flow that runs.
#[inline(always)]
fn promote<A: Address, T: Tables<A>>(tables: &T, key: &ReplyKey<A>, flags: u32, tick: u32) -> Option<Reply<A>> {
    let mut r = tables.half_open(key)?;
    if flags & RST != 0 {
        // Refused: the client port is free for another VIP at once.
        tables.remove_half_open(key);
    } else if flags & SYN == 0 {
        r.used = tick;
        tables.put_reply::<TCP>(key, &r);
        tables.remove_half_open(key);
    }
    Some(r)
}

/// A SYN for an address that is no VIP: when it opens a connection to an endpoint itself, what an
/// earlier flow through a VIP left for the same ports must not translate its replies. True: the
/// pod's port leads to a VIP, so `DIRECT` has to remember this client.
#[inline(always)]
pub fn direct<A: Address, T: Tables<A>>(tables: &T, config: &Config, key: &ReplyKey<A>, tick: u32) -> bool {
    if let Some(r) = tables.half_open(key) {
        if age(tick, r.used) <= 1 {
            // A SYN for the VIP that another hook has just rewritten (a bridge and its port are both uplinks,
            // or tcx stands behind XDP while hooks change).
            return false;
        }
        tables.remove_half_open(key);
    }
    if let Some(r) = tables.reply::<TCP>(key)
        && ({ r.state } == CLOSED || age(tick, r.used) > config.tcp_idle)
    {
        tables.remove_reply::<TCP>(key);
    }
    tables.reverse(&RevKey { pod: key.pod, port: key.pod_port, proto: TCP }).is_some()
}
