# The environments are made on first use, in .venv and (without QKeras) .venv-core, from pyproject.toml and the constraints;
# nothing is installed elsewhere. `make PYTHON=python3.13 ...` makes them of that Python, and later calls keep it.

BIN := .venv/bin
CORE := .venv-core/bin
CXX_PROGRAM = $(or $(HMQ_FPGA_GXX),g++)

.DEFAULT_GOAL := help
.PHONY: help demo bench test test-core lint format clean compiler simulator browser environment environment-core

help:
	@echo "make demo    train, quantize, convert and verify a small network; ends with a report page"
	@echo "make test    all checks and all tests"
	@echo "make test-core   all tests but QKeras's, in an environment with no TensorFlow and the newest numpy"
	@echo "make bench   cost of training steps, of a whole run's stages, and by number of parameters; half an hour"
	@echo "make lint    format, style, types and borders between the folders"
	@echo "make format  mend format and style where a program can"
	@echo "make clean   remove the environment and all caches; results in hls_projects/ stay"

demo: compiler environment
	$(BIN)/hmq-fpga run digits_mlp --rw 8

# A file's tests stay in one process, since they share what they compile.
test: compiler simulator browser lint
	$(BIN)/pytest -n 2 --dist loadfile
	rm -rf notebooks/hls_projects
	HMQ_FPGA_STEPS_SHARE=0.2 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --nbmake notebooks

test-core: compiler simulator browser environment-core
	HMQ_FPGA_CORE=1 $(CORE)/pytest -n 2 --dist loadfile

bench: compiler environment
	mkdir -p build
	$(BIN)/python benchmarks/step_time.py --json > build/step_time.json
	$(BIN)/python benchmarks/step_time.py --table build/step_time.json
	$(BIN)/python benchmarks/authors_step.py mlp_b64
	$(BIN)/python benchmarks/authors_step.py cnn_b128
	$(BIN)/python benchmarks/stages.py
	$(BIN)/python benchmarks/scaling.py --rows build/scaling.json

lint: environment
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then echo mypy; $(BIN)/mypy; \
	else echo "mypy: not run, types are checked with numpy 1.26, on Python 3.10 and 3.11"; fi
	$(BIN)/lint-imports

format: environment
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .venv-core build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
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

environment:
	@.ci/environment .venv dev $(PYTHON)

environment-core:
	@.ci/environment .venv-core test $(PYTHON)
