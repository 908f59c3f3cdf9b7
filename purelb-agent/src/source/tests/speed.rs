//! 5,000 Services with 3 endpoints, a file each: run by `cargo test --release -p purelb-agent speed -- --ignored --nocapture`.

use std::time::Instant;

use super::*;

#[test]
#[ignore = "figures of a release build"]
fn speed() {
    let mut case = Case::new();
    let text = |n: usize, last: usize| {
        let vip = format!("203.{}.{}.1", n / 250, n % 250);
        let name = format!("web-{n:04}");
        let e = |i: usize| {
            format!(
                "{{addresses: [10.{}.{}.{i}], nodeName: node1, conditions: {{ready: true, serving: true}}}}",
                n / 250,
                n % 250
            )
        };
        let slice = slice_with(&format!("{name}-a"), &name, &[e(1), e(2), e(last)].join(", "));
        format!("{}---\n{slice}", service(&name, &vip))
    };
    for n in 0..5000 {
        case.write(&format!("web-{n:04}.yaml"), &text(n, 3));
    }
    let resident = || {
        let statm = fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4 / 1024
    };
    let before = resident();
    let start = Instant::now();
    assert_eq!(case.all().len(), 5000);
    println!("cold read {:?}, {} MiB more", start.elapsed(), resident() - before);
    case.is_fine();
    let start = Instant::now();
    assert!(case.all().is_empty());
    println!("poll {:?}", start.elapsed());
    let mut times = Vec::new();
    for n in 0..200 {
        let name = format!("web-{:04}.yaml", n * 17);
        case.write(&name, &text(n * 17, 4 + n));
        let start = Instant::now();
        assert_eq!(case.named(&[&name]).len(), 1);
        assert!(case.problems().is_empty());
        times.push(start.elapsed());
    }
    times.sort();
    println!("one change {:?}, worst {:?}", times[100], times[199]);
}
