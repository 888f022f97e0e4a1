//! `GET /ui` in a browser, headless Chromium: what it draws of a running guest, what its tables say, and what it says when
//! there is nothing to draw.

use std::net::TcpListener;
use std::path::Path;

use accounting::Reading;
use accounting::reading::Modes;
use serde_json::{Value, json};
use tests::bed::{self, Folder};
use tests::browser::{Browser, chromium};
use tests::client;
use tests::flat::{Program, elf};
use tests::require_bed;
use tests::vm::{Process, Vm};

/// Ends the calling test, in one line that is counted, unless it can run here.
macro_rules! require_browser {
    () => {
        require_bed!(kvm);
        if let Err(why) = chromium() {
            bed::skipped("kvm", &why);
            return;
        }
    };
}

/// An address on loopback on which nobody listens.
fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").to_string()
}

/// What the tables of one vCPU say, in the page's own words, and what is drawn.
const TABLES: &str = r#"
(() => [...document.querySelectorAll("article")].map(vcpu => {
    const cells = row => [...row.querySelectorAll("td")];
    const figure = row => ({ ns: cells(row)[0].dataset.ns, text: cells(row)[0].textContent });
    const of = selector => figure(vcpu.querySelector(selector));
    return {
        name: vcpu.querySelector("h2").textContent,
        modes: Object.fromEntries([...vcpu.querySelectorAll(".modes tbody tr")].map(row => [row.dataset.name, figure(row)])),
        sum: of(".sum"), elapsed: of(".elapsed"), lower: of(".lower"), upper: of(".upper"),
        utime: of(".utime"), stime: of(".stime"),
        exits: Object.fromEntries([...vcpu.querySelectorAll(".exits tbody tr")].map(row => [row.dataset.name, cells(row)[2].dataset.count])),
        all_exits: vcpu.querySelector(".exits tfoot td:last-child").dataset.count,
        columns: Number(vcpu.querySelector(".time").dataset.columns),
        area: vcpu.querySelector(".time path.guest").getAttribute("d"),
        band: vcpu.querySelector(".band path").getAttribute("d"),
    };
}))()
"#;

/// A figure in nanoseconds, as a program reads it from the page; what people read is the same, to the last digit.
fn ns(figure: &Value) -> u64 {
    let ns = figure["ns"].as_str().expect("a figure");
    let (whole, decimals) = figure["text"]
        .as_str()
        .and_then(|t| t.split_once('.'))
        .expect("seconds");
    assert_eq!(decimals.len(), 9, "{figure}");
    let ns: u64 = ns.parse().expect("nanoseconds");
    assert_eq!(format!("{whole}{decimals}").parse(), Ok(ns), "{figure}");
    ns
}

/// The table's modes.
fn modes_of(table: &Value) -> Modes {
    let names = [
        "guest",
        "host_user",
        "host_kernel",
        "halted",
        "waiting",
        "blocked",
        "paused",
    ];
    Modes::from_array(names.map(|name| ns(&table["modes"][name])))
}

/// The table is of an instant between the two readings: each total is between theirs, and the sum is exact.
fn assert_between(before: &Reading, table: &Value, after: &Reading) {
    let told = modes_of(table);
    assert_eq!(told.sum_ns(), ns(&table["elapsed"]), "{table:#}");
    assert_eq!(told.sum_ns(), ns(&table["sum"]), "{table:#}");
    assert_eq!(ns(&table["utime"]), told.guest_ns + told.host_user_ns, "{table:#}");
    assert_eq!(ns(&table["stime"]), told.host_kernel_ns, "{table:#}");
    let figures = |reading: &Reading| {
        let (modes, bounds) = (reading.modes.to_array(), reading.gtime_bounds_ns);
        let others = [reading.elapsed_ns, bounds.lower, bounds.upper, reading.exits.total];
        modes.into_iter().chain(others).collect::<Vec<_>>()
    };
    let count = |value: &Value| value.as_str().and_then(|count| count.parse().ok()).expect("a count");
    let others = [
        ns(&table["elapsed"]),
        ns(&table["lower"]),
        ns(&table["upper"]),
        count(&table["all_exits"]),
    ];
    let told = told.to_array().into_iter().chain(others);
    for ((before, told), after) in figures(before).into_iter().zip(told).zip(figures(after)) {
        assert!(before <= told && told <= after, "{before} {told} {after}: {table:#}");
    }
    let by_reason = table["exits"].as_object().expect("exits by reason");
    assert_eq!(
        by_reason.values().map(count).sum::<u64>(),
        count(&table["all_exits"]),
        "{table:#}"
    );
}

#[test]
fn the_page_draws_a_running_guest_and_its_tables_say_what_the_api_says() {
    require_browser!();
    let address = free_address();
    let mut vm = Vm::flat(
        &Program::by_turns(),
        ["--cpus=2", "--pin=none", "--api-listen", &address],
    );
    let mut browser = Browser::start();
    browser.open(&format!("http://{address}/ui"));
    browser.wait_until("vcpus.length === 2 && vcpus.every(vcpu => vcpu.time.dataset.columns >= 2)");
    let drawn = browser.evaluate(TABLES);

    let before = vm.readings();
    // All that it shows is of a later reading than these.
    for reading in &before {
        let later = format!("vcpus[{}].last.at_ns > {}n", reading.index, reading.at_ns);
        browser.wait_until(&later);
    }
    browser.evaluate("new Promise(requestAnimationFrame)");
    let tables = browser.evaluate(TABLES);
    let after = vm.readings();
    for (index, (before, after)) in before.iter().zip(&after).enumerate() {
        let (table, was) = (&tables[index], &drawn[index]);
        assert_eq!(table["name"], format!("vCPU {index}"));
        assert_between(before, table, after);
        assert!(table["columns"].as_u64() > was["columns"].as_u64(), "{was:#} {table:#}");
        assert!(table["band"] != was["band"], "{was:#} {table:#}");
    }
    // The other vCPU waits for the first one to start it, all of its time.
    assert!(tables[0]["area"] != drawn[0]["area"], "{drawn:#} {tables:#}");

    let status = browser.evaluate("document.getElementById('status').textContent");
    assert_eq!(status, "Live. A reading every 500 ms.");
    assert_eq!(browser.errors(), [""; 0]);
}

#[test]
fn every_picture_has_its_table_and_32_vcpus_and_27_years_fit_a_phone() {
    require_browser!();
    let address = free_address();
    let mut vm = Vm::flat(
        &Program::by_turns(),
        ["--cpus=32", "--pin=none", "--api-listen", &address],
    );
    let mut browser = Browser::start();
    browser.screen(360, 740, 2.0, true);
    browser.open(&format!("http://{address}/ui"));
    browser.wait_until("vcpus.length === 32 && vcpus.every(vcpu => vcpu.time.dataset.columns >= 1)");
    assert_eq!(browser.evaluate("document.documentElement.scrollWidth"), 360);
    for (what, wrong) in [
        ("tables without a caption", "table:not(:has(> caption))"),
        ("heads that are of no row and no column", "th:not([scope])"),
        (
            "pictures that neither have a name nor are passed over",
            "svg:not([role=img][aria-label], [aria-hidden=true])",
        ),
    ] {
        let found = browser.evaluate(&format!("document.querySelectorAll({wrong:?}).length"));
        assert_eq!(found, 0, "{what}");
    }
    for (ns, said) in [
        ("0", "0 ns"),
        ("812", "812 ns"),
        ("999600", "1 ms"),
        ("12345678901", "12.3 s"),
        ("1200e9", "20 min"),
        ("90061e9", "1 d 1 h"),
        ("86461e9", "1 d"),
    ] {
        assert_eq!(browser.evaluate(&format!("span({ns})")), said, "{ns} ns");
    }
    // Another microVM at the same address, and ten thousand days in each mode but one.
    browser.evaluate("document.getElementById('hold').click()");
    let mut reading = vm.reading();
    let old_ns = 10_000 * 24 * 3600 * 1_000_000_000;
    reading.tid += 1;
    reading.elapsed_ns += 6 * old_ns;
    let modes = &mut reading.modes;
    let each = [
        &mut modes.guest_ns,
        &mut modes.host_user_ns,
        &mut modes.host_kernel_ns,
        &mut modes.halted_ns,
        &mut modes.waiting_ns,
        &mut modes.blocked_ns,
    ];
    each.into_iter().for_each(|mode| *mode += old_ns);
    let json = serde_json::to_string(&reading).expect("JSON");
    browser.evaluate(&format!("take(parse({json:?})); new Promise(requestAnimationFrame)"));
    let tables = browser.evaluate(TABLES);
    assert_eq!(
        tables.as_array().map(Vec::len),
        Some(1),
        "the others were the other microVM's"
    );
    // Beyond 2^53, where a float counts by twos and fours.
    assert!(old_ns > 1 << 53);
    assert_eq!(modes_of(&tables[0]), reading.modes);
    assert_eq!(
        [&tables[0]["sum"], &tables[0]["elapsed"]].map(ns),
        [reading.elapsed_ns; 2]
    );
    assert_eq!(browser.evaluate("document.documentElement.scrollWidth"), 360);
    assert_eq!(browser.errors(), [""; 0]);
}

#[test]
fn the_page_says_why_there_is_nothing_to_draw_and_goes_on_when_there_is() {
    require_browser!();
    let address = free_address();
    let folder = Folder::new();
    let kernel = folder.write("kernel", elf(&Program::spin_forever()));
    let said = |what: &str| format!("document.getElementById('status').textContent.startsWith({what:?})");
    let mut browser = Browser::start();
    let mut first = true;
    for id in ["one", "another"] {
        let socket = folder.join(id);
        let server = [
            Path::new("--api-sock"),
            &socket,
            Path::new("--api-listen"),
            Path::new(&address),
            Path::new("--id"),
            Path::new(id),
        ];
        let process = Process::chronovisor(server);
        let ask =
            |method: &str, path: &str, body: Value| client::request(&socket, method, path, Some(&body.to_string()));
        while client::request(&socket, "GET", "/", None).is_err() {
            std::thread::yield_now();
        }
        if first {
            browser.open(&format!("http://{address}/ui"));
        }
        browser.wait_until(&said("Not started yet"));
        assert_eq!(browser.evaluate("document.getElementById('vm').textContent"), id);
        assert_eq!(browser.evaluate("document.querySelectorAll('article').length"), 0);

        for (path, body) in [
            ("/boot-source", json!({ "kernel_image_path": kernel })),
            ("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 16 })),
            ("/actions", json!({ "action_type": "InstanceStart" })),
        ] {
            let answer = ask("PUT", path, body).expect("an answer");
            assert_eq!(answer.status, 204, "{path}: {answer:?}");
        }
        browser.wait_until(&said("Live"));
        browser.wait_until("vcpus[0].time.dataset.columns >= 1");
        assert_eq!(
            ask("PATCH", "/vm", json!({ "state": "Paused" }))
                .expect("an answer")
                .status,
            204
        );
        browser.wait_until(&said("Paused by request"));
        if first {
            // Up to here nothing went wrong, and nothing is to be complained of.
            assert_eq!(browser.errors(), [""; 0]);
        }
        let last = browser.evaluate("vcpus[0].find('.elapsed td').textContent");
        drop(process);
        browser.wait_until(&said("Connection lost"));
        // Its last figures are still there, and said to be.
        assert!(browser.evaluate("document.querySelectorAll('.stale article').length") == 1);
        assert!(browser.evaluate("vcpus[0].find('.elapsed td').textContent").as_str() >= last.as_str());
        first = false;
    }
}

#[test]
fn who_holds_the_page_reads_nothing_until_it_is_let_go() {
    require_browser!();
    let address = free_address();
    let _vm = Vm::flat(&Program::spin_forever(), ["--api-listen", &address]);
    let mut browser = Browser::start();
    browser.open(&format!("http://{address}/ui"));
    browser.wait_until("vcpus.length === 1 && vcpus[0].time.dataset.columns >= 1");
    browser.evaluate("document.getElementById('hold').click()");
    assert_eq!(browser.evaluate("stream"), Value::Null);
    let held = browser.evaluate("String(vcpus[0].last.at_ns)");
    assert_eq!(
        browser.evaluate("document.getElementById('hold').getAttribute('aria-pressed')"),
        "true"
    );
    browser.evaluate("document.getElementById('hold').click()");
    browser.wait_until(&format!("vcpus[0].last.at_ns > {}n", held.as_str().expect("digits")));
    // What passed meanwhile is in the picture: each column begins where the one before ends.
    assert_eq!(
        browser.evaluate("vcpus[0].samples.every((s, i, all) => i === 0 || s.from === all[i - 1].at)"),
        true
    );
    assert_eq!(browser.errors(), [""; 0]);
}
