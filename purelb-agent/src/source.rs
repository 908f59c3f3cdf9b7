//! The folder source: the very same YAML a cluster has, read from files.
//!
//! `dir` finds and parses files, `objects` are the fields of the Kubernetes objects that count,
//! `convert` makes a [`purelb_plan::world::World`] of them. A fault stays with its document or object.

pub mod convert;
pub mod dir;
pub mod objects;
