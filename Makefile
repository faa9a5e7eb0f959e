# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python
OUT    ?= runs/quickstart
PORT   ?= 7860

.PHONY: help install quickstart demo test lint clean

help:
	@echo "make quickstart  set up, draw scenes, pretrain nano, evaluate, search: about 10 minutes on 2 CPU cores"
	@echo "make demo        a page to search, classify and compare languages in, with the model of the quickstart; PORT=7860"
	@echo "make test        set up, check style, run the tests"
	@echo "make clean       remove runs/ and build output (the environment stays)"

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[train,eval]"
	touch $@

$(VENV)/.installed-demo: $(VENV)/.installed
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[train,eval,export,search,corpus,corpus-ray,demo,dev]"
	# What LAMB is compared with; its dependencies would bring torchvision, and its optimizers need only torch.
	$(RUN) -m pip install --quiet --no-deps -c constraints.txt timm
	touch $@

quickstart: install
	OUT=$(OUT) PYTHON=$(RUN) bash training/launch/quickstart.sh

# The quickstart's model over 8,000 scenes that it was not trained on (another seed). MODEL, DATA and EXAMPLES take others.
MODEL ?= $(OUT)/nano/model
DATA  ?= $(OUT)/demo/scenes/validation-*.parquet
ifeq ($(origin DATA),file)
EXAMPLES ?= 红色的圆形|a red circle;蓝色的圆形|a blue circle;三颗黄色的星星|three yellow stars;红色的圆在蓝色方块的左边|a red circle to the left of a blue square
endif

demo: $(VENV)/.installed-demo
ifeq ($(origin MODEL),file)
	@test -e $(MODEL) || { echo "There is no model in $(MODEL) yet: run 'make quickstart' first."; exit 1; }
endif
ifeq ($(origin DATA),file)
	@test -e $(OUT)/demo/scenes || $(RUN) -m training.scenes $(OUT)/demo/scenes --seed 1 --validation 8000 \
	  --train 4 --twins 2 --test 100 --task-size 10
endif
	@PORT=$(PORT) EXAMPLES="$(EXAMPLES)" $(RUN) model_cards/space/app.py --model "$(MODEL)" --data "$(DATA)" \
	  --index $(OUT)/demo/index

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

test: lint
	$(RUN) -m pytest -q

clean:
	rm -rf runs build dist *.egg-info
