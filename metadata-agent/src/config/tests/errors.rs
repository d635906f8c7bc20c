//! Errors of options and of their combinations. None shows a secret.

use proptest::prelude::*;
use secrecy::ExposeSecret;

use super::*;
use crate::nova_access::ClientCertificate;
use crate::sources::neutron::{Credentials, Domain, NeutronAuth};

#[test]
fn all_errors_are_reported_with_origin_and_accepted_values() {
    let ini = "[DEFAULT]\nnova_metadata_host = http://nova\nno separator\nauth_ca_cert = /nonexistent/ca\n\
               [metadata_agent]\nportal_mtu = $mtu\nlibvirt_dir = $nope/x\nportal_mtu = 12\n";
    let host = TestHost::new()
        .file("a.ini", ini)
        .env("METADATA_AGENT_ATTACH_MODE", "xdp")
        .flag("guest_link_kinds", "tun,bridge");
    let gone = ConfigSource::File(host.path("gone.ini"));
    let gone_dir = ConfigSource::Dir(host.path("gone.d"));
    assert_eq!(
        host.source(gone).source(gone_dir).errors(),
        [
            "/a.ini:3: neither `=` nor `:` in what should be `option = value`",
            "cannot read configuration /gone.ini: No such file or directory (os error 2)",
            "cannot read configuration /gone.d: No such file or directory (os error 2)",
            "nova_metadata_host: \"http://nova\" is not accepted (/a.ini:2); accepted is a list separated by commas, each a host name, an IPv4 address or an IPv6 address",
            "auth_ca_cert: cannot read \"/nonexistent/ca\" (/a.ini:4): No such file or directory (os error 2); accepted is the path of a readable file, or nothing for the system's own",
            "libvirt_dir: `$nope` names no option; a dollar sign itself is written `$$` (/a.ini:7)",
            "guest_link_kinds: \"tun,bridge\" is not accepted (--guest-link-kinds); accepted is a list separated by commas, each one of tun, veth",
            "attach_mode: \"xdp\" is not accepted (environment METADATA_AGENT_ATTACH_MODE); accepted is one of auto, tcx, clsact",
            "portal_mtu: \"12\" is not accepted (/a.ini:8); accepted is a whole number from 1280 to 65535",
        ]
    );
}

#[test]
fn a_client_certificate_needs_its_key() {
    let host = TestHost::new().write("crt", "x").write("key", "x");
    let (crt, key) = (host.path("crt"), host.path("key"));
    let host = host.env("METADATA_AGENT_NOVA_CLIENT_CERT", &crt);
    assert_eq!(
        host.errors(),
        [
            "nova_client_cert is set (environment METADATA_AGENT_NOVA_CLIENT_CERT) but nova_client_priv_key is not; accepted is both or neither"
        ]
    );
    let config = host.env("METADATA_AGENT_NOVA_CLIENT_PRIV_KEY", &key).load().unwrap();
    assert_eq!(config.client_certificate(), Some(ClientCertificate { certificate: crt, key }));
    assert!(config.warnings().contains(&ConfigWarning::TlsUnused));
}

#[test]
fn neutron_needs_all_options_that_belong_together() {
    let set = |options: &[(&str, &str)]| {
        options.iter().fold(TestHost::new(), |host, (name, value)| {
            host.env(&format!("METADATA_AGENT_NEUTRON_{name}"), value)
        })
    };
    assert!(TestHost::new().load().unwrap().neutron().is_none());

    let url = ("AUTH_URL", "http://controller:5000");
    let password = [
        url,
        ("USERNAME", "agent"),
        ("USER_DOMAIN_NAME", "Default"),
        ("USER_DOMAIN_ID", "default"),
        ("PASSWORD", SECRET),
        ("PROJECT_NAME", "service"),
        ("PROJECT_DOMAIN_NAME", "Default"),
    ];
    let config = set(&password).load().unwrap();
    let NeutronAuth::Keystone { url: at, credentials } = &config.neutron().unwrap().auth else { panic!() };
    assert_eq!(at.as_str(), "http://controller:5000");
    let Credentials::Password { user, user_domain, password: secret, .. } = credentials else { panic!() };
    assert_eq!((user.as_str(), secret.expose_secret()), ("agent", SECRET));
    assert_eq!(*user_domain, Domain::Id("default".to_owned()));
    assert!(!format!("{config:?}").contains(SECRET));

    let credential = ("AUTH_TYPE", "v3applicationcredential");
    let no_auth = ("AUTH_TYPE", "none");
    for (options, present, missing) in [
        (&[url][..], "auth_url", "username"),
        (&password[..3], "auth_url", "password"),
        (&password[..6], "auth_url", "project_domain_name"),
        (&password[1..], "username", "auth_url"),
        (&[url, credential], "auth_url", "application_credential_id"),
        (&[url, credential, ("APPLICATION_CREDENTIAL_ID", "x")], "auth_url", "application_credential_secret"),
        (
            &[("ENDPOINT_OVERRIDE", "http://a:9696")],
            "endpoint_override",
            "auth_url or neutron_auth_type = none",
        ),
        (&[no_auth], "auth_type", "endpoint_override"),
    ] {
        let origin = format!("environment METADATA_AGENT_NEUTRON_{}", present.to_ascii_uppercase());
        assert_eq!(
            set(options).errors(),
            [format!("neutron_{present} is set ({origin}) but neutron_{missing}, which it needs, is not")]
        );
    }
    let config = set(&[no_auth, ("ENDPOINT_OVERRIDE", "http://a:9696/"), ("INSECURE", "on")]).load().unwrap();
    assert!(
        matches!(&config.neutron().unwrap().auth, NeutronAuth::NoAuth { endpoint } if endpoint.as_str() == "http://a:9696")
    );
    assert!(config.warnings().contains(&ConfigWarning::NeutronNotChecked));
}

#[test]
fn the_secret_is_never_shown() {
    let config = TestHost::new()
        .file("a.ini", format!("[DEFAULT]\nmetadata_proxy_shared_secret = {SECRET}\n"))
        .load()
        .unwrap();
    assert_eq!(config.metadata_proxy_shared_secret.expose_secret(), SECRET);
    let json = serde_json::to_string(config.settings()).unwrap();
    assert!(json.contains("\"value\":\"(set)\""), "{json}");
    let shown = format!("{config:?} {config:#?} {:?} {json} {:?}", config.settings(), config.warnings());
    assert!(!shown.contains(SECRET), "{shown}");
}

/// Tries every known way for an error to show the secret.
#[test]
fn no_error_shows_the_secret() {
    let mut not_utf8 = SECRET.as_bytes().to_vec();
    not_utf8.push(0xff);
    let os_string = <OsString as std::os::unix::ffi::OsStringExt>::from_vec(not_utf8.clone());
    let secret = |text: &str| format!("[DEFAULT]\nmetadata_proxy_shared_secret = {text}\n");
    let hosts = [
        TestHost::new().file("a", secret(&format!("pa${}", SECRET.replace('-', "_")))),
        TestHost::new().file("a", secret(&format!("{SECRET}$metadata_proxy_shared_secret"))),
        TestHost::new()
            .file("a", format!("{}nova_metadata_host = $metadata_proxy_shared_secret\n", secret(SECRET))),
        TestHost::new()
            .file("a", format!("{}x = $metadata_proxy_shared_secret\nauth_ca_cert = /$x\n", secret(SECRET))),
        TestHost::new().file("a", format!("[DEFAULT]\npassword = {SECRET}\nnova_metadata_host = $password/\n")),
        TestHost::new().file("a", format!("[METADATA]\nmetadata_proxy_shared_secret = pa${}", SECRET.replace('-', "_"))),
        TestHost::new().file(
            "a",
            format!("[metadata]\nmetadata_proxy_shared_secret = {SECRET}\n[DEFAULT]\nhost = ${{METADATA.metadata_proxy_shared_secret}}\n"),
        ),
        TestHost::new().file("a", "[DEFAULT]\npassword = a$hunter2_xyzzy\nnova_metadata_host = $password\n"),
        TestHost::new().file("a", format!("[DEFAULT]\nmetadata_proxy_shared_secret {SECRET}\n")),
        TestHost::new().file("a", format!("metadata_proxy_shared_secret = {SECRET}\n")),
        TestHost::new().file("a", [secret("").as_bytes(), &not_utf8].concat()),
        TestHost::new().env("METADATA_AGENT_METADATA_PROXY_SHARED_SECRET", os_string),
    ];
    for (number, host) in hosts.iter().enumerate() {
        let errors = host.load().unwrap_err();
        let shown = format!("{errors} {errors:?} {errors:#?}");
        assert!(!shown.contains("hunter2"), "case {number}: {shown}");
    }
}

proptest! {
    #[test]
    fn no_file_causes_a_panic(text in "(\\[DEFAULT\\]|\\[metadata_agent\\])\n((nova_metadata_host|portal_mtu|guest_interfaces|identity_hold)=[ -~\u{e9}]{0,12}\n){0,4}") {
        let _ = TestHost::new().file("a.ini", text).load();
    }
}

#[test]
fn a_secret_file_must_hold_a_secret() {
    let host = TestHost::new().write("empty", "");
    let path = host.path("empty");
    let errors = host.env("METADATA_AGENT_SHARED_SECRET_FILES", path).errors();
    assert!(errors[0].contains("\"/empty\"") && errors[0].contains("it is empty"), "{errors:?}");
}

#[test]
fn options_of_later_features_are_checked() {
    let ini = "[DEFAULT]\nhost = cmp-1\nmetadata_proxy_socket_mode = some\nmetadata_access_mark = 0xg\n\
               [OVN]\novn_sb_connection = ssl:[fd00::1]:6642,tcp:sb:6642\novsdb_probe_interval = -1\n\
               [metadata_rate_limiting]\nip_versions = 4,5\nbase_query_rate_limit = 0\n";
    let host = TestHost::new().file("a.ini", ini);
    let errors: Vec<_> =
        host.errors().iter().map(|fault| fault.split(':').next().unwrap().to_owned()).collect();
    assert_eq!(
        errors,
        [
            "metadata_proxy_socket_mode",
            "metadata_access_mark",
            "ip_versions",
            "base_query_rate_limit",
            "ovsdb_probe_interval"
        ]
    );
}

#[test]
fn the_agent_cannot_send_to_the_socket_that_it_serves() {
    let ini = "[DEFAULT]\nmetadata_proxy_socket = /a\n[metadata_agent]\nupstream = neutron-agent\n";
    let forwarding = TestHost::new().file("a.ini", ini).load().unwrap();
    assert_eq!(forwarding.neutron_agent_socket, Path::new("/a"), "where Neutron's agent listens");
    assert!(forwarding.warnings().is_empty(), "the secret is that agent's affair");
    let both = format!("{ini}serve_metadata_proxy_socket = true\n");
    let errors = TestHost::new().file("a.ini", &both).errors();
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(errors[0].contains("would send requests to itself"), "{errors:?}");
    let apart = TestHost::new().file("a.ini", format!("{both}neutron_agent_socket = /b\n"));
    assert_eq!(apart.load().unwrap().neutron_agent_socket, Path::new("/b"));
}
