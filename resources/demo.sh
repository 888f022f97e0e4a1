#!/bin/sh
# The demo, the same on this machine and in the emulated host: boots Debian's kernel, pinned to a tickless CPU if there is
# one, has it spin and sleep by turns, and reads its vCPU's time through the API, live. The last line is the last reading.
#
# CHRONOVISOR_BED names the folder with chronovisor, vmlinux and guest.cpio. Leaves nothing behind.
set -eu
bed=${CHRONOVISOR_BED:?names no folder}
work=$(mktemp -d)
vmm=
clean() {
    [ -z "$vmm" ] || kill "$vmm" 2>/dev/null || :
    wait
    rm -r "$work"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
    echo "demo: $1; the guest's console ends in:" >&2
    tail -n 20 "$work/console" >&2
    exit 1
}

: >"$work/console"
echo "Booting Debian's kernel as a guest ..."
"$bed/chronovisor" run --kernel "$bed/vmlinux" --initrd "$bed/guest.cpio" --mem 256M --pin auto --api-sock "$work/api" \
    --cmdline 'console=ttyS0 quiet reboot=k panic=-1 chronovisor.do=spin:2000,sleep:2000,forever' \
    </dev/null >"$work/console" 2>&1 &
vmm=$!

waited=0
until grep -q 'chronovisor guest: spin' "$work/console"; do
    kill -0 "$vmm" 2>/dev/null || fail "chronovisor ended early"
    [ "$waited" -lt 80 ] || fail "no guest after $waited s"
    sleep 1
    waited=$((waited + 1))
done
grep 'chronovisor guest: init' "$work/console"
echo "It spins for 2 s and sleeps for 2 s by turns; its vCPU's time, by GET /vcpus:"
"$bed/chronovisor" times --api-sock "$work/api" --watch --interval 1000 --count 12 || fail "no readings"
"$bed/chronovisor" times --api-sock "$work/api" --json || fail "no last reading"
