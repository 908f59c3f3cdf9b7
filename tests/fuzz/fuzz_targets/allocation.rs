//! Arbitrary ranges, groups, Services and steps into the allocator, under the laws of its own model.
//!
//! Lines up to an empty one are ranges that groups may have, every byte after it is a decision of the model.
#![no_main]

use libfuzzer_sys::fuzz_target;
use purelb_fuzz::chance::Chance;
use purelb_fuzz::model::Model;
use purelb_fuzz::sidecar;
use purelb_plan::alloc::group::Group;
use purelb_plan::alloc::range::Range;
use purelb_plan::observed::Family;

fuzz_target!(|data: &[u8]| {
    let cut = data.windows(2).position(|pair| pair == b"\n\n");
    let (ranges, steps) = cut.map_or((&b""[..], data), |at| (&data[..at], &data[at + 2..]));
    let ranges = String::from_utf8_lossy(ranges);
    let ranges: Vec<String> = ranges.lines().take(8).filter(|text| range(text)).map(str::to_owned).collect();
    let mut model = Model::new(Chance::new(steps), &ranges);
    while !model.chance.is_empty() {
        model.step();
    }
    model.catalog.groups().for_each(sizes);
    model.rest();
});

/// Whether a group may have it: what the model's sidecar hands out would be refused for ever if it were another group's.
fn range(text: &str) -> bool {
    let Ok(range) = Range::parse(text) else { return true };
    assert!(range.size() > 0, "{range} is empty");
    let first = range.first_free(&[]).expect("a range has a first address");
    assert!(range.contains(first));
    let again = Range::parse(&range.to_string());
    assert_eq!(again, Ok(range), "what is written is not read");
    !sidecar::pool(Family::V4).chain(sidecar::pool(Family::V6)).any(|ip| range.contains(ip))
}

fn sizes(group: &Group) {
    for pool in &group.pools {
        let free = pool.range.first_free(&[&group.excluded]);
        assert_eq!(free.is_some(), group.size_of(pool) > 0, "{group:?}");
        assert!(free.is_none_or(|ip| group.pool(ip) == Some(pool)), "{free:?} of another pool");
    }
}
