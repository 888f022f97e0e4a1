//! What a case is made of: numbers that its own number decides.

/// Numbers that depend on the seed only: splitmix64 (Steele, Lea and Flood, 2014).
#[derive(Clone, Debug)]
pub struct Dice(pub u64);

impl Dice {
    pub(super) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.roll() % end
    }

    /// Once in `n` times.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        // A place in a slice.
        of[usize::try_from(self.below(of.len() as u64)).unwrap()]
    }

    pub(super) fn word16(&mut self) -> u16 {
        u16::try_from(self.below(1 << 16)).unwrap()
    }

    pub(super) fn word32(&mut self) -> u32 {
        u32::try_from(self.below(1 << 32)).unwrap()
    }

    /// A word as requests have them: small, most of the time.
    pub(super) fn small(&mut self) -> u32 {
        let few = u32::try_from(self.below(1200)).unwrap();
        let any = self.word32();
        self.pick(&[0, 0, 0, 1, 2, 4, 8, few, few, any])
    }
}
