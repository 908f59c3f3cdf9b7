//! Arbitrary bytes as a file of manifests: parsed, converted, planned, allocated from, beside a good Service.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use purelb_agent::source::claim::Home;
use purelb_agent::source::convert::Whose;
use purelb_agent::source::parse::{Found, object, parse};
use purelb_fuzz::laws;
use purelb_fuzz::objects::{GOOD, Shelf, converted, good, is_good};
use purelb_plan::apply::Twin;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = str::from_utf8(data) else { return };
    let parsed = parse("f.yaml", text);
    assert!(parsed.problems.iter().all(|p| !p.object.is_empty() && !p.message.is_empty()), "{:?}", parsed.problems);
    let mut shelf = Shelf { objects: parsed.objects, ..Shelf::default() };
    shelf.objects.retain(|key, _| !key.1.starts_with(GOOD));
    for (kind, value) in good() {
        let key = (kind, format!("{GOOD}/{}", value["metadata"]["name"].as_str().unwrap_or_default()));
        let object = object(kind, value).expect("the good object can be read");
        shelf.objects.insert(key, Arc::new(Found { object, origin: "good".to_owned() }));
    }
    let converter = converted(&shelf, Whose::OfClass);
    is_good(converter.world());
    let mut twin = Twin::new(1 << 17);
    laws::come_to_rest(converter.world(), &mut twin, 100);
    laws::allocate(&shelf, Home::Folder, [].into());
});
