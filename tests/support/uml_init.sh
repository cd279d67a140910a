#!/bin/sh
# The first process of a user-mode Linux kernel: makes the guest usable, runs one program, halts.
#
# The guest's root is the host's own file system, read-only: the checkout, its .venv and Debian's
# tools are there, and nothing a test does can change the host.  Writable are only copies and
# memory (/etc, /run, /var/lib/nfs, /dev/shm, work below) and the one directory the test shares.
#
# From the kernel's command line: ka_modules, and ka_share, the shared directory.  It holds
# `program` and an empty `work`, which becomes a memory file system and TMPDIR, and it receives
# `output` (of the program and what comes before it) and `status`.
set -u
umask 022
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8

halt() {
    echo o >/proc/sysrq-trigger
    sleep 60
}

mount -t proc proc /proc
mount -t hostfs -o "$ka_share" share "$ka_share" || halt
exec >"$ka_share/output" 2>&1

mount -t sysfs sys /sys
mount -t tmpfs run /run
mkdir -p /dev/shm && mount -t tmpfs shm /dev/shm
mount -t tmpfs work "$ka_share/work"
export TMPDIR="$ka_share/work"

release=$(uname -r)
mkdir -p /run/modules/lib/modules
ln -s "/usr/lib/uml/modules/$release" "/run/modules/lib/modules/$release"
# shellcheck disable=SC2046  # a list of words
modprobe -d /run/modules -a overlay $(echo "$ka_modules" | tr , ' ')

mkdir /run/etc /run/etc.work
mount -t overlay -o lowerdir=/etc,upperdir=/run/etc,workdir=/run/etc.work etc /etc
mount -t tmpfs nfs-state /var/lib/nfs
mkdir -p /var/lib/nfs/sm /var/lib/nfs/sm.bak /var/lib/nfs/v4recovery /var/lib/nfs/rpc_pipefs
touch /var/lib/nfs/etab /var/lib/nfs/rmtab
ip link set lo up

"$ka_share/program"
echo $? >"$ka_share/status"
halt
