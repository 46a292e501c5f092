# The pipeline: every chapter is a file that depends on its notebook, its parameters and the chapter before; a room
# depends on its notebook and its parameters only, so rooms run side by side, after the chapters, which measure speed.
#
#   models/<run>/parameters/<chapter>.yml   what the profile and the command line ask of the chapter
#   models/<run>/stamps/<chapter>.done      the chapter has run, with these
#   results/<run>/nbs/<chapter>.ipynb       the executed notebook

PROFILE := quick
DATA :=
VENV := .venv
PORT := 8000
JOBS := $(shell nproc 2>/dev/null || echo 2)

MAKEFLAGS += --no-builtin-rules --no-print-directory
.SUFFIXES:
.DELETE_ON_ERROR:

# The name of the run: the profile, with the name of the data where that is given.
quoted = '$(subst ','\'',$(1))'
data_name := $(if $(DATA),$(shell basename $(call quoted,$(DATA)) | sed -E 's/\.(zip|tar|tgz|tar\.[a-z0-9]+)$$//; s/[^A-Za-z0-9_.-]+/-/g; s/^[.-]+//; s/[.-]+$$//'))
ifeq ($(MAKECMDGOALS)$(DATA),site)
RUN := cifar10
else ifeq ($(MAKECMDGOALS)$(DATA),bench)
RUN := cifar10
else ifeq ($(DATA),)
RUN := $(PROFILE)
else
RUN := $(data_name)-$(PROFILE)
endif
ifeq ($(strip $(RUN)),)
$(error RUN is empty)
endif
ifneq ($(shell printf %s $(call quoted,$(RUN)) | tr -d 'A-Za-z0-9_.-'; expr $(call quoted,$(RUN)) : '[.-]'),0)
$(error RUN=$(RUN): a run is named by letters, digits, '-', '_' and '.', the first a letter or digit)
endif
export PROFILE DATA RUN

profiles := $(patsubst nbs/profiles/%.yml,%,$(sort $(wildcard nbs/profiles/*.yml)))
notebooks := $(sort $(wildcard nbs/[0-9][0-9]_*.ipynb))
chapters := $(notebooks:nbs/%.ipynb=%)
rooms := $(filter-out $(chapters),$(shell sed -n 's|^ *- file: nbs/\([^ ]*\).*|\1|p' _toc.yml))
pages := $(chapters) $(rooms)
parameters := $(pages:%=models/$(RUN)/parameters/%.yml)
stamps := $(chapters:%=models/$(RUN)/stamps/%.done)
room_stamps := $(rooms:%=models/$(RUN)/stamps/%.done)

# Not `bin/activate`: the tools of this environment come first, and nothing of another Python leaks in.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH PYTHONHOME
python := $(VENV)/bin/python

# A run is one chain; the make that it starts for the rooms is not.
ifndef CVDL_MAKE
.NOTPARALLEL:
endif

.PHONY: help book chapters rooms site test test-all lint export bench bench-full serve-site lock clean distclean check plan

help:
	@echo 'make book [PROFILE=$(subst $() ,|,$(profiles))] [DATA=path-or-name] [RUN=name]'
	@echo '                 run every chapter and room, render the site; an interrupted run resumes'
	@echo 'make chapters    the same without the site'
	@echo 'make site        render the committed CIFAR-10 run, or RUN=name, without training'
	@echo 'make test        lint, lesson cells, pipeline and site'
	@echo 'make test-all    the same and what a release needs: each extra installed, each chapter opened alone, more kills'
	@echo 'make bench       speed and size of the exported models of a run; speed of loading, augmentation, training and heat maps;'
	@echo '                 what fast-cnn learns in two epochs of CIFAR-10; the memory of a training on many images; the wait for a command'
	@echo 'make bench-full  the trainings on CIFAR-10 beside the book, hours: fast-cnn with three seeds, what each ingredient buys,'
	@echo '                 the wide one, a frozen backbone, ResNet50; an interrupted one goes on'
	@echo 'make export      notebooks to modules (nbdev), after an edit'
	@echo 'make lock        requirements.in to requirements.txt'
	@echo 'make clean       remove the site and the files of RUN (never results/cifar10)'
	@echo 'make distclean   remove every run, the site and the virtual environment'

book: chapters
	@$(python) tools/build_site.py $(RUN)

chapters: check $(stamps)
	@CVDL_MAKE=$$PPID $(MAKE) --jobs=$(JOBS) rooms

check:
	$(if $(filter $(PROFILE),$(profiles)),,$(error PROFILE=$(PROFILE): no such profile, expected one of: $(profiles)))

site: $(VENV)/.ready
	@$(python) tools/build_site.py $(RUN)

# -- chapters and rooms ------------------------------------------------------------------------------------------------

rooms: check $(room_stamps)
	@:

# Rewrites only the parameter files that change; the make for the rooms finds them written.
plan: check $(VENV)/.ready
	@$(python) tools/plan.py
ifndef CVDL_MAKE
$(parameters): plan
	@:
endif

# A plain command, without shell syntax: make then runs it as its own child, which ends when make is killed.
previous :=
define page
models/$(RUN)/stamps/$(1).done: nbs/$(1).ipynb models/$(RUN)/parameters/$(1).yml $(2) | _build/exported
	@$(python) tools/run_chapter.py $(1) $(RUN)
endef
define chapter
$(call page,$(1),$(previous))
previous := models/$(RUN)/stamps/$(1).done
endef
$(foreach name,$(chapters),$(eval $(call chapter,$(name))))
$(foreach name,$(rooms),$(eval $(call page,$(name))))

# -- environment and modules ------------------------------------------------------------------------------------------

$(VENV)/.ready: requirements.txt setup.py
	@tools/make_venv.sh $(VENV)

export: _build/exported
_build/exported: $(sort $(wildcard nbs/*.ipynb nbs/*/*.ipynb)) $(VENV)/.ready
	@mkdir -p _build
	@$(VENV)/bin/nbdev_export
	@touch $@

lock:
	@tools/lock.sh $(VENV)

# -- checks -----------------------------------------------------------------------------------------------------------

test: $(VENV)/.ready
	@$(python) -m pytest

test-all: $(VENV)/.ready
	@$(python) -m pytest -m 'release or not release'

lint: $(VENV)/.ready
	@$(VENV)/bin/ruff check

bench: $(VENV)/.ready
	@$(python) tools/bench.py $(RUN)
	@$(python) tools/bench_augmentation.py
	@$(python) tools/bench_data.py
	@$(python) tools/bench_training.py speed
	@$(python) tools/bench_training.py short
	@$(python) tools/bench_explanation.py
	@$(python) tools/bench_doors.py

bench-full: $(VENV)/.ready
	@for what in accuracy ablation wide frozen resnet50; do $(python) tools/bench_training.py $$what || exit 1; done

serve-site:
	@cd _build/html && $(CURDIR)/$(python) -m http.server $(PORT)

# -- cleaning ---------------------------------------------------------------------------------------------------------

clean:
	@rm -rf _build models/$(RUN) $(if $(filter cifar10,$(RUN)),,results/$(RUN))

distclean: clean
	@rm -rf models $(VENV) *.egg-info
	@find results -mindepth 1 -maxdepth 1 ! -name cifar10 -exec rm -rf {} + 2>/dev/null || true
