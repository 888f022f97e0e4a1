#!/bin/sh
# A root for the program alone: `unshare --mount --net sh root.sh CHRONOVISOR FILES COMMAND...` runs CHRONOVISOR, which serves at
# 127.0.0.1:8080, where there is nothing but FILES, what the kernel tells, and KVM; and COMMAND where we are. Whatever COMMAND asks
# for, no file and no device of the machine is touched by it. If FILES has a config.json, a guest is started.
set -eu

chronovisor=$1
files=$2
shift 2

root=$(mktemp -d)
mount -t tmpfs tmpfs "$root"
mkdir "$root/dev" "$root/proc" "$root/sys"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
: >"$root/dev/kvm"
mount --bind /dev/kvm "$root/dev/kvm"
cp "$chronovisor" "$root/chronovisor"
cp "$files"/* "$root"
ip link set lo up

config=
if [ -e "$root/config.json" ]; then
    config='--config-file /config.json'
fi
# Its log is our standard error; the words of $config are apart.
chroot "$root" /chronovisor --api-sock /socket --api-listen 127.0.0.1:8080 --level Warning $config >&2 </dev/null &
server=$!

status=0
"$@" || status=$?
if ! kill -0 $server 2>/dev/null; then
    echo "chronovisor has ended" >&2
    exit 1
fi
exit $status
