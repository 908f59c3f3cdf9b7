//! What a node's Lease says: PureLB's annotations, and ours beside them, which PureLB's agents do not look at.
//!
//! A Lease is its node's word to the others. Everything in it is written by compare-and-swap of the version seen last, so
//! what was read is what the node says until another version appears.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::election::Score;

/// Networks of the node's interfaces, in which it stands for election: sorted CIDRs with commas between. PureLB's.
pub const SUBNETS: &str = "purelb.io/subnets";
/// UID of the agent's pod. PureLB's.
pub const INSTANCE: &str = "purelb.io/instance";
/// Who wrote it: `place/session`. Without it a Lease is PureLB's agent's.
pub const SESSION: &str = "purelb.io/session";
/// Name of what the node asserts, another one whenever it asserts more; ` settled` behind it: everybody has yielded.
pub const EPOCH: &str = "purelb.io/epoch";
/// Addresses that the node asserts though another one has the better lot, since endpoints are here: with commas between.
pub const CLAIMS: &str = "purelb.io/claims";
/// What the node saw of others that are not settled: `node=epoch` when it answers for nothing that goes to that node,
/// `node~epoch` when it does still; with commas between.
pub const YIELD: &str = "purelb.io/yield";
/// There and `true`: the node answers for nothing and goes.
pub const RELEASED: &str = "purelb.io/released";
/// Written by another node, its name: the holder was silent for the term of its Lease and answers for nothing any more.
pub const REVOKED: &str = "purelb.io/revoked";

/// So many networks of a Lease count (PureLB's bound).
const MOST_SUBNETS: usize = 256;
/// So many claims, for all annotations together are 256 KiB.
pub const MOST_CLAIMS: usize = 4000;
/// No Lease is shorter, in milliseconds: the fence ends a second before it.
pub const SHORTEST: u64 = 2000;
/// Nobody means a longer one, in milliseconds: whoever falls silent is taken for alive for that long.
const LONGEST: u64 = 86_400_000;
/// No epoch of ours is longer. Others repeat it in their Leases.
const LONGEST_EPOCH: usize = 128;

/// A Lease as an API server or a folder has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The node whose it is.
    pub node: String,
    /// `metadata.uid`: another one after it was deleted and made anew.
    pub uid: String,
    /// `metadata.resourceVersion`: grows with every write, of all objects of the kind.
    pub version: u64,
    /// What it says.
    pub says: Arc<Statement>,
}

/// What a Lease says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statement {
    /// `spec.leaseDurationSeconds`, in milliseconds.
    pub duration: u64,
    /// Networks in which the node stands.
    pub subnets: BTreeSet<IpNet>,
    /// UID of the agent's pod.
    pub instance: String,
    /// What PureLB's agents do not write.
    pub ours: Option<Ours>,
    /// Who revoked it.
    pub revoked: Option<String>,
    /// What is odd about it, for people.
    pub odd: Option<String>,
}

/// The words of our agents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ours {
    /// Where the agent runs: boot and network namespace. Two agents of one place are never there at once.
    pub place: String,
    /// Name of the process, never used twice.
    pub session: String,
    /// Name of what is asserted.
    pub epoch: String,
    /// Everybody who was there yielded to it.
    pub settled: bool,
    /// Addresses asserted before any that others have by their subnets.
    pub claims: BTreeSet<IpAddr>,
    /// Marks for other nodes, by their name.
    pub yields: BTreeMap<String, Mark>,
    /// The node answers for nothing and goes.
    pub released: bool,
}

/// That a node knows of another's epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The epoch.
    pub epoch: String,
    /// It answers for nothing that this epoch takes from it, and will not as long as it stands.
    pub done: bool,
}

/// How strongly a node asserts an address: by what, and with which lot. Of two the smaller one has it; no two are alike.
pub type Strength = (Rank, Score);

/// By what a node asserts an address. A claim goes before a subnet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// It stands among the claims.
    Claim,
    /// A subnet contains it.
    Subnet,
}

impl Statement {
    /// Reads what can be read; what is malformed is left out.
    #[must_use]
    pub fn parse(annotations: &BTreeMap<String, String>, duration_seconds: i32) -> Self {
        let text = |key: &str| annotations.get(key).map(String::as_str);
        let ours = text(SESSION).and_then(|both| both.rsplit_once('/')).map(|(place, session)| {
            let (epoch, settled) = match text(EPOCH).unwrap_or_default().split_once(' ') {
                Some((epoch, rest)) => (epoch, rest == "settled"),
                None => (text(EPOCH).unwrap_or_default(), false),
            };
            Ours {
                place: place.to_owned(),
                session: session.to_owned(),
                epoch: if is_epoch(epoch) { epoch.to_owned() } else { String::new() },
                settled,
                claims: list(text(CLAIMS)).take(MOST_CLAIMS).collect(),
                yields: text(YIELD).unwrap_or_default().split(',').filter_map(mark).collect(),
                released: text(RELEASED) == Some("true"),
            }
        });
        Self {
            duration: u64::try_from(duration_seconds).unwrap_or_default().saturating_mul(1000).max(SHORTEST),
            subnets: list(text(SUBNETS)).take(MOST_SUBNETS).map(|net: IpNet| net.trunc()).collect(),
            instance: text(INSTANCE).unwrap_or_default().to_owned(),
            ours,
            revoked: text(REVOKED).map(str::to_owned),
            odd: odd(&text, duration_seconds),
        }
    }

    /// Our annotations by key; none deletes one.
    #[must_use]
    pub fn encode(&self) -> BTreeMap<&'static str, Option<String>> {
        let ours = self.ours.as_ref();
        let filled = |text: String| (!text.is_empty()).then_some(text);
        let sign = |done: bool| if done { '=' } else { '~' };
        let yields = ours.iter().flat_map(|ours| &ours.yields);
        let yields = yields.map(|(node, mark)| format!("{node}{}{}", sign(mark.done), mark.epoch));
        let epoch = |ours: &Ours| format!("{}{}", ours.epoch, if ours.settled { " settled" } else { "" });
        BTreeMap::from([
            (SUBNETS, Some(join(self.subnets.iter().map(ToString::to_string)))),
            (INSTANCE, Some(self.instance.clone())),
            (SESSION, ours.map(|ours| format!("{}/{}", ours.place, ours.session))),
            (EPOCH, ours.map(epoch)),
            (CLAIMS, filled(join(ours.iter().flat_map(|ours| &ours.claims).map(ToString::to_string)))),
            (YIELD, filled(join(yields))),
            (RELEASED, ours.filter(|ours| ours.released).map(|_| "true".to_owned())),
            (REVOKED, self.revoked.clone()),
        ])
    }

    /// Its holder answers for nothing: it said so, or was proven silent.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.revoked.is_some() || self.ours.as_ref().is_some_and(|ours| ours.released)
    }

    /// A subnet contains the address.
    #[must_use]
    pub fn covers(&self, ip: IpAddr) -> bool {
        covers(&self.subnets, ip)
    }

    /// By what it asserts the address.
    #[must_use]
    pub fn rank(&self, ip: IpAddr) -> Option<Rank> {
        if self.ours.as_ref().is_some_and(|ours| ours.claims.contains(&ip)) {
            return Some(Rank::Claim);
        }
        self.covers(ip).then_some(Rank::Subnet)
    }
}

/// One of them contains the address.
#[must_use]
pub fn covers(subnets: &BTreeSet<IpNet>, ip: IpAddr) -> bool {
    subnets.iter().any(|net| net.contains(&ip))
}

fn join(words: impl Iterator<Item = String>) -> String {
    words.collect::<Vec<_>>().join(",")
}

fn list<T: std::str::FromStr>(text: Option<&str>) -> impl Iterator<Item = T> {
    text.unwrap_or_default().split(',').filter_map(|word| word.trim().parse().ok())
}

/// With a comma it would come back out of our Lease as another mark, which we never left.
fn is_epoch(text: &str) -> bool {
    text.len() <= LONGEST_EPOCH && !text.contains(',')
}

/// What of a Lease counts for nothing, or for long.
fn odd<'a>(text: &impl Fn(&str) -> Option<&'a str>, seconds: i32) -> Option<String> {
    let mut said = Vec::new();
    let words: Vec<_> = text(SUBNETS).unwrap_or_default().split(',').filter(|word| !word.trim().is_empty()).collect();
    let bad = words.iter().find(|word| word.trim().parse::<IpNet>().is_err());
    if let Some(bad) = bad {
        said.push(format!("{SUBNETS} names {:?}, which is no network", bad.chars().take(40).collect::<String>()));
    }
    if words.len() > MOST_SUBNETS {
        said.push(format!("{SUBNETS} names {} networks; the first {MOST_SUBNETS} count", words.len()));
    }
    let epoch = text(EPOCH).unwrap_or_default();
    if !is_epoch(epoch.split_once(' ').map_or(epoch, |(epoch, _)| epoch)) {
        said.push(format!("{EPOCH} is none"));
    }
    match u64::try_from(seconds).unwrap_or_default().saturating_mul(1000) {
        short @ 0..SHORTEST => {
            said.push(format!("it runs for {} s; it counts for {} s", short / 1000, SHORTEST / 1000))
        }
        long if long > LONGEST => said.push(format!("it runs for {} days without renewal", long / LONGEST)),
        _ => {}
    }
    (!said.is_empty()).then(|| said.join("; "))
}

fn mark(word: &str) -> Option<(String, Mark)> {
    let at = word.find(['=', '~'])?;
    let (node, rest) = word.split_at(at);
    let epoch = rest.get(1..).filter(|epoch| !epoch.is_empty() && !node.is_empty())?;
    Some((node.to_owned(), Mark { epoch: epoch.to_owned(), done: rest.starts_with('=') }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Statement {
        let annotations = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Statement::parse(&annotations, 10)
    }

    #[test]
    fn what_is_written_is_read() {
        let ours = Ours {
            place: "boot/4026531840".to_owned(),
            session: "a1".to_owned(),
            epoch: "a1.3".to_owned(),
            settled: true,
            claims: ["192.0.2.9", "2001:db8::9"].map(|ip| ip.parse().unwrap()).into(),
            yields: [("n2", "b.1", true), ("n-3.x", "c.7", false)]
                .map(|(node, epoch, done)| (node.to_owned(), Mark { epoch: epoch.to_owned(), done }))
                .into(),
            released: true,
        };
        let subnets = ["192.0.2.0/24", "2001:db8::/64"].map(|net| net.parse().unwrap()).into();
        let says = Statement {
            duration: 10_000,
            subnets,
            instance: "pod".to_owned(),
            ours: Some(ours),
            revoked: Some("n9".into()),
            odd: None,
        };
        let texts = says.encode().into_iter().filter_map(|(key, text)| Some((key.to_owned(), text?))).collect();
        assert_eq!(Statement::parse(&texts, 10), says);
        assert_eq!(texts[SUBNETS], "192.0.2.0/24,2001:db8::/64");
        assert_eq!(
            Statement::default().encode()[SUBNETS].as_deref(),
            Some(""),
            "PureLB's reader sees a list with nothing"
        );
    }

    #[test]
    fn purelbs_own_and_garbage() {
        let says = read(&[(SUBNETS, "192.0.2.7/24,x,,10.0.0.0/33"), (INSTANCE, "pod")]);
        assert_eq!((says.subnets.len(), says.ours.is_none(), says.is_over()), (1, true, false));
        assert!(says.covers("192.0.2.200".parse().unwrap()));
        let many: Vec<_> = (0..10_000).map(|i| format!("10.{}.{}.0/24", i / 256, i % 256)).collect();
        assert_eq!(read(&[(SUBNETS, &many.join(","))]).subnets.len(), MOST_SUBNETS);
        let says =
            read(&[(SESSION, "p/s"), (EPOCH, ""), (CLAIMS, "1.2.3,,"), (YIELD, "=,~,a,a=,=b,c~d"), (RELEASED, "no")]);
        let ours = says.ours.clone().unwrap();
        assert_eq!((ours.claims.len(), ours.yields.len(), says.is_over()), (0, 1, false));
        assert_eq!(Statement::parse(&BTreeMap::new(), -5).duration, SHORTEST);
    }

    #[test]
    fn what_is_odd_is_said() {
        let odd = |pairs: &[(&str, &str)]| read(pairs).odd.unwrap_or_default();
        assert_eq!(odd(&[(SUBNETS, "192.0.2.0/24, 2001:db8::/64,")]), "");
        assert!(odd(&[(SUBNETS, "192.0.2.0/24,{\"x\"}")]).contains("{\\\"x\\\"}"));
        assert!(odd(&[(SUBNETS, &vec!["10.0.0.0/8"; 300].join(","))]).contains("300 networks"));
        for (seconds, word) in [(-5, "0 s"), (1, "1 s"), (2, ""), (86_400, ""), (i32::MAX, "24855 days")] {
            let said = Statement::parse(&BTreeMap::new(), seconds).odd.unwrap_or_default();
            assert!(said.contains(word) && said.is_empty() == word.is_empty(), "{seconds}: {said}");
        }
    }

    /// What we repeat in our own Lease says nothing there that we did not say.
    #[test]
    fn an_epoch_forges_no_mark() {
        for epoch in ["x,n2=b.1", &"x".repeat(200_000)] {
            let says = read(&[(SESSION, "p/s"), (EPOCH, epoch)]);
            let heard = says.ours.unwrap().epoch;
            let mark = Mark { epoch: heard, done: true };
            let ours = Ours { yields: [("n1".to_owned(), mark)].into(), ..Ours::default() };
            let written = Statement { ours: Some(ours), ..Statement::default() }.encode();
            assert!(says.odd.is_some() && !written[YIELD].as_ref().unwrap().contains("n2"), "{written:?}");
            assert!(written[YIELD].as_ref().unwrap().len() < 200);
        }
    }
}
