# The environment is made on first use, in .venv, from pyproject.toml and constraints.txt; nothing is installed elsewhere.

BIN := .venv/bin
READY := .venv/.ready
CXX_PROGRAM = $(or $(HMQ_FPGA_GXX),g++)

.DEFAULT_GOAL := help
.PHONY: help demo bench test lint format clean compiler simulator browser

help:
	@echo "make demo    train, quantize, convert and verify a small network; ends with a report page"
	@echo "make test    all checks and all tests"
	@echo "make bench   cost of training steps, of a whole run's stages, and by number of parameters; half an hour"
	@echo "make lint    format, style, types and borders between the folders"
	@echo "make format  mend format and style where a program can"
	@echo "make clean   remove the environment and all caches; results in hls_projects/ stay"

demo: compiler $(READY)
	$(BIN)/hmq-fpga run digits_mlp --rw 8

# A file's tests stay in one process, since they share what they compile.
test: compiler simulator browser lint
	$(BIN)/pytest -n 2 --dist loadfile
	rm -rf notebooks/hls_projects
	HMQ_FPGA_STEPS_SHARE=0.2 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --nbmake notebooks

bench: compiler $(READY)
	mkdir -p build
	$(BIN)/python benchmarks/step_time.py --json > build/step_time.json
	$(BIN)/python benchmarks/step_time.py --table build/step_time.json
	$(BIN)/python benchmarks/authors_step.py mlp_b64
	$(BIN)/python benchmarks/authors_step.py cnn_b128
	$(BIN)/python benchmarks/stages.py
	$(BIN)/python benchmarks/scaling.py --rows build/scaling.json

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find hmq_fpga tests -name __pycache__ -type d -prune -exec rm -rf {} +

compiler:
	@command -v "$(CXX_PROGRAM)" >/dev/null || { \
	  echo "$(CXX_PROGRAM) not found, needed to compile the C simulation: install your system's C++ compiler" \
	    "(Debian, Ubuntu: apt-get install g++), or set HMQ_FPGA_GXX to its path" >&2; exit 1; }

simulator:
	@command -v iverilog >/dev/null || { \
	  echo "iverilog not found, needed to test the Verilog edge by edge: install Icarus Verilog" \
	    "(Debian, Ubuntu: apt-get install iverilog)" >&2; exit 1; }

browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { \
	  echo "chromium not found, needed to test the report pages: install Chromium or Chrome" \
	    "(Debian: apt-get install chromium)" >&2; exit 1; }

$(READY): pyproject.toml constraints.txt
	@for python in python3.11 python3.10; do \
	  if $$python -c 'import ensurepip, venv' 2>/dev/null; then break; fi; python=; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "no Python 3.11 or 3.10 with venv found: install one" \
	    "(Debian 12: apt-get install python3.11-venv; elsewhere pyenv or your system's packages)" >&2; exit 1; \
	fi; \
	$$python -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
