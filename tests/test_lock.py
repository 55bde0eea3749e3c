"""poetry.lock installs each package once."""

from __future__ import annotations

import itertools
import tomllib
from collections import defaultdict

from conftest import ROOT
from packaging.markers import Marker

# Where the project runs: every combination is one environment in which at most one version may be installed.
PLATFORMS = [
    {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "aarch64"},
    {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"},
]
PYTHONS = [{"python_version": version, "python_full_version": f"{version}.1"} for version in ("3.11", "3.12", "3.13")]
EXTRAS = [{"extra": ""}, {"extra": "test"}]
ENVIRONMENTS = [
    {"implementation_name": "cpython", "platform_python_implementation": "CPython", **platform, **python, **extra}
    for platform, python, extra in itertools.product(PLATFORMS, PYTHONS, EXTRAS)
]


def installed_twice(lock: str) -> set[str]:
    """The packages of which a lock file installs two versions in one environment."""
    versions = defaultdict(list)
    for package in tomllib.loads(lock)["package"]:
        markers = package.get("markers", "")
        markers = markers.values() if isinstance(markers, dict) else [markers]  # one for each dependency group
        versions[package["name"]].append([Marker(text) if text else None for text in markers])

    def is_installed(markers: list[Marker | None], environment: dict[str, str]) -> bool:
        return any(marker is None or marker.evaluate(environment) for marker in markers)

    return {
        name
        for name, alternatives in versions.items()
        if any(sum(is_installed(m, environment) for m in alternatives) > 1 for environment in ENVIRONMENTS)
    }


def test_no_package_is_installed_twice():
    assert not installed_twice((ROOT / "poetry.lock").read_text("utf-8"))


def test_two_versions_with_overlapping_markers_are_found():
    """As nvidia-cublas once stood in the file: both versions were written over each other, and torch crashed."""
    package = '[[package]]\nname = "nvidia-cublas"\nversion = "{}"\nmarkers = "{}"\n'
    on_linux, on_both = "platform_system == 'Linux'", "sys_platform == 'win32' or sys_platform == 'linux'"
    assert installed_twice(package.format("13.1.1.3", on_both) + package.format("13.10.0.20", on_linux)) == {
        "nvidia-cublas"
    }
    on_windows = "sys_platform == 'win32'"
    assert not installed_twice(package.format("13.1.1.3", on_windows) + package.format("13.10.0.20", on_linux))
