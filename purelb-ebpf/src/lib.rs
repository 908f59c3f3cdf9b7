//! Lets cargo depend on the crate; the programs are in `main.rs`.
#![no_std]
