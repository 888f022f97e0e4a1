"""Drives firecracker-python, or its fork hysn-firecracker-python: `firecracker_python.py KERNEL DISK FOLDER` in host.sh.

Everything is asked for through the client's own classes, but for /vcpus, of which it does not know. The last line of the
output is what came of it, as JSON.
"""

import json
import os
import subprocess
import sys

import stand_ins
import vcpus

kernel, disk, folder = sys.argv[1:]
stand_ins.docker_daemon(folder)
stand_ins.public_address(folder)

from firecracker import MicroVM  # noqa: E402 (its constructor looks around, and so may its import)
from firecracker.vmm import VMMManager  # noqa: E402

DATA = "/var/lib/firecracker"

vm = MicroVM(name="driven", kernel_file=kernel, base_rootfs=disk, vcpu=1, memory=128, mmds_enabled=True,
             user_data="#cloud-config", vsock_enabled=True, vsock_guest_cid=7)
came = {"created": vm.create()}
listed = MicroVM.list()
came["listed"] = listed
vm_id, pid = listed[0]["id"], listed[0]["pid"]
reaper = stand_ins.Reaper(pid)
api = f"{DATA}/{vm_id}/firecracker.socket"

states = VMMManager()
came["id"] = vm_id
came["status"] = vm.status()
came["config"] = vm.config()
came["state"] = states.get_vmm_state(vm_id)
came["address"] = states.get_vmm_ip_addr(vm_id)
came["running"] = vcpus.running(api)

vm.pause()
came["paused"] = {"state": states.get_vmm_state(vm_id), "vcpus": vcpus.readings(api)}
vm.resume()
came["resumed"] = {"state": states.get_vmm_state(vm_id), "running": vcpus.running(api)}

came["deleted"] = vm.delete()
came["exit_status"] = reaper.exit_status()
came["left"] = {
    "listed": MicroVM.list(),
    # The folder for snapshots is every microVM's.
    "files": [name for name in os.listdir(DATA) if name != "snapshots"],
    "links": subprocess.run(["ip", "-o", "link"], check=True, capture_output=True, text=True).stdout,
}
print(json.dumps(came))
