# Everything sets itself up in .venv on first use.  `make` alone lists the targets.
PYTHON ?= python3
BIN    := .venv/bin
PARAMS ?= paper/params/demo.yaml
SHELL  := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
# two workers side by side must not start as many threads each as there are cores
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# large gradients are allocated anew in every step: huge pages make that cheap where the kernel offers them, and freed memory is kept instead of given back
export THP_MEM_ALLOC_ENABLE = 1
export GLIBC_TUNABLES = glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184

# read by the tools themselves: as words of a command line, braces and blanks in it would be the shell's
run paper: export SET := $(SET)

.PHONY: help demo run test test-slow test-gpu paper docs readme book edit bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/ready: settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "== building .venv (a few minutes, once)"
	@$(PYTHON) -m venv .venv || { echo "Python's venv module is missing: install python3-venv, then try again."; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: ## train on movie reviews with the offline backbone, explain, report
	@$(MAKE) --no-print-directory run PARAMS=paper/params/demo.yaml

run: .venv/ready ## run one experiment: make run PARAMS=paper/params/NAME.yaml [SET='source=data/sst2 seed=1']
	@$(BIN)/python tools/run_experiment.py $(PARAMS)

test: .venv/ready ## sync check, notebooks, pytest
	@echo "== 1/3 sync: notebooks and modules agree"
	@$(BIN)/python tools/check_sync.py
	@echo "== 2/3 notebooks"
	@$(ONE_THREAD) $(BIN)/nbdev_test --n_workers 2 --timing
	@echo "== 3/3 pytest"
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2

test-slow: test ## also what takes minutes
	@echo "== slow notebooks cells"
	@$(ONE_THREAD) $(BIN)/nbdev_test --n_workers 2 --flags slow --timing
	@echo "== slow tests"
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -m slow

test-gpu: .venv/ready ## what needs a GPU
	@$(BIN)/python -m pytest -q -m gpu

paper: .venv/ready ## figures and tables from paper/results; runs what is missing (tools/paper.py --list says what) [SET='data=FOLDER']
	@$(BIN)/python tools/paper.py

docs: .venv/ready readme ## build the site into _docs
	@if command -v quarto >/dev/null; then $(BIN)/nbdev_docs; else echo "Quarto is not installed: pandoc preview"; $(BIN)/python tools/docs_preview.py; fi

readme: .venv/ready ## README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

book: .venv/ready ## execute all chapters in place, clean, export
	@for n in nbs/[0-9]*.ipynb nbs/index.ipynb; do echo "== $$n"; TQDM_DISABLE=1 PYTHONWARNINGS="ignore:IProgress not found" $(BIN)/jupyter nbconvert --log-level ERROR --to notebook --execute --inplace "$$n"; done
	@$(BIN)/nbdev_clean && $(BIN)/nbdev_export && $(MAKE) --no-print-directory readme

edit: .venv/ready ## pair every chapter with a text file in .nbpy
	@$(BIN)/jupytext --sync nbs/*.ipynb

bench: export OMP_NUM_THREADS = 1
bench: .venv/ready ## time and memory of the decode and of a tagging step, time of a training step; one thread
	@for d in float32 bfloat16; do for g in sparse dense; do for p in tiled naive; do PYTHONPATH=. $(BIN)/python tools/bench_decode.py $$p $$g $$d; done; done; done
	@mkdir -p paper/bench; keep() { "$${@:2}" > "$$1.part" && mv "$$1.part" "$$1" && cat "$$1"; }; export PYTHONPATH=.; \
	precisions=$$($(BIN)/python tools/bench_step.py precisions) || exit 1; for d in $$precisions; do \
	for w in 400 50; do keep paper/bench/step_offline_$${w}_$$d.json $(BIN)/python tools/bench_step.py offline $$d $$w 12; done; \
	keep paper/bench/step_bert-base_$$d.json $(BIN)/python tools/bench_step.py bert-base $$d 50 5; done; $(BIN)/python tools/bench_step.py readme; \
	for d in float32 bfloat16; do keep paper/bench/tagging_$$d.json $(BIN)/python tools/bench_tagging.py both $$d; done

clean: ## remove what was built
	@rm -rf _docs _proc build dist *.egg-info runs
