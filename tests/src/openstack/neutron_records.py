"""Networks, routers and ports, made through Neutron's own objects. Arguments: Neutron's configuration, and a JSON file."""
import json
import sys

import netaddr
from neutron.common import config
from neutron.db.migration.models import head  # noqa: objects lean on all models, as in the server
from neutron.objects import network, ports, router, subnet
from neutron_lib import constants
from neutron_lib import context
from neutron_lib.db import api
from oslo_utils import uuidutils

HOST = 'hypervisor'
PROJECT = uuidutils.generate_uuid(dashed=False)


def add_network(ctx, one):
    """Hands back its segment and its subnet."""
    segment, sub = uuidutils.generate_uuid(), uuidutils.generate_uuid()
    network.Network(ctx, id=one['id'], project_id=PROJECT, name='bench', status='ACTIVE', admin_state_up=True,
                    mtu=1500).create()
    network.NetworkSegment(ctx, id=segment, network_id=one['id'], network_type='local').create()
    subnet.Subnet(ctx, id=sub, project_id=PROJECT, network_id=one['id'], ip_version=4, enable_dhcp=False,
                  cidr=netaddr.IPNetwork(one['cidr']), gateway_ip=netaddr.IPAddress(one['gateway'])).create()
    return segment, sub


def add_port(ctx, net, segment, sub, one):
    """A port that is bound, as Open vSwitch's agent and its driver leave it."""
    ports.Port(ctx, id=one['id'], project_id=one['project'], network_id=net, mac_address=netaddr.EUI(one['mac']),
               device_id=one['device'], device_owner=one['owner'], admin_state_up=True, status='ACTIVE',
               name='').create()
    ports.IPAllocation(ctx, port_id=one['id'], subnet_id=sub, network_id=net,
                       ip_address=netaddr.IPAddress(one['address'])).create()
    ports.PortBinding(ctx, port_id=one['id'], host=HOST, vif_type='ovs', vnic_type='normal', vif_details={},
                      profile={}, status='ACTIVE').create()
    ports.PortBindingLevel(ctx, port_id=one['id'], host=HOST, level=0, driver='openvswitch',
                           segment_id=segment).create()


def add_router(ctx, net, segment, sub, address):
    """One with the network's id."""
    port, owner = uuidutils.generate_uuid(), constants.DEVICE_OWNER_ROUTER_INTF
    router.Router(ctx, id=net, project_id=PROJECT, name='bench', status='ACTIVE', admin_state_up=True).create()
    add_port(ctx, net, segment, sub, {
        'id': port, 'project': PROJECT, 'mac': 'fa:16:3f:00:00:01', 'device': net, 'owner': owner,
        'address': address})
    router.RouterPort(ctx, router_id=net, port_id=port, port_type=owner).create()


def main(conf, records):
    config.register_common_config_options()
    config.init(['--config-file', conf])
    with open(records) as file:
        networks = json.load(file)
    ctx = context.get_admin_context()
    with api.CONTEXT_WRITER.using(ctx):
        for net in networks:
            segment, sub = add_network(ctx, net)
            add_router(ctx, net['id'], segment, sub, net['gateway'])
            for one in net['ports']:
                port = dict(one, device=one['instance'], owner=constants.DEVICE_OWNER_COMPUTE_PREFIX + 'nova')
                add_port(ctx, net['id'], segment, sub, port)


main(*sys.argv[1:])
