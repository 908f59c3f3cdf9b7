#!/bin/sh
# The first process of a guest: mounts what tests need, loads modules, runs what `cargo xtask vm` wrote into /purelb/runs
# and says on the console how it went. The lines that begin with == are read by `guest.rs`.
export PATH=/usr/sbin:/usr/bin HOME=/tmp
mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1
mkdir -p /dev/shm /dev/pts
mount -t devpts devpts /dev/pts
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t debugfs debug /sys/kernel/debug
for folder in /run /tmp /var /dev/shm; do mount -t tmpfs tmpfs $folder; done
mkdir -p /run/netns /var/log /var/lib /var/run
chmod 1777 /tmp

# kube-apiserver makes a label of it.
echo guest >/proc/sys/kernel/hostname
ip link set lo up
. /purelb/environment

status=0
while read -r name arguments; do
    echo "== begin $name"
    # Unquoted: these are words.
    "/purelb/tests/$name" $arguments </dev/null
    code=$?
    [ $code = 0 ] || status=1
    echo "== end $name $code"
done </purelb/runs
echo "== status $status"
echo o >/proc/sysrq-trigger
sleep 60
