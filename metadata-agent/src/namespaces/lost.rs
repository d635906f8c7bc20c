//! Programs that somebody takes off an interface in a namespace, and their way back, as on the host (see `guests/lost.rs`): within
//! a second, as the same attachment.
//!
//! The kernel tells of filters, on the socket by which the namespace is watched anyway, and of TCX links nobody: those are
//! looked for, by one thread that goes from namespace to namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::site::{Site, SiteError};
use crate::attach::qdisc;
use crate::datapath::{self, Hook};
use crate::ids::IfIndex;
use crate::net::portal::HOST_END;

/// How often programs are looked for, and for how long at once.
pub(super) const PATROL: Duration = Duration::from_millis(500);
const PATROL_TURN: Duration = Duration::from_millis(20);
/// How long whoever deleted a qdisc has for making another before we do, which would be in its way.
const GRACE: Duration = Duration::from_millis(400);

/// Looks for TCX links in the namespaces whose turn it is, after `seen`. Gives the name of the last one looked at, unless it is
/// the last one of all.
pub(super) fn patrol(
    sites: &mut BTreeMap<Arc<str>, Site>,
    seen: Option<&Arc<str>>,
) -> Result<Option<Arc<str>>, SiteError> {
    let after = seen.map_or(Bound::Unbounded, Bound::Excluded);
    let mut asked = Vec::new();
    let mut expected = Vec::new();
    for (name, site) in sites.range::<Arc<str>, _>((after, Bound::Unbounded)) {
        if let Some(of_site) = site.datapath.expected_programs()? {
            asked.push(Arc::clone(name));
            expected.push(of_site);
        }
    }
    let found = datapath::find_detached(&expected, Instant::now() + PATROL_TURN)?;
    let last = if found.len() == asked.len() { None } else { asked[..found.len()].last().or(seen).cloned() };
    for (name, missing) in asked.iter().zip(found) {
        let Some(site) = sites.get_mut(name).filter(|_| !missing.is_empty()) else { continue };
        for index in missing {
            site.is_missing(index);
            site.put_back(index);
        }
    }
    Ok(last)
}

/// The sites that something is still to be put back in.
pub(super) fn due(sites: &BTreeMap<Arc<str>, Site>) -> BTreeSet<Arc<str>> {
    sites.iter().filter(|(_, site)| !site.missing.is_empty()).map(|(name, _)| Arc::clone(name)).collect()
}

impl Site {
    /// Looks whether filters are in their place, and puts back what is not: at once where there is a qdisc for it.
    pub(super) async fn keep_filters(&mut self) -> Result<(), SiteError> {
        let guests = self.attached.keys().copied().filter(|_| self.datapath.hook() == Hook::Clsact);
        for index in guests.chain(self.datapath.portal()).collect::<Vec<_>>() {
            let programs = self.netlink.filter_programs(index).await?;
            if programs.contains(&self.datapath.program_id(index)?) {
                self.missing.remove(&index);
                continue;
            }
            let since = self.is_missing(index);
            if self.put_back(index) || since.elapsed() < GRACE && self.attached.contains_key(&index) {
                continue;
            }
            if self.attached.contains_key(&index) {
                qdisc::provide_qdisc(&self.netlink, &self.datapath, index).await?;
            } else {
                self.netlink.add_ingress_qdisc(index).await?;
            }
            self.put_back(index);
        }
        Ok(())
    }

    /// Since when. The qdisc may be somebody else's by now: we never delete it.
    fn is_missing(&mut self, index: IfIndex) -> Instant {
        if let Some(since) = self.missing.get(&index) {
            return *since;
        }
        let interface = self.interface(index);
        warn!(namespace = %self.name, interface, "somebody took our program off; putting it back");
        if self.datapath.filter(index).is_some()
            && let Err(error) = self.datapath.set_qdisc_owned(index, false)
        {
            warn!(namespace = %self.name, interface, %error, "a qdisc that is gone is still noted");
        }
        let now = Instant::now();
        self.missing.insert(index, now);
        now
    }

    /// Whether it worked. Without a qdisc it does not, which is not worth telling; what keeps failing is tried again and again.
    fn put_back(&mut self, index: IfIndex) -> bool {
        let interface = self.interface(index);
        if self.datapath.reattach(index, &interface).is_err() {
            return false;
        }
        let after = self.missing.remove(&index).map(|since| since.elapsed());
        info!(namespace = %self.name, interface, ?after, "our program is back");
        true
    }

    fn interface(&self, index: IfIndex) -> String {
        let attached = self.attached.get(&index);
        attached.map_or_else(|| HOST_END.to_owned(), |attached| attached.link.name.clone())
    }
}
