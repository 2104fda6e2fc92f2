PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OUT ?= runs/$@-$(SEED)
SEED ?= 0
CONFIGS := configs/tiny

.PHONY: install test quickstart reproduce edits

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
	$(RUN) -m duet.inference.generate --model $(CONFIGS)/model --output $(OUT)/edit \
	  --adapter $(OUT)/ar/checkpoint-45 --adapter $(OUT)/decoder/checkpoint-40 \
	  --image $(CONFIGS)/prompts/edits_eval/002-source0.png \
	  --image $(CONFIGS)/prompts/edits_eval/002-source1.png \
	  --prompt "put the circle of the first picture above the word of the second"

reproduce: install
	$(call pipeline,250,180)

# both stages on edits, then held-out edits kind by kind
edits: install
	$(RUN) -m duet.train $(CONFIGS)/edits_decoder.yaml seed=$(SEED) output_dir=$(OUT)/decoder train.resume=latest
	$(RUN) -m duet.train $(CONFIGS)/edits_ar.yaml seed=$(SEED) output_dir=$(OUT)/ar train.resume=latest
	$(RUN) -m duet.train.tiny.edit_success $(CONFIGS)/edits_ar.yaml --output $(OUT)/report \
	  --checkpoint $(OUT)/decoder/checkpoint-60 --checkpoint $(OUT)/ar/checkpoint-60 \
	  --checkpoint $(OUT)/ar/checkpoint-60,$(OUT)/decoder/checkpoint-60
