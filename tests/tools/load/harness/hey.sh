#!/usr/bin/env bash
# For hey: one request of a scenario, again and again. Ends with 1 where a status was not 200.
#
#   export API_KEY=sk-... BODIES=bodies BASE_URL=http://localhost:6008
#   tests/tools/load/harness/hey.sh text -z 60s -c 64
#
# First text, mixed, image or health, then hey's own options. hey can send one body alone, and looks at no reply: identical inputs
# that are under way at once are computed once, so its figures are about HTTP, parsing and the queue, not about the device. The key
# can be seen in the list of processes while it runs.
set -euo pipefail
scenario=${1:?text, mixed, image or health}
shift
url=${BASE_URL:-http://localhost:6008}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ "$scenario" = health ]; then
    hey -t 60 "$@" "$url/health/live" | tee "$work/summary"
else
    head -n 1 "${BODIES:-bodies}/$scenario.tsv" | cut -f 2- | tr -d '\n' > "$work/body"
    hey -t 60 "$@" -m POST -T application/json -H "Authorization: Bearer ${API_KEY:-}" -D "$work/body" "$url/v1/embeddings" \
        | tee "$work/summary"
fi
# Its summary has a line for each status, and below them the errors of connections.
grep -q '\[200\]' "$work/summary"
! grep -E '^ +\[[0-9]+\]|Error distribution' "$work/summary" | grep -qv '\[200\]'
