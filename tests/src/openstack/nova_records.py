"""Instances, made through Nova's own objects. Arguments: Nova's configuration, and a JSON file."""
import base64
import json
import sys

from nova import config
from nova import context
from nova import exception
from nova import objects
from nova.network import model
from oslo_utils import timeutils

HOST = 'hypervisor'
IMAGE = 'b4bfd0d0-5a8e-4a0c-8f6a-3a1d5b6c7d8e'
KEY = 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBenchBenchBenchBenchBenchBenchBenchBenchBenc bench'
USER_DATA = base64.b64encode(b'#cloud-config\npackage_update: false\n').decode()


def flavor(ctx):
    made = objects.Flavor(
        ctx, name='m1.bench', flavorid='bench', memory_mb=512, vcpus=1, root_gb=1, ephemeral_gb=0, swap=0,
        rxtx_factor=1.0, vcpu_weight=0, disabled=False, is_public=True, extra_specs={})
    try:
        made.create()
    except (exception.FlavorExists, exception.FlavorIdExists):
        made = objects.Flavor.get_by_flavor_id(ctx, 'bench')
    return made


def interface(net, one):
    gateway = model.IP(address=net['gateway'], type='gateway')
    subnet = model.Subnet(cidr=net['cidr'], gateway=gateway, version=4, ips=[model.FixedIP(address=one['address'])],
                          routes=[model.Route(cidr='169.254.169.254/32', gateway=gateway)])
    network = model.Network(id=net['id'], bridge='br-int', label='bench', subnets=[subnet], mtu=1500)
    return model.VIF(id=one['id'], address=one['mac'], network=network, type='ovs', devname=one['tap'], active=True)


def add_instance(ctx, kind, net, one):
    """What nova-api and a compute node leave of an instance that has booted."""
    name = 'guest-' + one['address'].replace('.', '-')
    keypair = objects.KeyPair(name='bench', user_id=one['project'], fingerprint='', public_key=KEY, type='ssh')
    made = objects.Instance(
        ctx, uuid=one['instance'], project_id=one['project'], user_id=one['project'], display_name=name,
        hostname=name, host=HOST, node=HOST, availability_zone='nova', launch_index=0, reservation_id='r-bench',
        vm_state='active', power_state=1, launched_at=timeutils.utcnow(), image_ref=IMAGE,
        root_device_name='/dev/vda', memory_mb=512, vcpus=1, root_gb=1, ephemeral_gb=0, flavor=kind, old_flavor=None,
        new_flavor=None, key_name='bench', key_data=KEY, keypairs=objects.KeyPairList(objects=[keypair]),
        user_data=USER_DATA, metadata={'role': 'bench'}, system_metadata={'image_base_image_ref': IMAGE},
        security_groups=objects.SecurityGroupList(objects=[]))
    made.create()
    made.info_cache.network_info = model.NetworkInfo([interface(net, one)])
    made.info_cache.save()
    objects.BlockDeviceMapping(
        ctx, instance_uuid=made.uuid, source_type='image', destination_type='local', device_type='disk',
        device_name='/dev/vda', boot_index=0, image_id=IMAGE, delete_on_termination=True, volume_size=1).create()


def main(conf, records):
    config.parse_args(['nova', '--config-file', conf])
    objects.register_all()
    with open(records) as file:
        networks = json.load(file)
    admin = context.get_admin_context()
    kind = flavor(admin)
    [cell] = [cell for cell in objects.CellMappingList.get_all(admin) if not cell.is_cell0()]
    for net in networks:
        for one in net['ports']:
            with context.target_cell(admin, cell) as ctx:
                add_instance(ctx, kind, net, one)
            objects.InstanceMapping(
                admin, instance_uuid=one['instance'], cell_mapping=cell, project_id=one['project'],
                user_id=one['project'], queued_for_delete=False).create()


main(*sys.argv[1:])
