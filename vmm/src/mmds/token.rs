//! Session tokens of version 2: made here, checked here, kept nowhere.
//!
//! ```text
//!   token = hex( expiry in ms, 8 bytes | serial, 8 bytes | HMAC-SHA-256 of these 16 under the VM's key, 32 bytes )
//! ```
//!
//! Only the holder of the key can make one, or make one live longer, and a guest that asks for millions costs no memory. The key is
//! random and new with each [`Tokens`], so that no VM takes another's token. The expiry counts from the making of the key: it tells
//! the guest nothing of the host's clocks. The serial makes two tokens of the same instant differ.

use std::fmt::Write;
use std::time::Instant;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use thiserror::Error;

const MIN_TTL_SECONDS: u32 = 1;
/// Six hours, as IMDSv2.
const MAX_TTL_SECONDS: u32 = 21_600;

const CLAIM_BYTES: usize = 16;
const TAG_BYTES: usize = 32;
const TOKEN_BYTES: usize = CLAIM_BYTES + TAG_BYTES;

/// A lifetime that no token may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "Invalid time to live value provided for token: {0}. Please provide a value between {MIN_TTL_SECONDS} and {MAX_TTL_SECONDS}."
)]
pub(super) struct TtlError(u32);

/// Makes and checks the tokens of one VM.
pub(super) struct Tokens {
    keyed: Hmac<Sha256>,
    epoch: Instant,
    issued: u64,
}

impl Tokens {
    /// A new key; lives are counted from `epoch`.
    ///
    /// # Errors
    /// The kernel gave no random bytes.
    pub fn new(epoch: Instant) -> std::io::Result<Self> {
        let mut key = [0; 32];
        // One call fills it: up to 256 bytes are never cut short once the pool is ready (getrandom(2)).
        let filled = rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty())?;
        if filled != key.len() {
            return Err(std::io::Error::other("getrandom gave less than a key"));
        }
        Ok(Self {
            keyed: Hmac::new_from_slice(&key).expect("HMAC takes a key of any length"),
            epoch,
            issued: 0,
        })
    }

    /// A token that lives `ttl_seconds` from `now` on.
    ///
    /// # Errors
    /// The lifetime is not one of 1 to 21,600 s.
    pub fn issue(&mut self, ttl_seconds: u32, now: Instant) -> Result<String, TtlError> {
        if !(MIN_TTL_SECONDS..=MAX_TTL_SECONDS).contains(&ttl_seconds) {
            return Err(TtlError(ttl_seconds));
        }
        let expiry_ms = self.elapsed_ms(now) + u64::from(ttl_seconds) * 1000;
        self.issued += 1;
        let mut token = [0; TOKEN_BYTES];
        token[..8].copy_from_slice(&expiry_ms.to_be_bytes());
        token[8..CLAIM_BYTES].copy_from_slice(&self.issued.to_be_bytes());
        let tag = self.keyed.clone().chain_update(&token[..CLAIM_BYTES]).finalize();
        token[CLAIM_BYTES..].copy_from_slice(&tag.into_bytes());
        Ok(to_hex(&token))
    }

    /// Whether `token` was made here and lives at `now`.
    pub fn valid(&self, token: &str, now: Instant) -> bool {
        let Some(token) = from_hex(token) else { return false };
        let (claim, tag) = token.split_at(CLAIM_BYTES);
        let made_here = self.keyed.clone().chain_update(claim).verify_slice(tag).is_ok();
        let expiry_ms = u64::from_be_bytes(claim[..8].try_into().expect("eight bytes of sixteen"));
        made_here && expiry_ms > self.elapsed_ms(now)
    }

    fn elapsed_ms(&self, now: Instant) -> u64 {
        let elapsed = now.saturating_duration_since(self.epoch);
        u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX / 2)
    }
}

/// Without the key.
impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens")
            .field("issued", &self.issued)
            .finish_non_exhaustive()
    }
}

fn to_hex(bytes: &[u8; TOKEN_BYTES]) -> String {
    bytes
        .iter()
        .fold(String::with_capacity(2 * TOKEN_BYTES), |mut hex, byte| {
            write!(hex, "{byte:02x}").expect("a string takes all");
            hex
        })
}

fn from_hex(hex: &str) -> Option<[u8; TOKEN_BYTES]> {
    if hex.len() != 2 * TOKEN_BYTES {
        return None;
    }
    let digit = |c: u8| char::from(c).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut bytes = [0; TOKEN_BYTES];
    for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn tokens() -> (Tokens, Instant) {
        let epoch = Instant::now();
        (Tokens::new(epoch).unwrap(), epoch)
    }

    #[test]
    fn a_token_lives_exactly_as_long_as_asked() {
        let (mut tokens, epoch) = tokens();
        let issued_at = epoch + Duration::from_millis(1234);
        for ttl_seconds in [1, 60, 21_600] {
            let token = tokens.issue(ttl_seconds, issued_at).unwrap();
            let death = issued_at + Duration::from_secs(ttl_seconds.into());
            assert!(tokens.valid(&token, issued_at));
            assert!(tokens.valid(&token, death - Duration::from_millis(1)));
            assert!(!tokens.valid(&token, death));
            assert!(!tokens.valid(&token, death + Duration::from_secs(1_000_000)));
        }
    }

    #[test]
    fn a_lifetime_out_of_range_is_refused_in_firecrackers_words() {
        let (mut tokens, epoch) = tokens();
        for ttl_seconds in [0, 21_601, u32::MAX] {
            assert_eq!(
                tokens.issue(ttl_seconds, epoch).unwrap_err().to_string(),
                format!(
                    "Invalid time to live value provided for token: {ttl_seconds}. Please provide a value between 1 and 21600."
                )
            );
        }
    }

    #[test]
    fn a_token_with_any_bit_changed_is_refused() {
        let (mut tokens, epoch) = tokens();
        let token = from_hex(&tokens.issue(60, epoch).unwrap()).unwrap();
        for bit in 0..8 * TOKEN_BYTES {
            let mut forged = token;
            forged[bit / 8] ^= 1 << (bit % 8);
            assert!(!tokens.valid(&to_hex(&forged), epoch), "bit {bit}");
        }
        assert!(tokens.valid(&to_hex(&token), epoch));
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let (tokens, epoch) = tokens();
        let nothing = "0".repeat(2 * TOKEN_BYTES);
        let multibyte = "é".repeat(TOKEN_BYTES);
        for text in [
            "",
            "INVALID_TOKEN",
            &nothing,
            &nothing[1..],
            &multibyte,
            &"+f".repeat(TOKEN_BYTES),
        ] {
            assert!(!tokens.valid(text, epoch), "{text:?}");
        }
    }

    #[test]
    fn a_token_is_unlike_any_other_and_no_other_vms() {
        let (mut ours, epoch) = tokens();
        let (mut others, _) = tokens();
        let [a, b] = [ours.issue(60, epoch).unwrap(), ours.issue(60, epoch).unwrap()];
        assert_ne!(a, b);
        assert!(ours.valid(&a, epoch) && ours.valid(&b, epoch));
        assert!(!ours.valid(&others.issue(60, epoch).unwrap(), epoch));
    }
}
