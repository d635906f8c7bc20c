//! Finds the Rust source files that the textual checks read.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Finding;
use crate::command::workspace_root;

/// Applies a check to the Rust files below `paths`, or to the whole workspace if there are none.
///
/// # Errors
/// Fails if a file or a folder cannot be read.
pub fn check(paths: &[PathBuf], findings: fn(&str) -> Vec<Finding>) -> Result<Vec<(PathBuf, Finding)>> {
    let root = workspace_root();
    let mut files = Vec::new();
    if paths.is_empty() {
        collect(&root, &mut files)?;
    }
    for path in paths {
        collect(path, &mut files)?;
    }
    files.sort();
    let mut all = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let shown = file.strip_prefix(&root).unwrap_or(&file);
        all.extend(findings(&text).into_iter().map(|finding| (shown.to_owned(), finding)));
    }
    Ok(all)
}

/// Adds `path` itself, or the Rust files below it, to `files`.
fn collect(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if !path.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path).with_context(|| format!("list {}", path.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            if !is_skipped(&path) {
                collect(&path, files)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

/// Returns true for build output and hidden folders.
fn is_skipped(folder: &Path) -> bool {
    folder
        .file_name()
        .and_then(|name| name.to_str())
        .is_none_or(|name| name == "target" || name.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_file_is_found_and_build_output_is_not() {
        let mut files = Vec::new();
        collect(&workspace_root(), &mut files).unwrap();
        assert!(files.iter().any(|file| file.ends_with("xtask/src/lint/sources.rs")));
        assert!(is_skipped(Path::new("/a/target")) && is_skipped(Path::new("/a/.git")));
        assert!(!is_skipped(Path::new("/a/targets")));
    }
}
