"""`tdmld version`"""

import importlib.metadata
import platform

from tdmld import __version__
from tdmld.cli.common import AsJson, emit

_PARTS = ("torch", "transformers", "libp2p", "trio", "rocksdict", "textual")


def version(*, json: AsJson = False) -> None:
    """What is installed here: tdmld, Python and the parts that matter."""
    document = {"tdmld": __version__, "python": platform.python_version()}
    for name in _PARTS:
        try:
            document[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            document[name] = "missing"
    emit(document, [f"{name:<13}{value}" for name, value in document.items()], as_json=json)
