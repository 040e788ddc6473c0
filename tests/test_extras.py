"""Commands where a package is missing that the optimizer alone does not need."""

import subprocess
import sys

import pytest

from misa.extras import exit_with

WITHOUT = """
import runpy, sys
missing, command, *words = sys.argv[1:]
sys.modules[missing] = None  # what an import then raises is ModuleNotFoundError
sys.argv = [command, *words]
runpy.run_module(command, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        ("misa.train", "pydantic", "train"),
        ("misa.memory", "transformers", "train"),
        ("misa.evaluate", "transformers", "eval"),
        ("misa.figures", "pandas", "figures"),
    ],
)
def test_command_without_its_packages_says_what_to_install(command, missing, extra):
    words = {"misa.figures": ["all", "--data_dir", "paper_figures/data"]}.get(command, ["--help"])
    done = subprocess.run([sys.executable, "-c", WITHOUT, missing, command, *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert missing in done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith(f"install with: pip install 'misa-optimizer[{extra}]'")
    assert "Traceback" not in done.stderr


def test_missing_module_of_the_package_itself_is_no_matter_of_installing():
    def main():
        raise ModuleNotFoundError("No module named 'misa.nothing'", name="misa.nothing")

    with pytest.raises(ModuleNotFoundError, match="nothing"):
        exit_with(main, "train")
