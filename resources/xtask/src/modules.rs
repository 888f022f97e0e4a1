//! Kernel modules with what they depend on, as each says in its own `depends=` line: Debian's package has no `modules.dep`, which
//! depmod makes where a kernel is installed.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A module's name, with `_` for `-`, and its contents.
pub type Module = (String, Vec<u8>);

/// The modules of one kernel.
pub struct Modules(HashMap<String, PathBuf>);

impl Modules {
    /// Those below `dir`.
    pub fn of(dir: &Path) -> Result<Self> {
        let mut found = HashMap::new();
        let mut dirs = vec![dir.to_owned()];
        while let Some(dir) = dirs.pop() {
            let entries = fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
            for entry in entries {
                let path = entry?.path();
                if path.is_dir() {
                    dirs.push(path);
                } else if path.extension().is_some_and(|extension| extension == "ko") {
                    let name = path.file_stem().unwrap_or_default().to_string_lossy().replace('-', "_");
                    found.insert(name, path);
                }
            }
        }
        Ok(Self(found))
    }

    /// `name` and all that it depends on, in the order in which they can be loaded. Nothing where there is no such module: it
    /// is built into this kernel.
    pub fn closure(&self, name: &str) -> Result<Vec<Module>> {
        let mut order = Vec::new();
        self.add(name, &mut order)?;
        Ok(order)
    }

    fn add(&self, name: &str, order: &mut Vec<Module>) -> Result<()> {
        let Some(path) = self.0.get(name) else { return Ok(()) };
        if order.iter().any(|(known, _)| known == name) {
            return Ok(());
        }
        let module = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        for needed in depends(&module) {
            self.add(&needed, order)?;
        }
        order.push((name.to_owned(), module));
        Ok(())
    }
}

/// What `module` says that it depends on.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|bytes| bytes == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..]
        .split(|&byte| byte == 0)
        .next()
        .unwrap_or_default();
    let names = String::from_utf8_lossy(value).replace('-', "_");
    names
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_names_what_it_depends_on() {
        assert_eq!(
            depends(b"\x7fELF\0license=GPL\0depends=virtio,virtio-ring\0name=x\0"),
            ["virtio", "virtio_ring"]
        );
        assert!(depends(b"\0depends=\0").is_empty() && depends(b"\x7fELF").is_empty());
    }

    #[test]
    fn what_is_depended_on_is_loaded_first_and_once() {
        let dir = std::env::temp_dir().join(format!("chronovisor-modules-{}", std::process::id()));
        fs::create_dir_all(dir.join("deep")).unwrap();
        for (name, depends) in [("a", "b,c-d"), ("b", "c-d"), ("c-d", "")] {
            fs::write(
                dir.join("deep").join(format!("{name}.ko")),
                format!("\0depends={depends}\0"),
            )
            .unwrap();
        }
        let modules = Modules::of(&dir).unwrap();
        let names = |name| {
            modules
                .closure(name)
                .unwrap()
                .into_iter()
                .map(|(name, _)| name)
                .collect::<Vec<_>>()
        };
        let (a, none) = (names("a"), names("builtin"));
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!((a, none), (["c_d", "b", "a"].map(str::to_owned).to_vec(), Vec::new()));
    }
}
