//! The `metadata-agent` command.

fn main() {}
