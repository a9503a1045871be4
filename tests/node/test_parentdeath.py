"""A child notices that its parent is gone by their channel, whatever the parent's number was."""

import os
import socket
import subprocess
import sys

PROGRAM = """
import sys
from tdmld.node.parentdeath import die_with_parent
die_with_parent(int(sys.argv[1]))
print("alive", flush=True)
"""
ORPHAN = "import os, sys\nif os.fork(): os._exit(0)\n" + PROGRAM


def run(program: str, *, parent_lives: bool) -> str:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        read, write = os.pipe()
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdout=write,
            stderr=write,
        )
        os.close(write)
        if not parent_lives:
            ours.close()
        with open(read) as output:
            told = output.read()
        child.wait()
        return told


def test_a_child_of_process_one_lives_while_its_channel_does() -> None:
    assert run(ORPHAN, parent_lives=True) == "alive\n"


def test_a_child_whose_parent_ended_before_it_looked_ends() -> None:
    assert "is gone" in run(PROGRAM, parent_lives=False)
