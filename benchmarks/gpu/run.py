"""Test and measure on a CUDA machine: `python benchmarks/gpu/run.py`; see benchmarks/README.md.

The first process needs only Python: it lays out the packages of this repository as if they were
installed, and starts processes for the tests, which compile side by side, and then one for the
measurements, alone. It keeps to a number of minutes: what does not fit is left out and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NO_DEVICE = 3
#: Processes that run tests, and their share of the time.
WORKERS, TESTS = 8, 0.45
#: Deals the tests out to the processes, which need no further package for that.
DEAL = """
import os

def pytest_collection_modifyitems(items):
    mine, all_ = map(int, os.environ["TESTS_OF"].split("/"))
    items[:] = items[mine::all_]
"""
SUBJECTS = ("rotation", "norms", "attention", "network")

#: Batch, rows, columns of tokens.
IMAGES = [(4, 32, 32), (2, 64, 64)]
IMAGES_SMOKE = [(2, 3, 4)]
NETWORK = {"width": 1536, "layers": 16, "heads": 16, "kv_heads": 16, "token_dim": 16}
NETWORK_SMOKE = {"width": 32, "layers": 2, "heads": 2, "kv_heads": 2, "token_dim": 4}


def main() -> int:
    parser = argparse.ArgumentParser(description="Test and measure on a CUDA machine.")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU; no result")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="end within this time; default %(default)s"
    )
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument(
        "--only", choices=SUBJECTS, action="append", help="measure this; may be repeated"
    )
    parser.add_argument("--measure", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        sys.path.insert(0, str(ROOT / "benchmarks" / "kernels"))
        subjects = options.only or list(SUBJECTS)
        measure(subjects, Path(options.measure), options.deadline, smoke=options.smoke)
        return 0
    if not options.smoke and not has_cuda():
        print("no CUDA device: nothing measured")
        return NO_DEVICE
    begun = time.time()
    deadline = begun + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        environment = install(Path(folder), smoke=options.smoke)
        passed, tests = True, "not run"
        if not options.no_tests:
            end = begun + TESTS * (deadline - begun)
            passed, tests = run_tests(Path(folder), environment, end, smoke=options.smoke)
        table = Path(folder) / "table.md"
        # 20 seconds before the end, so that what is under way then can end too.
        command = [sys.executable, __file__, "--measure", str(table)]
        command += ["--deadline", str(deadline - 20)]
        command += [word for subject in options.only or () for word in ("--only", subject)]
        command += ["--smoke"] if options.smoke else []
        try:
            left = max(20.0, deadline - time.time())
            code = subprocess.run(command, env=environment, timeout=left).returncode
            ended = "" if code == 0 else f"\nThe measurements ended with exit code {code}.\n"
        except subprocess.TimeoutExpired:
            ended = "\nThe measurements were ended for lack of time.\n"
        passed &= not ended
        tables = table.read_text(encoding="utf-8") if table.exists() else "Nothing measured."
        report = f"{tables}\n{ended}\nGPU tests: {tests}\n"
    print(f"\n{report}")
    if options.smoke:
        print("smoke: the script ran; nothing above is a measurement, and nothing was written")
    else:
        print(f"written to {write(report)}")
    return 0 if passed else 1


def has_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def install(folder: Path, *, smoke: bool) -> dict[str, str]:
    """Describe every distribution of the repository in `folder`, and give an environment with it.

    A `*.dist-info` with a name, a version and entry points is all that importlib.metadata reads.
    """
    paths = [str(folder)]
    for file in sorted(
        [*ROOT.glob("packages/*/pyproject.toml"), *ROOT.glob("kernels/pyproject.toml")]
    ):
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        name, version = project["name"], project["version"]
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        lines: list[str] = []
        for group, entries in project.get("entry-points", {}).items():
            lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
        (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
        paths.append(str(file.parent / "src"))
    environment = dict(os.environ)
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([*paths, inherited] if inherited else paths)
    for name in ("ROPE3D_BACKEND", "ROPE3D_ATTENTION", "NEXTDIT_KERNELS", "TRITON_INTERPRET"):
        environment.pop(name, None)
    if smoke:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def run_tests(
    folder: Path, environment: dict[str, str], end: float, *, smoke: bool
) -> tuple[bool, str]:
    """Run the tests marked gpu, and on a GPU all tests of the kernels, which then run natively.

    Only files that mention the mark are collected, since others may import what is not here; those
    of code compiled ahead of time need no GPU and are left to machines without one. So is what the
    repository's own conftest.py imports.
    """
    settings = folder / "pytest.ini"
    settings.write_text(
        "[pytest]\naddopts = --import-mode=importlib --strict-markers -p no:cacheprovider -q -ra\n"
        "markers =\n  gpu: needs a CUDA device\n  ray: starts Ray\n  slow: takes minutes\n",
        encoding="utf-8",
    )
    (folder / "deal.py").write_text(DEAL, encoding="utf-8")
    kernels = ROOT / "kernels" / "tests"
    candidates = [*ROOT.glob("packages/*/tests/**/test_*.py"), *ROOT.glob("tests/**/test_*.py")]
    candidates += kernels.glob("**/test_*.py")
    marked = sorted(
        str(file) for file in candidates if "mark.gpu" in file.read_text(encoding="utf-8")
    )
    runs = [[*marked, "-m", "gpu"]]
    if not smoke:
        others = [file for file in marked if not file.startswith(str(kernels))]
        native = sorted(map(str, kernels.glob("test_*.py")))
        native = [file for file in native if not file.endswith("code.py")]
        runs = [[*native, "-m", "not slow"]]
        runs += [[*others, "-m", "gpu"]] if others else []
    workers = max(1, min(WORKERS, (os.cpu_count() or 1) // 2))
    command = [sys.executable, "-m", "pytest", "-c", str(settings), f"--rootdir={ROOT}"]
    command += [f"--confcutdir={ROOT / 'kernels'}", "-p", "deal"]

    def run(arguments: list[str], worker: int) -> tuple[int, str]:
        own = environment | {"TESTS_OF": f"{worker}/{workers}"}
        left = max(1.0, end - time.time())
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
            try:
                code = subprocess.run(
                    [*command, *arguments],
                    env=own,
                    cwd=ROOT,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    timeout=left,
                ).returncode
            except subprocess.TimeoutExpired:
                code = 1
                said.write("\nended for lack of time")
            said.seek(0)
            return code, said.read()

    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(run, each, worker) for each in runs for worker in range(workers)]
    passed, counts = True, dict[str, int]()
    for job in jobs:
        code, said = job.result()
        if code not in (0, 5):  # 5: there was no test for this process
            passed = False
            print(said, flush=True)
        last = (said.strip().splitlines() or ["no output"])[-1]
        found = re.findall(r"(\d+) (passed|failed|errors?|skipped)", last)
        for number, word in found:
            counts[word] = counts.get(word, 0) + int(number)
        if code not in (0, 1, 5) or not (found or code == 5):
            counts[last.strip("= ")[:80]] = counts.get(last.strip("= ")[:80], 0) + 1
    return passed, ", ".join(f"{number} {word}" for word, number in counts.items()) or "none"


def write(report: str) -> Path:
    import torch

    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    machine = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    file = folder / f"gpu--{machine}--{datetime.now(UTC):%Y-%m-%d}.md"
    file.write_text(report, encoding="utf-8")
    return file


# What follows runs in its own process, with the packages on its path.


def measure(subjects: list[str], file: Path, deadline: float | None, *, smoke: bool) -> None:
    """Time everything and write the report as Markdown, after each subject what there is of it."""
    from subjects import table

    title = "# Smoke run on the CPU: no measurement" if smoke else "# Kernels and Next-DiT"
    rounds = 2 if smoke else 50
    deadline = deadline or time.time() + 3600
    parts = [title, conditions(smoke=smoke)]
    for subject in subjects:
        try:
            if time.time() > deadline:
                parts.append(f"## {subject.capitalize()}: no time left")
            elif subject == "network":
                few = max(2, rounds // 5)
                parts.append(f"## Next-DiT, bfloat16, not compiled, median of {few} rounds")
                parts.append(network(IMAGES_SMOKE if smoke else IMAGES, few, smoke=smoke))
            else:
                parts += table(subject, rounds, deadline, smoke=smoke)
        except Exception:  # the other subjects are worth having
            parts.append(f"{subject} failed:\n\n```\n{traceback.format_exc()}```")
        file.write_text("\n\n".join(parts), encoding="utf-8")


def conditions(*, smoke: bool) -> str:
    import torch
    import triton

    def ask(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        return done.stdout.strip().replace("\n", "; ")

    facts = {
        "device": "CPU, Triton's interpreter" if smoke else torch.cuda.get_device_name(),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": ask("git", "rev-parse", "HEAD"),
        "uncommitted": ask("git", "status", "--short") or "nothing",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {triton.__version__}, CUDA {torch.version.cuda}",
    }
    if not smoke:
        query = "driver_version,power.limit,clocks.max.sm,clocks.max.mem"
        facts["driver, power limit, maximal clocks"] = ask(
            "nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"
        )
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def network(images: list[tuple[int, int, int]], rounds: int, *, smoke: bool) -> str:
    import contest
    import torch

    from nextdit_core import NextDiT, NextDiTConfig, Tokens

    device = "cpu" if smoke else "cuda"
    torch.manual_seed(0)
    config = NextDiTConfig(**(NETWORK_SMOKE if smoke else NETWORK))
    model = NextDiT(config).to(device, torch.bfloat16)
    with torch.no_grad():  # what starts at zero too: zeros are no fair numbers to multiply
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=not smoke)
    size = 64 if smoke else 8192
    factors = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = [("batch × tokens", "what", "ms", "TFLOP/s", "of matmul")]
    for batch, height, width in images:
        place = torch.cartesian_prod(
            torch.zeros(1), torch.arange(float(height)), torch.arange(float(width))
        ).to(device)
        values = torch.randn(batch * len(place), config.token_dim, device=device)
        tokens = Tokens(values, place.repeat(batch, 1), (len(place),) * batch)
        t = torch.rand(batch, device=device)
        aim = torch.randn_like(values)

        def forward(backend: str, tokens=tokens, t=t):
            os.environ["ROPE3D_BACKEND"] = backend
            with torch.no_grad():
                return model(tokens, t)

        def train(backend: str, tokens=tokens, t=t, aim=aim) -> None:
            os.environ["ROPE3D_BACKEND"] = backend
            torch.nn.functional.mse_loss(model(tokens, t).float(), aim).backward()
            optimizer.step()
            optimizer.zero_grad()

        ours, theirs = forward("triton").float(), forward("reference").float()
        error = (ours - theirs).norm() / theirs.norm()
        if not error < 0.05:  # also refuses NaN
            raise RuntimeError(f"the backends disagree by {error:.3f}; nothing is worth timing")
        operations = forward_operations(model, batch, len(place))
        runs: dict[str, Callable[[], object]] = {
            "matmul": lambda: factors[0] @ factors[1],
            "forward, triton rotation": lambda f=forward: f("triton"),
            "forward, reference rotation": lambda f=forward: f("reference"),
            "training step, triton rotation": lambda f=train: f("triton"),
            "training step, reference rotation": lambda f=train: f("reference"),
        }
        counts = dict.fromkeys(runs, operations) | {"matmul": 2 * size**3}
        counts |= {name: 3 * operations for name in runs if name.startswith("training")}
        times = contest.timed(runs, rounds, smoke=smoke)
        medians = {name: statistics.median(values) for name, values in times.items()}
        rates = {name: counts[name] / seconds / 1e12 for name, seconds in medians.items()}
        for name, seconds in medians.items():
            rows.append(
                (
                    f"{batch} × {len(place)}" if name != "matmul" else f"{size} × {size} × {size}",
                    name,
                    f"{seconds * 1e3:.2f}",
                    f"{rates[name]:.1f}",
                    f"{rates[name] / rates['matmul']:.2f}",
                )
            )
    return f"{parameters / 1e6:.0f} million parameters, {config}\n\n{contest.markdown(rows)}"


def forward_operations(model, batch: int, tokens: int) -> int:
    """Count the operations of one forward pass: linear layers per token, and attention."""
    from torch import nn

    per_token = sum(
        2 * module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "adaLN" not in name and "t_embedder" not in name
    )
    config = model.config
    attention = 4 * batch * tokens**2 * config.width * config.layers
    return batch * tokens * per_token + attention


if __name__ == "__main__":
    sys.exit(main())
