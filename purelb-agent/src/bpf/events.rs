//! Sampled drops from the ring buffer `EVENTS`.

use std::path::Path;

use aya::maps::{Map, MapData, MapError, RingBuf};
use purelb_common::table::Event;
use tokio::io::unix::AsyncFd;

use super::{BpfError, sys};

/// A reader of the ring buffer.
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
}

impl Events {
    pub(super) fn open(path: &Path) -> Result<Self, BpfError> {
        let fail = |e: MapError| BpfError::Map { name: path.display().to_string(), source: Box::new(e) };
        let map = MapData::from_pin(path).and_then(Map::from_map_data).map_err(fail)?;
        let ring = RingBuf::try_from(map).map_err(fail)?;
        let ring = sys::watch(ring).map_err(|e| BpfError::syscall("epoll", path, e))?;
        Ok(Self { ring })
    }

    /// The next event; `None` when the descriptor fails, which it does not while the map lives.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            let mut guard = self.ring.readable_mut().await.ok()?;
            while let Some(item) = guard.get_inner_mut().next() {
                if let Some(bytes) = item.get(..size_of::<Event>()) {
                    return Some(bytemuck::pod_read_unaligned(bytes));
                }
            }
            guard.clear_ready();
        }
    }
}
