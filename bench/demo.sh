#!/usr/bin/env bash
# make demo: a collector, a tracer that sends to it, and ten seconds of a shell that opens the file. Leaves nothing behind.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
pids=()
cleanup() {
	for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || :; done
	wait
	rm -rf "$work"
}
trap cleanup EXIT

wait_for() { # FILE TEXT PID
	for _ in $(seq 100); do
		grep -q "$2" "$1" 2>/dev/null && return
		kill -0 "$3" 2>/dev/null || break
		sleep 0.1
	done
	cat "$1" >&2
	exit 1
}

"$python" traceleft.py collect --listen 127.0.0.1:0 >"$work/received" 2>"$work/collect" &
collector=$!
pids+=("$collector")
wait_for "$work/collect" "ready" "$collector"
port=$(sed -n 's/.*:\([0-9]*\)$/\1/p' "$work/collect" | tail -1)

# spec/grpc.json, with a file of our own, the collector's port, and the same filter once more for a file channel
"$python" - "$work" "$port" >"$work/spec.json" <<-'PYTHON'
	import json, sys
	work, port = sys.argv[1:]
	spec = json.load(open("spec/grpc.json"))
	spec["channels"] = [{"id": "collector", "type": "grpc", "path": f"localhost:{port}"},
	                    {"id": "file", "type": "file", "path": f"{work}/log"}]
	spec["events"][0]["rule"] = f"arg1 == '{work}/a.txt'"
	spec["events"].append({**spec["events"][0], "channel": "file"})
	json.dump(spec, sys.stdout)
PYTHON
"$python" traceleft.py trace --collector-insecure --spec "$work/spec.json" 2>"$work/trace" &
tracer=$!
pids+=("$tracer")
wait_for "$work/trace" "ready" "$tracer"

echo "opening $work/a.txt for ten seconds"
# shellcheck disable=SC2016 # it is the inner shell that counts
opens=$(timeout 10 bash -c 'trap "echo \$n; exit" TERM; n=0; while true; do echo -n >"$1"; n=$((n+1)); done' _ "$work/a.txt" || :)

kill -INT "$tracer"
wait "$tracer"
kill -INT "$collector"
wait "$collector"
pids=()
echo "opens by the shell's own count: $opens"
echo "--- file channel, the last alert of $(grep -c COUNT "$work/log")"
tail -3 "$work/log"
echo "--- collect"
cat "$work/received"
echo "--- trace"
cat "$work/trace"
