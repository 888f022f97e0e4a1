//! Streams over made-up readings, in made-up time: each reading's `at_ns` is how many had been made before it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use accounting::Reading;
use accounting::disturbance::Disturbance;
use accounting::reading::Histograms;
use axum::Router;
use axum::extract::Request;
use http_body_util::BodyExt;
use tower::ServiceExt;
use vmm::Action;

use tokio::time::Instant;

use super::sampler::{GROUP, room};
use super::*;
use crate::backend::{Answer, fake};
use crate::routes::{Limits, STREAM, router};

#[derive(Debug, Default)]
struct Counted {
    vcpus: AtomicUsize,
    readings: AtomicU64,
}

impl Backend for Counted {
    fn send(&self, _: Action, _: Answer) {
        panic!("a stream is nothing to the VMM thread");
    }

    fn vcpus(&self) -> usize {
        self.vcpus.load(Relaxed)
    }

    fn read(&self, index: usize) -> Option<Reading> {
        let at_ns = self.readings.fetch_add(1, Relaxed);
        let index = u32::try_from(index).unwrap();
        Some(Reading {
            at_ns,
            ..fake::reading(index)
        })
    }

    fn explain(&self, _: usize) -> Option<accounting::Explained> {
        None
    }

    fn histograms(&self, _: usize) -> Option<Histograms> {
        None
    }

    fn disturbances(&self, _: usize) -> Vec<Disturbance> {
        Vec::new()
    }
}

struct Served {
    backend: Arc<Counted>,
    shared: Shared,
    router: Router,
}

impl Served {
    fn with(vcpus: usize) -> Self {
        let backend = Arc::new(Counted::default());
        backend.vcpus.store(vcpus, Relaxed);
        let shared = Shared::new(backend.clone(), || {});
        let router = router(shared.clone(), Limits::default());
        Self {
            backend,
            shared,
            router,
        }
    }

    async fn get(&self, path: &str) -> Response {
        let request = Request::get(path).body(Body::empty()).unwrap();
        self.router.clone().oneshot(request).await.unwrap()
    }

    async fn listen(&self, interval_ms: u64) -> Body {
        let response = self.get(&format!("{STREAM}?interval_ms={interval_ms}")).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()[header::CONTENT_TYPE], "text/event-stream");
        response.into_body()
    }

    fn readings(&self) -> u64 {
        self.backend.readings.load(Relaxed)
    }
}

/// What comes next, still on its way; `None` once there is nothing more to come.
async fn frame(body: &mut Body) -> Option<Bytes> {
    let frame = body.frame().await?;
    Some(frame.unwrap().into_data().unwrap())
}

/// The readings of a message, which has been sent by then.
async fn readings(body: &mut Body) -> Vec<Reading> {
    parse(&frame(body).await.expect("it goes on"))
}

/// The readings of a message.
fn parse(message: &Bytes) -> Vec<Reading> {
    let message = std::str::from_utf8(message).unwrap();
    let events = message.strip_suffix("\n\n").expect("whole events").split("\n\n");
    let reading = |event: &str| {
        let data = event.strip_prefix("event: reading\ndata: ").expect(event);
        serde_json::from_str(data).unwrap()
    };
    events.map(reading).collect()
}

/// Lets all that can run do so, without any time passing.
async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

/// Whether nothing comes for now.
async fn nothing_comes(body: &mut Body) -> bool {
    settle().await;
    let mut frame = std::pin::pin!(body.frame());
    std::future::poll_fn(|context| Poll::Ready(frame.as_mut().poll(context).is_pending())).await
}

#[tokio::test(start_paused = true)]
async fn there_is_an_event_for_each_vcpu_at_once_and_at_each_interval() {
    let served = Served::with(3);
    let (mut body, begin) = (served.listen(250).await, Instant::now());
    for after in 0..4 {
        let readings = readings(&mut body).await;
        assert_eq!(
            readings.iter().map(|reading| reading.index).collect::<Vec<_>>(),
            [0, 1, 2]
        );
        assert_eq!(begin.elapsed(), Duration::from_millis(250 * after));
    }
}

#[tokio::test(start_paused = true)]
async fn a_second_is_the_interval_unless_told_otherwise() {
    let served = Served::with(1);
    let (mut body, begin) = (served.get(STREAM).await.into_body(), Instant::now());
    readings(&mut body).await;
    readings(&mut body).await;
    assert_eq!(begin.elapsed(), Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn however_many_listen_the_vcpus_are_read_once_an_interval() {
    let served = Served::with(2);
    let mut bodies = Vec::new();
    for _ in 0..100 {
        let mut body = served.listen(10).await;
        readings(&mut body).await;
        bodies.push(body);
    }
    let before = served.readings();
    assert_eq!(before, 2 * 100, "each was told at once how it is");
    for tick in 0..50 {
        for body in &mut bodies {
            assert_eq!(readings(body).await[0].at_ns, before + 2 * tick);
        }
    }
    assert_eq!(served.readings(), before + 2 * 50);
}

#[tokio::test(start_paused = true)]
async fn a_request_waits_for_one_group_of_clients_and_not_for_all() {
    const CLIENTS: usize = 6 * GROUP;
    let served = Served::with(1);
    let told = Arc::new(AtomicUsize::new(0));
    for _ in 0..CLIENTS {
        let (mut body, told) = (served.listen(10).await, told.clone());
        tokio::spawn(async move {
            loop {
                readings(&mut body).await;
                told.fetch_add(1, Relaxed);
            }
        });
    }
    settle().await;
    assert_eq!(told.load(Relaxed), CLIENTS);
    tokio::time::advance(Duration::from_millis(10)).await;
    // Whoever is ready runs once before anybody runs again.
    let (mut before, mut most) = (CLIENTS, 0);
    while before < 2 * CLIENTS {
        tokio::task::yield_now().await;
        let now = told.load(Relaxed);
        most = most.max(now - before);
        before = now;
    }
    assert_eq!(most, GROUP);
}

#[tokio::test(start_paused = true)]
async fn nobody_is_read_for_once_nobody_listens() {
    let served = Served::with(1);
    let mut body = served.listen(10).await;
    readings(&mut body).await;
    readings(&mut body).await;
    drop(body);
    let before = served.readings();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(served.readings(), before);
    assert!(served.shared.streams.are_idle());
    // And it is begun again for the next one.
    let mut body = served.listen(10).await;
    readings(&mut body).await;
    readings(&mut body).await;
}

#[tokio::test(start_paused = true)]
async fn who_is_slow_skips_readings_and_gets_the_latest_when_ready() {
    let served = Served::with(1);
    let mut slow = served.listen(10).await;
    let first = frame(&mut slow).await.unwrap();
    // The client takes no more than the first bytes: hyper holds the rest, and asks for more at every turn.
    let held = first.slice(20..);
    drop(first);
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert!(nothing_comes(&mut slow).await, "queued while the last was on its way");
    }
    drop(held);
    let latest = readings(&mut slow).await;
    assert_eq!(latest[0].at_ns + 1, served.readings(), "not the latest");
    assert!(nothing_comes(&mut slow).await, "more than one was kept for it");
}

#[tokio::test(start_paused = true)]
async fn who_is_slow_is_told_as_soon_as_it_is_ready() {
    let served = Served::with(1);
    let mut slow = served.listen(60_000).await;
    let held = frame(&mut slow).await;
    let latest = tokio::spawn(async move { (readings(&mut slow).await, Instant::now()) });
    tokio::time::sleep(Duration::from_secs(90)).await;
    let ready = Instant::now();
    drop(held);
    let told = tokio::time::timeout(Duration::from_secs(3600), latest).await;
    let (latest, told) = told.expect("it is never told").unwrap();
    assert_eq!((latest[0].at_ns, told), (1, ready));
}

#[tokio::test(start_paused = true)]
async fn before_the_start_there_are_comments_and_readings_follow() {
    let served = Served::with(0);
    let mut body = served.listen(1000).await;
    let begin = Instant::now();
    for after in [0, 15, 30] {
        let comment = frame(&mut body).await.unwrap();
        assert!(comment.starts_with(b":") && comment.ends_with(b"\n\n"), "{comment:?}");
        assert_eq!(begin.elapsed(), Duration::from_secs(after));
    }
    // The look of this instant.
    settle().await;
    served.backend.vcpus.store(2, Relaxed);
    assert_eq!(readings(&mut body).await.len(), 2);
    assert_eq!(begin.elapsed(), Duration::from_secs(31));
}

#[tokio::test(start_paused = true)]
async fn a_client_of_a_long_interval_hears_a_comment_in_between_and_one_that_does_not_read_none() {
    let served = Served::with(1);
    let (mut body, begin) = (served.listen(50_000).await, Instant::now());
    let mut deaf = served.listen(50_000).await;
    let _held = frame(&mut deaf).await;
    readings(&mut body).await;
    for after in [15, 30, 45] {
        let comment = frame(&mut body).await.unwrap();
        assert!(comment.starts_with(b":") && comment.ends_with(b"\n\n"), "{comment:?}");
        assert_eq!(begin.elapsed(), Duration::from_secs(after));
        assert!(nothing_comes(&mut deaf).await);
    }
    // A reading in time is word enough.
    readings(&mut body).await;
    assert_eq!(begin.elapsed(), Duration::from_secs(50));
    let mut often = served.listen(10_000).await;
    for _ in 0..5 {
        readings(&mut often).await;
    }
}

#[tokio::test(start_paused = true)]
async fn at_the_end_who_has_got_all_is_told_so_and_who_has_not_is_cut_off() {
    let served = Served::with(1);
    let (mut ready, mut slow) = (served.listen(10).await, served.listen(10).await);
    readings(&mut ready).await;
    let _held = frame(&mut slow).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(nothing_comes(&mut slow).await);
    served.shared.end_streams();
    readings(&mut ready).await;
    assert!(frame(&mut ready).await.is_none());
    assert!(slow.frame().await.unwrap().is_err());
    let mut late = served.listen(10).await;
    readings(&mut late).await;
    assert!(frame(&mut late).await.is_none(), "a stream begun after the end");
}

#[tokio::test(start_paused = true)]
async fn one_client_too_many_is_told_so_and_requests_are_served_on() {
    let served = Served::with(1);
    let mut bodies = Vec::new();
    for _ in 0..room() {
        bodies.push(served.listen(1000).await);
    }
    let refused = served.get(STREAM).await;
    assert_eq!(refused.status(), 503);
    let said = refused.into_body().collect().await.unwrap().to_bytes();
    assert!(said.starts_with(b"{\"fault_message\":\"Too many clients"), "{said:?}");
    assert_eq!(served.get("/vcpus/0/cputime").await.status(), 200);
    bodies.pop();
    bodies.push(served.listen(1000).await);
}
