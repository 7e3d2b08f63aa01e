#!/usr/bin/env bash
# On a GPU machine: builds, runs the tests marked `gpu`, then every GPU benchmark, within 25 minutes; results in
# bench/results/<device>/. Goes on when a part fails, says so at the end, and then exits with 1.
#
#   bench/gpu.sh [PART...]
#
# Without arguments every part runs: peers build tests log_probs lm_head losses advantages calls accuracy rollout scoring.
# Needs a Python with a CUDA build of torch, a C++ compiler, pytest and rich, for the last two transformers and peft too;
# nothing is downloaded. PYTHON chooses the Python (python3). Peers that it can import take part. Others can come along
# as wheels in bench/wheels/ (not in version control), fetched elsewhere, for Python 3.12 say, with
#
#   cd bench/wheels && pip download --no-deps --python-version 3.12 --platform manylinux2014_x86_64 \
#       --platform manylinux_2_28_x86_64 --platform manylinux1_x86_64 trl==1.12.0 verl==0.9.1 openrlhf==0.11.2 \
#       liger-kernel==0.8.5 cut-cross-entropy==25.1.1 torchrl==0.14.1 tensordict==0.14.3 hoptorch pyvers cloudpickle
#   pip download --no-deps trl==1.16.0
#
# TRL's Triton kernel is in 1.16 and its PPO in 1.12: the wheel of the later one is unpacked apart, as trl_latest.
# flash-attn has no wheel on PyPI; of its files one in Triton is used, and this makes a wheel without the CUDA part:
#
#   FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE \
#       pip wheel --no-deps --no-build-isolation flash-attn==2.8.3
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
# What Python gets on top of what it has: fastrlhf for everything, the peers for the benchmarks alone.
SITE=$PWD/build/gpu-site
PEERS=$PWD/build/gpu-peers
WANTED=" $* "
FAILED=()

# part NAME SECONDS COMMAND...: runs it under a limit of time if it is wanted, and remembers when it fails.
part() {
    local name=$1 seconds=$2 started=$SECONDS
    shift 2
    [[ $WANTED == *[![:space:]]* && $WANTED != *" $name "* ]] && return 0
    printf '\n=== %s (at most %s s)\n' "$name" "$seconds"
    if timeout --kill-after=10 "$seconds" "$@"; then
        printf '=== %s: done in %s s\n' "$name" $((SECONDS - started))
    else
        local status=$?
        printf '=== %s: FAILED (%s) after %s s\n' "$name" "$status" $((SECONDS - started))
        FAILED+=("$name")
        return 1
    fi
}

check() {
    "$PYTHON" - <<'PY'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} in {sys.executable} finds no GPU that it can use")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version.split()[0]}")
PY
}

unpack() {
    local wheel target
    rm -rf "$PEERS" && mkdir -p "$PEERS"
    for wheel in bench/wheels/*.whl; do
        target=$PEERS
        [[ $wheel == */trl-1.1[3-9]* ]] && target=$PEERS/trl_latest
        "$PYTHON" -m zipfile -e "$wheel" "$target" || return 1
    done
    # Some wheels keep their package under NAME.data/purelib.
    for wheel in "$PEERS"/*.data/purelib/* "$PEERS"/*.data/platlib/*; do
        [[ -e $wheel ]] && cp -rn "$wheel" "$PEERS/"
    done
    return 0
}

# The package as it will be installed, from links: nothing is written into the Python that is there.
build() {
    rm -rf "$SITE"
    "$PYTHON" setup.py -q build_ext --inplace || return 1
    mkdir -p "$SITE/fastrlhf" && cp -rsf "$PWD"/fastrlhf/* "$SITE/fastrlhf/" || return 1
    ln -sfn "$PWD/kernels/triton" "$SITE/fastrlhf/kernels"
    ln -sfn "$PWD/bench" "$SITE/fastrlhf/bench"
    mkdir -p "$SITE/fastrlhf-0.dist-info"
    printf 'Metadata-Version: 2.1\nName: fastrlhf\nVersion: %s\n' \
        "$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" > "$SITE/fastrlhf-0.dist-info/METADATA"
}

bench() {
    local families=(kernels --only "$1")
    [[ $1 == rollout || $1 == scoring ]] && families=("$1")
    PYTHONPATH=$PYTHONPATH:$PEERS "$PYTHON" -m fastrlhf bench "${families[@]}" --device cuda
}

export PYTHON SITE PEERS
export -f unpack build bench
# PYTHONSAFEPATH (Python 3.11): or the folder fastrlhf in the working directory would come before $SITE.
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

check || exit 1
compgen -G 'bench/wheels/*.whl' > /dev/null && part "peers" 60 bash -c unpack
part "build" 240 bash -c build || exit 1
# Only the files that hold such tests: others import what a bare machine does not have.
mapfile -t WITH_GPU_TESTS < <(grep -l 'pytest.mark.gpu' tests/test_*.py)
part "tests" 220 "$PYTHON" -m pytest -m gpu -p no:cacheprovider "${WITH_GPU_TESTS[@]}"
part "log_probs" 200 bash -c "bench log_probs"
part "lm_head" 210 bash -c "bench lm_head"
part "losses" 120 bash -c "bench losses"
part "advantages" 100 bash -c "bench advantages"
part "calls" 80 bash -c "bench calls"
part "accuracy" 60 bash -c "bench accuracy"
part "rollout" 150 bash -c "bench rollout"
part "scoring" 60 bash -c "bench scoring"

printf '\n%s minutes\n' $(((SECONDS + 59) / 60))
if ((${#FAILED[@]})); then
    printf 'Failed: %s\n' "${FAILED[*]}"
    exit 1
fi
printf 'All parts passed; results are in bench/results/\n'
