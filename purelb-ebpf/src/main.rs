//! The programs: entry points, licence, panic handler; the packet's way is in `steer.rs`.
#![no_std]
#![no_main]

mod maps;
mod packet;
mod steer;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use purelb_common::verdict::Action;

/// The next program of the chain, or the kernel, goes on with the packet.
const TCX_NEXT: i32 = -1;
/// The packet ends here.
const TCX_DROP: i32 = 2;

/// Uplink ingress before the kernel spends anything on the packet.
#[xdp(frags)]
pub fn purelb_xdp(context: XdpContext) -> u32 {
    match steer::ingress(&packet::Xdp(context)) {
        Action::Pass => XDP_PASS,
        Action::Drop => XDP_DROP,
    }
}

/// Uplink ingress where XDP is not right (D15).
#[classifier]
pub fn purelb_ingress(context: TcContext) -> i32 {
    match steer::ingress(&packet::Skb::new(context)) {
        Action::Pass => TCX_NEXT,
        Action::Drop => TCX_DROP,
    }
}

/// Uplink egress: un-NAT of replies.
#[classifier]
pub fn purelb_egress(context: TcContext) -> i32 {
    steer::egress(context);
    TCX_NEXT
}

/// Not attached: the agent runs it once a second to learn the clock of the maps. The one place that logs
/// (aya-log): off the packet path, and only what is rare.
#[xdp]
pub fn clock(context: XdpContext) -> u32 {
    maps::read_clock();
    if let Some(silence) = maps::lapsed() {
        aya_log_ebpf::warn!(
            &context,
            "the agent was silent for {} ticks: meanwhile new flows passed and drops lapsed",
            silence
        );
    }
    XDP_PASS
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
