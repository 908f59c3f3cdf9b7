//! What an agent has pinned, read from outside: the kernel's word, not the agent's.

use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context as _, Result};
use aya::Pod;
use aya::maps::{Array, HashMap, Map, MapData, MapError};
use purelb_common::table::{Endpoint, FIRST_ENDPOINT, SLOTS_PER_ELEMENT, Service, ServiceKey, Slot};

use super::folder::{self, PORT};

type V4 = [u8; 4];

/// The pinned tables of IPv4.
pub struct Pins {
    services: HashMap<MapData, ServiceKey<V4>, Service>,
    endpoints: Array<MapData, Endpoint<V4>>,
    slots: Array<MapData, [u64; 16]>,
}

impl Pins {
    /// Opens them; `None` before they are all there.
    pub fn open(root: &Path) -> Option<Self> {
        let data = |name: &str| MapData::from_pin(root.join(name)).ok();
        Some(Self {
            services: HashMap::try_from(Map::HashMap(data("SERVICES4")?)).ok()?,
            endpoints: array(data("ENDPOINTS4")?)?,
            slots: array(data("SLOTS")?)?,
        })
    }

    /// The value of one of the folder's Services.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub fn service(&self, number: u32) -> Result<Option<Service>> {
        self.at(folder::vip(number))
    }

    /// The value of the Service at an address.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub fn at(&self, vip: Ipv4Addr) -> Result<Option<Service>> {
        let key = ServiceKey { vip: vip.octets(), port: PORT, proto: 6 };
        match self.services.get(&key, 0) {
            Ok(service) => Ok(Some(service)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).context("read SERVICES4"),
        }
    }

    /// Where each slot of a Service sends new flows.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub fn currents(&self, service: &Service) -> Result<Vec<u16>> {
        let elements = service.base / SLOTS_PER_ELEMENT..(service.base + service.mask + 1) / SLOTS_PER_ELEMENT;
        let mut found = Vec::new();
        for element in elements {
            let words = self.slots.get(&element, 0).context("read SLOTS")?;
            found.extend(words.map(|word| Slot(word).cur()));
        }
        Ok(found)
    }

    /// True when a Service is there and each of its slots names an endpoint.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub fn programmed(&self, number: u32) -> Result<bool> {
        let Some(service) = self.service(number)? else { return Ok(false) };
        Ok(self.currents(&service)?.into_iter().all(|id| id >= FIRST_ENDPOINT))
    }

    /// Address of an endpoint.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub fn address(&self, id: u16) -> Result<V4> {
        Ok(self.endpoints.get(&u32::from(id), 0).context("read ENDPOINTS4")?.addr)
    }
}

fn array<T: Pod>(data: MapData) -> Option<Array<MapData, T>> {
    Array::try_from(Map::Array(data)).ok()
}
