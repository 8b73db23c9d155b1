"""Objectives on handwritten digits: `python benchmarks/core/objectives.py [--write]`.

The demo's recipe with other paths and predictions, trained alike, and how many of the samples are
read as the digit asked for, by the ODE and by the SDE. A check that each can be trained and sampled
from end to end; one seed of a small model does not rank them.
"""

from __future__ import annotations

import sys
import tempfile
import tomllib
from importlib.resources import files
from pathlib import Path

import summary
import torch

from modality_image.digits import caption, recognise
from nextdit_core import Pipeline, Recipe, train
from nextdit_core.training.run_folder import RunFolder

OBJECTIVES = (
    ("linear", "velocity", "none"),
    ("gvp", "velocity", "none"),
    ("vp", "velocity", "none"),
    ("linear", "noise", "velocity"),
    ("vp", "noise", "none"),
    ("gvp", "score", "velocity"),
    ("linear", "data", "none"),
)
COUNT = 20


def main() -> int:
    parser = summary.options("Objectives on handwritten digits.", rounds=1)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--nfe", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    asked = [digit for digit in range(10) for _ in range(COUNT)]
    prompts = [caption(digit) for digit in asked]
    values = tomllib.loads((files("modality_image") / "digits.toml").read_text())
    values |= {"engine": "local", "workers": 1, "device": "cpu", "steps": options.steps}
    rows = [("path", "prediction", "weighting", "last losses", "ODE", "SDE `sigma`")]
    held_out = ""
    for objective in OBJECTIVES:
        with tempfile.TemporaryDirectory() as folder:
            names = dict(zip(("path", "prediction", "weighting"), objective, strict=True))
            run = Recipe.from_dict(values | {"out": str(Path(folder) / "run"), "objective": names})
            pipe = Pipeline.from_pretrained(train(run), device="cpu")
            losses = [row["loss"] for row in RunFolder(run.out).rows()][-50:]
        accuracies = []
        for way in ({}, {"sde": "sigma"}):
            found = recognise(pipe(prompts, seed=0, nfe=options.nfe, **way))
            accuracies.append(f"{found.accuracy(asked):.1%}")
            held_out = f"{found.held_out_accuracy:.1%}"
        rows.append((*objective, f"{sum(losses) / len(losses):.3f}", *accuracies))
        print(rows[-1], file=sys.stderr)
    text = (
        f"{options.steps} steps of the demo's recipe each, {len(asked)} samples of "
        f"{options.nfe} evaluations with guidance 2, one seed. The reader, a classifier that never "
        f"saw the model, reads {held_out} of real held-out digits. Losses are in the units of each "
        "objective, and do not compare."
    )
    parts = ["# Objectives on handwritten digits", summary.head(), text, summary.table(rows)]
    return summary.finish(parts, "objectives-digits", write=options.write)


if __name__ == "__main__":
    sys.exit(main())
