//! Programs from Python's package index, each in its own virtual environment.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Returns an environment with this package, `name==version`. It is kept in `target`, so that it is
/// created once.
///
/// # Errors
/// Returns the output of Python or pip if it cannot be created.
pub fn environment(python: &str, package: &str) -> Result<PathBuf, String> {
    let place = target_dir().join(package.replace("==", "-"));
    // Written last, so that an interrupted installation does not count as complete.
    let complete = place.join("complete");
    if !complete.exists() {
        run(Command::new(python).args(["-m", "venv", "--clear"]).arg(&place))?;
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", package];
        run(Command::new(place.join("bin/python")).args(pip))?;
        fs::write(&complete, "").map_err(|e| format!("write {}: {e}", complete.display()))?;
    }
    Ok(place)
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|e| format!("start {command:?}: {e}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{command:?}: {}: {errors}", output.status)) }
}

/// Returns cargo's target directory.
fn target_dir() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"));
    let workspace = workspace.parent().unwrap_or(workspace);
    workspace.join(std::env::var_os("CARGO_TARGET_DIR").as_deref().unwrap_or(OsStr::new("target")))
}
