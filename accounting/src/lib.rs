//! Accounting.
pub mod account;
pub mod host;
pub mod reading;
pub mod vtime;
pub use account::{Account, Open, OpenError};
pub use reading::Reading;
