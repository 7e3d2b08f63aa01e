import logging
import os

# Before torch and transformers are imported, and for the children of tests too: no test asks the network, threads that
# wait leave the core to others, and processes that run beside each other have one thread each.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from compat_peers import peers_on_path

# Minutes each: they begin first, so that no worker is left with one of them at the end.
LONG = [f"test_{name}.py" for name in ("build", "triton_lm_head", "vocab_parallel", "gpu_audit", "triton_sampling")]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers at every run; FASTRLHF_TEST_SEED takes others, to see whether a test hangs on them."""
    torch.manual_seed(int(os.environ.get("FASTRLHF_TEST_SEED", "0")))


@pytest.fixture(autouse=True)
def warnings_are_logged():
    """As in a process of its own: the demo and its like silence the loggers of the process that they run in."""
    logging.getLogger("fastrlhf").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def peers():
    """The frameworks that fastrlhf.compat is compared with can be imported while the tests of one file run."""
    with peers_on_path():
        yield


@pytest.fixture(scope="module")
def only_us():
    """In the benchmarks nobody but ourselves and eager PyTorch: torch.compile alone would take minutes."""
    from fastrlhf.bench import peers, suite
    from fastrlhf.bench.settings import TINY

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "ADAPTERS", {name: peers.ADAPTERS[name] for name in ("ours", "eager")})
        patch.setattr(suite, "QUICK", {"cpu": TINY})
        for variable in ("THP_MEM_ALLOC_ENABLE", "FASTRLHF_CPU_CAPABILITY", "FASTRLHF_BACKEND"):
            patch.delenv(variable, raising=False)
        yield


@pytest.fixture(scope="module")
def measured(only_us, tmp_path_factory):
    """{family: its file}, from a run of everything at tiny sizes."""
    from fastrlhf.cli import main

    output = tmp_path_factory.mktemp("results")
    assert main(["bench", "kernels", "--device", "cpu", "--quick", "--output", str(output)]) == 0
    (folder,) = output.iterdir()
    return {path.name.removesuffix("-quick.json"): path for path in folder.iterdir()}
