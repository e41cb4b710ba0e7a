#!/bin/bash
# Trains on a slice of Google Cloud TPUs: asks for it, waits, installs this checkout, runs the same command on each machine.
#   PROJECT=mine ZONE=us-east5-a scripts/launch/cloud_tpu.sh NAME experiment=transformer_1b parallelism=fsdp \
#       data.source.paths=[/mnt/text/*.parquet] tokenizer.path=/mnt/tokenizer.json run.dir=/mnt/runs/one
# A slice that is taken away is asked for anew, and the run goes on from what run.dir has; so it does with the same
# command after this script was stopped. The machines must all see run.dir: let SETUP mount a file share.
#   ACCELERATOR  v5p-32, in Google's count      RUNTIME  v2-alpha-tpuv5       SPOT=yes  cheaper, and may be taken away
#   SETUP        a command that comes first on each machine                   KEEP=yes  leaves the slice when all is done
set -euo pipefail

: "${PROJECT:?the project that pays}" "${ZONE:?where the slice is, say us-east5-a}"
ACCELERATOR=${ACCELERATOR:-v5p-32} RUNTIME=${RUNTIME:-v2-alpha-tpuv5} POLL_SECONDS=${POLL_SECONDS:-30}
name=${1:?a name for the slice, and then keys of train}
shift
here=$(cd "$(dirname "$0")/../.." && pwd)
place=(--project="$PROJECT" --zone="$ZONE")

ask() {
    gcloud compute tpus queued-resources create "$name" "${place[@]}" --node-id="$name" \
        --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" ${SPOT:+--spot}
}

state() {
    gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)' 2>/dev/null || true
}

release() {
    gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

on_all() {
    gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}

# What was taken away or refused keeps its name until it is deleted.
wait_for_slice() {
    local now
    while now=$(state) && [[ $now != ACTIVE ]]; do
        echo "slice $name: ${now:-asked for}"
        case $now in
            "") ask ;;
            FAILED | SUSPENDED) release ;;
        esac
        sleep "$POLL_SECONDS"
    done
}

# The images bring an older Python; uv fetches one.
install() {
    local archive
    archive=$(mktemp -d)/efficient-lm.tar.gz
    tar -czf "$archive" -C "$here" pyproject.toml requirements.lock README.md LICENSE efficient_lm kernels_pallas configs scripts
    gcloud compute tpus tpu-vm scp "$archive" "$name:" "${place[@]}" --worker=all
    on_all "set -e; ${SETUP:-true}
        mkdir -p efficient-lm; tar -xzf efficient-lm.tar.gz -C efficient-lm; cd efficient-lm
        python3 -m pip install --quiet --user uv
        [ -d .venv ] || ~/.local/bin/uv venv --quiet --python '>=3.12' .venv
        ~/.local/bin/uv pip install --quiet --constraint requirements.lock --editable '.[tpu]'"
}

# A machine knows its own number; where the first one listens is told to all. What an earlier call of this script left
# running is asked to save and stop.
train() {
    local found addresses keys
    found=$(gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format='value(networkEndpoints[].ipAddress)')
    IFS=';,' read -ra addresses <<<"$found"
    keys=$(printf ' %q' "$@")
    on_all "last=\${TMPDIR:-/tmp}/efficient-lm.pid
        if [ -e \$last ]; then
            kill -TERM \$(cat \$last) 2>/dev/null
            while kill -0 \$(cat \$last) 2>/dev/null; do sleep 1; done
        fi
        export JAX_COORDINATOR_ADDRESS=${addresses[0]}:8476 JAX_NUM_PROCESSES=${#addresses[@]}
        export JAX_PROCESS_ID=\$(curl -s -H Metadata-Flavor:Google \
            http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
        echo \$\$ > \$last
        exec efficient-lm/.venv/bin/efficient-lm train$keys"
}

wait_for_slice
install
until train "$@"; do
    sleep "$POLL_SECONDS"
    if [[ $(state) == ACTIVE ]]; then
        echo "the run ended early; slice $name is still there, and costs. To give it back:" >&2
        echo "  gcloud compute tpus queued-resources delete $name ${place[*]} --force" >&2
        exit 1
    fi
    wait_for_slice
    install
done
[[ ${KEEP:-} == yes ]] || release
