"""What `import misa` costs."""

import statistics
import subprocess
import sys

import pytest


def run(code):
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return out.stdout.strip()


def test_import_loads_no_heavy_library():
    code = "import misa, sys; misa.MISA; print(*(m for m in sys.modules if '.' not in m))"
    loaded = set(run(code).split())
    assert "torch" in loaded
    assert not loaded & {"transformers", "datasets", "accelerate", "peft", "pandas", "matplotlib", "lm_eval", "badam"}


@pytest.mark.slow
def test_import_takes_at_most_a_tenth_longer_than_that_of_torch():
    """Processor time, because other processes do not count in it; the two alternate, and medians are compared."""
    code = "import time; import {}; print(time.process_time())"
    times = {"torch": [], "misa; misa.MISA": []}
    for _ in range(7):
        for name, values in times.items():
            values.append(float(run(code.format(name))))
    torch_alone, with_misa = (statistics.median(values) for values in times.values())
    assert with_misa <= 1.1 * torch_alone
