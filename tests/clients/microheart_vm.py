"""Drives microheart: `microheart_vm.py KERNEL DISK FOLDER` in host.sh.

Everything is asked for through the client's own class, but for /vcpus, of which it does not know. The last line of the
output is what came of it, as JSON.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import stand_ins
import vcpus

kernel, disk, folder = sys.argv[1:]
home = Path(folder) / "home"
home.mkdir()
# Where it looks before it downloads.
(home / "firecracker").symlink_to("/usr/local/bin/firecracker")
(home / "vmlinux-6.1").symlink_to(kernel)
key = home / "vm_key"
key.touch(mode=0o600)
os.environ["MICROHEART_HOME"] = str(home)
# The guest has neither an address nor sshd: see bin/ssh.
os.environ["PATH"] = f"{Path(__file__).parent / 'bin'}:{os.environ['PATH']}"
os.environ["STAND_IN_SOCKET"] = str(home / "vms/driven/firecracker.socket")
os.environ["STAND_IN_PYTHON"] = sys.executable

from microheart import MicroVM  # noqa: E402 (it reads the environment)

vm = MicroVM("driven", rootfs=disk, key=str(key), vcpu=1, mem_mib=128)
came = {"seconds": vm.start()}
reaper = stand_ins.Reaper(vm.pid())

came["config"] = vm.machine_config()
came["running"] = vcpus.running(vm.sock)
came["console"] = vm.tail()

vm.stop()
came["exit_status"] = reaper.exit_status()
came["still_running"] = vm.running()
vm.clean()
came["left"] = {
    "files": os.listdir(home / "vms"),
    "links": subprocess.run(["ip", "-o", "link"], check=True, capture_output=True, text=True).stdout,
}
print(json.dumps(came))
