//! What rows put into the maps, and what they find there afterwards.

use anyhow::Result;

use super::*;

impl World {
    /// A VIP with `VIP_*` flags.
    ///
    /// # Errors
    /// A map that the kernel does not let write.
    pub fn vip(&mut self, host: Host, flags: u32) -> Result<()> {
        let name = self.name("VIP_INDEX");
        by_family!(self.family, A => {
            let addr = <A as Bytes>::of(host);
            let bit = hash::vip_bit(addr);
            Array::try_from(self.map(&name)?)?.set(bit, VipAt { addr, flags: flags | VIP_HERE }, 0)?;
            self.loaded.indexed.push((self.family, bit));
        });
        self.vip_beside(host, flags)
    }

    /// A VIP whose element of the index is another one's.
    ///
    /// # Errors
    /// A map that the kernel does not let write.
    pub fn vip_beside(&mut self, host: Host, flags: u32) -> Result<()> {
        self.bit(host)?;
        by_family!(self.family, A => self.insert("VIPS", &<A as Bytes>::of(host), &Vip { flags }))
    }

    /// The MAC address of the device that test runs come in by, `lo`.
    ///
    /// # Errors
    /// A map that the kernel does not let write.
    pub fn uplink(&mut self, mac: [u8; 6]) -> Result<()> {
        let [a, b, c, d, e, f] = mac;
        self.put_uplink(Uplink { mac: u64::from_le_bytes([a, b, c, d, e, f, 0, 0]), ifindex: 1, pad: 0 })
    }

    /// Until when questions for local VIPs may be answered, and from when on they are somebody else's: nanoseconds since boot.
    ///
    /// # Errors
    /// A map that the kernel does not let write.
    pub fn fence(&mut self, until: u64, over: u64) -> Result<()> {
        Ok(Array::try_from(self.map("FENCE")?)?.set(0, Fence { until, over }, 0)?)
    }

    pub(super) fn put_uplink(&mut self, entry: Uplink) -> Result<()> {
        Ok(Array::try_from(self.map("UPLINKS")?)?.set(1, entry, 0)?)
    }

    /// The bitmap's bit of an address, which need not be a VIP.
    ///
    /// # Errors
    /// As [`Self::vip`].
    pub fn bit(&mut self, host: Host) -> Result<()> {
        let bit = by_family!(self.family, A => hash::vip_bit(<A as Bytes>::of(host)));
        let mut bitmap: Array<&mut MapData, u64> = Array::try_from(self.map("VIP_BITMAP")?)?;
        let word = bitmap.get(&(bit / 64), 0)?;
        Ok(bitmap.set(bit / 64, word | 1 << (bit % 64), 0)?)
    }

    /// A port of a VIP.
    ///
    /// # Errors
    /// As [`Self::vip`].
    pub fn service(&mut self, (vip, port): (Host, u16), proto: u16, value: Service) -> Result<()> {
        by_family!(self.family, A =>
            self.insert("SERVICES", &ServiceKey { vip: <A as Bytes>::of(vip), port, proto }, &value))
    }

    /// Fills slots; `base` and `count` in multiples of 16.
    ///
    /// # Errors
    /// As [`Self::vip`].
    pub fn slots(&mut self, base: u32, count: u32, value: Slot) -> Result<()> {
        let mut slots: Array<&mut MapData, [u64; 16]> = Array::try_from(self.map("SLOTS")?)?;
        for element in base / 16..(base + count) / 16 {
            slots.set(element, [value.0; 16], 0)?;
        }
        Ok(())
    }

    /// Reads one slot.
    ///
    /// # Errors
    /// As [`Self::vip`].
    pub fn slot(&mut self, index: u32) -> Result<Slot> {
        let slots: Array<&mut MapData, [u64; 16]> = Array::try_from(self.map("SLOTS")?)?;
        let element = slots.get(&(index / 16), 0)?;
        Ok(Slot(element.get(index as usize % 16).copied().unwrap_or_default()))
    }

    /// An endpoint of generation `id * 10`.
    ///
    /// # Errors
    /// As [`Self::vip`].
    pub fn endpoint(&mut self, id: u16, at: (Host, u16), state: u16) -> Result<()> {
        self.put_endpoint(id, at, state, u32::from(id) * 10)
    }

    /// A ready endpoint of another generation.
    ///
    /// # Errors
    /// As [`Self::vip`].
    pub fn generation(&mut self, id: u16, at: (Host, u16), generation: u32) -> Result<()> {
        self.put_endpoint(id, at, READY, generation)
    }

    fn put_endpoint(&mut self, id: u16, (host, port): (Host, u16), state: u16, generation: u32) -> Result<()> {
        let name = self.name("ENDPOINTS");
        by_family!(self.family, A => {
            let value = Endpoint { addr: <A as Bytes>::of(host), port, state, generation };
            Ok(Array::try_from(self.map(&name)?)?.set(u32::from(id), value, 0)?)
        })
    }

    /// A source range of a service: the first `bits` of a client's address.
    ///
    /// # Errors
    /// As [`Self::vip`].
    pub fn range(&mut self, service: u32, client: Host, bits: u32) -> Result<()> {
        let name = self.name("SRC_RANGES");
        by_family!(self.family, A => {
            let data = RangeKey { service: service.to_be(), client: <A as Bytes>::of(client) };
            let mut ranges: LpmTrie<&mut MapData, RangeKey<A>, u32> = LpmTrie::try_from(self.map(&name)?)?;
            Ok(ranges.insert(&lpm_trie::Key::new(32 + bits, data), 1, 0)?)
        })
    }

    /// A range of the cluster's own addresses.
    ///
    /// # Errors
    /// As [`Self::vip`].
    pub fn cluster(&mut self, host: Host, bits: u32) -> Result<()> {
        let name = self.name("CLUSTER");
        by_family!(self.family, A => {
            let mut cluster: LpmTrie<&mut MapData, A, u32> = LpmTrie::try_from(self.map(&name)?)?;
            Ok(cluster.insert(&lpm_trie::Key::new(bits, <A as Bytes>::of(host)), 1, 0)?)
        })
    }

    /// The VIP and port that a pod's port alone leads back to.
    ///
    /// # Errors
    /// As [`Self::vip`].
    pub fn reverse(&mut self, (pod, port): (Host, u16), proto: u16, vip: (Host, u16)) -> Result<()> {
        by_family!(self.family, A => self.insert(
            "REVSVC",
            &RevKey { pod: <A as Bytes>::of(pod), port, proto },
            &Rev { vip: <A as Bytes>::of(vip.0), port: vip.1, pad: 0 },
        ))
    }

    /// A pin of a flow.
    ///
    /// # Errors
    /// As [`Self::vip`].
    pub fn pin(&mut self, from: (Host, u16), to: (Host, u16), proto: u32, pin: Pin) -> Result<()> {
        by_family!(self.family, A => self.insert("PINS", &flow_key::<A>(from, to, proto), &pin))
    }

    /// Reads a pin.
    ///
    /// # Errors
    /// As [`Self::vip`].
    pub fn pinned(&mut self, from: (Host, u16), to: (Host, u16), proto: u32) -> Result<Option<Pin>> {
        by_family!(self.family, A => self.get("PINS", &flow_key::<A>(from, to, proto)))
    }

    /// State of a flow's entry in `REPLIES`, `UDP_REPLIES` or `HALF_OPEN`.
    ///
    /// # Errors
    /// As [`Self::vip`].
    pub fn state(&mut self, map: &str, seen: Seen) -> Result<Option<u16>> {
        by_family!(self.family, A => {
            let found: Option<Reply<A>> = self.get(map, &reply_key::<A>(seen))?;
            Ok(found.map(|r| r.state))
        })
    }

    /// Forgets a flow's entry.
    ///
    /// # Errors
    /// As [`Self::vip`].
    pub fn forget(&mut self, map: &str) -> Result<()> {
        by_family!(self.family, A => self.clear::<ReplyKey<A>, Reply<A>>(map))
    }
}

fn flow_key<A: Bytes + bytemuck::Pod>(from: (Host, u16), to: (Host, u16), proto: u32) -> FlowKey<A> {
    FlowKey { client: A::of(from.0), vip: A::of(to.0), client_port: from.1, port: to.1, proto }
}

fn reply_key<A: Bytes + bytemuck::Pod>((pod, client, proto): Seen) -> ReplyKey<A> {
    ReplyKey { pod: A::of(pod.0), client: A::of(client.0), pod_port: pod.1, client_port: client.1, proto }
}
