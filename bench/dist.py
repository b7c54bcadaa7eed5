#!/usr/bin/env python3
"""make dist: dist/traceleft, one executable file that holds the script and the BPF object, and its SHA-256 beside it.

It is a zip archive behind a `#!` line, which Python runs as it is; `unzip -p traceleft traceleft.py` shows the script. The
object is in it as .xz, a third smaller than a zip archive makes it. The same commit makes the same bytes: the members' order,
times and modes are fixed, and the compressors' levels are. (Only another implementation of zlib, such as zlib-ng, may pack
the same members into other bytes.)
"""

import hashlib
import io
import lzma
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import traceleft  # noqa: E402

MAX_BYTES = 200 << 10
NAME = "traceleft"
SHEBANG = b"#!/usr/bin/env python3\n"
LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the first time that a zip archive can hold

# Parsed by every Python since 2.6, so that an old one gets a sentence and no traceback.
MAIN = '''"""Runs traceleft.py, which is beside this file in the archive."""
import os
import signal
import sys

if sys.version_info < (3, 9):
    sys.stderr.write("traceleft: Python %d.%d is too old: it needs 3.9 or later, as in: python3.9 %s\\n"
                     % (sys.version_info[0], sys.version_info[1], sys.argv[0]))
    sys.exit(3)
while True:  # as traceleft.py does when it is the program: no descriptor of a closed stream becomes a file's
    null = os.open(os.devnull, os.O_RDWR)
    if null > 2:
        os.close(null)
        break
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: os._exit(0))
signal.signal(signal.SIGUSR1, signal.SIG_IGN)

try:
    import traceleft
except Exception as error:
    sys.stderr.write("traceleft: cannot start (%s: %s): either this Python (%s) lacks a part of its standard library, and "
                     "apt-get install python3 helps; or this file is damaged: copy it again, and compare its SHA-256\\n"
                     % (type(error).__name__, error, sys.executable))
    sys.exit(3)

sys.exit(traceleft.main())
'''


def members():
    """Name and content of what is in the archive."""
    yield "__main__.py", MAIN.encode()
    yield "traceleft.py", (HERE / "traceleft.py").read_bytes()
    packed = lzma.compress(traceleft.OBJECT_PATH.read_bytes(), preset=9 | lzma.PRESET_EXTREME)
    yield f"bpf/{traceleft.OBJECT_PATH.name}.xz", packed
    yield traceleft.COMMIT_NAME, f"{traceleft.commit()}\n".encode()
    yield "LICENSE", (HERE / "LICENSE").read_bytes()


def build():
    """The archive's bytes."""
    buffer = io.BytesIO()
    buffer.write(SHEBANG)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in members():
            info = zipfile.ZipInfo(name, LONG_AGO)
            info.compress_type = zipfile.ZIP_STORED if name == "__main__.py" else zipfile.ZIP_DEFLATED  # it says what lacks
            info.create_system = 3  # Unix: modes are those below
            info.external_attr = 0o100644 << 16
            archive.writestr(info, data, compresslevel=9)
    return buffer.getvalue()


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else HERE / "dist")
    data = build()
    if len(data) >= MAX_BYTES:
        sys.exit(f"dist: {len(data)} bytes, and {MAX_BYTES} are the limit")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_bytes(data)
    (folder / NAME).chmod(0o755)
    digest = hashlib.sha256(data).hexdigest()
    (folder / f"{NAME}.sha256").write_text(f"{digest}  {NAME}\n")
    print(f"{folder / NAME}: {len(data)} bytes, commit {traceleft.commit()}, sha256 {digest}")


if __name__ == "__main__":
    main()
