# The commands of the project; "make help" lists them. They need make, and Python 3.10 or later
# with venv.
#
#   PYTHON=python3.12      the interpreter; each has an environment of its own in .venv
#   ARGS='-k pool -x'      more arguments for pytest, the benchmark or the soak; '-n 0' runs the
#                          tests in one process, for debugging
#   CLIP='my film.mp4'     the video clip for the demo

PYTHON ?= python3
VENV = .venv/$(or $(shell $(PYTHON) -c 'import sys; print(sys.implementation.cache_tag)' 2>&-),none)
RUN = $(VENV)/bin/python
METADATA = setup.cfg setup.py pyproject.toml
LOCALES = src/pyams_zmq/locales

# The shell receives the file name as it was typed: blanks, quotes and dollars included.
override CLIP := $(value CLIP)
export CLIP

.DELETE_ON_ERROR:
.PHONY: help test test-slow soak demo lint bench bench-jobs coverage docs packaging locales clean check-python

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 18

test: $(VENV)/.has-test ## run the test suite, in several processes
	$(RUN) -m pytest -n auto $(ARGS)

test-slow: $(VENV)/.has-test ## run only the slow tests, which "make test" leaves out
	$(RUN) -m pytest -n auto -m slow $(ARGS)

soak: $(VENV)/.has-test ## load, jobs and faults for 20 minutes, then checks; ARGS='--minutes 2 --seed 7'
	cd benchmarks && $(abspath $(RUN)) -W ignore -m soak $(ARGS)

demo: $(VENV)/.has-demo ## convert the video CLIP, or a generated one, in a ØMQ process
	@$(RUN) -W 'ignore:pkg_resources is deprecated' examples/media_converter/demo.py $${CLIP:+-- "$$CLIP"}

lint: $(VENV)/.has-tox ## check the style and the types
	$(RUN) -m tox run -e lint

bench: check-python ## compare the speed with other libraries, installed in .bench; 15 minutes
	$(PYTHON) benchmarks/environments.py
	.bench/ours/bin/python benchmarks/bench.py $(ARGS)
	.bench/ours/bin/python -W ignore benchmarks/footprint.py

bench-jobs: check-python ## compare jobs with huey, rq, dramatiq and Celery, installed in .bench; 20 minutes
	$(PYTHON) benchmarks/environments.py ours queues
	.bench/ours/bin/python -W ignore benchmarks/jobs.py $(ARGS)

coverage: $(VENV)/.has-tox ## measure the coverage of the test suite, child processes included
	$(RUN) -m tox run -e coverage

docs: $(VENV)/.has-tox ## build the documentation: docs/_build/html/index.html
	$(RUN) -m tox run -e docs

packaging: $(VENV)/.has-tox ## build the distributions in dist, and check them
	$(RUN) -m tox run -e packaging

locales: $(VENV)/.has-locales ## extract the messages, update and compile the catalogues
	$(VENV)/bin/pybabel -q extract --no-location --omit-header -o $(LOCALES)/pyams_zmq.pot src/pyams_zmq
	$(VENV)/bin/pybabel -q update --ignore-pot-creation-date -D pyams_zmq -i $(LOCALES)/pyams_zmq.pot -d $(LOCALES)
	$(VENV)/bin/pybabel compile -D pyams_zmq -d $(LOCALES) --statistics

clean: ## remove everything that these commands made
	rm -rf .venv .bench .tox .coverage .coverage.* htmlcov build dist docs/_build src/*.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>&- || { \
	    echo "pyams_zmq needs Python 3.10 or later. PYTHON=$(PYTHON) is:" \
	        "$$($(PYTHON) --version 2>&1 | head -n 1)." \
	        "Use another interpreter, for example: make test PYTHON=python3.13" >&2; exit 2; }

# tox with uv leaves a file named .venv if there is no such folder.
$(RUN): | check-python
	@[ -d .venv ] || rm -f .venv
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

# The extra "test" includes "demo".
$(VENV)/.has-test: $(RUN) $(METADATA)
	$(RUN) -m pip install -qq -e '.[test]'
	touch $(VENV)/.has-demo $@

$(VENV)/.has-demo: $(RUN) $(METADATA)
	$(RUN) -m pip install -qq -e '.[demo]'
	touch $@

$(VENV)/.has-locales: $(RUN) $(METADATA)
	$(RUN) -m pip install -qq -e '.[locales]'
	touch $@

$(VENV)/.has-tox: $(RUN)
	$(RUN) -m pip install -qq tox
	touch $@
