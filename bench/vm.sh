#!/usr/bin/env bash
# vm.sh KERNEL ARCH DIR [KERNEL_ARGUMENT ...]: boots a Debian kernel under qemu, without KVM, runs DIR/run in it as root,
# shows its console, and exits 0 only when DIR/run exited 0 there.
#
#   KERNEL  a series such as 6.1, or `newest`: the newest that Debian's stable releases and their backports have
#   ARCH    amd64 or arm64
#   DIR     becomes /p; userland is busybox, and Python and libbpf of Debian's SUITE (default bookworm; PYTHON=python3.N
#           for another Python than the suite's default). - boots nothing, and prints the archive of that userland
#
# Needs qemu-system-x86, qemu-system-arm, busybox-static, cpio, and at first the mirror that this machine is configured
# with. Keeps what it made in VMCACHE, about 300 MB for an architecture.
set -euo pipefail
kernel=$1 arch=$2 dir=$3
shift 3
suite=${SUITE:-bookworm} python=${PYTHON:-}
cache=${VMCACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/traceleft-vm}
root=$cache/apt-$arch image=$cache/kernel-$arch-$kernel base=$cache/base-$arch-$suite${python:+-$python}.cpio.gz
mkdir -p "$cache"

say() { echo "vm: $*" >&2; }

# Debian's package lists in a root of their own: nothing of this machine's own package state is touched. Unstable has one for
# itself, so that no kernel comes from there.
make_apt_root() {
	[ ! -e "$root/ok" ] || return 0
	local key='[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]' codename main security name
	codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
	repository() { apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' | awk -v r="$1" '$2 == r { print $1; exit }'; }
	main=$(repository "$codename") security=$(repository "$codename-security")
	mkdir -p "$root"/{etc/apt/{apt.conf.d,preferences.d,sources.list.d},var/lib/apt/lists/partial,var/cache/apt/archives/partial,var/lib/dpkg}
	: >"$root/var/lib/dpkg/status"
	if [ "${root%-sid}" != "$root" ]; then
		echo "deb $key $main sid main" >"$root/etc/apt/sources.list"
	else
		for name in bullseye bookworm trixie trixie-backports; do echo "deb $key $main $name main"; done >"$root/etc/apt/sources.list"
		for name in bullseye bookworm trixie; do echo "deb $key $security $name-security main"; done >>"$root/etc/apt/sources.list"
	fi
	cat >"$root/apt.conf" <<-APT
		Dir "$root/";
		Dir::State::status "$root/var/lib/dpkg/status";
		APT::Architecture "$arch";
		APT::Architectures {"$arch";};
		APT::Sandbox::User "root";
		Acquire::Languages "none";
		Acquire::Check-Valid-Until "false";
	APT
	APT_CONFIG=$root/apt.conf apt-get update -qq
	touch "$root/ok"
}

# the newest build of the series whose package can still be had; its vmlinuz and the package's name
get_kernel() {
	local series=${kernel//./\\.} package found scratch
	[ "$kernel" != newest ] || series='[0-9]+\.[0-9]+'
	scratch=$(mktemp -d "$cache/get.XXXXXX")
	for package in $(apt-cache pkgnames | grep -E "^linux-(image|binary)-${series}\.[0-9].*-cloud-$arch$" | sed 's/^linux-[a-z]*-//' | sort -Vr); do
		for package in "linux-image-$package" "linux-binary-$package"; do
			(cd "$scratch" && rm -rf ./* && apt-get download -qq "$package" 2>/dev/null) || continue
			dpkg-deb --fsys-tarfile "$scratch"/*.deb | tar -x -C "$scratch" --wildcards './boot/vmlinuz-*' './usr/lib/modules/*/vmlinuz' 2>/dev/null || :
			found=$(find "$scratch" -name 'vmlinuz*' -type f | head -1)
			[ -n "$found" ] || continue
			mkdir -p "$image"
			echo "$package" >"$image/name"
			mv "$found" "$image/vmlinuz"
			break 2
		done
	done
	rm -rf "$scratch"
	[ -e "$image/vmlinuz" ] || { say "no kernel $kernel for $arch to be had"; exit 1; }
}

# Python and libbpf of the suite, unpacked and byte-compiled, as an initramfs
make_base() {
	local tree libbpf deb found loader
	tree=$(mktemp -d "$cache/tree.XXXXXX")
	[ -n "$python" ] || python=$(apt-cache show -t "$suite" python3/"$suite" | sed -n 's/^Depends:.*python3\.\([0-9]*\).*/python3.\1/p' | head -1)
	[ "$suite" = bullseye ] && libbpf=libbpf0 || libbpf=libbpf1
	rm -f "$root"/var/cache/apt/archives/*.deb
	apt-get install -qq -y -t "$suite" --download-only --no-install-recommends "$python-minimal" "lib$python-stdlib" "$libbpf" busybox-static >/dev/null
	for deb in "$root"/var/cache/apt/archives/*.deb; do dpkg -x "$deb" "$tree"; done
	rm -rf "$tree"/usr/share/{doc,man,locale,info,lintian} "$tree/usr/lib/$python"/{idlelib,lib2to3,ensurepip,pydoc_data}
	mkdir -p "$tree"/{proc,sys,dev,tmp,run,root,p,etc}
	if [ ! -e "$tree/bin" ]; then # merged: in trixie the links come with base-files
		for deb in bin sbin lib lib64; do ln -s "usr/$deb" "$tree/$deb"; done
		mkdir -p "$tree"/usr/{bin,sbin,lib,lib64}
	fi
	ln -sf "$python" "$tree/usr/bin/python3"
	ln -sf "$(cd "$tree" && [ -e usr/bin/busybox ] && echo /usr/bin/busybox || echo /bin/busybox)" "$tree/bin/sh"
	# without .pyc files the start of Python takes twice as long; a Python of that version here makes them, or that Python itself
	loader=$tree/lib64/ld-linux-x86-64.so.2
	compile() { "$@" -m compileall -q --invalidation-mode unchecked-hash "$tree/usr/lib/$python" >/dev/null 2>&1; }
	for found in "$(command -v "$python" || :)" ~/.pyenv/versions/"${python#python}".*/bin/python; do
		[ ! -x "$found" ] || compile "$found" || continue
		[ ! -x "$found" ] || break
	done
	[ -n "$(find "$tree/usr/lib/$python" -name '*.pyc' -print -quit)" ] || [ ! -e "$loader" ] ||
		PYTHONHOME=$tree/usr compile "$loader" --library-path "$tree/usr/lib/x86_64-linux-gnu" "$tree/usr/bin/$python" || :
	cat >"$tree/init" <<-'INIT'
		#!/bin/sh
		busybox=/bin/busybox
		$busybox mount -t proc proc /proc
		$busybox mount -t sysfs sysfs /sys
		$busybox mount -t devtmpfs devtmpfs /dev
		$busybox --install -s /bin 2>/dev/null
		export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
		mount -t bpf bpf /sys/fs/bpf
		mount -t securityfs securityfs /sys/kernel/security
		mount -t tmpfs tmpfs /tmp
		ip link set lo up
		echo root:x:0:0::/root:/bin/sh >/etc/passwd
		echo "VM-INIT $(uname -rm)"
		cd /p && sh ./run
		echo "VM-EXIT rc=$?"
		poweroff -f
	INIT
	chmod +x "$tree/init"
	(cd "$tree" && find . | cpio -o -H newc -R 0:0 --quiet | gzip -1) >"$base.new"
	truncate -s %4 "$base.new" # an appended archive that does not begin at a multiple of four is silently ignored
	rm -rf "$tree"
	mv "$base.new" "$base"
}

{
	flock 9 # several of these may run at once
	make_apt_root
	export APT_CONFIG=$root/apt.conf
	[ -e "$image/vmlinuz" ] || get_kernel
	if [ "$suite" = sid ] && [ ! -e "$base" ]; then
		unset APT_CONFIG
		root+=-sid
		make_apt_root
		export APT_CONFIG=$root/apt.conf
	fi
	[ -e "$base" ] || make_base
} 9>"$cache/lock-$arch"

if [ "$dir" = - ]; then
	echo "$base"
	exit
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/p"
cp -a "$dir/." "$work/p"
(cd "$work" && find p | cpio -o -H newc -R 0:0 --quiet >overlay.cpio)
cat "$base" "$work/overlay.cpio" >"$work/initrd"
case $arch in
amd64) qemu=(qemu-system-x86_64 -machine q35 -cpu max) console=ttyS0 ;;
arm64) qemu=(qemu-system-aarch64 -machine virt -cpu "max,pauth-impdef=on") console=ttyAMA0 ;;
*) say "unknown architecture $arch"; exit 2 ;;
esac
timeout "${TMO:-900}" "${qemu[@]}" -accel tcg -smp "${CPUS:-2}" -m "${MEM:-512M}" -nodefaults -no-user-config -display none \
	-serial "file:$work/console" -no-reboot -kernel "$image/vmlinuz" -initrd "$work/initrd" \
	-append "console=$console panic=-1 quiet lsm=capability,yama,bpf $*" || say "qemu ended with status $?"
tr -d '\r' <"$work/console"
grep -aq '^VM-EXIT rc=0' <(tr -d '\r' <"$work/console") # qemu ends with 0 after a panic too
