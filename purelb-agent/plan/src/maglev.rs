//! Maglev over a power of two with odd skips: which of n endpoints owns each slot.
//!
//! Depends on the endpoints' addresses and ports alone, so every node and every order of input gives
//! the same table. Source: Eisenbud et al., NSDI 2016, section 3.4; odd skips walk all of a power of two.

use std::net::IpAddr;

const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(h: u64) -> u64 {
    let h = (h ^ (h >> 32)).wrapping_mul(MULTIPLIER);
    let h = (h ^ (h >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    h ^ (h >> 32)
}

fn identity(addr: IpAddr, port: u16) -> u64 {
    let wide = match addr {
        IpAddr::V4(a) => u128::from(u32::from(a)),
        IpAddr::V6(a) => u128::from(a),
    };
    mix(mix(wide as u64 ^ MULTIPLIER) ^ (wide >> 64) as u64 ^ u64::from(port) << 48)
}

/// Owner of each of `slots` (a power of two) slots as an index into `endpoints`, which must be sorted;
/// empty when there are none.
#[must_use]
pub fn table(endpoints: &[(IpAddr, u16)], slots: u32) -> Vec<u16> {
    const FREE: u16 = u16::MAX;
    if endpoints.is_empty() {
        return Vec::new();
    }
    let mask = slots - 1;
    // Next slot to try and the (odd) skip of each endpoint.
    let mut walk: Vec<(u32, u32)> = endpoints
        .iter()
        .map(|&(addr, port)| {
            let h = identity(addr, port);
            (h as u32 & mask, (mix(h ^ 1) as u32 | 1) & mask)
        })
        .collect();
    let mut owners = vec![FREE; slots as usize];
    let mut left = slots;
    loop {
        for (index, (next, skip)) in walk.iter_mut().enumerate() {
            loop {
                let slot = *next;
                *next = next.wrapping_add(*skip) & mask;
                if let Some(owner @ &mut FREE) = owners.get_mut(slot as usize) {
                    *owner = index as u16;
                    break;
                }
            }
            left -= 1;
            if left == 0 {
                return owners;
            }
        }
    }
}

/// Slots of a service with `endpoints` endpoints: at least 1,024 and 100 for each.
#[must_use]
pub fn slots_for(endpoints: usize) -> u32 {
    (endpoints as u32).saturating_mul(100).next_power_of_two().clamp(purelb_common::table::MIN_BLOCK, 1 << 19)
}
