//! The programs in the kernel, packet by packet.

mod malformed;
mod neighbour;
mod pins;
mod reply;
mod steer;
