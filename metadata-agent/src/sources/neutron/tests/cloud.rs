//! Scripted Keystone and Neutron.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use super::super::access::{Credentials, Domain, HttpUrl, NeutronAccess, NeutronAuth, NeutronInterface};
use secrecy::SecretString;
use std::time::Duration;

#[derive(Debug, Default)]
pub(super) struct CloudState {
    pub(super) ports: Vec<Value>,
    /// Status of Keystone's responses, if not a success.
    pub(super) keystone: Option<StatusCode>,
    /// Response of Neutron to every request.
    pub(super) neutron: Option<(StatusCode, Vec<u8>)>,
    /// Tokens that Neutron accepts.
    pub(super) tokens: BTreeSet<String>,
    /// Ports per page.
    pub(super) page: Option<usize>,
    pub(super) logins: usize,
    /// Neutron's endpoint in the catalog, if it is not this server.
    pub(super) endpoint: Option<String>,
    /// Certificate, if the server uses TLS.
    pub(super) tls: Option<Arc<rustls::ServerConfig>>,
    /// If set, each response of Neutron consumes a permit.
    pub(super) response_permits: Option<Arc<Semaphore>>,
    /// Queries that Neutron received.
    pub(super) asked: Vec<String>,
}

pub(super) struct Cloud {
    pub(super) url: HttpUrl,
    pub(super) state: Arc<Mutex<CloudState>>,
    server: JoinHandle<()>,
}

impl Drop for Cloud {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Cloud {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        Self::serve(listener, &url, CloudState::default())
    }

    /// With TLS and this certificate, as `localhost`.
    pub(super) async fn start_tls(tls: Arc<rustls::ServerConfig>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
        Self::serve(listener, &url, CloudState { tls: Some(tls), ..CloudState::default() })
    }

    fn serve(listener: TcpListener, url: &str, state: CloudState) -> Self {
        let url = HttpUrl::parse(url).unwrap();
        let state = Arc::new(Mutex::new(state));
        let (shared, base) = (Arc::clone(&state), url.clone());
        let server = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (shared, base) = (Arc::clone(&shared), base.clone());
                let tls = shared.lock().unwrap().tls.clone();
                tokio::spawn(async move {
                    let service = service_fn(|request| answer(Arc::clone(&shared), base.clone(), request));
                    let mut http = http1::Builder::new();
                    let Some(tls) = tls else {
                        return drop(http.serve_connection(TokioIo::new(stream), service).await);
                    };
                    // A connection for each request, so that each request verifies the certificate.
                    http.keep_alive(false);
                    if let Ok(stream) = TlsAcceptor::from(tls).accept(stream).await {
                        drop(http.serve_connection(TokioIo::new(stream), service).await);
                    }
                });
            }
        });
        Self { url, state, server }
    }

    pub(super) fn set<T>(&self, change: impl FnOnce(&mut CloudState) -> T) -> T {
        change(&mut self.state.lock().unwrap())
    }

    pub(super) fn access(&self) -> NeutronAccess {
        NeutronAccess {
            auth: NeutronAuth::Keystone {
                url: self.url.clone(),
                credentials: Credentials::Password {
                    user: "agent".to_owned(),
                    user_domain: Domain::Name("Default".to_owned()),
                    password: SecretString::from("right"),
                    project: "service".to_owned(),
                    project_domain: Domain::Id("default".to_owned()),
                },
            },
            endpoint: None,
            region: None,
            interface: NeutronInterface::Internal,
            ca_certificates: None,
            insecure: true,
            timeout: Duration::from_secs(5),
        }
    }
}

async fn answer(
    state: Arc<Mutex<CloudState>>,
    base: HttpUrl,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let (response_permits, (status, token, text)) = {
        let mut state = state.lock().unwrap();
        let answer = match head.uri.path() {
            "/v3/auth/tokens" => login(&mut state, &base, &body),
            "/v2.0/ports" => {
                let token = head.headers.get("x-auth-token").map_or("", |value| value.to_str().unwrap());
                let (status, text) = list(&mut state, head.uri.query().unwrap(), token);
                (status, None, text)
            }
            path => panic!("{path}"),
        };
        (state.response_permits.clone(), answer)
    };
    if let Some(response_permits) = response_permits {
        response_permits.acquire().await.unwrap().forget();
    }
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    if let Some(token) = token {
        response.headers_mut().insert("X-Subject-Token", token.parse().unwrap());
    }
    Ok(response)
}

fn login(state: &mut CloudState, base: &HttpUrl, body: &[u8]) -> (StatusCode, Option<String>, Vec<u8>) {
    state.logins += 1;
    let asked: Value = serde_json::from_slice(body).unwrap();
    let user = &asked["auth"]["identity"]["password"]["user"];
    assert_eq!((&user["name"], &user["domain"]["name"]), (&json!("agent"), &json!("Default")));
    assert_eq!(asked["auth"]["scope"]["project"]["domain"]["id"], "default");
    if let Some(status) = state.keystone {
        return (status, None, b"{}".to_vec());
    }
    let token = format!("token-{}", state.logins);
    state.tokens.insert(token.clone());
    let endpoint = state.endpoint.as_deref().unwrap_or(base.as_str());
    let body = json!({ "token": {
        "issued_at": "2026-11-23T04:00:00.000000Z", "expires_at": "2026-11-23T05:00:00.000000Z",
        "catalog": [{ "type": "network", "endpoints": [
            { "interface": "internal", "region": "one", "region_id": "one", "url": endpoint },
        ] }],
    } });
    (StatusCode::CREATED, Some(token), body.to_string().into_bytes())
}

fn list(state: &mut CloudState, query: &str, token: &str) -> (StatusCode, Vec<u8>) {
    state.asked.push(query.to_owned());
    if !state.tokens.contains(token) {
        return (StatusCode::UNAUTHORIZED, b"{}".to_vec());
    }
    if let Some(answer) = &state.neutron {
        return answer.clone();
    }
    let all = |name: &str| -> Vec<String> {
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        let values = pairs.filter(|(key, _)| *key == name).map(|(_, value)| value.replace("%3D", "="));
        values.collect()
    };
    let fits = |port: &&Value| {
        let one_of = |name: &str| all(name).is_empty() || all(name).iter().any(|value| port[name] == **value);
        let addresses = all("fixed_ips");
        let is_at = |wanted: &String| {
            let wanted = wanted.strip_prefix("ip_address=").unwrap();
            port["fixed_ips"].as_array().unwrap().iter().any(|one| one["ip_address"] == wanted)
        };
        let address = addresses.is_empty() || addresses.iter().any(is_at);
        ["binding:host_id", "id", "mac_address", "network_id", "device_id", "device_owner"]
            .iter()
            .all(|name| one_of(name))
            && address
    };
    let mut ports: Vec<Value> = state.ports.iter().filter(fits).cloned().collect();
    ports.sort_by_key(|port| port["id"].to_string());
    if let Some(marker) = all("marker").first() {
        ports.retain(|port| port["id"].as_str().unwrap() > marker.as_str());
    }
    let mut links = Vec::new();
    let limit = state.page.unwrap_or(usize::MAX);
    if ports.len() > limit {
        ports.truncate(limit);
        let last = ports.last().unwrap()["id"].as_str().unwrap();
        links.push(json!({ "rel": "next", "href": format!("http://192.0.2.1/v2.0/ports?marker={last}") }));
    }
    let fields = all("fields");
    for port in &mut ports {
        port.as_object_mut().unwrap().retain(|name, _| fields.contains(name));
    }
    (StatusCode::OK, json!({ "ports": ports, "ports_links": links }).to_string().into_bytes())
}
