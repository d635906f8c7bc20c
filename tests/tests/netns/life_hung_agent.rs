//! Connections that an agent held when it hung end, although only the portal's sockets know them.

use std::io::ErrorKind;
use std::net::TcpStream;

use metadata_tests::http::Connection;
use metadata_tests::wait::PATIENCE;
use metadata_tests::{Mode, TwoTenants, legacy};

/// A request without an answer yet.
fn request(mut connection: Connection<TcpStream>) -> Connection<TcpStream> {
    connection.send("GET / HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n").expect("send the request");
    connection
}

fn assert_reset(mut connection: Connection<TcpStream>, case: &str) {
    let error = connection.receive().expect_err(case);
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{case}: {error}");
}

/// Each guest has three requests open: one that the agent has accepted, and two that it has not.
#[test]
fn guests_of_a_hung_agent_are_reset_and_can_retry() {
    for has_legacy_path in [true, false] {
        let tenants = TwoTenants::new();
        let legacies = tenants.networks.each_ref().map(|network| has_legacy_path.then(|| network.legacy()));
        let agent = tenants.agent().set("metadata_agent", "heartbeat_stale_after", "3").install();
        let process = agent.start();
        tenants.nova.set_mode(Mode::Hold);
        let guests = tenants.guests.each_ref();
        let in_flight = guests.map(|guest| request(guest.connect()));
        tenants.nova.wait_for(2, PATIENCE);

        process.freeze();
        let queued = guests.map(|guest| request(guest.connect()));
        let queued_v6 = guests.map(|guest| request(guest.connect_v6()));
        for (kind, connections) in [("in flight", in_flight), ("queued", queued), ("IPv6", queued_v6)] {
            for connection in connections {
                assert_reset(connection, &format!("{kind}, legacy path: {has_legacy_path}"));
            }
        }
        if has_legacy_path {
            for (guest, network) in guests.iter().zip(&tenants.networks) {
                assert_eq!(guest.get("/").text(), format!("{}{}", legacy::GREETING, network.id));
            }
        }
        process.thaw();
        tenants.nova.set_mode(Mode::Serve);
        drop(legacies);
        tenants.assert_served();
    }
}
