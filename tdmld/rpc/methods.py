"""The methods of a node, by name and scope.

Read answers questions; write hands the node something that is already signed or public; admin
commands the process. No method of this version signs anything: keys stay with their owner.
"""

from tdmld.rpc.access import Scope
from tdmld.rpc.backend import Backend
from tdmld.rpc.registry import Registry

_METHODS = (
    ("node_status", Backend.node_status, Scope.READ),
    ("node_earnings", Backend.node_earnings, Scope.READ),
    ("net_peers", Backend.net_peers, Scope.READ),
    ("net_reachability", Backend.net_reachability, Scope.READ),
    ("net_connect", Backend.net_connect, Scope.ADMIN),
    ("net_bans", Backend.net_bans, Scope.READ),
    ("net_ban", Backend.net_ban, Scope.ADMIN),
    ("net_unban", Backend.net_unban, Scope.ADMIN),
    ("chain_head", Backend.chain_head, Scope.READ),
    ("chain_block", Backend.chain_block, Scope.READ),
    ("chain_account", Backend.chain_account, Scope.READ),
    ("chain_transaction", Backend.chain_transaction, Scope.READ),
    ("chain_submit", Backend.chain_submit, Scope.WRITE),
    ("chain_prove", Backend.chain_prove, Scope.READ),
    ("chain_parameters", Backend.chain_parameters, Scope.READ),
    ("chain_validators", Backend.chain_validators, Scope.READ),
    ("chain_stake", Backend.chain_stake, Scope.READ),
    ("chain_keys", Backend.chain_keys, Scope.READ),
    ("chain_asks", Backend.chain_asks, Scope.READ),
    ("chain_subscribeHeads", Backend.chain_subscribe_heads, Scope.READ),
    ("job_publish", Backend.job_publish, Scope.WRITE),
    ("job_list", Backend.job_list, Scope.READ),
    ("job_status", Backend.job_status, Scope.READ),
    ("job_subscribe", Backend.job_subscribe, Scope.READ),
    ("job_fetch", Backend.job_fetch, Scope.WRITE),
    ("admin_stop", Backend.admin_stop, Scope.ADMIN),
)


def registry() -> Registry:
    """A registry whose methods are answered by a `Backend`."""
    found = Registry()
    for name, declaration, scope in _METHODS:
        found.add(name, declaration, scope)
    return found
