"""Installs ``kernels/`` as ``i2am.kernels`` (CONTRIBUTING.md says why it is laid out so); the rest: pyproject.toml."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Take the modules of ``i2am.kernels`` from ``kernels/``; in a checkout ``i2am/kernels/__init__.py`` finds them."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return super().find_package_modules(package, "kernels" if package == "i2am.kernels" else package_dir)


setup(cmdclass={"build_py": BuildPy})
