//! Prometheus and promtool, as Debian has them: downloaded and unpacked, not installed, for that would start a service.

use std::path::PathBuf;

use anyhow::Result;

use crate::layout::Layout;
use crate::{debian, setup};

/// The folder with the programs `prometheus` and `promtool`. Touches the network the first time only.
///
/// # Errors
/// The package cannot be had.
pub fn unpack(layout: &Layout) -> Result<PathBuf> {
    let kept = layout.kept();
    let downloads = setup::downloads(layout)?;
    let _lock = setup::lock(&kept)?;
    let package = setup::unpacked(&kept, "prometheus", || debian::prometheus_package(&downloads))?;
    Ok(package.join("usr/bin"))
}
