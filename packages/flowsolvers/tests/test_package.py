"""The package as a whole: its surface, its README, what importing it costs."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import flowsolvers as fs

ROOT = Path(__file__).parents[1]


def test_public_names_are_these():
    assert fs.__all__ == [
        "APG",
        "GVP",
        "VP",
        "AdaptiveError",
        "AdaptiveSolution",
        "Context",
        "Controller",
        "Guided",
        "Likelihood",
        "Limiter",
        "Linear",
        "Method",
        "Momentum",
        "NotFiniteError",
        "Pair",
        "Path",
        "Plan",
        "Reached",
        "Renorm",
        "Row",
        "Schedule",
        "Solution",
        "Step",
        "Tableau",
        "Velocity",
        "__version__",
        "beta",
        "citation",
        "composed",
        "contextual",
        "cosine",
        "diffusion_coefficient",
        "embedded_pair",
        "evaluate",
        "fit_schedule",
        "fitted",
        "flux_shift",
        "from_times",
        "guidance_rule",
        "guided",
        "guided_batch",
        "inpainted",
        "karras",
        "linear_quadratic",
        "log_likelihood",
        "logistic",
        "lumina_rational",
        "lumina_sigmoid",
        "method",
        "model_rows",
        "plan",
        "polyexponential",
        "progress",
        "sample_sde",
        "schedule",
        "sd3_shift",
        "shift",
        "sigmoid",
        "solve",
        "solve_adaptive",
        "solvers",
        "terminal",
        "uniform",
    ]
    assert all(hasattr(fs, name) for name in fs.__all__)
    assert fs.__version__ == version("flowsolvers")


def test_readme_example_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("midpoint on shift:4@cosine: 10 evaluations")


def test_import_takes_at_most_a_twentieth_of_what_torch_takes(tmp_path):
    """50 ms beyond torch on a machine that imports torch in a second, compiled as pip leaves it.

    Without the garbage collector, which goes over all of torch's objects, 80 ms, when their number
    happens to reach its limit.
    """
    code = (
        "import gc, time; gc.disable(); begun = time.process_time(); import torch; "
        "middle = time.process_time(); "
        "import flowsolvers; print((time.process_time() - middle) / (middle - begun))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)
    first, *runs = [
        float(subprocess.check_output([sys.executable, "-c", code], env=environment, text=True))
        for _ in range(4)
    ]
    assert min(runs) <= 0.05, (first, *runs)
