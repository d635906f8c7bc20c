//! What the project needs of a machine beyond a Rust toolchain: one row a thing, with how it is recognised, why
//! it is needed and who provides it.

use std::path::Path;

use clap::ValueEnum;

use crate::probe::Probe;

/// What a requirement is needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Scope {
    /// Building and running the agent
    Build,
    /// Testing it
    Test,
    /// Measuring it beside peers that take part only when they are asked for
    Bench,
}

/// One thing that has to be there.
#[derive(Debug)]
pub struct Requirement {
    /// The smallest scope that needs it.
    pub scope: Scope,
    /// Its name for people.
    pub what: &'static str,
    /// What it is needed for.
    pub why: &'static str,
    /// How its presence shows.
    pub sign: Sign,
    /// Where it comes from.
    pub provider: Provider,
}

/// How the presence of something shows.
#[derive(Debug)]
pub enum Sign {
    /// All of these Debian packages: for what has no file that only one version or one build of it has.
    Packages(&'static [&'static str]),
    /// A file, or a folder.
    File(&'static str),
    /// A program on the PATH, or in a folder for system programs.
    Program(&'static str),
    /// A command that succeeds and prints something that begins so.
    Answer(&'static [&'static str], &'static str),
}

/// Who provides something.
#[derive(Debug)]
pub enum Provider {
    /// Debian 12, in these packages.
    Debian(&'static [&'static str]),
    /// The installed Rust toolchain, as this component of rustup's.
    Rustup(&'static str),
    /// crates.io: arguments of `cargo install`, and what to add to its environment.
    Crate(&'static [&'static str], &'static [(&'static str, &'static str)]),
}

impl Requirement {
    /// Whether it is there.
    pub fn is_met(&self, probe: &impl Probe) -> bool {
        match self.sign {
            Sign::Packages(names) => names.iter().all(|name| probe.package(name)),
            Sign::File(path) => probe.file(Path::new(path)),
            Sign::Program(name) => probe.program(name),
            Sign::Answer(words, beginning) => {
                probe.answer(words).is_some_and(|answer| answer.starts_with(beginning))
            }
        }
    }
}

/// What `scope` needs and the machine lacks, in the order of the table.
pub fn missing(scope: Scope, probe: &impl Probe) -> Vec<&'static Requirement> {
    REQUIREMENTS.iter().filter(|row| row.scope <= scope && !row.is_met(probe)).collect()
}

const fn debian(
    scope: Scope,
    what: &'static str,
    why: &'static str,
    sign: Sign,
    packages: &'static [&'static str],
) -> Requirement {
    Requirement { scope, what, why, sign, provider: Provider::Debian(packages) }
}

/// The table. A row may lean on the rows above it.
pub const REQUIREMENTS: &[Requirement] = &[
    debian(
        Scope::Build,
        "C compiler",
        "links the agent and builds the cryptography of its TLS",
        Sign::Program("cc"),
        &["gcc", "libc6-dev"],
    ),
    debian(
        Scope::Build,
        "Rust compiler with the sources of its own core library",
        "the BPF target comes without a core library: it is built along",
        Sign::Packages(&["rustc-web", "cargo-web", "rust-web-src"]),
        &["rustc-web", "cargo-web", "rust-web-src"],
    ),
    debian(
        Scope::Build,
        "LLVM 22",
        "the compiler above speaks its bitcode; bpf-linker is built against it",
        Sign::File("/usr/lib/llvm-22/include/llvm-c/Core.h"),
        &["llvm-22-dev"],
    ),
    Requirement {
        scope: Scope::Build,
        what: "bpf-linker 0.13.0",
        why: "links the BPF programs",
        sign: Sign::Answer(&["bpf-linker", "--version"], "bpf-linker 0.13.0"),
        provider: Provider::Crate(
            &[
                "bpf-linker",
                "--version",
                "0.13.0",
                "--locked",
                "--no-default-features",
                "--features",
                "llvm-22",
            ],
            &[("LLVM_PREFIX", "/usr/lib/llvm-22")],
        ),
    },
    debian(
        Scope::Build,
        "ip",
        "the lab lays out its namespaces and taps with it",
        Sign::Program("ip"),
        &["iproute2"],
    ),
    debian(
        Scope::Build,
        "curl",
        "the command that the lab prints for the operator to try",
        Sign::Program("curl"),
        &["curl", "ca-certificates"],
    ),
    Requirement {
        scope: Scope::Test,
        what: "rustfmt",
        why: "checks the format",
        sign: Sign::Answer(&["cargo", "fmt", "--version"], "rustfmt "),
        provider: Provider::Rustup("rustfmt"),
    },
    Requirement {
        scope: Scope::Test,
        what: "clippy",
        why: "checks the house's lints",
        sign: Sign::Answer(&["cargo", "clippy", "--version"], "clippy "),
        provider: Provider::Rustup("clippy"),
    },
    debian(
        Scope::Test,
        "bpftool",
        "shows what is attached when a test fails, and counts instructions",
        Sign::Program("bpftool"),
        &["bpftool"],
    ),
    debian(
        Scope::Test,
        "ethtool",
        "switches the offloads of test interfaces",
        Sign::Program("ethtool"),
        &["ethtool"],
    ),
    debian(
        Scope::Test,
        "iptables",
        "the firewall of hosts that let nothing through",
        Sign::Program("iptables"),
        &["iptables"],
    ),
    debian(
        Scope::Test,
        "conntrack",
        "fills the connection table of such a host",
        Sign::Program("conntrack"),
        &["conntrack"],
    ),
    debian(
        Scope::Test,
        "dnsmasq",
        "DHCP for the guests of the scenarios",
        Sign::Program("dnsmasq"),
        &["dnsmasq-base"],
    ),
    debian(
        Scope::Test,
        "what cloud-init's code needs",
        "cloud-init's own probe looks for the metadata service",
        Sign::Packages(&["python3-requests", "python3-yaml"]),
        &["python3-requests", "python3-yaml"],
    ),
    debian(
        Scope::Test,
        "Open vSwitch",
        "the OVSDB source is tested against the real server and its schema, and guests' interfaces beside the real switch",
        Sign::File("/usr/share/openvswitch/vswitch.ovsschema"),
        &["openvswitch-switch"],
    ),
    debian(
        Scope::Test,
        "haproxy",
        "the agent answers the haproxies that Neutron's agents run, and is tested behind the real program",
        Sign::Program("haproxy"),
        &["haproxy"],
    ),
    debian(
        Scope::Test,
        "Neutron's metadata agent",
        "the agent forwards to it where a site keeps it, and is tested before the original",
        Sign::File("/usr/lib/python3/dist-packages/neutron/agent/metadata/agent.py"),
        &["python3-neutron"],
    ),
    debian(
        Scope::Test,
        "libvirtd",
        "the libvirt source is tested against what the real one writes of its domains",
        Sign::Packages(&["libvirt-daemon", "libvirt-daemon-driver-qemu"]),
        &["libvirt-daemon", "libvirt-daemon-driver-qemu"],
    ),
    debian(Scope::Test, "virsh", "tells libvirtd what to run", Sign::Program("virsh"), &["libvirt-clients"]),
    debian(
        Scope::Test,
        "OVN's Southbound schema",
        "the OVN source is tested against the real schema, served by the database server above",
        Sign::File("/usr/share/ovn/ovn-sb.ovsschema"),
        &["ovn-central"],
    ),
    debian(
        Scope::Test,
        "Keystone and Neutron",
        "the Neutron source is tested against the real servers; their packages start nothing where a policy forbids it",
        Sign::Packages(&["keystone", "neutron-server", "uwsgi-plugin-python3"]),
        &["keystone", "neutron-server", "uwsgi-plugin-python3"],
    ),
    debian(
        Scope::Test,
        "QEMU",
        "runs guests on real taps, and the kernels that the programs must load on",
        Sign::Program("qemu-system-x86_64"),
        &["qemu-system-x86"],
    ),
    debian(
        Scope::Test,
        "mmdebstrap",
        "makes the root file systems of the virtual machines",
        Sign::Program("mmdebstrap"),
        &["mmdebstrap"],
    ),
    debian(
        Scope::Test,
        "lz4",
        "unpacks the guests' kernel, so that no emulated processor has to",
        Sign::Program("lz4"),
        &["lz4"],
    ),
    debian(
        Scope::Test,
        "xz",
        "unpacks the modules of the kernels that the programs must load on",
        Sign::Program("xz"),
        &["xz-utils"],
    ),
    debian(
        Scope::Test,
        "strip",
        "takes the debugging information off what runs on those kernels, or it would fill their memory",
        Sign::Program("strip"),
        &["binutils"],
    ),
    debian(Scope::Test, "mkfs.ext4", "formats the guests' disks", Sign::Program("mkfs.ext4"), &["e2fsprogs"]),
    debian(Scope::Test, "buildah", "builds the container image", Sign::Program("buildah"), &["buildah"]),
    // Not crun, which buildah and podman would take along: 1.8 refuses a host whose cgroup v2 tree holds some of
    // the controllers and whose v1 trees hold the others.
    debian(Scope::Test, "runc", "starts the agent's container", Sign::Program("runc"), &["runc"]),
    debian(
        Scope::Test,
        "podman",
        "runs the agent's container with the rights that the DaemonSet grants",
        Sign::Program("podman"),
        &["podman"],
    ),
    debian(
        Scope::Test,
        "systemd-analyze",
        "checks the unit file",
        Sign::Program("systemd-analyze"),
        &["systemd"],
    ),
    debian(
        Scope::Test,
        "Python with virtual environments",
        "the DaemonSet is checked against Kubernetes' schemas by kubernetes-validate",
        Sign::Answer(&["python3", "-c", "import ensurepip, venv; print('here')"], "here"),
        &["python3-venv"],
    ),
    debian(
        Scope::Test,
        "valgrind",
        "counts the instructions of packets and requests",
        Sign::Program("valgrind"),
        &["valgrind"],
    ),
    debian(
        Scope::Test,
        "DejaVu fonts",
        "the words in the pictures of a report",
        Sign::File("/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf"),
        &["fonts-dejavu-core"],
    ),
    debian(
        Scope::Test,
        "nginx",
        "answers at the end of every path that is measured, at the least cost there is",
        Sign::Program("nginx"),
        &["nginx-light"],
    ),
    debian(
        Scope::Bench,
        "MariaDB",
        "Neutron's metadata agent is measured as it is shipped: before neutron-server and its database",
        Sign::Packages(&["mariadb-server", "python3-pymysql"]),
        &["mariadb-server", "python3-pymysql"],
    ),
    debian(
        Scope::Bench,
        "RabbitMQ",
        "carries that agent's questions to neutron-server",
        Sign::Packages(&["rabbitmq-server"]),
        &["rabbitmq-server"],
    ),
    debian(
        Scope::Bench,
        "nova-api-metadata",
        "answers where the bench measures what a guest feels in a cloud",
        Sign::Packages(&["nova-api"]),
        &["nova-api"],
    ),
];

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// A machine that has what the test says.
    #[derive(Default)]
    pub struct FakeProbe {
        pub packages: BTreeSet<&'static str>,
        pub files: BTreeSet<&'static str>,
        pub programs: BTreeSet<&'static str>,
        pub answers: Vec<(Vec<&'static str>, &'static str)>,
        pub debian_12: bool,
        pub root: bool,
    }

    impl Probe for FakeProbe {
        fn package(&self, name: &str) -> bool {
            self.packages.contains(name)
        }
        fn file(&self, path: &Path) -> bool {
            path.to_str().is_some_and(|path| self.files.contains(path))
        }
        fn program(&self, name: &str) -> bool {
            self.programs.contains(name)
        }
        fn answer(&self, words: &[&str]) -> Option<String> {
            self.answers.iter().find(|(asked, _)| asked == words).map(|(_, answer)| (*answer).to_owned())
        }
        fn is_debian_12(&self) -> bool {
            self.debian_12
        }
        fn is_root(&self) -> bool {
            self.root
        }
    }

    /// A machine that shows every sign in the table.
    pub fn complete() -> FakeProbe {
        let mut probe = FakeProbe::default();
        for row in REQUIREMENTS {
            match row.sign {
                Sign::Packages(names) => probe.packages.extend(names),
                Sign::File(path) => drop(probe.files.insert(path)),
                Sign::Program(name) => drop(probe.programs.insert(name)),
                Sign::Answer(words, beginning) => probe.answers.push((words.to_vec(), beginning)),
            }
        }
        probe
    }

    fn names(rows: &[&Requirement]) -> Vec<&'static str> {
        rows.iter().map(|row| row.what).collect()
    }

    #[test]
    fn a_complete_machine_misses_nothing_and_an_empty_one_everything() {
        assert_eq!(names(&missing(Scope::Bench, &complete())), [""; 0]);
        assert_eq!(missing(Scope::Bench, &FakeProbe::default()).len(), REQUIREMENTS.len());
    }

    #[test]
    fn testing_asks_for_no_server_that_only_a_bench_measures() {
        let rows = missing(Scope::Test, &FakeProbe::default());
        assert!(names(&rows).contains(&"QEMU"));
        assert!(!names(&rows).contains(&"MariaDB") && !names(&rows).contains(&"RabbitMQ"));
    }

    #[test]
    fn building_asks_for_no_test_tool() {
        let rows = missing(Scope::Build, &FakeProbe::default());
        assert!(rows.iter().all(|row| row.scope == Scope::Build));
        assert!(names(&rows).contains(&"bpf-linker 0.13.0"));
        assert!(!names(&rows).contains(&"QEMU"));
    }

    #[test]
    fn a_tool_of_another_version_counts_as_missing() {
        let mut probe = complete();
        for (words, answer) in &mut probe.answers {
            if words[0] == "bpf-linker" {
                *answer = "bpf-linker 0.9.5";
            }
        }
        assert_eq!(names(&missing(Scope::Build, &probe)), ["bpf-linker 0.13.0"]);
    }

    #[test]
    fn one_package_of_a_set_is_not_the_set() {
        let mut probe = complete();
        probe.packages.remove("rust-web-src");
        let [row] = missing(Scope::Build, &probe)[..] else { panic!("one row") };
        assert!(row.what.starts_with("Rust compiler"));
    }
}
