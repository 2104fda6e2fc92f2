PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OUT ?= runs/$@-$(SEED)
SEED ?= 0
CONFIGS := configs/tiny

.PHONY: install test quickstart reproduce

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

test: install
	$(RUN) -m pytest -q -n 2 --dist loadfile

# decoder stage, AR stage, then base, each checkpoint and both together on held-out prompts
define pipeline
	$(RUN) -m duet.train $(CONFIGS)/decoder.yaml seed=$(SEED) output_dir=$(OUT)/decoder train.max_steps=$(1) train.resume=latest
	$(RUN) -m duet.train $(CONFIGS)/ar.yaml seed=$(SEED) output_dir=$(OUT)/ar train.max_steps=$(2) train.resume=latest
	$(RUN) -m duet.train.evaluate $(CONFIGS)/decoder.yaml --output $(OUT)/report \
	  --checkpoint $(OUT)/decoder/checkpoint-$(1) --checkpoint $(OUT)/ar/checkpoint-$(2) \
	  --checkpoint $(OUT)/ar/checkpoint-$(2),$(OUT)/decoder/checkpoint-$(1)
endef

quickstart: install
	$(call pipeline,40,45)

reproduce: install
	$(call pipeline,250,180)
