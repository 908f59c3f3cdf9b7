//! What people, pods and machines do to the nodes.
#![expect(clippy::unwrap_used, reason = "a model in a test may stop at the first surprise")]

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use purelb_plan::announce::election::Preference;
use purelb_plan::announce::owner::{Event, Stop};

use super::{Message, Model};

impl Model {
    /// Endpoints moved: everybody hears of it some time.
    pub fn prefer(&mut self, ip: IpAddr, preference: Preference, slowest: u64) {
        self.wants.get_mut(&ip).unwrap().preference = preference;
        for host in 0..self.hosts.len() {
            let delay = 5 + self.chance.below(slowest);
            self.tell(host, delay, Event::Wants(self.wants.clone()));
        }
    }

    pub fn kill(&mut self, host: usize) {
        let host = &mut self.hosts[host];
        if host.paused {
            return;
        }
        host.process = None;
        host.life += 1;
        host.inbox.clear();
        host.pending.clear();
    }

    pub fn start_after(&mut self, host: usize, delay: u64) {
        self.push(delay, Message::Start { host });
    }

    pub fn stop(&mut self, host: usize, how: Stop) {
        self.tell(host, 0, Event::Stop(how));
    }

    /// The machine is gone with its links.
    pub fn destroy(&mut self, host: usize) {
        self.kill(host);
        self.hosts[host].link.clear();
    }

    pub fn freeze(&mut self, host: usize, long: u64) {
        if !self.hosts[host].frozen {
            self.count.frozen += 1;
            self.hosts[host].frozen = true;
            self.push(long, Message::Thaw { host });
        }
    }

    pub fn pause(&mut self, host: usize, long: u64) {
        // Somebody must be there to hear of it.
        if !self.hosts[host].frozen && self.hosts[host].process.is_some() {
            (self.hosts[host].frozen, self.hosts[host].paused) = (true, true);
            self.push(long, Message::Thaw { host });
        }
    }

    pub fn stall(&mut self, host: usize, long: u64) {
        self.hosts[host].stall = self.now + long;
    }

    pub fn cut(&mut self, host: usize, long: u64) {
        self.hosts[host].cut = self.now + long;
    }

    pub fn api_away(&mut self, long: u64) {
        self.down = self.now + long;
    }

    /// Somebody deletes a Lease.
    pub fn delete(&mut self, node: &str) {
        let Some(lease) = self.api.objects.get(node) else { return };
        // Of a node that holds for an upgrade nobody is there to notice: said in the documentation.
        if lease.says.duration == self.d {
            self.count.deleted += 1;
            self.api.delete(node);
            self.publish(node);
        }
    }

    pub fn set_subnets(&mut self, host: usize, subnets: BTreeSet<IpNet>) {
        self.hosts[host].subnets.clone_from(&subnets);
        self.tell(host, 0, Event::Subnets(subnets));
    }

    /// All faults end; processes that are not there come back.
    pub fn heal(&mut self) {
        self.calm = true;
        self.down = 0;
        for host in 0..self.hosts.len() {
            (self.hosts[host].stall, self.hosts[host].cut) = (0, 0);
            if self.hosts[host].process.is_none() {
                self.start_after(host, 100);
            }
        }
    }
}
