# make demo        the whole way from a clone: environment, SFT, reward model, PPO, and the numbers in runs/demo
# make demo QUICK=1   every stage in a few minutes, without targets
# make compare     the alternatives to PPO in one table, in runs/compare, in an hour and a half. QUICK=1 as above
# make test        all tests          make lint   style          make gpu-audit   GPU kernels, compiled without a GPU
# make bench       the ops beside their peers, which it installs in .venv-bench, and fastrlhf.compat beside the functions
#                  that it replaces; results in bench/results
# make clean       takes away what these made, but not runs/
#
# PYTHON  the Python to make .venv with (3.10 or newer)
# TORCH   what pip installs as torch, e.g. TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
# ARGS    more arguments, for `fastrlhf demo`, for pytest or for `fastrlhf bench kernels`

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
BIN := .venv/bin
PIP := python -m pip install --disable-pip-version-check
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.PHONY: demo compare test lint gpu-audit bench clean

demo: .venv/.demo
	$(BIN)/fastrlhf demo $(if $(filter-out 0,$(QUICK)),--quick) $(ARGS)

compare: .venv/.demo
	$(BIN)/fastrlhf compare $(if $(filter-out 0,$(QUICK)),--quick) $(ARGS)

test: .venv/.test .venv/.peers .venv/.deepspeed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

gpu-audit: .venv/.test
	$(BIN)/python bench/gpu_audit.py

bench: .venv-bench/.peers .venv/.test .venv/.peers
	.venv-bench/bin/fastrlhf bench kernels $(ARGS)
	$(BIN)/fastrlhf bench compat
	.venv-bench/bin/python -m fastrlhf.bench.readme

clean:
	rm -rf .venv .venv-bench build *.egg-info fastrlhf/_C*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each step of the installation leaves a stamp and is not repeated until what it depends on changes.
# The C++ part is built against the torch that is there, so torch comes first and pip builds without isolation.
.venv/.torch .venv-bench/.torch:
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -c "import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 10)" 2>/dev/null \
	    || { echo "Installing $(TORCH)"; $(@D)/bin/$(PIP) $(TORCH); }
	$(@D)/bin/$(PIP) "setuptools>=77" wheel
	@touch $@

.venv/.demo: .venv/.torch $(SOURCES)
	@echo "Installing fastrlhf"
	$(BIN)/$(PIP) --no-build-isolation -e ".[demo]"
	@touch $@

.venv/.test: .venv/.torch $(SOURCES)
	@echo "Installing fastrlhf with its tests"
	$(BIN)/$(PIP) --no-build-isolation -e ".[test,demo]"
	@touch .venv/.demo $@

# The frameworks whose functions fastrlhf.compat replaces, beside the environment: they contradict it and each other, so
# only the tests that compare with them see them. Without a network those tests are skipped.
.venv/.peers: .venv/.torch tests/peers.txt bench/peers.txt
	@echo "Installing the frameworks that fastrlhf.compat is compared with"
	@$(BIN)/$(PIP) -q --no-deps --upgrade -r tests/peers.txt --target .venv/peers \
	    && for version in 1.12.0 1.13.0 1.14.2 1.15.0; do \
	        $(BIN)/$(PIP) -q --no-deps --upgrade trl==$$version --target .venv/peers-trl/$$version || exit 1; \
	    done && touch $@ || echo "They cannot be installed; their tests are skipped"

# Beside the environment, too: what can import DeepSpeed does.
.venv/.deepspeed: .venv/.torch tests/deepspeed.txt
	@echo "Installing DeepSpeed for its tests"
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/$(PIP) -q --no-deps --no-build-isolation --upgrade \
	    -r tests/deepspeed.txt --target .venv/deepspeed && touch $@ || echo "It cannot be installed; its tests are skipped"

# bench/peers.txt says why those come without their requirements. The constraint keeps torch as it is. TRL's PPO and its
# Triton kernel are not in one release: the later one lies beside the other as trl_latest.
.venv-bench/.peers: .venv-bench/.torch $(SOURCES) bench/peers.txt
	@echo "Installing fastrlhf and its peers"
	@$(@D)/bin/python -m pip freeze | grep -i '^torch==' > $(@D)/constraints.txt
	$(@D)/bin/$(PIP) -c $(@D)/constraints.txt --no-build-isolation -e ".[demo,bench]"
	$(@D)/bin/$(PIP) --no-deps -r bench/peers.txt
	$(@D)/bin/$(PIP) --no-deps --upgrade trl==1.16.0 \
	    --target $$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/trl_latest
	@touch $@
