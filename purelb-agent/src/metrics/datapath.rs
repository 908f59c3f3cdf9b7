//! Metrics of the data path, read from the pinned maps when they are asked for: what is gone there is gone here.

use std::fmt;
use std::path::{Path, PathBuf};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::bpf::{BpfError, Maps};
use crate::commands::live::{Live, protocol_name};
use crate::commands::reason::action;

/// Of one bpf root.
#[derive(Debug)]
pub struct DataPath(PathBuf);

/// A series: labels and value.
type Series = (Vec<(&'static str, String)>, u64);

impl DataPath {
    /// Reads nothing yet.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self(root.to_owned())
    }

    fn reasons(&self, maps: &Maps) -> Result<Vec<Series>, BpfError> {
        let labels = |reason: purelb_common::verdict::Reason| {
            vec![("reason", reason.name().to_owned()), ("action", action(reason).to_owned())]
        };
        Ok(maps.reasons()?.into_iter().map(|(reason, packets)| (labels(reason), packets)).collect())
    }
}

impl Collector for DataPath {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        // Before the agent has pinned them there are none.
        let Ok(maps) = Maps::open(&self.0) else { return Ok(()) };
        if let Ok(reasons) = self.reasons(&maps) {
            counters(&mut encoder, "datapath_packets", "Packets by the reason for which they left", &reasons)?;
        }
        let Ok(live) = Live::read(&self.0, &maps) else { return Ok(()) };
        let mut services = Vec::new();
        for (frontend, service) in &live.observed.services {
            let Ok(stats) = maps.stats(service.id) else { continue };
            let labels = vec![
                ("service", live.service_name(frontend)),
                ("vip", frontend.vip.to_string()),
                ("port", frontend.port.to_string()),
                ("protocol", protocol_name(frontend.protocol).to_owned()),
            ];
            services.push((labels, stats));
        }
        let of = |value: fn(&purelb_common::table::Stats) -> u64| -> Vec<Series> {
            services.iter().map(|(labels, stats)| (labels.clone(), value(stats))).collect()
        };
        counters(&mut encoder, "datapath_service_packets", "Packets to a VIP's port", &of(|s| s.packets))?;
        counters(&mut encoder, "datapath_service_bytes", "Bytes to a VIP's port", &of(|s| s.bytes))?;
        counters(&mut encoder, "datapath_service_new_flows", "New flows to a VIP's port", &of(|s| s.new_flows))?;
        counters(
            &mut encoder,
            "datapath_service_drops",
            "Packets to a VIP's port that were dropped",
            &of(|s| s.drops),
        )?;
        let endpoints = i64::try_from(live.observed.endpoints.len()).unwrap_or(i64::MAX);
        let gauge = ConstGauge::new(endpoints);
        gauge.encode(encoder.encode_descriptor(
            "datapath_endpoints",
            "Endpoints in the tables",
            None,
            gauge.metric_type(),
        )?)
    }
}

fn counters(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, series: &[Series]) -> Result<(), fmt::Error> {
    let kind = ConstCounter::new(0_u64).metric_type();
    let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
    for (labels, value) in series {
        let labels: Vec<(&str, &str)> = labels.iter().map(|(key, value)| (*key, value.as_str())).collect();
        ConstCounter::new(*value).encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}
