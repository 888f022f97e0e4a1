//! What a guest says of its memory (5.5.6.3): a list of tags and values, and Firecracker's names for them.

use serde::Serialize;

use crate::devices::virtio::queue::Buffers;

/// Bytes of one statistic: a tag of 16 bits, and a value of 64.
const STAT: usize = 10;
/// Statistics that are looked at: the specification has 16, Linux adds one now and then.
const STATS_MAX: usize = 256;

/// `GET /balloon/statistics`. What the guest did not tell is left out. Memory is in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct BalloonStats {
    /// Pages of 4 KiB that the balloon is to have.
    pub target_pages: u32,
    /// Pages of 4 KiB that it has, as the guest says.
    pub actual_pages: u32,
    /// MiB that the balloon is to have.
    pub target_mib: u32,
    /// MiB that it has, as the guest says.
    pub actual_mib: u32,
    /// What the guest tells of its memory.
    #[serde(flatten)]
    pub guest: GuestStats,
}

macro_rules! guest_stats {
    ($($tag:literal $name:ident $doc:literal)*) => {
        /// What the guest tells, by the specification's tags.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        pub struct GuestStats {
            $(
                #[doc = $doc]
                #[serde(skip_serializing_if = "Option::is_none")]
                pub $name: Option<u64>,
            )*
        }

        impl GuestStats {
            /// False where the tag is none that we know.
            fn set(&mut self, tag: u16, value: u64) -> bool {
                match tag {
                    $($tag => self.$name = Some(value),)*
                    _ => return false,
                }
                true
            }
        }
    };
}

guest_stats! {
    0 swap_in "Bytes swapped in."
    1 swap_out "Bytes swapped out."
    2 major_faults "Page faults that waited for a disk."
    3 minor_faults "Page faults that did not."
    4 free_memory "Bytes used for nothing."
    5 total_memory "Bytes there are."
    6 available_memory "Bytes that could be had without swapping: an estimate."
    7 disk_caches "Bytes that could be had without I/O, such as caches of files."
    8 hugetlb_allocations "Huge pages asked for and had."
    9 hugetlb_failures "Huge pages asked for and not had."
    10 oom_kill "Processes killed for want of memory."
    11 alloc_stall "Allocations that had to wait for memory to be reclaimed."
    12 async_scan "Pages looked at by the kernel's reclaim thread."
    13 direct_scan "Pages looked at by those who waited."
    14 async_reclaim "Pages reclaimed by the kernel's reclaim thread."
    15 direct_reclaim "Pages reclaimed by those who waited."
}

impl GuestStats {
    /// Takes over what `buffer` tells; the rest stays. How many statistics it could make nothing of.
    pub(super) fn update(&mut self, buffer: &mut Buffers<'_>) -> u64 {
        // More would be a driver that keeps us busy.
        if buffer.len() > STAT * STATS_MAX {
            return 1;
        }
        let mut bytes = vec![0; buffer.len()];
        buffer.read(&mut bytes);
        let stats = bytes.chunks_exact(STAT);
        let mut unknown = u64::from(!stats.remainder().is_empty());
        for stat in stats {
            let (tag, value) = stat.split_at(2);
            let tag = u16::from_le_bytes(tag.try_into().expect("two bytes"));
            let value = u64::from_le_bytes(value.try_into().expect("eight bytes"));
            unknown += u64::from(!self.set(tag, value));
        }
        unknown
    }
}
