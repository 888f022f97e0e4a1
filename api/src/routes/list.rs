//! Every path, each method of it, and who answers: a row a route, and nowhere else.
//!
//! The router is made of these rows; the table of tests (`table.txt`) must have rows of its own for each; and the document
//! (`resources/openapi.json`) describes those that are offered: in the words above the row, with the types that the handler
//! reads (`takes`; `may_take` where the body may be left out; `asks` what follows the question mark) and writes (`answers`
//! JSON of a type, or `says` text of a media type; neither: 204), and `or` another status than 400 of a refusal.

use axum::Router;
use axum::routing::{MethodFilter, on};

use super::{
    Shared, actions, balloon, devices, drives, host, interfaces, machine, metrics, mmds, openapi, outputs, stream, ui,
    unsupported, vcpus, vm,
};

macro_rules! routes {
    (
        offered {$(
            $(#[doc = $doc:literal])+
            $method:ident $path:literal => $handler:path
                $(, takes $body:ty)? $(, may_take $option:ty)? $(, asks $query:ty)?
                $(, answers $answer:ty)? $(, says $media:literal)? $(, or $status:literal)?;
        )+}
        refused {$(
            $refused_method:ident $refused_path:literal => $refused_handler:path;
        )+}
    ) => {
        /// With all routes.
        pub(super) fn add_to(router: Router<Shared>) -> Router<Shared> {
            router
                $(.route($path, on(MethodFilter::$method, $handler)))+
                $(.route($refused_path, on(MethodFilter::$refused_method, $refused_handler)))+
        }

        /// The method and path of each route that is offered.
        #[cfg(test)]
        pub(super) const OFFERED: &[(&str, &str)] = &[$((stringify!($method), $path)),+];

        /// What is read and written by each of [`OFFERED`], in that order.
        #[cfg(test)]
        pub(super) fn described() -> Vec<Described> {
            vec![$(Described {
                method: stringify!($method),
                path: $path,
                words: &[$($doc),+],
                body: None$(.or(Some((of::<$body> as Shape, true))))?$(.or(Some((of::<$option> as Shape, false))))?,
                query: None$(.or(Some(of::<$query> as Shape)))?,
                answer: None$(.or(Some(of::<$answer> as Shape)))?,
                media: None$(.or(Some($media)))?,
                refusals: &[400 $(, $status)?],
            }),+]
        }

        /// The method and path of each route that only says what is wrong with the request.
        #[cfg(test)]
        pub(super) const REFUSED: &[(&str, &str)] = &[$((stringify!($refused_method), $refused_path)),+];
    };
}

/// Says what a type looks like as JSON.
#[cfg(test)]
pub(super) type Shape = fn(&mut schemars::SchemaGenerator) -> schemars::Schema;

#[cfg(test)]
fn of<T: schemars::JsonSchema>(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
    generator.subschema_for::<T>()
}

/// A route that is offered, as its row says.
#[cfg(test)]
pub(super) struct Described {
    pub method: &'static str,
    pub path: &'static str,
    /// The words above it, a line each.
    pub words: &'static [&'static str],
    /// What it reads, and whether it must be there.
    pub body: Option<(Shape, bool)>,
    /// What it reads behind the question mark.
    pub query: Option<Shape>,
    /// What it writes as JSON.
    pub answer: Option<Shape>,
    /// What it writes that is not JSON.
    pub media: Option<&'static str>,
    /// Statuses of its refusals.
    pub refusals: &'static [u16],
}

routes! {
    offered {
        /// What this microVM is, and whether it runs.
        GET "/" => vm::info, answers vmm::Info;
        /// The version of Firecracker whose API this is, and our own.
        GET "/version" => vm::version, answers vm::Version;
        /// All that is configured, but for `/cpu-config`, metadata and where vCPUs are.
        ///
        /// As a `--config-file` it makes another such microVM.
        GET "/vm/config" => vm::config, answers vmm::config::VmConfig;
        /// Pauses the guest, or lets it go on. After the start.
        PATCH "/vm" => vm::patch_state, takes vm::Vm;
        /// Starts the guest; after that presses Ctrl-Alt-Del, by which Linux shuts down, or writes a line of metrics.
        PUT "/actions" => actions::put, takes actions::ActionBody;

        /// The machine.
        GET "/machine-config" => machine::get, answers vmm::config::MachineConfig;
        /// Sets the machine. Before the start.
        PUT "/machine-config" => machine::put, takes vmm::config::MachineConfig;
        /// Changes what is named of the machine, which is one field at least. Before the start.
        PATCH "/machine-config" => machine::patch, takes vmm::config::MachineConfigUpdate;
        /// Sets what is booted. Before the start.
        PUT "/boot-source" => machine::put_boot_source, takes vmm::config::BootSource;
        /// Changes the processor that the guest sees; an empty object takes it back. Before the start.
        PUT "/cpu-config" => machine::put_cpu_config, takes vmm::config::CpuConfig;

        /// Adds a drive, or puts it in the place of that of its id. Before the start.
        PUT "/drives/{id}" => drives::put, takes vmm::config::Drive;
        /// Puts another file behind a drive, or other limits on it. After the start.
        PATCH "/drives/{id}" => drives::patch, takes vmm::config::DriveUpdate;
        /// Adds a network interface, or puts it in the place of that of its id. Before the start.
        PUT "/network-interfaces/{id}" => interfaces::put, takes vmm::config::NetworkInterface;
        /// Puts other limits on a network interface. After the start.
        PATCH "/network-interfaces/{id}" => interfaces::patch, takes vmm::config::NetworkInterfaceUpdate;
        /// Sets the socket device. Before the start.
        PUT "/vsock" => devices::put_vsock, takes vmm::config::Vsock;
        /// Sets the source of randomness. Before the start.
        PUT "/entropy" => devices::put_entropy, takes vmm::config::Entropy;

        /// The balloon.
        GET "/balloon" => balloon::get, answers vmm::config::Balloon;
        /// Sets the balloon. Before the start.
        PUT "/balloon" => balloon::put, takes vmm::config::Balloon;
        /// Inflates or deflates the balloon. After the start.
        PATCH "/balloon" => balloon::patch, takes vmm::config::BalloonUpdate;
        /// What the guest told last of its memory. After the start, of a balloon with statistics.
        GET "/balloon/statistics" => balloon::statistics, answers vmm::BalloonStats;
        /// Changes how often the guest is asked. After the start, of a balloon with statistics.
        PATCH "/balloon/statistics" => balloon::patch_statistics, takes vmm::config::BalloonStatsUpdate;
        /// Asks the guest which pages are free, and takes them. After the start, of a balloon with hinting.
        PATCH "/balloon/hinting/start" => balloon::start_hinting, may_take vmm::HintingStart;
        /// Lets the guest have the pages again. After the start, of a balloon with hinting.
        ///
        /// What is in the body has no effect.
        PATCH "/balloon/hinting/stop" => balloon::stop_hinting, may_take serde_json::Value;
        /// How far hinting is. After the start, of a balloon with hinting.
        GET "/balloon/hinting/status" => balloon::hinting_status, answers vmm::HintingStatus;

        /// The metadata; an empty object before the first PUT.
        GET "/mmds" => mmds::get, answers serde_json::Value;
        /// Sets the metadata: any JSON.
        PUT "/mmds" => mmds::put, takes serde_json::Value, or 413;
        /// Merges into the metadata (RFC 7396), after the first PUT.
        PATCH "/mmds" => mmds::patch, takes serde_json::Value, or 413;
        /// How the guest reaches the metadata; an empty object where it does not.
        GET "/mmds/config" => mmds::get_config, answers mmds::Answer;
        /// Sets how the guest reaches the metadata. Before the start.
        PUT "/mmds/config" => mmds::put_config, takes vmm::mmds::config::MmdsConfig;

        /// Where the serial port's output goes. Before the start.
        PUT "/serial" => outputs::put_serial, takes vmm::config::Serial;
        /// Where the log goes. Before the start.
        PUT "/logger" => outputs::put_logger, takes vmm::config::Logger;
        /// Where the vCPUs' time went, for Prometheus: text format 0.0.4.
        GET "/metrics" => metrics::get, says "text/plain; version=0.0.4; charset=utf-8";
        /// Where a line of metrics goes each minute. Before the start, once.
        PUT "/metrics" => outputs::put_metrics, takes vmm::config::Metrics;

        /// A reading of each vCPU, in order; none before the start.
        GET "/vcpus" => vcpus::list, answers Vec<accounting::Reading>;
        /// A reading of each vCPU at an interval, as server-sent events: in each, the JSON of a reading.
        ///
        /// A client that is slow gets fewer of them, and none late.
        GET "/vcpus/stream" => stream::stream, asks stream::Asked, says "text/event-stream";
        /// A reading of one vCPU: where its time went, the running slice included. After the start.
        ///
        /// With `explain=1` also what each source claims by itself, and what each probe said.
        GET "/vcpus/{index}/cputime" => vcpus::cputime, asks vcpus::Asked, answers vcpus::Cputime;
        /// How long the vCPU's stays in `KVM_RUN` and the handling of its exits took. After the start.
        GET "/vcpus/{index}/histograms" => vcpus::histograms, answers accounting::reading::Histograms;
        /// Where the vCPU is pinned. After the start.
        GET "/vcpus/{index}/affinity" => vcpus::affinity, answers vmm::affinity::Affinity;
        /// Puts the vCPU on another host CPU, while it runs. After the start.
        PUT "/vcpus/{index}/affinity" => vcpus::put_affinity, takes vmm::affinity::Affinity;
        /// What this host offers, and what disturbs the vCPUs on it now.
        GET "/host" => host::get, answers host::Answer<'_>;

        /// A page that draws where the vCPUs' time goes, for a browser.
        GET "/ui" => ui::page, says "text/html; charset=utf-8";
        /// This document.
        GET "/openapi.json" => openapi::get, answers serde_json::Value;
    }
    refused {
        PUT "/drives" => drives::put;
        PATCH "/drives" => drives::patch;
        PUT "/network-interfaces" => interfaces::put;
        PATCH "/network-interfaces" => interfaces::patch;
        GET "/balloon/{path}" => balloon::get_unknown;
        GET "/balloon/hinting" => balloon::unknown_hinting;
        GET "/balloon/hinting/{path}" => balloon::unknown_hinting;
        GET "/balloon/hinting/start" => balloon::unknown_hinting;
        GET "/balloon/hinting/stop" => balloon::unknown_hinting;
        PATCH "/balloon/hinting" => balloon::unknown_hinting;
        PATCH "/balloon/hinting/{path}" => balloon::unknown_hinting;
        PATCH "/balloon/hinting/status" => balloon::unknown_hinting;
        PUT "/mmds/{path}" => mmds::put_unknown;
        PUT "/snapshot/{what}" => unsupported::snapshots;
        PUT "/pmem/{id}" => unsupported::pmem;
        PATCH "/pmem/{id}" => unsupported::pmem;
        GET "/hotplug/memory" => unsupported::hotplug;
        PUT "/hotplug/memory" => unsupported::hotplug;
        PATCH "/hotplug/memory" => unsupported::hotplug;
    }
}
