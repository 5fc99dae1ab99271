# shellcheck shell=bash disable=SC2034  # the arrays are read by the scripts beside this file
# Set-up shared by the scripts beside this file: Debian packages, then .venv. Sourced, never run.
# Whatever is already there is left alone, so that a second run starts in seconds.

set -euo pipefail
# Tests start hundreds of Pythons: each would compile anew what it imports, Nova's for ten seconds.
unset PYTHONDONTWRITEBYTECODE

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
script=script/$(basename "$0")
cache=$repository/.cache
setup_log=$cache/setup.log
beside= # of set_up
venv=$repository/.venv

# command or file whose presence makes the Debian package unnecessary : package
base_packages=(
    haproxy:haproxy
    ip:iproute2
    nft:nftables
    nsenter:util-linux
    curl:curl
    /etc/ssl/certs/ca-certificates.crt:ca-certificates
)
test_packages=(
    logrotate:logrotate
    wrk:wrk
    chromium:chromium
    promtool:prometheus
    ps:procps
    xmllint:libxml2-utils
    openssl:openssl
    /usr/lib/systemd/systemd:systemd
    libvirtd:libvirt-daemon
    virsh:libvirt-clients
    virt-qemu-run:libvirt-daemon-driver-qemu
    /etc/libvirt/network.conf:libvirt-daemon-driver-network
    /usr/lib/python3/dist-packages/libvirt.py:python3-libvirt
    ovn-northd:ovn-central
    ovn-controller:ovn-host
    ovs-vswitchd:openvswitch-switch
    /usr/lib/python3/dist-packages/ovs/poller.py:python3-openvswitch
    etcd:etcd-server
    etcdctl:etcd-client
    faketime:faketime
    ethtool:ethtool
    /usr/lib/rabbitmq/bin/rabbitmq-server:rabbitmq-server
    dhcp_release:dnsmasq-utils
    iptables:iptables
    conntrack:conntrack
    radvd:radvd
    keepalived:keepalived
    arping:iputils-arping
    /usr/lib/apache2/modules/mod_auth_openidc.so:libapache2-mod-auth-openidc
    kubectl:kubectl
    jq:jq
    softhsm2-util:softhsm2
)
# what builds and checks packages
package_packages=(
    dh:debhelper
    dh_python3:dh-python
    /usr/lib/python3/dist-packages/installer:pybuild-plugin-pyproject
    /usr/lib/python3/dist-packages/hatchling:python3-hatchling
    man:man-db
    lintian:lintian
    autopkgtest:autopkgtest
    apt-ftparchive:apt-utils
)
# what makes releases, and checks them
release_packages=(
    git:git
    rpmbuild:rpm
    rpmlint:rpmlint
    ssh-keygen:openssh-client
)
# virtual machines, and the network that they are on
vm_packages=(
    qemu-system-x86_64:qemu-system-x86
    mmdebstrap:mmdebstrap
    mke2fs:e2fsprogs
    mkfs.vfat:dosfstools
    sfdisk:fdisk
    qemu-img:qemu-utils
    dnsmasq:dnsmasq-base
    udhcpc:udhcpc
    busybox:busybox
    ssh:openssh-client
)
# builds and runs container images
container_packages=(
    mmdebstrap:mmdebstrap
    podman:podman
    crun:crun
)
all_packages=(
    "${base_packages[@]}" "${test_packages[@]}" "${package_packages[@]}" "${release_packages[@]}"
    "${vm_packages[@]}" "${container_packages[@]}"
)
policy_mark='# laid by script/lib.sh of imdsproxy while it installs, in process'

say() {
    printf '%s\n' "$*" >&2
}

die() {
    say "$script $*"
    exit 1
}

need_root() {
    [[ $(id -u) -eq 0 ]] || die "needs root: run it with sudo"
}

need_system() {
    local name like=" "
    [[ $(uname -s) == Linux ]] || die "needs Linux with Debian's packages: this is $(uname -s)"
    name=$(. /etc/os-release 2>/dev/null && printf '%s' "${PRETTY_NAME:-Linux}") || name="an unknown Linux"
    like=$(. /etc/os-release 2>/dev/null && printf ' %s %s ' "${ID:-}" "${ID_LIKE:-}") || true
    # shellcheck disable=SC2015  # a die after     [[ $like == *" debian "    [[ $like == *" debian " is what is meant
    [[ $like == *" debian "* || $like == *" ubuntu "* ]] && command -v apt-get >/dev/null ||
        die "needs Debian 13 or a relative with apt-get: this is $name"
}

# haproxy_at_least_3 "VERSION": true for 3.0 and later, an epoch or suffix may surround it
haproxy_at_least_3() {
    local major=${1#*:}
    major=${major%%.*}
    [[ $major =~ ^[0-9]+$ ]] && ((major >= 3))
}

need_haproxy_3() {
    local version
    version=$(haproxy -v 2>/dev/null | sed -n '1s/^HAProxy version \([^ ]*\).*/\1/p') || true
    haproxy_at_least_3 "$version" ||
        die "needs HAProxy 3.0 or later (Debian 13 has it): found ${version:-none that runs}"
}

is_there() {
    if [[ $1 == /* ]]; then [[ -e $1 ]]; else command -v "$1" >/dev/null; fi
}

# missing_packages PRESENCE:PACKAGE...: the packages to install, one a line
missing_packages() {
    local entry
    for entry in "$@"; do
        is_there "${entry%%:*}" || printf '%s\n' "${entry#*:}"
    done
}

logged() {
    if ! "$@" >>"$setup_log" 2>&1 </dev/null; then
        tail -n 15 "$setup_log" >&2
        die "could not finish its set-up: '$*' failed (all of it in $setup_log)"
    fi
}

remove_policy() {
    local owner
    owner=$(sed -n "s|^$policy_mark ||p" /usr/sbin/policy-rc.d 2>/dev/null) || return 0
    # Another work tree's set-up may be installing just now: only a dead or the own one's goes.
    if [[ -n $owner ]] && { [[ $owner == "$$" ]] || ! kill -0 "$owner" 2>/dev/null; }; then
        rm -f /usr/sbin/policy-rc.d || true
    fi
}

# apt_install PACKAGE...: without starting or enabling any service that a package brings
apt_install() {
    local link unit enabled_before policy=$cache/policy-rc.d
    logged apt-get -q -o DPkg::Lock::Timeout=120 update
    if [[ " $* " == *" haproxy "* ]]; then
        local candidate
        candidate=$(LC_ALL=C apt-cache policy haproxy | sed -n 's/^ *Candidate: *//p')
        haproxy_at_least_3 "$candidate" ||
            die "needs HAProxy 3.0 or later (Debian 13 has it): this system offers ${candidate:-none}"
    fi
    say "installing Debian packages: $*"
    printf '#!/bin/sh\n%s %s\nexit 101\n' "$policy_mark" "$$" >"$policy"
    chmod 755 "$policy"
    enabled_before=$(enabled_units)
    # A machine of continuous integration is thrown away: its disk need not have every file before the next one.
    local install=(env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=120
        ${CI:+-o Dpkg::Options::=--force-unsafe-io} install --no-install-recommends "$@")
    if [[ -e /usr/sbin/policy-rc.d ]]; then
        # The host has a policy of its own: ours lies over it for apt's eyes only.
        # shellcheck disable=SC2016  # for the inner shell
        logged unshare --mount sh -c 'mount --bind "$0" /usr/sbin/policy-rc.d && exec "$@"' \
            "$policy" "${install[@]}"
    else
        trap remove_policy EXIT
        cp "$policy" /usr/sbin/policy-rc.d
        logged "${install[@]}"
        remove_policy
        trap - EXIT
    fi
    # By hand: deb-systemd-helper never ends with units that name each other, as libvirt's do.
    for link in $(comm -13 <(printf '%s\n' "$enabled_before") <(enabled_units)); do
        logged rm -f "$link"
        unit=$(basename "$link" .service)
        [[ ! -e /etc/init.d/$unit ]] || logged update-rc.d "$unit" disable
    done
}

# enabled_units: the links by which systemd would start something at the next boot, sorted
enabled_units() {
    find /etc/systemd/system -path '*.wants/*' 2>/dev/null | sort
}

# usable_python PYTHON: true when it is 3.11 or later and can make a virtual environment
usable_python() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in python3.13 python3.12 python3.11 python3 /usr/bin/python3; do
        if command -v "$candidate" >/dev/null && usable_python "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
}

install_missing() {
    local missing
    mapfile -t missing < <(missing_packages "$@")
    [[ -x $venv/bin/python || -n $(find_python) ]] || missing+=(python3 python3-venv)
    ((${#missing[@]} == 0)) && return
    [[ $(id -u) -eq 0 ]] || die "needs root to install ${missing[*]}: run it with sudo"
    apt_install "${missing[@]}"
}

venv_stamp() {
    (cd "$repository" && sha256sum requirements/*.txt pyproject.toml && pwd) | sha256sum
}

# own_venv: true when .venv was made for this work tree; a linked or copied one runs another tree's programs
own_venv() {
    [[ ! -L $venv && $(sed -n 's/^command = .* //p' "$venv/pyvenv.cfg" 2>/dev/null) == "$venv" ]]
}

build_venv() {
    local python stamp=$venv/.set-up
    if own_venv && [[ -f $stamp && $(<"$stamp") == "$(venv_stamp)" ]]; then
        return
    fi
    if ! { own_venv && [[ -x $venv/bin/python ]] && usable_python "$venv/bin/python"; }; then
        [[ ! -L $venv ]] || rm "$venv"
        python=$(find_python)
        [[ -n $python ]] || die "needs Python 3.11 or later with the venv module"
        say "making a virtual environment with $("$python" --version)"
        logged "$python" -m venv --clear "$venv"
    fi
    say "installing the pinned Python packages"
    local pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check install --no-compile)
    logged "${pip[@]}" --require-hashes -r "$repository/requirements/build.txt"
    logged "${pip[@]}" --require-hashes -r "$repository/requirements/dev.txt"
    logged "${pip[@]}" --no-deps --no-build-isolation -e "$repository"
    venv_stamp >"$stamp"
}

# pinned_venv NAME: the path of a virtual environment with requirements/NAME.txt alone, made where it is missing or stale
pinned_venv() {
    local environment=$cache/venv-$1 wanted python
    local setup_log=$environment.log
    wanted=$(sha256sum "$repository/requirements/$1.txt")
    mkdir -p "$cache"
    (
        flock 9
        [[ ! -f $environment/.set-up || $(<"$environment/.set-up") != "$wanted" ]] || exit 0
        : >"$setup_log"
        install_missing
        python=$(find_python)
        say "installing the pinned Python packages of requirements/$1.txt"
        logged "$python" -m venv --clear "$environment"
        logged "$environment/bin/python" -m pip --quiet --disable-pip-version-check install \
            --require-hashes -r "$repository/requirements/$1.txt"
        printf '%s\n' "$wanted" >"$environment/.set-up"
    ) 9>"$environment.lock"
    printf '%s\n' "$environment"
}

# link_modules: the distribution's libvirt and python-ovs, which the .deb uses too, for .venv; PyPI's would need a compiler
link_modules() {
    local modules=/usr/lib/python3/dist-packages from file
    [[ -e $modules/libvirt.py ]] || return 0
    from=$("$venv/bin/python" -c 'import sysconfig as s; print(s.get_config_var("EXT_SUFFIX"), s.get_path("platlib"))')
    for file in libvirt.py "libvirtmod${from% *}"; do
        if [[ ! -e $modules/$file ]]; then
            say "note: no $modules/$file; tests of libvirt need .venv to be of the distribution's own Python"
            return 0
        fi
        ln -sfn "$modules/$file" "${from#* }/$file"
    done
    [[ ! -e $modules/ovs ]] || ln -sfn "$modules/ovs" "${from#* }/ovs"
}

# check_sources: what script/check says that it does
check_sources() {
    local sources=() wrong=() folder
    cd "$repository"
    for folder in src tests demo bench script; do
        [[ -d $folder ]] && sources+=("$folder")
    done
    check format ruff format --check "${sources[@]}"
    check lint ruff check --quiet "${sources[@]}"
    check types mypy --no-error-summary "${sources[@]}"
    check layers lint-imports --no-logo
    check dependencies deptry --no-ansi src
    check english python script/english.py
    "$venv/bin/python" script/counts.py
    ((${#wrong[@]} == 0)) || die "found something in: ${wrong[*]}"
}

# check NAME PROGRAM...: adds the name to `wrong` where one of .venv's programs fails
check() {
    local name=$1 program=$2
    shift 2
    if PATH=$venv/bin:$PATH "$venv/bin/$program" "$@"; then
        say "check: $name is clean"
    else
        wrong+=("$name")
    fi
}

# set_up PRESENCE:PACKAGE...: one at a time in this work tree
# Where `beside` names a function, it is called too, beside the packages' installation: it needs .venv alone.
set_up() {
    need_system
    mkdir -p "$cache"
    (
        flock 9
        umask 022 # other accounts run what is installed, as the workers of the document server do
        : >"$setup_log"
        remove_policy # of a run that was killed
        ! is_there haproxy || need_haproxy_3
        # At once: each of them uses one processor, and waits for the network.
        install_missing "$@" &
        installing=$! called='' status=0
        if [[ $(id -u) -eq 0 && -n $(find_python) ]]; then
            build_venv
            called=yes
            (${beside:-:}) || status=$?
        fi
        wait "$installing"
        need_haproxy_3
        build_venv
        link_modules
        [[ -n $called ]] || (${beside:-:}) || status=$?
        exit "$status"
    ) 9>"$cache/setup.lock"
}
