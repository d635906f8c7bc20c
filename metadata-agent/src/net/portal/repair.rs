//! Repairs of the portal. Most of them complete the portal as the start does.

use metadata_ebpf::identity::PORTAL_ADDRESS;

use super::desired::{Damage, Desired, Repair};
use super::{
    GATEWAY, HOST_END, PORTAL_END, Portal, PortalError, identity_prefix, set_up_inner_end, sysctl, veth,
};
use crate::net::netlink::VethPair;

/// Length of the prefix of the address that the agent listens on.
const ADDRESS_PREFIX: u8 = 128;

impl Portal {
    /// Creates what is missing of the portal, uplinks aside, and sets up what is there.
    pub(super) async fn complete(&self) -> Result<(), PortalError> {
        let Self { host, inside, mtu, .. } = self;
        // The veth pair.
        let pair = VethPair {
            name: HOST_END,
            peer: PORTAL_END,
            peer_netns: &self.netns,
            mtu: *mtu,
            mac: None,
            peer_mac: Some(self.mac),
        };
        let (outer, inner) = match veth::adopt(host, inside, &pair).await? {
            Some(ends) => ends,
            None => veth::establish(host, inside, &pair).await?,
        };

        // The sysctls and the host end.
        inside.set_mtu(inner.index, *mtu).await?;
        let refused = self.netns.run(sysctl::apply)??;
        self.note_unwritable(refused);
        host.set_mtu(outer.index, *mtu).await?;
        host.disable_link_local(outer.index).await?;
        host.set_up(outer.index, *mtu).await?;

        // The portal's end and the address that the agent listens on.
        let lo = inside.link("lo").await?.ok_or_else(|| PortalError::Vanished { name: "lo".to_owned() })?;
        inside.set_up(lo.index, lo.mtu).await?;
        inside.set_address(lo.index, PORTAL_ADDRESS.into(), ADDRESS_PREFIX).await?;
        set_up_inner_end(inside, inner.index, *mtu).await?;
        inside.set_route(identity_prefix(), GATEWAY, inner.index).await?;
        self.set_host_ifindex(outer.index);
        Ok(())
    }

    /// Returns the differences from the desired state.
    pub(super) async fn damage(&self) -> Result<Vec<Damage>, PortalError> {
        let before = self.uplinks.version();
        let observed = self.observe().await?;
        let uplinks = self.uplinks.all();
        let are_comparable = before.is_some() && self.uplinks.version() == before;
        let desired = Desired {
            mtu: self.mtu,
            mac: self.mac,
            unwritable: &self.unwritable(),
            uplinks: are_comparable.then_some(&uplinks),
        };
        Ok(desired.compare(&observed))
    }

    /// Repairs this damage. Goes on after an error, and returns the first one.
    pub(super) async fn repair(&self, damage: &[Damage]) -> Result<(), PortalError> {
        let mut outcome = Ok(());
        let mut is_incomplete = false;
        for Damage { repair, .. } in damage {
            let repaired = match repair {
                Repair::Complete | Repair::SetSysctl => {
                    is_incomplete = true;
                    Ok(())
                }
                Repair::ReplaceAddress => {
                    is_incomplete = true;
                    self.delete_address().await
                }
                Repair::RestoreName => self.netns.restore_name().map_err(PortalError::from),
                Repair::DeleteRoute(route) => {
                    self.inside.delete_listed_route(route).await.map_err(PortalError::from)
                }
                Repair::AddRule(rule) => self.inside.set_rule(rule).await.map_err(PortalError::from),
                Repair::DeleteRule(rule) => self.inside.delete_rule(rule).await.map_err(PortalError::from),
                // Below: sysctls come first.
                Repair::RestoreUplink(_) => Ok(()),
                Repair::ReplaceUplink(inner) => {
                    self.uplinks.mark_lost(*inner);
                    Ok(())
                }
            };
            outcome = outcome.and(repaired);
        }
        if is_incomplete {
            outcome = outcome.and(self.complete().await);
        }
        let mut uplinks: Vec<_> = damage
            .iter()
            .filter_map(
                |damage| {
                    if let Repair::RestoreUplink(inner) = damage.repair { Some(inner) } else { None }
                },
            )
            .collect();
        uplinks.dedup();
        for inner in uplinks {
            outcome = outcome.and(self.restore_uplink(inner).await);
        }
        outcome
    }

    async fn delete_address(&self) -> Result<(), PortalError> {
        let Some(lo) = self.inside.link("lo").await? else { return Ok(()) };
        Ok(self.inside.delete_address(lo.index, PORTAL_ADDRESS.into(), ADDRESS_PREFIX).await?)
    }
}
