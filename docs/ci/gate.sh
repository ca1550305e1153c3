#!/bin/sh
# Decides whether a compressed model may be released, in any CI system that has a POSIX shell.
#
#     sh gate.sh CANDIDATE [--baseline [NAME=]PATH]... [--policy FILE] [further options of `compress gate`]
#
# CANDIDATE is an artifact, a model directory or an eval.json. The exit code is the answer: 0 passed, 1 failed,
# 2 a mistake in the request or a policy that the data cannot decide, 3 inconclusive, 4 the work failed,
# 5 damaged or not comparable. Results are in $GATE_OUTPUT: verdict.json (and what it rests on, verdict.records.json.gz),
# gate.xml (JUnit), gate.md, gate.html.
#
#   COMPRESS       the program; `compress` if unset
#   GATE_OUTPUT    folder for the results; `gate-results` if unset
#   GATE_PLAN      `no` leaves out the check that the policy can be decided at all
#   GATE_HISTORY   folder of history.jsonl; where it is set, the run is added and compared with the last release
#   GATE_COMMIT    commit of the run, needed with GATE_HISTORY; GITHUB_SHA or CI_COMMIT_SHA if unset
#   GATE_RELEASE   name of the release that the run makes, if it makes one
#   GATE_DRIFT     `fail`: exit with 1 where a gate that passed drifts; it is only reported otherwise

set -u
COMPRESS=${COMPRESS:-compress}
GATE_OUTPUT=${GATE_OUTPUT:-gate-results}

if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
    echo "error: the first argument must be the candidate: an artifact, a model directory or an eval.json" >&2
    echo "hint: sh gate.sh ./artifact --policy gates.toml" >&2
    exit 2
fi
candidate=$1
shift

mkdir -p "$GATE_OUTPUT" || exit 4
for name in verdict.json verdict.records.json.gz gate.xml gate.md gate.html trend.html; do
    rm -f "$GATE_OUTPUT/$name" || exit 4 # what an earlier run left must not pass for this one's
done

# An artifact is what its manifest says, down to the byte, or nothing else about it counts.
if [ -f "$candidate/compress_manifest.json" ]; then
    "$COMPRESS" verify "$candidate" || exit $?
fi

# Before minutes are spent on scoring: can this policy be decided with the data it names?
if [ "${GATE_PLAN:-yes}" != no ]; then
    "$COMPRESS" gate --plan "$@" || exit $?
fi

"$COMPRESS" gate "$candidate" "$@" --output "$GATE_OUTPUT/verdict.json" --junit "$GATE_OUTPUT/gate.xml" \
    --markdown "$GATE_OUTPUT/gate.md"
code=$?

# Reports follow from the verdict; one that cannot be made never turns a refusal into a pass.
if [ -f "$GATE_OUTPUT/verdict.json" ]; then
    "$COMPRESS" report "$GATE_OUTPUT/verdict.json" --html "$GATE_OUTPUT/gate.html" || [ $code -ne 0 ] || code=4
    if [ -n "${GATE_HISTORY:-}" ]; then
        commit=${GATE_COMMIT:-${GITHUB_SHA:-${CI_COMMIT_SHA:-}}}
        set -- "$GATE_HISTORY" --add "$GATE_OUTPUT/verdict.json" --commit "$commit" --html "$GATE_OUTPUT/trend.html"
        [ -z "${GATE_RELEASE:-}" ] || set -- "$@" --release "$GATE_RELEASE"
        [ "${GATE_DRIFT:-report}" != fail ] || set -- "$@" --fail-on-drift
        "$COMPRESS" trend "$@"
        trend=$?
        [ $code -ne 0 ] || code=$trend
    fi
elif [ $code -eq 0 ]; then
    echo "error: the gate passed without writing $GATE_OUTPUT/verdict.json" >&2
    echo "hint: give no --plan, --check, --noise-floor or --output of your own" >&2
    code=4
fi
exit $code
