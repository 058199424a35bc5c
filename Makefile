# The environments are made on first use, in .venv and (without QKeras) .venv-core, from pyproject.toml and the constraints;
# nothing is installed elsewhere. `make PYTHON=python3.13 ...` makes them of that Python, and later calls keep it.

BIN := .venv/bin
CORE := .venv-core/bin
CXX_PROGRAM = $(or $(HMQ_FPGA_GXX),g++)

.DEFAULT_GOAL := help
.PHONY: help demo docs bench results test test-core lint format clean compiler simulator browser environment environment-core environment-hgq2

help:
	@echo "make demo    train, quantize, convert and verify a small network; ends with a report page"
	@echo "make test    all checks and all tests"
	@echo "make test-core   the tests but QKeras's and long training, in an environment with no TensorFlow and the newest numpy"
	@echo "make bench   figures of time and memory: training steps, a run's stages, size of the network; an hour"
	@echo "make docs    the documentation, in build/docs, with warnings as errors"
	@echo "make results all figures of README and docs again, but for rows that are stored; many hours, goes on where it stopped"
	@echo "make lint    format, style, types and borders between the folders"
	@echo "make format  mend format and style where a program can"
	@echo "make clean   remove the environment and all caches; results in hls_projects/ stay"

demo: compiler environment
	$(BIN)/hmq-fpga run digits_mlp --rw 8

# A file's tests stay in one process, since they share what they compile.
test: compiler simulator browser lint docs
	$(BIN)/pytest -n 2 --dist loadfile
	rm -rf notebooks/hls_projects
	HMQ_FPGA_STEPS_SHARE=0.2 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --nbmake notebooks

test-core: compiler simulator browser environment-core
	HMQ_FPGA_CORE=1 $(CORE)/pytest -n 2 --dist loadfile -m "not once"

# Each keeps its rows in benchmarks/*.json, and measures only those that are missing: without a file, all of it.
bench: compiler environment
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/authors_step.py
	$(BIN)/python benchmarks/stages.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/imagenet.py

results: bench environment-hgq2
	$(BIN)/python benchmarks/promise.py digits_mlp digits_cnn --seeds 5 --exact
	$(BIN)/python benchmarks/results.py --seeds 5
	$(BIN)/python benchmarks/estimates.py build/results/digits_tiny_cnn build/results/magic_mlp build/results/pendigits_mlp
	.venv-hgq2/bin/python benchmarks/hgq2.py pendigits_shallow --luts 4000 2600 1700
	.venv-hgq2/bin/python benchmarks/hgq2.py mnist14_mlp --luts 6000 3000
	$(BIN)/python benchmarks/frontier.py pendigits_shallow --luts 4000 3600 2600 2350 1700 1580
	$(BIN)/python benchmarks/frontier.py mnist14_mlp --luts 6000 5800 3000 2950
	$(BIN)/python benchmarks/frontier.py letter_mlp --luts 20000 --no-yosys
	$(BIN)/python benchmarks/frontier.py magic_mlp --luts 9000 4000 --no-yosys
	$(BIN)/python benchmarks/frontier.py mnist14_wide --luts 14000 13500
	$(BIN)/python benchmarks/ablation.py pendigits_shallow --luts 1700 --seeds 8
	$(BIN)/python benchmarks/ablation.py mnist14_mlp --luts 3000 --variants 'as built' 'saliency: magnitude alone' --seeds 8
	$(BIN)/python benchmarks/methods.py pendigits_mlp letter_mlp --rates 6 8 10 12 14 --seeds 5
	$(BIN)/python benchmarks/methods.py magic_mlp --methods hmq uniform --rates 8 12 14 --seeds 5
	$(BIN)/python benchmarks/methods.py mnist_cnn dscnn_fsdd --seeds 3
	$(BIN)/python benchmarks/options.py pendigits_mlp letter_mlp --seeds 5
	$(BIN)/python benchmarks/distill.py digits_mlp digits_tiny_cnn pendigits_mlp letter_mlp magic_mlp --seeds 5
	$(BIN)/python benchmarks/dead.py digits_mlp pendigits_mlp letter_mlp magic_mlp --seeds 5
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/clock.py
	$(BIN)/python -m tests.documentation

docs: environment
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f docs/mkdocs.yml

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

environment-hgq2:
	@.ci/environment .venv-hgq2 hgq2 $(PYTHON)
