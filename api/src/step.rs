//! One step of a configuration that is given before the API is served: an action, and what its user calls it.

use vmm::Action;

/// See the module.
#[derive(Debug)]
pub struct Step {
    /// The section of a file, or the flag of a command line, with its value. Empty where the error names it by itself.
    pub name: String,
    /// What to do.
    pub action: Action,
}

impl Step {
    /// `action`, known to its user as `name`.
    pub fn new(name: impl Into<String>, action: Action) -> Self {
        Self {
            name: name.into(),
            action,
        }
    }

    /// `error` of this step, on one line that names it.
    pub fn in_words(name: &str, error: &str) -> String {
        if name.is_empty() {
            error.to_owned()
        } else {
            format!("{name}: {error}")
        }
    }
}
