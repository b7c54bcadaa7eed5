#!/usr/bin/env python3
"""What the verifier says of each program of the object: instructions walked, bytes, and how long loading takes."""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import traceleft  # noqa: E402


def main():
    print(f"{traceleft.OBJECT_PATH.name}: {traceleft.OBJECT_PATH.stat().st_size} bytes, kernel {traceleft.platform.release()}")
    for name in ("on_sys_exit", "feed"):
        took, instructions = [], 0
        for _ in range(5):
            tracer = traceleft.Tracer("open")
            configure = tracer.configure

            def only_this(tracer=tracer, configure=configure, name=name):
                configure()
                for program in ("on_sys_exit", "feed"):
                    tracer.bpf.call("bpf_program__set_autoload", tracer.program(program), program == name)
                tracer.attached = []

            tracer.configure = only_this
            begin = time.monotonic()
            tracer.load()
            took.append(time.monotonic() - begin)
            instructions = tracer.verified_instructions(name)
            tracer.close()
        print(f"{name:12} {instructions:7} instructions verified (limit 1000000)   loaded in {statistics.median(took):.3f} s")


if __name__ == "__main__":
    main()
