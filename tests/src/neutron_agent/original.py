"""Neutron's own metadata agent on a unix socket, with its questions to neutron-server answered from a file.

Arguments: the socket, and a JSON file of ports as neutron-server has them.
"""
import sys

import eventlet
eventlet.monkey_patch()

import json

from neutron.agent.linux import utils
from neutron.agent.metadata import agent
from neutron.common import cache_utils
from neutron.common import config as common_config
from neutron.conf.agent.metadata import config
from oslo_config import cfg


class Server(object):
    """neutron-server's `get_ports` (neutron/api/rpc/handlers/metadata_rpc.py)."""

    def __init__(self, path):
        with open(path) as ports:
            self.ports = json.load(ports)

    def get_ports(self, context, filters):
        addresses = filters.get('fixed_ips', {}).get('ip_address', [])

        def fits(port):
            own = [ip['ip_address'] for ip in port['fixed_ips']]
            return (port['network_id'] in filters.get('network_id', [])
                    and all(address in own for address in addresses)
                    and port['mac_address'] in filters.get('mac_address', [port['mac_address']]))

        return [port for port in self.ports if fits(port)]


def main(socket, ports, *options):
    common_config.register_common_config_options()
    for group in (config.SHARED_OPTS, config.METADATA_PROXY_HANDLER_OPTS,
                  config.UNIX_DOMAIN_METADATA_PROXY_OPTS):
        cfg.CONF.register_opts(group)
    cache_utils.register_oslo_configs(cfg.CONF)
    common_config.init(['--config-file', options[0]])
    agent.MetadataPluginAPI = lambda topic: Server(ports)
    agent.context.get_admin_context_without_session = lambda: None
    server = utils.UnixDomainWSGIServer('neutron-metadata-agent')
    server.start(agent.MetadataProxyHandler(cfg.CONF), socket, workers=0, backlog=128, mode=0o666)
    server.wait()


main(*sys.argv[1:])
