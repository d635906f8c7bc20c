//! The request checks of nova/api/metadata/handler.py, in their order and wording.

use crate::http_server::{Answer, Recorded};
use crate::nova::documents::{Document, lookup, versions};
use crate::nova::error_page::Fault;
use crate::nova::instance::Instance;
use crate::nova::{Instances, path, signature};

/// The maximum length of a posted password.
const MAX_PASSWORD: usize = 1020;

pub(super) struct Handler {
    pub(super) secret: String,
    pub(super) instances: Instances,
}

impl Handler {
    pub(super) fn answer(&self, request: &Recorded) -> Answer {
        let path = path::path_info(&request.path);
        let path = path::normalised(&path);
        match path.as_slice() {
            // The real service serves these two to every client.
            [] => Answer::text(200, &versions()),
            ["healthcheck"] => Answer::text(200, "OK"),
            _ => self.identified(request, &path).unwrap_or_else(|fault| fault.page(request)),
        }
    }

    fn identified(&self, request: &Recorded, path: &[&str]) -> Result<Answer, Fault> {
        if request.header("x-metadata-provider").is_some() {
            // The load-balancer branch, where the client's header selects the instance. A proxy
            // that lets a guest get here has failed. Nova responds like this if the provider's own
            // headers are incomplete.
            return Err(Fault::BadRequest("X-Metadata-Provider is not for guests."));
        }
        let id = request.header("x-instance-id");
        let id = id.ok_or(Fault::BadRequest("X-Instance-ID header is missing from request."))?;
        let signed = request.header("x-instance-id-signature");
        let signed =
            signed.ok_or(Fault::BadRequest("X-Instance-ID-Signature header is missing from request."))?;
        let project = request.header("x-tenant-id");
        let project = project.ok_or(Fault::BadRequest("X-Tenant-ID header is missing from request."))?;
        if signed != signature(&self.secret, &id) {
            return Err(Fault::Forbidden("Invalid proxy request signature."));
        }
        let mut instances = self.instances.lock();
        let instance = instances.get_mut(&id).ok_or(Fault::NotFound)?;
        if instance.project.as_str() != project {
            return Err(Fault::NotFound);
        }
        match lookup(instance, path).ok_or(Fault::NotFound)? {
            Document::Text(body) => Ok(Answer::new(200, "text/plain; charset=UTF-8", body)),
            Document::Json(body) => Ok(Answer::new(200, "application/json", body)),
            Document::Password => password(instance, request),
        }
    }
}

fn password(instance: &mut Instance, request: &Recorded) -> Result<Answer, Fault> {
    let html = |body: Vec<u8>| Answer::new(200, "text/html; charset=UTF-8", body);
    match request.method.as_str() {
        "GET" => Ok(html(instance.password.clone().unwrap_or_default())),
        "POST" if instance.password.as_ref().is_some_and(|password| !password.is_empty()) => {
            Err(Fault::Conflict)
        }
        // nova/api/metadata/password.py compares the length with a number, also if there is none.
        "POST" if request.header("content-length").is_none() => Err(Fault::Crash),
        "POST" if request.body.len() > MAX_PASSWORD => Err(Fault::BadRequest("Request is too large.")),
        "POST" => {
            instance.password = Some(request.body.to_vec());
            Ok(html(Vec::new()))
        }
        _ => Err(Fault::BadRequest("GET and POST only are supported.")),
    }
}
