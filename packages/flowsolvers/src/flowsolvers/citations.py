"""Who to cite for a plan: the sources of its solver and its time grid, in BibTeX."""

from __future__ import annotations

from flowsolvers.plan import Plan
from flowsolvers.registry import method

__all__ = ["citation"]


def citation(plan: Plan) -> str:
    """Write the sources of a plan's solver and time grid in BibTeX.

    Args:
        plan: Any plan; solvers of other distributions say what to cite in an attribute
            `citation`, a string in BibTeX.

    Returns:
        Entries with a blank line between; empty where nothing is known, such as for a plan of
        one's own from JSON.

    Example:
        >>> from flowsolvers import plan
        >>> print(citation(plan("dpm2m", nfe=4)))
        @misc{lu2022dpmpp,
          author = {Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and
            Zhu, Jun},
          title = {{DPM-Solver++}: Fast Solver for Guided Sampling of Diffusion Probabilistic
            Models},
          eprint = {2211.01095},
          archiveprefix = {arXiv},
          year = {2022},
        }
    """
    keys = list(_SOLVERS.get(plan.solver, ()))
    for part in plan.schedule.removesuffix(" backwards").split("@"):
        keys += _SCHEDULES.get(part.removesuffix("^-1").partition(":")[0], ())
    entries = [_ENTRIES[key] for key in dict.fromkeys(keys)]
    if plan.solver not in _SOLVERS:
        entries += _own(plan.solver)
    return "\n\n".join(entries)


def _own(solver: str) -> list[str]:
    """What a solver of another distribution says of itself."""
    try:
        text = getattr(method(solver), "citation", "")
    except ValueError:  # the plan came from elsewhere
        return []
    return [text.strip()] if isinstance(text, str) and text.strip() else []


def _entry(kind: str, key: str, **fields: str) -> str:
    lines = [f"@{kind}{{{key},", *(f"  {name} = {{{value}}}," for name, value in fields.items())]
    return "\n".join([*lines, "}"])


def _arxiv(key: str, author: str, title: str, number: str, year: str) -> str:
    return _entry(
        "misc", key, author=author, title=title, eprint=number, archiveprefix="arXiv", year=year
    )


_ENTRIES = {
    "euler1768": _entry(
        "book",
        "euler1768",
        author="Euler, Leonhard",
        title="Institutionum calculi integralis, volumen primum",
        address="Petropoli",
        year="1768",
    ),
    "runge1895": _entry(
        "article",
        "runge1895",
        author="Runge, Carl",
        title='{\\"U}ber die numerische {Aufl{\\"o}sung} von {Differentialgleichungen}',
        journal="Mathematische Annalen",
        volume="46",
        pages="167--178",
        year="1895",
    ),
    "heun1900": _entry(
        "article",
        "heun1900",
        author="Heun, Karl",
        title="Neue {Methoden} zur approximativen {Integration} der {Differentialgleichungen}\n"
        '    einer unabh{\\"a}ngigen {Ver{\\"a}nderlichen}',
        journal='Zeitschrift f{\\"u}r Mathematik und Physik',
        volume="45",
        pages="23--38",
        year="1900",
    ),
    "kutta1901": _entry(
        "article",
        "kutta1901",
        author="Kutta, Wilhelm",
        title='Beitrag zur n{\\"a}herungsweisen {Integration} totaler {Differentialgleichungen}',
        journal='Zeitschrift f{\\"u}r Mathematik und Physik',
        volume="46",
        pages="435--453",
        year="1901",
    ),
    "ralston1962": _entry(
        "article",
        "ralston1962",
        author="Ralston, Anthony",
        title="Runge-Kutta Methods with Minimum Error Bounds",
        journal="Mathematics of Computation",
        volume="16",
        number="80",
        pages="431--437",
        year="1962",
    ),
    "shu1988": _entry(
        "article",
        "shu1988",
        author="Shu, Chi-Wang and Osher, Stanley",
        title="Efficient Implementation of Essentially Non-oscillatory Shock-Capturing Schemes",
        journal="Journal of Computational Physics",
        volume="77",
        number="2",
        pages="439--471",
        year="1988",
    ),
    "bashforth1883": _entry(
        "book",
        "bashforth1883",
        author="Bashforth, Francis and Adams, John Couch",
        title="An Attempt to Test the Theories of Capillary Action",
        publisher="Cambridge University Press",
        year="1883",
    ),
    "hairer1993": _entry(
        "book",
        "hairer1993",
        author="Hairer, Ernst and N{\\o}rsett, Syvert P. and Wanner, Gerhard",
        title="Solving Ordinary Differential Equations {I}: Nonstiff Problems",
        edition="2",
        publisher="Springer",
        year="1993",
    ),
    "hochbruck2010": _entry(
        "article",
        "hochbruck2010",
        author="Hochbruck, Marlis and Ostermann, Alexander",
        title="Exponential Integrators",
        journal="Acta Numerica",
        volume="19",
        pages="209--286",
        year="2010",
    ),
    "zhang2023res": _arxiv(
        "zhang2023res",
        "Zhang, Qinsheng and Song, Jiaming and Chen, Yongxin",
        "Improved Order Analysis and Design of Exponential Integrator for Diffusion Models\n"
        "    Sampling",
        "2308.02157",
        "2023",
    ),
    "lu2022dpmpp": _arxiv(
        "lu2022dpmpp",
        "Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and\n"
        "    Zhu, Jun",
        "{DPM-Solver++}: Fast Solver for Guided Sampling of Diffusion Probabilistic\n    Models",
        "2211.01095",
        "2022",
    ),
    "zhao2023unipc": _arxiv(
        "zhao2023unipc",
        "Zhao, Wenliang and Bai, Lujia and Rao, Yongming and Zhou, Jie and Lu, Jiwen",
        "{UniPC}: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models",
        "2302.04867",
        "2023",
    ),
    "zhuo2024lumina": _arxiv(
        "zhuo2024lumina",
        "Zhuo, Le and Du, Ruoyi and Xiao, Han and others",
        "{Lumina-Next}: Making {Lumina-T2X} Stronger and Faster with {Next-DiT}",
        "2406.18583",
        "2024",
    ),
    "esser2024sd3": _arxiv(
        "esser2024sd3",
        "Esser, Patrick and Kulal, Sumith and Blattmann, Andreas and others",
        "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
        "2403.03206",
        "2024",
    ),
    "hacohen2024ltx": _arxiv(
        "hacohen2024ltx",
        "HaCohen, Yoav and Chiprut, Nisan and Brazowski, Benny and others",
        "{LTX-Video}: Realtime Video Latent Diffusion",
        "2501.00103",
        "2025",
    ),
    "karras2022edm": _arxiv(
        "karras2022edm",
        "Karras, Tero and Aittala, Miika and Aila, Timo and Laine, Samuli",
        "Elucidating the Design Space of Diffusion-Based Generative Models",
        "2206.00364",
        "2022",
    ),
    "lee2024beta": _arxiv(
        "lee2024beta",
        "Lee, Haeil and Lee, Hansang and Gye, Seoyeon and Kim, Junmo",
        "Beta Sampling is All You Need: Efficient Image Generation Strategy for Diffusion Models\n"
        "    using Stepwise Spectral Analysis",
        "2407.12173",
        "2024",
    ),
    "genmo2024mochi": _entry(
        "misc",
        "genmo2024mochi",
        author="{Genmo Team}",
        title="Mochi 1",
        howpublished="https://github.com/genmoai/models",
        year="2024",
    ),
    "fritsch1984": _entry(
        "article",
        "fritsch1984",
        author="Fritsch, Frederick N. and Butland, Judy",
        title="A Method for Constructing Local Monotone Piecewise Cubic Interpolants",
        journal="{SIAM} Journal on Scientific and Statistical Computing",
        volume="5",
        number="2",
        pages="300--304",
        year="1984",
    ),
}

_ADAMS = ("bashforth1883", "hairer1993")
_PEC = ("hairer1993", "zhao2023unipc")

#: Solver to keys.
_SOLVERS: dict[str, tuple[str, ...]] = {
    "ab2": _ADAMS,
    "ab3": _ADAMS,
    "ab4": _ADAMS,
    "auto": _PEC,
    "dpm2m": ("lu2022dpmpp",),
    "dpm3m": ("lu2022dpmpp", "hochbruck2010"),
    "euler": ("euler1768",),
    "heun": ("heun1900",),
    "heun3": ("heun1900",),
    "kutta3": ("kutta1901",),
    "midpoint": ("runge1895",),
    "pec1": _PEC,
    "pec2": _PEC,
    "pec3": _PEC,
    "ralston": ("ralston1962",),
    "ralston3": ("ralston1962",),
    "res2": ("hochbruck2010", "zhang2023res"),
    "res3": ("hochbruck2010", "zhang2023res"),
    "rk38": ("kutta1901",),
    "rk4": ("kutta1901",),
    "ssprk3": ("shu1988",),
    "unipc2": ("zhao2023unipc",),
    "unipc3": ("zhao2023unipc",),
}

#: Kind of time grid to keys.
_SCHEDULES: dict[str, tuple[str, ...]] = {
    "beta": ("lee2024beta",),
    "karras": ("karras2022edm",),
    "linear-quadratic": ("genmo2024mochi",),
    "lumina-rational": ("zhuo2024lumina",),
    "lumina-sigmoid": ("zhuo2024lumina",),
    "shift": ("zhuo2024lumina", "esser2024sd3"),
    "sigmoid": ("zhuo2024lumina",),
    "terminal": ("hacohen2024ltx",),
    "times": ("fritsch1984",),
}
