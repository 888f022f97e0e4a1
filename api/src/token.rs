//! The token that a client of the API over TCP has to bring, where there is one: `Authorization: Bearer TOKEN` (RFC
//! 6750, 2.1).
//!
//! Its file is its secret's only place: it must be a regular file of this user's that nobody else may read, and is
//! opened through no symbolic link, so that no other user chooses what is compared. It is read once, at the start.
//!
//! What a client brings is compared by the tags that an HMAC under a random key gives both: in constant time, and even
//! what the tags have in common says nothing of what the tokens have. Neither the token nor its tag is ever logged.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use hmac::{Hmac, KeyInit, Mac};
use rustix::fs::{Mode, OFlags};
use rustix::rand::{GetRandomFlags, getrandom};
use sha2::Sha256;

/// The shortest token, in characters: 96 bits, if they are base64.
const LEAST: usize = 16;

/// The longest: what fits in a request's head beside the rest.
const MOST: usize = 4096;

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It is not there, or not for us.
    #[error("--api-token-file {path}: cannot be read: {source}")]
    Read {
        /// As given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Its last part is a symbolic link.
    #[error("--api-token-file {0}: is a symbolic link, which is not followed: give the file itself")]
    Link(PathBuf),
    /// Something else has that name.
    #[error("--api-token-file {0}: is no regular file")]
    NotAFile(PathBuf),
    /// Others may read it, or change it.
    #[error(
        "--api-token-file {path}: its mode is {mode:04o}, so others know the token, or choose it: chmod 600 {path}"
    )]
    Open {
        /// As given.
        path: PathBuf,
        /// The permissions.
        mode: u32,
    },
    /// Another user may change it.
    #[error(
        "--api-token-file {path}: belongs to user {owner}, who may change it: it has to be this process's user's, or root's"
    )]
    NotOurs {
        /// As given.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// It holds no token.
    #[error(
        "--api-token-file {0}: holds no token, which is a line of {LEAST} to {MOST} letters, digits and any of -._~+/= : head -c 32 /dev/urandom | base64"
    )]
    Malformed(PathBuf),
    /// The kernel gave no random bytes.
    #[error("no random key: {0}")]
    Random(io::Error),
}

/// What is asked for.
#[derive(Clone)]
pub struct Token {
    keyed: Hmac<Sha256>,
    tag: [u8; 32],
}

/// Without either.
impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token").finish_non_exhaustive()
    }
}

impl Token {
    /// Reads it from `path`.
    ///
    /// # Errors
    /// See [`TokenError`].
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let cannot = |source| TokenError::Read {
            path: path.to_owned(),
            source,
        };
        // A fifo that nobody writes to is not waited for.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| match error {
            rustix::io::Errno::LOOP => TokenError::Link(path.to_owned()),
            error => cannot(error.into()),
        })?;
        let file = File::from(file);
        // Of what was opened, not of what has the name by now.
        let metadata = file.metadata().map_err(cannot)?;
        if !metadata.is_file() {
            return Err(TokenError::NotAFile(path.to_owned()));
        }
        let (mode, owner) = (metadata.mode() & 0o7777, metadata.uid());
        if mode & 0o077 != 0 {
            return Err(TokenError::Open {
                path: path.to_owned(),
                mode,
            });
        }
        if owner != 0 && owner != rustix::process::geteuid().as_raw() {
            return Err(TokenError::NotOurs {
                path: path.to_owned(),
                owner,
            });
        }
        let mut text = Vec::new();
        file.take(MOST as u64 + 2).read_to_end(&mut text).map_err(cannot)?;
        let line = text.strip_suffix(b"\n").unwrap_or(&text);
        if !(LEAST..=MOST).contains(&line.len()) || !line.iter().all(|&byte| is_token(byte)) {
            return Err(TokenError::Malformed(path.to_owned()));
        }
        Self::new(line).map_err(TokenError::Random)
    }

    /// `token` itself.
    pub(crate) fn new(token: &[u8]) -> io::Result<Self> {
        let mut key = [0; 32];
        // Up to 256 bytes are never cut short once the pool is ready (getrandom(2)).
        if getrandom(&mut key, GetRandomFlags::empty())? != key.len() {
            return Err(io::Error::other("getrandom gave less than a key"));
        }
        let keyed: Hmac<Sha256> = Hmac::new_from_slice(&key).expect("HMAC takes a key of any length");
        let tag = keyed.clone().chain_update(token).finalize().into_bytes().into();
        Ok(Self { keyed, tag })
    }

    /// Whether `header`, the value of `Authorization`, brings it.
    #[must_use]
    pub fn is_in(&self, header: &[u8]) -> bool {
        const SCHEME: &[u8] = b"Bearer ";
        let Some((scheme, token)) = header.split_at_checked(SCHEME.len()) else {
            return false;
        };
        // A scheme's case means nothing (RFC 9110, 11.1).
        scheme.eq_ignore_ascii_case(SCHEME) && self.keyed.clone().chain_update(token).verify_slice(&self.tag).is_ok()
    }
}

/// Whether a token may have it (RFC 6750, 2.1: b64token).
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~+/=".contains(&byte)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;
    use crate::scratch::Scratch;

    const SECRET: &str = "c2VjcmV0IG9mIHRoZSB0ZXN0";

    fn file(scratch: &Scratch, name: &str, text: &str, mode: u32) -> PathBuf {
        let path = scratch.path(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn a_token_is_a_line_of_its_file_and_is_known_again() {
        let scratch = Scratch::new();
        for (name, text) in [("line", format!("{SECRET}\n")), ("no-end", SECRET.to_owned())] {
            let token = Token::read(&file(&scratch, name, &text, 0o600)).unwrap();
            for good in [format!("Bearer {SECRET}"), format!("bearer {SECRET}")] {
                assert!(token.is_in(good.as_bytes()), "{good}");
            }
            let longer = format!("Bearer {SECRET}x");
            for bad in [
                "",
                "Bearer",
                "Bearer ",
                SECRET,
                "Basic c2Vj",
                &longer,
                &longer[..longer.len() - 2],
            ] {
                assert!(!token.is_in(bad.as_bytes()), "{bad}");
            }
            assert!(!format!("{token:?}").contains(SECRET));
        }
    }

    #[test]
    fn a_file_that_others_have_a_hand_in_is_refused_with_what_to_do() {
        let scratch = Scratch::new();
        let good = file(&scratch, "good", SECRET, 0o400);
        assert!(Token::read(&good).is_ok());
        let link = scratch.path("link");
        symlink(&good, &link).unwrap();
        std::fs::create_dir(scratch.path("folder")).unwrap();
        let fifo = scratch.path("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
        let table = [
            (scratch.path("missing"), "No such file"),
            (link, "symbolic link"),
            (scratch.path("folder"), "no regular file"),
            (fifo, "no regular file"),
            (file(&scratch, "group", SECRET, 0o640), "0640"),
            (file(&scratch, "world", SECRET, 0o604), "chmod 600"),
            (file(&scratch, "writable", SECRET, 0o620), "chmod 600"),
            (file(&scratch, "empty", "", 0o600), "head -c 32"),
            (file(&scratch, "short", "fifteenletters!", 0o600), "16 to 4096"),
            (file(&scratch, "words", "two words of a secret", 0o600), "no token"),
            (file(&scratch, "two", &format!("{SECRET}\n\n"), 0o600), "no token"),
            (file(&scratch, "long", &"x".repeat(MOST + 1), 0o600), "no token"),
        ];
        for (path, says) in table {
            let said = Token::read(&path).expect_err(says).to_string();
            assert!(said.contains(says), "{said}");
            assert!(
                said.starts_with(&format!("--api-token-file {}", path.display())),
                "{said}"
            );
            assert!(!said.contains(SECRET), "{said}");
        }
    }
}
