//! What a stack promises, whatever its guest sends: for those who send what they like.

use std::sync::atomic::Ordering;

use super::*;
use crate::mmds::data::DEFAULT_LIMIT_BYTES;
use crate::mmds::wire::QUEUE_FRAMES;

/// What [`Stack`]'s documentation promises, after any call.
pub(super) fn keeps_its_bounds(stack: &mut Stack, now: Instant) {
    assert!(stack.connections.len() <= MAX_CONNECTIONS);
    for connection in &stack.connections {
        assert!(connection.request.capacity() <= 2 * REQUEST_LIMIT_BYTES);
        assert!(connection.response.capacity() <= DEFAULT_LIMIT_BYTES + 1024);
    }
    assert_eq!(stack.sockets.iter().count(), stack.connections.len());
    // Whatever opened a connection was counted, and whatever ended one.
    let listens = |c: &Connection| stack.sockets.get::<Socket>(c.handle).state() == State::Listen;
    assert!(stack.connections.iter().all(|c| c.opened != listens(c)));
    let [created, destroyed] = [&stack.metrics.connections_created, &stack.metrics.connections_destroyed]
        .map(|counter| counter.load(Ordering::Relaxed));
    let open = stack.connections.iter().filter(|c| c.opened).count();
    assert_eq!(created - destroyed, open as u64);
    assert!(stack.next_poll(now).is_none_or(|delay| delay >= SHORTEST_POLL));
}

/// All frames due, of which there are no more at one instant than were queued, a burst, and its last round of sockets.
pub(super) fn drain(stack: &mut Stack, now: Instant) -> Vec<Vec<u8>> {
    const MOST: usize = QUEUE_FRAMES + BURST_FRAMES + MAX_CONNECTIONS;
    let frames: Vec<_> = std::iter::from_fn(|| stack.transmit(now)).take(MOST + 1).collect();
    assert!(frames.len() <= MOST, "frames without end");
    assert!(frames.iter().all(|frame| frame.len() <= 1514));
    frames
}
