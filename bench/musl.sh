#!/usr/bin/env bash
# musl.sh SOURCES FOLDER: makes a userland of musl and busybox and no other, FOLDER/root, for bench/portability.py.
#
#   SOURCES  has the .orig.tar files of Debian's source packages busybox, elfutils, libbpf, libffi, musl, python3.x,
#            xz-utils and zlib
#   FOLDER   root/ will hold busybox, Python, libbpf and what they need, all linked to /lib/ld-musl-x86_64.so.1; that is
#            the musl of Debian's package musl-tools, with whose musl-gcc all is built. libc.so beside it is SOURCES' musl
#
# Takes about five minutes with two CPUs. Needs musl-tools, gcc, make, bzip2 and xz-utils.
set -euo pipefail
sources=$(realpath "$1") folder=$(realpath "$2")
build=$folder/build root=$folder/root interpreter=/lib/ld-musl-x86_64.so.1
mkdir -p "$build/include" "$root"/{bin,dev,etc,lib,p,proc,run,sys,tmp,usr/bin,usr/lib,usr/include}
echo 127.0.0.1 localhost >"$root/etc/hosts" # musl knows it from there alone

say() { echo "musl: $*" >&2; }
trap 'say "failed; the end of $build/log:"; tail -n 30 "$build/log" >&2' ERR
exec >"$build/log"

for archive in "$sources"/*.orig.tar.*[z2]; do tar -xf "$archive" -C "$build"; done
cd "$build"

# The kernel's headers are not musl's; a compiler with those, that takes no other library of this machine
for name in linux asm-generic mtd; do ln -s "/usr/include/$name" include/; done
ln -s "/usr/include/$(gcc -print-multiarch)/asm" include/
cat >cc <<COMPILER
#!/bin/sh
[ "\$1" != --print-multiarch ] || exec echo x86_64-linux-musl
for argument; do
	shift
	case \$argument in -[IL]/usr/*|-[IL]/lib/*) ;; *) set -- "\$@" "\$argument" ;; esac
done
unset LD_LIBRARY_PATH # is for programs that were built, not for gcc
exec musl-gcc -w -idirafter $build/include -I$root/usr/include -L$root/usr/lib "\$@"
COMPILER
chmod +x cc
export CC=$build/cc CFLAGS=-O2 CPPFLAGS="-I$root/usr/include" LDFLAGS="-L$root/usr/lib" PKG_CONFIG=false DESTDIR=$root
jobs=$(nproc)

say "zlib, libffi, liblzma"
(cd zlib-*/ && ./configure --prefix=/usr && make -j"$jobs" && make install)
(cd libffi-*/ && ./configure --host=x86_64-linux-musl --prefix=/usr --disable-static --disable-docs \
	--disable-multi-os-directory && make -j"$jobs" && make install)
(cd xz-*/ && ./configure --host=x86_64-linux-musl --prefix=/usr --disable-{static,doc,nls,xz,xzdec,lzmadec,lzmainfo} \
	--disable-{lzma-links,scripts} && make -j"$jobs" && make install)

say "libelf" # alone: elfutils' own way would build its tools as well, with argp, fts and obstack, which musl has not
mkdir elf
cat >elf/config.h <<-'CONFIG'
	#define HAVE_VISIBILITY 1
	#define HAVE_ERR_H 1
	#define HAVE_DECL_MEMPCPY 1
	#define HAVE_DECL_RAWMEMCHR 0
	#define HAVE_DECL_POWEROF2 0
	#define HAVE_DECL_REALLOCARRAY 1
	#include <eu-config.h>
CONFIG
elfutils=$(echo elfutils-*/)
$CC $CFLAGS -D_GNU_SOURCE -DHAVE_CONFIG_H -DPACKAGE_NAME='"elfutils"' -std=gnu99 -shared -fPIC -Ielf -I"${elfutils}lib" \
	-I"${elfutils}libelf" "${elfutils}"libelf/*.c "${elfutils}"lib/{crc32,next_prime}.c -lz \
	-Wl,-soname,libelf.so.1,--version-script="${elfutils}libelf/libelf.map",--no-undefined -o "$root/usr/lib/libelf.so.1"
ln -s libelf.so.1 "$root/usr/lib/libelf.so"
cp "${elfutils}"libelf/{libelf,gelf,nlist,elf}.h "$root/usr/include"

say "libbpf"
make -C libbpf-*/src BUILD_STATIC_ONLY= OBJDIR="$build/libbpf" NO_PKG_CONFIG=1 DESTDIR=
cp -a "$build"/libbpf/libbpf.so* "$root/usr/lib"

say "busybox"
(cd busybox-*/ && unset CFLAGS CPPFLAGS LDFLAGS && make defconfig &&
	sed -i 's/^# CONFIG_STATIC is not set/CONFIG_STATIC=y/' .config && make -j"$jobs" CC="$CC" HOSTCC=gcc && cp busybox "$root/bin")
for name in $("$root/bin/busybox" --list); do [ "$name" = busybox ] || ln -s busybox "$root/bin/$name"; done
ln -s /bin/env "$root/usr/bin/env"

say "Python" # without modules that need libraries of this machine
without="_ssl _hashlib _sqlite3 _tkinter readline _curses _curses_panel _dbm _gdbm _bz2 _uuid nis ossaudiodev"
(cd Python-*/ && printf '*disabled*\n%s\n' "$without" >Modules/Setup.local &&
	./configure --prefix=/usr --build=x86_64-linux-musl --host=x86_64-linux-musl --without-ensurepip --disable-test-modules \
		--without-doc-strings && make -j"$jobs" RUNSHARED="LD_LIBRARY_PATH=$root/usr/lib" 2>&1 &&
	make install RUNSHARED="LD_LIBRARY_PATH=$root/usr/lib" 2>&1)

say "musl itself"
(cd musl-*/ && unset CPPFLAGS LDFLAGS && CC=gcc ./configure && make -j"$jobs" lib/libc.so && cp lib/libc.so "$folder")
cp -L "$interpreter" "$root$interpreter"

say "without what only a compiler needs"
rm -rf "$root"/usr/{include,share,lib/pkgconfig} "$root"/usr/lib/*.{a,la}
rm -rf "$root"/usr/lib/python3*/{config-*,idlelib,lib2to3,pydoc_data}
for file in $(find "$root" -type f); do
	if readelf -d "$file" 2>/dev/null | grep -E 'NEEDED.*\[libc\.so\.6|NEEDED.*ld-linux'; then say "$file needs glibc"; false; fi
done
chroot "$root" /usr/bin/python3 -c 'import ctypes, lzma, zlib; ctypes.CDLL("libbpf.so.1")'
rm -rf "$build"
