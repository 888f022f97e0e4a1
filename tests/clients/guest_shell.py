"""The commands that bin/ssh takes."""

import os
import sys

import vcpus

path = os.environ["STAND_IN_SOCKET"]
commands = {"true": vcpus.running, "reboot": vcpus.ctrl_alt_del}
try:
    commands[sys.argv[-1]](path)
except OSError as error:
    print(error, file=sys.stderr)
    # As ssh, where nobody answers yet.
    sys.exit(255)
