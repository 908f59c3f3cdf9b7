//! What only guests show.

mod ipvs;
mod kernel;
