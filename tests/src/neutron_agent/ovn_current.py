"""The part of neutron-ovn-metadata-agent of Neutron 29 that answers haproxy: its server, its handler and its replica.

What it would do to the host, namespaces and haproxies, is left out. Arguments: those of the agent.
"""
import sys

from neutron.agent.ovn.metadata import ovsdb
from neutron.agent.ovn.metadata import server_socket
from neutron.common import config
from neutron.conf.agent.metadata import config as meta
from neutron.conf.agent.ovn.metadata import config as ovn_meta
from neutron.conf.plugins.ml2.drivers.ovn import ovn_conf
from oslo_config import cfg

TABLES = ('Encap', 'Port_Binding', 'Datapath_Binding', 'SB_Global', 'Chassis', 'Chassis_Private')


def main(chassis, *arguments):
    config.register_common_config_options()
    ovn_conf.register_opts()
    for options in (meta.SHARED_OPTS, meta.UNIX_DOMAIN_METADATA_PROXY_OPTS, meta.METADATA_PROXY_HANDLER_OPTS):
        ovn_meta.register_meta_conf_opts(options)
    ovn_meta.register_meta_conf_opts(ovn_meta.OVS_OPTS, group='ovs')
    config.init(list(arguments))
    config.setup_logging()
    replica = ovsdb.MetadataAgentOvnSbIdl(chassis=chassis, tables=TABLES).start()
    proxy = server_socket.UnixDomainMetadataProxy(cfg.CONF, chassis, sb_idl=replica)
    proxy.run()
    proxy.wait()


main(*sys.argv[1:])
