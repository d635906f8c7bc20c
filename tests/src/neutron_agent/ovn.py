"""The part of neutron-ovn-metadata-agent that answers haproxy: its server, its handler and its replica of the Southbound database.

What it would do to the host, namespaces and haproxies, is left out. Arguments: those of the agent.
"""
import sys

from neutron.cmd.eventlet.agents import ovn_metadata  # noqa: as the agent, patches what blocks

from neutron.agent.ovn.metadata import server
from neutron.common import config
from neutron.conf.agent.metadata import config as meta
from neutron.conf.agent.ovn.metadata import config as ovn_meta
from neutron.conf.plugins.ml2.drivers.ovn import ovn_conf
from oslo_config import cfg


def main(chassis, *arguments):
    config.register_common_config_options()
    ovn_conf.register_opts()
    for options in (meta.SHARED_OPTS, meta.UNIX_DOMAIN_METADATA_PROXY_OPTS, meta.METADATA_PROXY_HANDLER_OPTS):
        ovn_meta.register_meta_conf_opts(options)
    ovn_meta.register_meta_conf_opts(ovn_meta.OVS_OPTS, group='ovs')
    config.init(list(arguments))
    config.setup_logging()
    proxy = server.UnixDomainMetadataProxy(cfg.CONF, chassis)
    proxy.run()
    proxy.wait()


main(*sys.argv[1:])
