//! Table of everything that the project needs from a machine beyond a Rust toolchain.

use std::path::Path;

use clap::ValueEnum;

use crate::probe::Probe;

/// Purpose of a requirement. Each scope includes the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Scope {
    /// Building and running the agent
    Build,
    /// Checking the code without running it
    Lint,
    /// Testing the agent
    Test,
    /// Measuring the agent beside optional peers
    Bench,
}

/// One row of the table.
#[derive(Debug)]
pub struct Requirement {
    /// The smallest scope that needs it.
    pub scope: Scope,
    pub name: &'static str,
    pub purpose: &'static str,
    pub detection: Detection,
    pub provider: Provider,
}

/// The way to find out if a requirement is met.
#[derive(Debug)]
pub enum Detection {
    /// All of these Debian packages are installed. For requirements without a file that identifies
    /// the right version or build.
    Packages(&'static [&'static str]),
    /// This file or folder exists.
    File(&'static str),
    /// This program is on the PATH or in a folder for system programs.
    Program(&'static str),
    /// This command succeeds, and its output starts with this text.
    Output(&'static [&'static str], &'static str),
}

/// Origin of a requirement.
#[derive(Debug)]
pub enum Provider {
    /// These packages of Debian 12.
    Debian(&'static [&'static str]),
    /// This component of the Rust toolchain, installed by rustup.
    Rustup(&'static str),
    /// A crate from crates.io: its name, its version, more arguments for `cargo install`, and
    /// environment variables.
    Crate {
        name: &'static str,
        version: &'static str,
        arguments: &'static [&'static str],
        environment: &'static [(&'static str, &'static str)],
    },
    /// The programs from PyPI that `xtask/lint-tools.txt` lists, in a virtual environment.
    LintTools,
}

impl Requirement {
    pub fn is_met(&self, probe: &impl Probe) -> bool {
        match self.detection {
            Detection::Packages(names) => names.iter().all(|name| probe.has_package(name)),
            Detection::File(path) => probe.has_file(Path::new(path)),
            Detection::Program(name) => probe.has_program(name),
            Detection::Output(words, start) => {
                probe.output(words).is_some_and(|output| output.starts_with(start))
            }
        }
    }
}

/// Returns the unmet requirements of `scope`, in the order of the table.
pub fn missing(scope: Scope, probe: &impl Probe) -> Vec<&'static Requirement> {
    REQUIREMENTS.iter().filter(|row| row.scope <= scope && !row.is_met(probe)).collect()
}

const fn debian(
    scope: Scope,
    name: &'static str,
    purpose: &'static str,
    detection: Detection,
    packages: &'static [&'static str],
) -> Requirement {
    Requirement { scope, name, purpose, detection, provider: Provider::Debian(packages) }
}

/// The table. A row may depend on the rows above it.
pub const REQUIREMENTS: &[Requirement] = &[
    debian(
        Scope::Build,
        "C compiler",
        "links the agent and compiles the cryptography for TLS",
        Detection::Program("cc"),
        &["gcc", "libc6-dev"],
    ),
    debian(
        Scope::Build,
        "Rust compiler with the sources of its core library",
        "the BPF target has no prebuilt core library, so the build compiles it",
        Detection::Packages(&["rustc-web", "cargo-web", "rust-web-src"]),
        &["rustc-web", "cargo-web", "rust-web-src"],
    ),
    debian(
        Scope::Build,
        "LLVM 22",
        "the compiler above emits its bitcode, and bpf-linker links against it",
        Detection::File("/usr/lib/llvm-22/include/llvm-c/Core.h"),
        &["llvm-22-dev"],
    ),
    Requirement {
        scope: Scope::Build,
        name: "bpf-linker 0.13.0",
        purpose: "links the BPF programs",
        detection: Detection::Output(&["bpf-linker", "--version"], "bpf-linker 0.13.0"),
        provider: Provider::Crate {
            name: "bpf-linker",
            version: "0.13.0",
            arguments: &["--locked", "--no-default-features", "--features", "llvm-22"],
            environment: &[("LLVM_PREFIX", "/usr/lib/llvm-22")],
        },
    },
    debian(
        Scope::Build,
        "ip",
        "creates the namespaces and taps of the lab",
        Detection::Program("ip"),
        &["iproute2"],
    ),
    debian(
        Scope::Build,
        "curl",
        "runs the example request that the lab prints",
        Detection::Program("curl"),
        &["curl", "ca-certificates"],
    ),
    Requirement {
        scope: Scope::Lint,
        name: "rustfmt",
        purpose: "checks the format of the code",
        detection: Detection::Output(&["cargo", "fmt", "--version"], "rustfmt "),
        provider: Provider::Rustup("rustfmt"),
    },
    Requirement {
        scope: Scope::Lint,
        name: "clippy",
        purpose: "checks the workspace's lints",
        detection: Detection::Output(&["cargo", "clippy", "--version"], "clippy "),
        provider: Provider::Rustup("clippy"),
    },
    debian(
        Scope::Lint,
        "Python with virtual environments",
        "holds the lint tools below, and the tests' validator for Kubernetes manifests",
        Detection::Output(&["python3", "-c", "import ensurepip, venv; print('found')"], "found"),
        &["python3-venv"],
    ),
    Requirement {
        scope: Scope::Lint,
        name: "typos 1.52.0",
        purpose: "checks the spelling",
        detection: Detection::Output(&["typos", "--version"], "typos-cli 1.52.0"),
        provider: Provider::LintTools,
    },
    Requirement {
        scope: Scope::Lint,
        name: "cargo-deny 0.20.2",
        purpose: "checks licences, sources and duplicate versions of the dependencies",
        detection: Detection::Output(&["cargo-deny", "--version"], "cargo-deny 0.20.2"),
        provider: Provider::LintTools,
    },
    debian(
        Scope::Test,
        "bpftool",
        "lists attached programs when a test fails, and counts instructions",
        Detection::Program("bpftool"),
        &["bpftool"],
    ),
    debian(
        Scope::Test,
        "ethtool",
        "switches offloads of test interfaces",
        Detection::Program("ethtool"),
        &["ethtool"],
    ),
    debian(
        Scope::Test,
        "iptables",
        "sets up the firewall of hosts that drop everything",
        Detection::Program("iptables"),
        &["iptables"],
    ),
    debian(
        Scope::Test,
        "conntrack",
        "fills the connection tracking table of such a host",
        Detection::Program("conntrack"),
        &["conntrack"],
    ),
    debian(
        Scope::Test,
        "strace",
        "counts the agent's system calls",
        Detection::Program("strace"),
        &["strace"],
    ),
    debian(
        Scope::Test,
        "dnsmasq",
        "serves DHCP to the guests of the scenarios",
        Detection::Program("dnsmasq"),
        &["dnsmasq-base"],
    ),
    debian(
        Scope::Test,
        "Python modules for cloud-init",
        "cloud-init's own code probes for the metadata service",
        Detection::Packages(&["python3-requests", "python3-yaml"]),
        &["python3-requests", "python3-yaml"],
    ),
    debian(
        Scope::Test,
        "Open vSwitch",
        "serves the real schema to the OVSDB source, and the real switch to guests",
        Detection::File("/usr/share/openvswitch/vswitch.ovsschema"),
        &["openvswitch-switch"],
    ),
    debian(
        Scope::Test,
        "haproxy",
        "forwards requests to the agent as Neutron's own haproxy processes do",
        Detection::Program("haproxy"),
        &["haproxy"],
    ),
    debian(
        Scope::Test,
        "Neutron's metadata agent",
        "receives the requests that the agent forwards on sites that keep it",
        Detection::File("/usr/lib/python3/dist-packages/neutron/agent/metadata/agent.py"),
        &["python3-neutron"],
    ),
    debian(
        Scope::Test,
        "libvirtd",
        "writes real domain files for the libvirt source",
        Detection::Packages(&["libvirt-daemon", "libvirt-daemon-driver-qemu"]),
        &["libvirt-daemon", "libvirt-daemon-driver-qemu"],
    ),
    debian(Scope::Test, "virsh", "controls libvirtd", Detection::Program("virsh"), &["libvirt-clients"]),
    debian(
        Scope::Test,
        "OVN's Southbound schema",
        "is served to the OVN source by the database server of Open vSwitch",
        Detection::File("/usr/share/ovn/ovn-sb.ovsschema"),
        &["ovn-central"],
    ),
    debian(
        Scope::Test,
        "Keystone and Neutron",
        "serve the real API to the Neutron source",
        Detection::Packages(&["keystone", "neutron-server", "uwsgi-plugin-python3"]),
        &["keystone", "neutron-server", "uwsgi-plugin-python3"],
    ),
    debian(
        Scope::Test,
        "QEMU",
        "runs guests on real taps, and the kernels that the programs have to support",
        Detection::Program("qemu-system-x86_64"),
        &["qemu-system-x86"],
    ),
    debian(
        Scope::Test,
        "mmdebstrap",
        "creates the root file systems of the virtual machines",
        Detection::Program("mmdebstrap"),
        &["mmdebstrap"],
    ),
    debian(
        Scope::Test,
        "lz4",
        "unpacks the guests' kernel, which is slow on an emulated processor",
        Detection::Program("lz4"),
        &["lz4"],
    ),
    debian(
        Scope::Test,
        "xz",
        "unpacks the kernel modules of the virtual machines",
        Detection::Program("xz"),
        &["xz-utils"],
    ),
    debian(
        Scope::Test,
        "strip",
        "removes debugging information from programs that have to fit into a virtual machine's memory",
        Detection::Program("strip"),
        &["binutils"],
    ),
    debian(
        Scope::Test,
        "mkfs.ext4",
        "formats the guests' disks",
        Detection::Program("mkfs.ext4"),
        &["e2fsprogs"],
    ),
    debian(Scope::Test, "buildah", "builds the container image", Detection::Program("buildah"), &["buildah"]),
    // buildah and podman recommend crun, but crun 1.8 refuses a host that splits its controllers
    // between cgroup v1 and v2.
    debian(Scope::Test, "runc", "starts the agent's container", Detection::Program("runc"), &["runc"]),
    debian(
        Scope::Test,
        "podman",
        "runs the agent's container with the privileges that the DaemonSet grants",
        Detection::Program("podman"),
        &["podman"],
    ),
    debian(
        Scope::Test,
        "systemd-analyze",
        "checks the unit file",
        Detection::Program("systemd-analyze"),
        &["systemd"],
    ),
    debian(
        Scope::Test,
        "valgrind",
        "counts instructions per packet and per request",
        Detection::Program("valgrind"),
        &["valgrind"],
    ),
    debian(
        Scope::Test,
        "DejaVu fonts",
        "renders the text in the plots of a report",
        Detection::File("/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf"),
        &["fonts-dejavu-core"],
    ),
    debian(
        Scope::Test,
        "nginx",
        "serves as the cheapest possible upstream of every measured path",
        Detection::Program("nginx"),
        &["nginx-light"],
    ),
    debian(
        Scope::Bench,
        "MariaDB",
        "stores the data of neutron-server, which Neutron's metadata agent depends on",
        Detection::Packages(&["mariadb-server", "python3-pymysql"]),
        &["mariadb-server", "python3-pymysql"],
    ),
    debian(
        Scope::Bench,
        "RabbitMQ",
        "carries the RPCs between that agent and neutron-server",
        Detection::Packages(&["rabbitmq-server"]),
        &["rabbitmq-server"],
    ),
    debian(
        Scope::Bench,
        "nova-api-metadata",
        "serves as the upstream when the bench measures a whole cloud",
        Detection::Packages(&["nova-api"]),
        &["nova-api"],
    ),
];

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// A machine with exactly the contents that a test gives it.
    #[derive(Default)]
    pub struct FakeProbe {
        pub packages: BTreeSet<&'static str>,
        pub files: BTreeSet<&'static str>,
        pub programs: BTreeSet<&'static str>,
        pub outputs: Vec<(Vec<&'static str>, &'static str)>,
        pub debian_12: bool,
        pub root: bool,
    }

    impl Probe for FakeProbe {
        fn has_package(&self, name: &str) -> bool {
            self.packages.contains(name)
        }
        fn has_file(&self, path: &Path) -> bool {
            path.to_str().is_some_and(|path| self.files.contains(path))
        }
        fn has_program(&self, name: &str) -> bool {
            self.programs.contains(name)
        }
        fn output(&self, words: &[&str]) -> Option<String> {
            self.outputs.iter().find(|(command, _)| command == words).map(|(_, output)| (*output).to_owned())
        }
        fn is_debian_12(&self) -> bool {
            self.debian_12
        }
        fn is_root(&self) -> bool {
            self.root
        }
    }

    /// A machine that meets every requirement.
    pub fn complete() -> FakeProbe {
        let mut probe = FakeProbe::default();
        for row in REQUIREMENTS {
            match row.detection {
                Detection::Packages(names) => probe.packages.extend(names),
                Detection::File(path) => drop(probe.files.insert(path)),
                Detection::Program(name) => drop(probe.programs.insert(name)),
                Detection::Output(words, start) => probe.outputs.push((words.to_vec(), start)),
            }
        }
        probe
    }

    fn names(rows: &[&Requirement]) -> Vec<&'static str> {
        rows.iter().map(|row| row.name).collect()
    }

    #[test]
    fn complete_machine_lacks_nothing_and_empty_one_everything() {
        assert_eq!(names(&missing(Scope::Bench, &complete())), [""; 0]);
        assert_eq!(missing(Scope::Bench, &FakeProbe::default()).len(), REQUIREMENTS.len());
    }

    #[test]
    fn servers_of_the_bench_are_not_needed_for_testing() {
        let rows = missing(Scope::Test, &FakeProbe::default());
        assert!(names(&rows).contains(&"QEMU"));
        assert!(!names(&rows).contains(&"MariaDB") && !names(&rows).contains(&"RabbitMQ"));
    }

    #[test]
    fn building_needs_no_test_tool() {
        let rows = missing(Scope::Build, &FakeProbe::default());
        assert!(rows.iter().all(|row| row.scope == Scope::Build));
        assert!(names(&rows).contains(&"bpf-linker 0.13.0"));
        assert!(!names(&rows).contains(&"QEMU"));
    }

    #[test]
    fn a_tool_of_another_version_counts_as_missing() {
        let mut probe = complete();
        for (words, output) in &mut probe.outputs {
            if words[0] == "bpf-linker" {
                *output = "bpf-linker 0.9.5";
            }
        }
        assert_eq!(names(&missing(Scope::Build, &probe)), ["bpf-linker 0.13.0"]);
    }

    #[test]
    fn a_set_of_packages_must_be_complete() {
        let mut probe = complete();
        probe.packages.remove("rust-web-src");
        let [row] = missing(Scope::Build, &probe)[..] else { panic!("one row") };
        assert!(row.name.starts_with("Rust compiler"));
    }

    #[test]
    fn lint_tools_have_the_same_version_in_both_files() {
        let pinned = include_str!("../lint-tools.txt");
        for row in REQUIREMENTS.iter().filter(|row| matches!(row.provider, Provider::LintTools)) {
            let (name, version) = row.name.split_once(' ').unwrap();
            let pin = format!("{name}=={version} ");
            assert!(pinned.contains(&pin), "lint-tools.txt does not pin {pin}");
        }
    }
}
