"""A stand-in for `tdmld run`: answers /readyz on the node's RPC port until SIGTERM.

fake_node.py run --data-dir DIR [--stubborn | --broken]
"""

import http.server
import signal
import sys
from pathlib import Path

from tdmld.config import load_config


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    arguments = sys.argv[1:]
    config = load_config(Path(arguments[arguments.index("--data-dir") + 1]))
    if "--broken" in arguments:
        sys.exit("the database is corrupt")
    if "--stubborn" in arguments:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    http.server.HTTPServer((config.rpc_host, config.rpc_port), Handler).serve_forever()


main()
