//! What an IPAM sidecar serves and the allocator asks (`proto/ipam.proto`, PureLB's `purelb.ipam.v1`): generated.

/// Messages, client and server of `purelb.ipam.v1`.
#[expect(missing_docs, clippy::pedantic, clippy::nursery, reason = "generated; proto/ipam.proto has the docs")]
pub mod v1 {
    tonic::include_proto!("purelb.ipam.v1");
}
