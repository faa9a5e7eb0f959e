# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python
OUT    ?= runs/quickstart

.PHONY: help install quickstart test lint clean

help:
	@echo "make quickstart  set up, draw scenes, pretrain nano, evaluate, search: about 10 minutes on 2 CPU cores"
	@echo "make test        set up, check style, run the tests"
	@echo "make clean       remove runs/ and build output (the environment stays)"

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[train,eval]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[train,eval,export,search,corpus,corpus-ray,demo,dev]"
	# What LAMB is compared with; its dependencies would bring torchvision, and its optimizers need only torch.
	$(RUN) -m pip install --quiet --no-deps -c constraints.txt timm
	touch $@

quickstart: install
	OUT=$(OUT) PYTHON=$(RUN) bash training/launch/quickstart.sh

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

test: lint
	$(RUN) -m pytest -q

clean:
	rm -rf runs build dist *.egg-info
