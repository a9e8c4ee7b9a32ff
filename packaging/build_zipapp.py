"""Builds clawnet as one runnable file for a platform: build_zipapp.py [--all | PLATFORM...] -> dist/*.pyz

Each file holds the wheels of every supported Python version: extension modules named for one Python version lie side by
side, the others are built for all. Where a platform has no table entry, the file is for the Python that builds it.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
WORK = ROOT / "build" / "zipapp"
VERSIONS = ("3.11", "3.12", "3.13")
ENTRY_POINT = "clawnet.commands.app:main"
SOURCES = ("clawnet", "commands", "pyproject.toml", "README.md", "LICENSE")
PLATFORMS = {
    "linux-x86_64": ("manylinux2014_x86_64", "manylinux_2_28_x86_64", "manylinux_2_34_x86_64"),
    "linux-aarch64": ("manylinux2014_aarch64", "manylinux_2_28_aarch64", "manylinux_2_34_aarch64"),
    "macos-arm64": ("macosx_11_0_arm64", "macosx_12_0_arm64"),
    "windows-amd64": ("win_amd64",),
}


def this_platform() -> str:
    """The name of the platform that runs this script, as in PLATFORMS."""
    system = {"Darwin": "macos"}.get(platform.system(), platform.system().lower())
    return f"{system}-{platform.machine().lower()}"


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    """Runs a command; ends the build with what it printed when it fails."""
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        sys.exit(f"build_zipapp: this failed: {' '.join(words)}")


def build_distributions() -> Path:
    """The wheel and the source archive, from a copy of the sources, so that no leftover of an older build slips in."""
    source = WORK / "source"
    source.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--outdir", DIST, source)
    return max(DIST.glob("clawnet-*.whl"), key=lambda path: path.stat().st_mtime)


def requirements(wheel: Path) -> list[str]:
    """What the wheel needs to run, without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    found = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return [line for line in found if "extra ==" not in line]


def collect(name: str, wheel: Path) -> Path:
    """A directory with clawnet and everything it needs on a platform."""
    site = WORK / f"site-{name}"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile")
    run(*pip, "--target", site, "--no-deps", wheel)
    if name not in PLATFORMS:
        run(*pip, "--target", site, *requirements(wheel))
        return site
    tags = [part for tag in PLATFORMS[name] for part in ("--platform", tag)]
    for version in VERSIONS:
        layer = WORK / f"layer-{name}-{version}"
        run(*pip, "--target", layer, "--only-binary=:all:", *tags, "--python-version", version, *requirements(wheel))
        shutil.copytree(layer, site, dirs_exist_ok=True)
    return site


def build(name: str, wheel: Path) -> Path:
    """The runnable file of one platform. Byte code is compiled at its first run, so that later ones start fast."""
    site = collect(name, wheel)
    shutil.rmtree(site / "bin", ignore_errors=True)
    target = DIST / f"clawnet-{name}.pyz"
    shiv = (sys.executable, "-m", "shiv", "--compile-pyc", "--reproducible")
    run(*shiv, "--site-packages", site, "--python", "/usr/bin/env python3", "-e", ENTRY_POINT, "-o", target)
    return target


def main() -> None:
    """Builds what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every platform")
    parser.add_argument("platform", nargs="*", help=f"{', '.join(PLATFORMS)} (default: this one)")
    options = parser.parse_args()
    names = list(PLATFORMS) if options.all else options.platform or [this_platform()]
    shutil.rmtree(WORK, ignore_errors=True)
    DIST.mkdir(exist_ok=True)
    wheel = build_distributions()
    for name in names:
        target = build(name, wheel)
        print(f"{target} ({target.stat().st_size / 1e6:.1f} MB)")
    shutil.rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    main()
