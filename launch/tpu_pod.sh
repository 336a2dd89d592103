#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice: asks for it, installs this clone on all workers, runs on all,
# collects the run directory, gives the slice back.
#
#   MOUNT=my-bucket launch/tpu_pod.sh all --config configs/mixtral.py mesh.fsdp=2 mesh.expert=8
#   launch/tpu_pod.sh create | install | run ARGUMENTS | collect | delete     one step at a time
#
# Needs: gcloud, logged in, with a project that has TPU quota. Edit the settings below or give them
# as environment variables. RUN_DIR must be a place that all workers share and that outlives them:
# a bucket that is mounted at the same path on all workers (MOUNT mounts one with gcsfuse).
# jax finds the workers by itself; `run` may be repeated, after a preemption or a crash, and goes on
# from the last checkpoint.
set -euo pipefail

NAME="${NAME:-drlora}"               # of the slice and its queued resource
ZONE="${ZONE:-us-east5-a}"
TYPE="${TYPE:-v5p-32}"               # 16 chips; https://cloud.google.com/tpu/docs
VERSION="${VERSION:-v2-alpha-tpuv5}" # of the TPU VM's software; v2-alpha-tpuv6e for v6e
SPOT="${SPOT:-}"                     # 1: cheaper, may be taken away at any time
PYTHON="${PYTHON:-3.12}"             # installed on the workers, whose own may be too old
MOUNT="${MOUNT:-}"                   # bucket to mount at /mnt/runs on every worker
RUN_DIR="${RUN_DIR:-${MOUNT:+/mnt/runs/$NAME}}"
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

refuse() {
    echo "$1" >&2
    exit 2
}

on_workers() { # COMMAND: on all workers at once, with its output
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

create() {
    local spot=()
    if [ -n "$SPOT" ]; then spot=(--spot); fi
    gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$VERSION" "${spot[@]}"
    echo "waiting for the slice ($TYPE in $ZONE)"
    local state=""
    until [ "$state" = ACTIVE ]; do
        sleep 20
        state="$(gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
            --format='value(state.state)')"
        echo "  $state"
        case "$state" in FAILED | SUSPENDED)
            echo "no slice; look at: gcloud compute tpus queued-resources describe $NAME --zone=$ZONE" >&2
            exit 1
            ;;
        esac
    done
}

install() {
    local archive
    archive="$(mktemp --suffix=.tar.gz)"
    git -C "$HERE" archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:/tmp/drlora.tar.gz" --zone="$ZONE" --worker=all
    rm -f "$archive"
    on_workers "rm -rf ~/drlora && mkdir ~/drlora && tar -xzf /tmp/drlora.tar.gz -C ~/drlora \
        && python3 -m pip install --quiet --user uv \
        && \$HOME/.local/bin/uv venv --quiet --clear --seed --python $PYTHON ~/venv \
        && \$HOME/venv/bin/pip install --quiet -e ~/drlora'[tpu]'"
    if [ -n "$MOUNT" ]; then
        # A checkpoint is finished by renaming its directory, which gcsfuse refuses unless told.
        on_workers "sudo mkdir -p /mnt/runs && sudo chown \$USER /mnt/runs \
            && (mountpoint -q /mnt/runs \
                || gcsfuse --implicit-dirs --rename-dir-limit=1000000 '$MOUNT' /mnt/runs)"
    fi
    on_workers "\$HOME/venv/bin/python -c 'import jax; jax.distributed.initialize(); \
        print(jax.process_index(), jax.local_device_count(), jax.device_count())'"
}

run() {
    local arguments
    printf -v arguments ' %q' "$@" "run.dir=$RUN_DIR"
    if ! on_workers "cd ~/drlora && \$HOME/venv/bin/python -u -m drlora_jax.train$arguments"; then
        echo "ended early; '$0 run' with the same arguments resumes from the last checkpoint" >&2
        return 1
    fi
}

collect() { # logs, report and checkpoints of the run, into ./runs
    mkdir -p runs
    gcloud compute tpus tpu-vm scp --recurse "$NAME:$RUN_DIR" runs/ --zone="$ZONE" --worker=0
}

delete() {
    gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
}

step="${1:-}"
shift || true
# Before anything costs money.
case "$step" in run | all | collect)
    [ -n "$RUN_DIR" ] || refuse "set MOUNT=BUCKET, or RUN_DIR to a directory that all workers share"
    ;;
esac
case "$step" in run | all)
    [ "$#" -gt 0 ] || refuse "usage: $0 $step --config FILE.py [section.field=value ...]"
    ;;
esac
case "$step" in
create | install | collect | delete) "$step" ;;
run) run "$@" ;;
all)
    create
    trap delete EXIT # a slice costs money until it is given back
    install
    run "$@"
    collect
    ;;
*)
    echo "usage: $0 all|create|install|run|collect|delete [arguments of drlora_jax.train]" >&2
    exit 2
    ;;
esac
