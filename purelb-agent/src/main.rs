//! Parses the command line and runs it.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    purelb_agent::run::main(purelb_agent::args::Args::parse())
}
