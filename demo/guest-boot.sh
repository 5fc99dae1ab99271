#!/bin/sh
# Boots one guest as far as cloud-init is concerned: its four stages, in a throw-away root.
#
# usage: guest-boot.sh ROOT LAYER UNPACKED
#   ROOT      a directory that holds the guest's own files (etc/ is laid by the caller)
#   LAYER     files that lie over the machine's /usr
#   UNPACKED  cloud-init's Debian packages, unpacked
#
# Runs as the first process of new mount, PID, UTS and IPC namespaces, inside the guest's network
# namespace. The machine's /usr is seen read-only under cloud-init's files; nothing else of the
# machine is seen but three device nodes. Mounts end with the mount namespace.
set -eu
root=$1
layer=$2
unpacked=$3

cd "$root"
mkdir -p usr proc sys dev run tmp root proof var/lib var/log var/tmp etc/alternatives
for link in /bin /sbin /lib /lib32 /lib64 /libx32; do
    if [ -L "$link" ]; then
        ln -sfn "$(readlink "$link")" "$root$link"
    fi
done
# Over the machine's /usr: no service manager runs in the guest, and it has its address already. What the machine has of
# DHCP clients, cloud-init would use before it asks, and wait a minute for a server. The device 0, 0 is how overlayfs hides
# a file of the layers below; on a tmpfs, because not every file system takes it (an overlay does not).
mount -t tmpfs -o mode=755,size=64k tmpfs proof
mkdir proof/bin proof/sbin
printf '#!/bin/sh\nexit 0\n' >proof/bin/systemctl
chmod 755 proof/bin/systemctl
for client in dhclient dhcpcd udhcpc; do
    mknod "proof/bin/$client" c 0 0
    mknod "proof/sbin/$client" c 0 0
done
mount -t overlay -o "ro,lowerdir=$root/proof:$layer:$unpacked/usr:/usr" imdsdemo usr
umount proof
if [ -d usr/local ]; then
    # Python libraries that the machine's owner put there are not the ones cloud-init was made for.
    mount -t tmpfs -o ro tmpfs usr/local
fi
if [ -d /etc/alternatives ]; then
    mount --bind -o ro /etc/alternatives etc/alternatives
fi
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
if [ -d sys/devices/virtual/dmi/id ]; then
    # The machine's own firmware must not tell the guest in which cloud it is.
    mount -t tmpfs -o ro tmpfs sys/devices/virtual/dmi/id
fi
mount -t tmpfs -o mode=755,size=64k tmpfs dev
for node in null zero urandom; do
    : >"dev/$node"
    mount --bind "/dev/$node" "dev/$node"
done
ln -s urandom dev/random
ln -s /proc/self/fd dev/fd
ln -s /proc/self/fd/1 dev/stdout
ln -s /proc/self/fd/2 dev/stderr
mount -t tmpfs -o mode=755 tmpfs run
hostname unnamed

# shellcheck disable=SC2016  # for the shell inside the root
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 chroot "$root" /bin/sh -euc '
    for stage in "init --local" init "modules --mode=config" "modules --mode=final"; do
        # shellcheck disable=SC2086  # a stage is one to three words
        cloud-init $stage
    done
    hostname >/proof/hostname
    cp /run/cloud-init/result.json /proof/result.json
'
