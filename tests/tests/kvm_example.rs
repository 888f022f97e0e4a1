//! The example of `accounting`: a KVM loop that is not ours, accounted for.

use accounting::laws;
use accounting::reading::VcpuState;
use tests::require_bed;

#[path = "../../accounting/examples/kvm_loop.rs"]
#[expect(dead_code, reason = "its main is not this program's")]
mod kvm_loop;

#[test]
fn a_loop_that_is_not_ours_is_read_while_it_runs_and_after() {
    require_bed!(kvm);
    let readings = kvm_loop::readings().expect("the guest runs to its end");
    for pair in readings.windows(2) {
        assert_eq!(laws::check_pair(&pair[0], &pair[1]), Ok(()));
    }
    let [.., last] = readings.as_slice() else {
        panic!("there is a reading of the end")
    };
    assert_eq!(
        (last.state, last.exits.by_reason["io"].count),
        (VcpuState::Exited, 10),
        "{last:#?}"
    );
    assert!(last.gtime_ns > 0, "{last:#?}");
}
