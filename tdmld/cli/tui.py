"""`tdmld tui`"""

from tdmld.cli.common import DataDir


def tui(*, data_dir: DataDir = None) -> None:
    """Watch the node on a dashboard: earnings, tasks, jobs. It outlives restarts of the node."""
    from tdmld.config import default_data_dir
    from tui.app import Dashboard
    from tui.rpcfeed import RpcFeed

    # The token is new at each start of the node: it is read again for each connection.
    Dashboard(RpcFeed(data_dir, default_data_dir())).run()
