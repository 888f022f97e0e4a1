#!/bin/sh
# A host for one client: `unshare --mount --net sh host.sh CHRONOVISOR COMMAND...` runs COMMAND in it.
#
# Clients written for Firecracker name their paths in the source, make taps, and write firewall rules. Here they may: the
# network is a new one, whose default route leads nowhere, and /usr/local/bin, /var/lib and /etc are seen through overlays
# that end with the namespace. Nothing of the machine is changed.
set -eu

chronovisor=$1
shift

layers=$(mktemp -d)
mount -t tmpfs tmpfs "$layers"
for dir in /usr/local/bin /var/lib /etc; do
    layer=$layers/$(echo "$dir" | tr / _)
    mkdir -p "$layer/upper" "$layer/work"
    mount -t overlay -o "lowerdir=$dir,upperdir=$layer/upper,workdir=$layer/work" overlay "$dir"
done
# Nobody looks into the layers again; the namespace keeps them.
umount --lazy "$layers"
rmdir "$layers"

# The process's name is the link's, and some look for it.
ln -sfn "$chronovisor" /usr/local/bin/firecracker
mkdir -p /var/lib/firecracker

# 198.51.100.0/24 is for examples (RFC 5737).
ip link set lo up
ip link add uplink type veth peer name nowhere
ip addr add 198.51.100.2/24 dev uplink
ip link set uplink up
ip link set nowhere up
ip route add default via 198.51.100.1

exec "$@"
