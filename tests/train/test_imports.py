"""What needs no torch does not import it."""

import subprocess
import sys

CODE = """
import sys
import tdmld.train.channel, tdmld.train.data, tdmld.train.digest, tdmld.train.export
import tdmld.train.families, tdmld.train.framelog, tdmld.train.jobfile, tdmld.train.numerics
import tdmld.train.budget, tdmld.train.pretrained, tdmld.train.wireformat
import tdmld.train.schedule, tdmld.train.segment, tdmld.train.spec, tdmld.train.statefile
import tdmld.cli.reference, tdmld.cli.evaluate
print(sorted({"torch", "transformers", "numpy", "trio", "libp2p", "rocksdict"} & set(sys.modules)))
"""


def test_the_torch_free_modules_import_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
