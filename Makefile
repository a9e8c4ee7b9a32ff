# Thin: each target calls a script.
.PHONY: init run build build-all test test-coverage lint fmt release

init:
	scripts/clawnet init

run:
	scripts/clawnet

build:
	scripts/build

build-all:
	scripts/build --all

test:
	scripts/test

test-coverage:
	scripts/test --coverage

lint:
	scripts/lint

fmt:
	scripts/lint --fix

release:
	scripts/release
