//! One object for every kernel: the tests in [`inside`] run on the running kernel, and again on
//! each of Debian's kernels in a virtual machine.
//!
//! | kernel | from | hook |
//! |---|---|---|
//! | 5.10, the oldest supported | Debian 11 | clsact |
//! | 6.1 | Debian 12 | clsact |
//! | 6.12 | Debian 12, security updates | TCX |
//! | the running one | this machine | depends on its version |
//!
//! The output is kept in `target/vm-kernels`: the sizes of the programs, and the verifier's log
//! for a rejected program.

#![expect(clippy::print_stdout, reason = "the sizes of the programs belong to the test's output")]

use metadata_tests::vm::KernelUnderTest;

mod inside {
    //! Assertions for every kernel.

    use metadata_ebpf::identity::METADATA_IPV4;
    use metadata_ebpf::reason::Reason;
    use metadata_tests::packets::differential::decide_alike;
    use metadata_tests::packets::kernel::Fixture;
    use metadata_tests::packets::table;
    use metadata_tests::two_tenants::HOSTNAME;
    use metadata_tests::{Answer, Instance, Mode, PacketSocket, ServedTenants};

    /// Few, because all but the running kernel are emulated, but enough for each reason to occur.
    const FRAMES: u64 = 64_000;
    const USER_DATA: &str = "/openstack/latest/user_data";
    const PASSWORD: &str = "/openstack/2013-04-04/password";

    fn release() -> (u32, u32) {
        let uname = nix::sys::utsname::uname().unwrap();
        let mut numbers = uname.release().to_str().unwrap().split(['.', '-']).map(str::parse);
        (numbers.next().unwrap().unwrap(), numbers.next().unwrap().unwrap())
    }

    #[test]
    fn both_programs_load_and_are_counted() {
        let (major, minor) = release();
        for (copy, program) in Fixture::set_up("count", |fixture| fixture.load().programs()) {
            // An instruction has eight bytes. The verifier reports its count since 5.16.
            let translated = program.size_translated().unwrap() / 8;
            let verified = program.verified_instruction_count();
            let name = program.name_as_str().unwrap();
            println!("{major}.{minor} {name} {copy}: {translated} instructions, {verified:?} verified");
            // A third of it is for ICMP errors and IPv4 options, which are rare.
            assert!(translated < 7_168, "{name} {copy} is too large");
            assert!(verified.unwrap_or(0) < 100_000, "{name} is a tenth of the limit of the verifier");
        }
    }

    #[test]
    fn every_case_of_the_packet_table_holds() {
        table::assert_in_kernel();
    }

    #[test]
    fn the_kernel_and_the_host_build_decide_alike() {
        println!("{}", decide_alike(FRAMES, 7));
    }

    /// Bodies of several segments pass as one GSO frame in either direction.
    #[test]
    fn two_guests_are_served_over_both_protocols() {
        let tenants = ServedTenants::new();
        let ServedTenants { process, nova, red, blue, .. } = &tenants;
        for guest in [red, blue] {
            guest.assert_hostname_served();
            let answer = guest.get_v6(HOSTNAME);
            assert_eq!((answer.status, answer.text()), (200, guest.hostname().as_str()));
        }
        let hook = process.state()["datapath"]["hook"].clone();
        assert_eq!(hook, if release() >= (6, 6) { "tcx" } else { "clsact" });

        let large: Vec<u8> = (0..=250).cycle().take(400_000).collect();
        nova.add(Instance { user_data: Some(large.clone()), ..Instance::from_port(&red.port) });
        for answer in [red.get(USER_DATA), red.get_v6(USER_DATA)] {
            assert_eq!(answer.status, 200);
            assert!(answer.body == large, "{} bytes came", answer.body.len());
        }
        nova.set_mode(Mode::Fixed(Answer::text(200, "taken")));
        let posted = [
            red.post(PASSWORD, &large[..60_000]),
            red.connect_v6().request("POST", PASSWORD, &[], &large[..60_000]).unwrap(),
        ];
        assert_eq!(posted.map(|answer| answer.status), [200, 200]);
        let [.., over_ipv4, over_ipv6] = &nova.requests()[..] else { panic!("two requests") };
        assert!(over_ipv4.body == large[..60_000] && over_ipv6.body == large[..60_000]);
        for reason in [Reason::ConnectionOpened, Reason::Segment, Reason::Reply, Reason::NdReply] {
            assert!(process.packets(reason) > 0, "{reason:?}");
        }
    }

    /// A GSO frame that the guest's interface cannot accept is segmented to the guest's MSS.
    /// Translation from IPv6 makes every segment 20 bytes shorter and must not make its payload
    /// longer.
    #[test]
    fn a_large_answer_is_cut_to_the_guests_segment_size() {
        const MSS: usize = 1000;
        let tenants = ServedTenants::new();
        let ServedTenants { nova, red, host, .. } = &tenants;
        host.netns().run(&["ethtool", "-K", &red.tap, "tso", "off"]);
        let route = red.netns().run(&["ip", "route", "show", "169.254.169.254"]);
        red.netns().ip(&format!("route replace {} advmss {MSS}", route.trim()));
        nova.add(Instance { user_data: Some(vec![b'x'; 100_000]), ..Instance::from_port(&red.port) });
        let wire = PacketSocket::open(red.netns(), "eth0");
        assert_eq!(red.get(USER_DATA).body.len(), 100_000);

        let (mut largest, mut sum) = (0, 0);
        wire.wait_for("large answer", |frame| {
            let of_the_answer = frame[12..14] == [8, 0] && frame[26..30] == METADATA_IPV4;
            if of_the_answer {
                largest = largest.max(frame.len());
                sum += frame.len();
            }
            // The socket buffers no more than this.
            (sum > 40_000).then_some(())
        });
        // TCP options count as payload here.
        assert_eq!(largest, 14 + 20 + 20 + MSS);
    }
}

#[test]
fn linux_5_10_serves() {
    serves("linux-image-cloud-amd64", true, "5.10.");
}

#[test]
fn linux_6_1_serves() {
    serves("linux-image-cloud-amd64", false, "6.1.");
}

#[test]
fn linux_6_12_serves() {
    serves("linux-image-6.12-cloud-amd64", false, "6.12.");
}

fn serves(metapackage: &str, bullseye: bool, version: &str) {
    let kernel = KernelUnderTest::prepare(metapackage, bullseye).unwrap();
    let output = kernel.run_this_test("kernels::inside:: --test-threads=1 --nocapture").unwrap();
    assert!(output.lines().any(|line| line.starts_with(version)), "another kernel: {output}");
    assert!(output.contains("5 passed; 0 failed; 0 ignored"), "{output}");
    for line in output.lines().filter(|line| line.contains(" instructions, ")) {
        println!("{line}");
    }
}
