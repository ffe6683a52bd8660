# Each target needs only Python (3.10 to 3.13) and make: it builds .venv and uses it again the next time.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
# opencv-python needs a desktop's libraries; where they are missing, its headless build takes its place.
HEADLESS := $(BIN)/python -c 'import cv2' 2>/dev/null || $(PIP) --force-reinstall --no-deps opencv-python-headless
PACKAGING := constraints.txt pyproject.toml setup.py
# A worker of pytest runs whole files: they share fixtures that are expensive. Their order is that of their names, which
# ends with quick ones: xdist's own order ends with those of few tests, and one worker would wait for the slow among them.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
# These folders need torch and timm, but not OpenMMLab.
STITCHING := tests/stitching tests/files

.PHONY: help quickstart demo check test test-stitching coverage setup setup-full lint clean

help:
	@echo "make quickstart      set up without a compiler, then train, evaluate and plot stitched ViTs"
	@echo "make demo            after it: a page on which any of these ViTs' stitches runs on your images"
	@echo "make check           lint, types and the fast tests: before each commit, about two minutes on two cores"
	@echo "make test            lint, types and all tests: what CI runs"
	@echo "make coverage        all tests once more, slower, with a table of the lines that none of them runs"
	@echo "make test-stitching  the tests of mmsnnet.stitching and mmsnnet.files without OpenMMLab"
	@echo "All but these two set up everything first, detection's compiled operators included."

quickstart: setup
	@PATH="$(abspath $(BIN)):$$PATH" bash configs/quickstart/run.sh

QUICKSTART := work_dirs/quickstart
demo: $(VENV)/.setup-demo
	@test -d $(QUICKSTART)/stitched-vit-s-l || { echo "$(QUICKSTART) has no model yet: make quickstart"; exit 2; }
	@$(BIN)/python -m mmsnnet.demo $(QUICKSTART)/stitched-vit-s-l --points $(QUICKSTART)/operating_points.json \
		--examples $(QUICKSTART)/data/images/validation

check: lint
	$(PYTEST) -m "not (slow or distributed or end_to_end or detection or browser)"

test: lint test-stitching
	$(PYTEST) $(STITCHING:%=--ignore=%)

# Tracing makes Python code take twice as long, so CI does without.
coverage: setup-full
	$(PYTEST) -p tests.without_openmmlab $(STITCHING) --cov --cov-report=
	$(PYTEST) $(STITCHING:%=--ignore=%) --cov --cov-append

test-stitching: setup-full
	$(PYTEST) -p tests.without_openmmlab $(STITCHING)

lint: setup-full
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.setup
setup-full: $(VENV)/.setup-full

$(VENV)/.setup: $(PACKAGING)
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14) and "the pinned stack needs Python 3.10 to 3.13: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -U pip
	$(PIP) -e '.[mminstall,viz]'
	$(HEADLESS)
	touch $@

$(VENV)/.setup-demo: $(VENV)/.setup
	$(PIP) -e '.[mminstall,viz,demo]'
	$(HEADLESS)
	touch $@

# mmdet does not import without mmcv's compiled operators. Where no wheel offers them, they are compiled against the
# installed torch (about 10 minutes on 2 cores); pip caches the operator-less wheel, hence --no-cache-dir.
$(VENV)/.setup-full: $(VENV)/.setup
	$(PIP) setuptools wheel ninja psutil packaging
	@echo "mmcv's operators: from a wheel if there is one, else compiled now, which takes about 10 minutes on 2 cores"
	$(BIN)/python -c 'import mmcv._ext' 2>/dev/null || \
		$(PIP) --no-build-isolation --no-cache-dir --force-reinstall --no-deps onedl-mmcv
	$(BIN)/python -c 'import mmcv._ext'
	$(PIP) -e '.[mminstall,det,viz,onnx,demo,serve,dev]'
	$(HEADLESS)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info mmsnnet/.mim
