"""Neutron's own clean-up of namespaces, confined to one namespace.

Arguments: a configuration file, the namespace, and one of
  netns        run neutron-netns-cleanup
  netns-force  run neutron-netns-cleanup --force
  dhcp PORT    remove the interfaces that are not the DHCP port's, as the DHCP agent does at each set-up
"""
import sys

from neutron import privileged
from neutron.agent.linux import dhcp
from neutron.agent.linux import ip_lib
from neutron.cmd import netns_cleanup
from oslo_privsep import priv_context


def main(config, namespace, action, *arguments):
    # This process is root, so it needs no helper.
    for context in vars(privileged).values():
        if isinstance(context, priv_context.PrivContext):
            context.set_client_mode(False)
    # Other tests have namespaces, too.
    ip_lib.list_network_namespaces = lambda **kwargs: [namespace]
    options = ['--config-file', config]
    if action == 'dhcp':
        conf = netns_cleanup.setup_conf()
        conf(options)
        manager = dhcp.DeviceManager(conf, netns_cleanup.FakeDhcpPlugin())
        network = dhcp.NetModel({'id': namespace.replace(dhcp.NS_PREFIX, ''), 'subnets': [], 'ports': []})
        manager._cleanup_stale_devices(network, dhcp.DictModel({'id': arguments[0]}))
    else:
        sys.argv[1:] = options + (['--force'] if action == 'netns-force' else [])
        netns_cleanup.main()


main(*sys.argv[1:])
