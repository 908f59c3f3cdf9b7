//! Which addresses a Service of type LoadBalancer gets: a pure function of the ServiceGroups, the Services and their
//! status. PureLB's contract, with its faults mended.
//!
//! ```text
//! ServiceGroups ── group ── catalog (which group serves whom) ─┐
//! Services' status ── ledger (who holds which address) ────────┼─ decide ──> Decision: ingress, annotations, events
//! Service ─────────────────────────────────────────────────────┘
//! ```
//! Addresses of external groups come from sidecars; [`external`] says what they are asked and told.
//! [`Allocator`](allocator::Allocator) keeps catalog and ledger current and looks again at what may have changed.

pub mod allocator;
pub mod catalog;
pub mod claim;
pub mod decide;
pub mod external;
pub mod group;
pub mod ledger;
pub mod range;
pub mod refusal;
pub mod status;
