//! `cargo xtask build-ebpf`: builds the BPF object and prints the sizes of its functions.
//!
//! The agent's build script builds the object, here as in every build. This command only locates
//! and inspects it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::command::Invocation;
use crate::requirements::Scope;
use crate::setup::{Report, setup};
use crate::terminal::print;

/// Part of the LLVM that bpf-linker links against.
const NM: &str = "/usr/lib/llvm-22/bin/llvm-nm";
/// `e_machine` in the ELF header of a BPF object.
const EM_BPF: [u8; 2] = 247u16.to_le_bytes();
/// Bytes per BPF instruction.
const INSTRUCTION_SIZE: u64 = 8;

#[derive(Debug, PartialEq, Eq)]
struct Function {
    name: String,
    instructions: u64,
}

/// Builds the object and prints one line for each function.
///
/// # Errors
/// Fails if the set-up or the build fails, or the build leaves no BPF object.
pub fn build_ebpf() -> Result<()> {
    setup(Scope::Build, Report::OnlyChanges)?;
    let build = Invocation::cargo(["build", "--package", "metadata-agent", "--lib"]);
    build.run()?;
    let messages = build.args(["--quiet", "--message-format=json"]).output()?;
    let Some(folder) = out_dir(&messages) else {
        bail!("cargo reports no output folder of metadata-agent's build script")
    };
    let objects = bpf_objects(&folder)?;
    if objects.is_empty() {
        bail!("the build script left no BPF object in {}", folder.display());
    }
    for object in objects {
        print(format_args!("{}: {} bytes", object.display(), fs::metadata(&object)?.len()))?;
        let nm = [NM, "--defined-only", "--print-size", "--radix=d"];
        let symbols = Invocation::new(nm).args([object.display().to_string()]).output()?;
        for Function { name, instructions } in functions(&symbols) {
            print(format_args!("  {name:<24} {instructions:>5} instructions"))?;
        }
    }
    Ok(())
}

/// Returns the output folder of the agent's build script, from cargo's messages.
fn out_dir(messages: &str) -> Option<PathBuf> {
    messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).find_map(|message| {
        let is_agent = message["package_id"].as_str()?.contains("/metadata-agent#");
        let has_run = message["reason"] == "build-script-executed";
        (is_agent && has_run).then(|| message["out_dir"].as_str().map(PathBuf::from))?
    })
}

fn bpf_objects(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut objects = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        if path.is_file() && is_bpf_object(&fs::read(&path)?) {
            objects.push(path);
        }
    }
    objects.sort();
    Ok(objects)
}

fn is_bpf_object(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF") && bytes.get(18..20) == Some(&EM_BPF)
}

/// Parses the functions in the output of `llvm-nm`: address, size, kind, name.
fn functions(symbols: &str) -> Vec<Function> {
    let function = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let size: u64 = fields.next()?.parse().ok()?;
        let kind = fields.next()?;
        let name = fields.next()?.to_owned();
        kind.eq_ignore_ascii_case("t").then_some(Function { name, instructions: size / INSTRUCTION_SIZE })
    };
    symbols.lines().filter_map(function).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_not_confused_with_maps_and_labels() {
        let symbols = "0000000000000000 0000000000000032 B MD_CLIENTS\n\
                       0000000000000000 0000000000002400 T md_from_guest\n\
                       0000000000000096 0000000000000080 t memcpy\n\
                       0000000000000100 t LBB0_1\n";
        let found: Vec<_> = functions(symbols).into_iter().map(|f| (f.name, f.instructions)).collect();
        assert_eq!(found, [("md_from_guest".to_owned(), 300), ("memcpy".to_owned(), 10)]);
    }

    #[test]
    fn the_output_folder_is_that_of_the_agent() {
        let messages = r#"
{"reason":"build-script-executed","package_id":"registry+x#ring@0.17.0","out_dir":"/ring"}
{"reason":"compiler-artifact","package_id":"path+file:///src/metadata-agent#0.1.0"}
{"reason":"build-script-executed","package_id":"path+file:///src/metadata-agent#0.1.0","out_dir":"/agent"}
"#;
        assert_eq!(out_dir(messages), Some(PathBuf::from("/agent")));
        assert_eq!(out_dir(""), None);
    }

    #[test]
    fn a_bpf_object_is_recognised_by_its_header() {
        let mut header = *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x01\0\xf7\0";
        assert!(is_bpf_object(&header));
        header[18] = 62;
        assert!(!is_bpf_object(&header));
        assert!(!is_bpf_object(b"\x7fELF"));
    }
}
