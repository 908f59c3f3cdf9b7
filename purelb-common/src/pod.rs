//! aya's marker for the map types. The one unsafe file of this crate: bytemuck's derive proves
//! each type is plain data without padding, this only repeats the promise to aya.

use bytemuck::Pod;

use crate::table as t;

const fn proven<T: Pod>() {}

macro_rules! pod {
    ($($t:ty),* $(,)?) => {$(
        const _: () = proven::<$t>();
        // SAFETY: `proven` holds that the type is `bytemuck::Pod`: any bits are valid, no padding.
        unsafe impl aya::Pod for $t {}
    )*};
}

pod!(
    t::Config,
    t::Fence,
    t::Vip,
    t::Service,
    t::Slot,
    t::Pin,
    t::Affinity,
    t::Stats,
    t::Event,
    t::Uplink,
    t::Owner,
    t::Clock
);
macro_rules! family {
    ($($a:ty),*) => {$(
        pod!(
            t::VipAt<$a>, t::ServiceKey<$a>, t::Endpoint<$a>, t::FlowKey<$a>, t::ReplyKey<$a>, t::Reply<$a>,
            t::RevKey<$a>, t::Rev<$a>, t::AffinityKey<$a>, t::RangeKey<$a>,
        );
    )*};
}
family!([u8; 4], [u8; 16]);
