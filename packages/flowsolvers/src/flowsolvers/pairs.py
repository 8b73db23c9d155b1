r"""Embedded Runge-Kutta pairs as frozen data: two orders from the same evaluations.

With h = t_next - t, stage i is k_i = v(t + c_i·h, x + h·Σ_j a_ij·k_j) over j < i; the step ends
at x + h·Σ_i b_i·k_i, and differs from its companion of one order less by h·Σ_i error_i·k_i, the
estimate by which an adaptive solver chooses its steps. Within the step, at the fraction θ of it,

    x(θ) = x + h·Σ_i (dense_i0·θ + dense_i1·θ² + ...)·k_i

The last stage is evaluated at the step's end, and so is the first of the next step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowsolvers.spelling import closest_first

__all__ = [
    "ADAPTIVE_HEUN",
    "BOSH3",
    "DOPRI5",
    "DOPRI8",
    "FEHLBERG2",
    "PAIRS",
    "TSIT5",
    "Pair",
    "embedded_pair",
]


@dataclass(frozen=True)
class Pair:
    """An explicit embedded pair with dense output, checked when it is made.

    Args:
        order: Of the solution that is carried on; its companion has one less.
        c: Where in the step each stage is evaluated; `c[0]` is 0 and the last is 1.
        a: For each stage the weights of the stages before it; the last row is b.
        b: Weights of the stages in the step's end; the last is 0.
        error: b less the weights of the companion.
        dense: For each stage the coefficients of θ, θ², ... within the step.

    Raises:
        ValueError: The shapes do not fit; a row of `a` does not sum to its c; `b` does not sum
            to 1, or `error` to 0; the last stage is not the next step's first; or the dense
            output does not start with the step's slope and end at its end.

    Source: E. Hairer, S. P. Nørsett, G. Wanner, Solving Ordinary Differential Equations I (1993),
        II.4 to II.6.

    Example:
        >>> DOPRI5.order, DOPRI5.stages
        (5, 7)
    """

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    error: tuple[float, ...]
    dense: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """Prove the shapes, the sums, the shared stage and the ends of the dense output."""
        stages = len(self.b)
        if self.order < 2 or stages < 3:
            raise ValueError(
                f"a pair needs an order of at least 2 and 3 stages, got {self.order} and {stages}"
            )
        lengths = [len(row) for row in self.a]
        if lengths != list(range(stages)) or not (
            len(self.c) == len(self.error) == len(self.dense) == stages
        ):
            raise ValueError(
                f"a pair of {stages} stages (the length of b) needs as many values of c, error "
                f"and dense, and rows of a with {list(range(stages))} weights, got {len(self.c)}, "
                f"{len(self.error)}, {len(self.dense)} and {lengths}"
            )
        for i, (c, row) in enumerate(zip(self.c, self.a, strict=True)):
            if not _equal(math.fsum(row), c):
                raise ValueError(f"row {i} of a sums to {math.fsum(row)!r}; it must be c[{i}]={c}")
        if not _equal(math.fsum(self.b), 1.0):
            raise ValueError(f"b sums to {math.fsum(self.b)!r}; it must sum to 1")
        if not _equal(math.fsum(self.error), 0.0):
            raise ValueError(f"error sums to {math.fsum(self.error)!r}; it must sum to 0")
        if self.c[-1] != 1.0 or (*self.a[-1], 0.0) != self.b:
            raise ValueError(
                "the last stage must be the next step's first: c[-1]=1, a[-1]=b[:-1] and b[-1]=0; "
                "append such a stage, with error[-1]=0, to a pair that lacks it"
            )
        for i, row in enumerate(self.dense):
            start, end = row[0], math.fsum(row)
            if not (_equal(start, float(i == 0), 1e-10) and _equal(end, self.b[i], 1e-10)):
                raise ValueError(
                    f"row {i} of dense starts with {start!r} and sums to {end!r}; it must start "
                    f"with {float(i == 0)} and sum to b[{i}]={self.b[i]!r}"
                )

    @property
    def stages(self) -> int:
        """Velocity evaluations in the first step; later ones make one less."""
        return len(self.b)


def embedded_pair(name: str | Pair) -> Pair:
    """Find the pair that a name stands for.

    Args:
        name: One of `PAIRS`; a pair is returned as it is.

    Returns:
        The pair.

    Raises:
        ValueError: The name is not known.

    Example:
        >>> embedded_pair("bosh3").order
        3
    """
    if isinstance(name, Pair):
        return name
    if name not in PAIRS:
        accepted = ", ".join(closest_first(str(name), PAIRS))
        raise ValueError(f"unknown pair {name!r}; accepted, closest first: {accepted}")
    return PAIRS[name]


def _equal(value: float, expected: float, tolerance: float = 1e-12) -> bool:
    return math.isclose(value, expected, rel_tol=0.0, abs_tol=tolerance)


def _hermite(b: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    """The cubic that has the state and the slope of both ends."""
    return tuple(
        (
            float(first),
            3 * weight - 2 * first - last,
            -2 * weight + first + last,
        )
        for weight, first, last in _ends(b)
    )


def _quartic(b: tuple[float, ...], middle: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    """The quartic that besides has the state x + h·Σ middle_i·k_i at θ = 1/2."""
    return tuple(
        (
            float(first),
            16 * half - 5 * weight - 4 * first + last,
            -32 * half + 14 * weight + 5 * first - 3 * last,
            16 * half - 8 * weight - 2 * first + 2 * last,
        )
        for (weight, first, last), half in zip(_ends(b), middle, strict=True)
    )


def _ends(b: tuple[float, ...]) -> list[tuple[float, int, int]]:
    """Of each stage its weight, and whether it is the slope at the start or at the end."""
    return [(weight, int(i == 0), int(i == len(b) - 1)) for i, weight in enumerate(b)]


def _product(lead: float, *factors: tuple[float, ...]) -> tuple[float, ...]:
    """Multiply polynomials, each written from its constant up; return θ, θ², ..."""
    total = (lead,)
    for factor in factors:
        longer = [0.0] * (len(total) + len(factor) - 1)
        for i, left in enumerate(total):
            for j, right in enumerate(factor):
                longer[i + j] += left * right
        total = tuple(longer)
    return total[1:]


_W = (1 / 2, 1 / 2, 0.0)

#: Heun (1900) with Euler as its companion.
ADAPTIVE_HEUN = Pair(
    order=2,
    c=(0.0, 1.0, 1.0),
    a=((), (1.0,), _W[:-1]),
    b=_W,
    error=(-1 / 2, 1 / 2, 0.0),
    dense=_hermite(_W),
)

_W = (1 / 512, 255 / 256, 1 / 512, 0.0)

#: Fehlberg, NASA Technical Report R-315 (1969), RK1(2): carried on at order 2.
FEHLBERG2 = Pair(
    order=2,
    c=(0.0, 1 / 2, 1.0, 1.0),
    a=((), (1 / 2,), (1 / 256, 255 / 256), _W[:-1]),
    b=_W,
    error=(-1 / 512, 0.0, 1 / 512, 0.0),
    dense=_hermite(_W),
)

_W = (2 / 9, 1 / 3, 4 / 9, 0.0)

#: Bogacki & Shampine, A 3(2) pair of Runge-Kutta formulas, Appl. Math. Lett. 2 (1989).
BOSH3 = Pair(
    order=3,
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    a=((), (1 / 2,), (0.0, 3 / 4), _W[:-1]),
    b=_W,
    error=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    dense=_hermite(_W),
)

_W = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0)

#: Dormand & Prince, A family of embedded Runge-Kutta formulae, J. Comput. Appl. Math. 6 (1980),
#: with the companion and the midpoint of Shampine, Some practical Runge-Kutta formulas, Math.
#: Comp. 46 (1986), as torchdiffeq, diffrax and torchode have it; dense output of order 4.
DOPRI5 = Pair(
    order=5,
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _W[:-1],
    ),
    b=_W,
    error=(
        35 / 384 - 1951 / 21600,
        0.0,
        500 / 1113 - 22642 / 50085,
        125 / 192 - 451 / 720,
        -2187 / 6784 + 12231 / 42400,
        11 / 84 - 649 / 6300,
        -1 / 60,
    ),
    dense=_quartic(
        _W,
        (
            6025192743 / 30085553152 / 2,
            0.0,
            51252292925 / 65400821598 / 2,
            -2691868925 / 45128329728 / 2,
            187940372067 / 1594534317056 / 2,
            -1776094331 / 19743644256 / 2,
            11237099 / 235043384 / 2,
        ),
    ),
)

_W = (
    0.09646076681806522951816731316512876,
    1 / 100,
    0.47988965041449957477524953229059652,
    1.37900857410374189319227482185687277,
    -3.29006951543608067990104758571136385,
    2.32471052409977398241535591839876580,
    0.0,
)

#: Tsitouras, Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying
#: assumption, Comput. Math. Appl. 62 (2011); the paper's error weights, of which the last needs
#: its sign changed, here as b less those of the companion; dense output of order 4.
TSIT5 = Pair(
    order=5,
    c=(0.0, 161 / 1000, 327 / 1000, 9 / 10, 0.98002554090450968572981028628702460, 1.0, 1.0),
    a=(
        (),
        (161 / 1000,),
        (-0.00848065549235698854442687425023077, 0.33548065549235698854442687425023077),
        (
            2.89715305710549343213043259419293876,
            -6.35944848997507484314815991238382562,
            4.36229543286958141101772731819088686,
        ),
        (
            5.32586482843925660442887792084051131,
            -11.74888356406282787774717033978577296,
            7.49553934288983620830460478456435815,
            -0.09249506636175524925650207933207191,
        ),
        (
            5.86145544294642002865925148698264789,
            -12.92096931784710929170611868178335939,
            8.15936789857615864318040079453925348,
            -0.07158497328140099722453054252582973,
            -0.02826905039406838290900305721271224,
        ),
        _W[:-1],
    ),
    b=_W,
    error=(
        0.00178001105222577144337855060753953,
        0.00081643445965674690322363606335468,
        -0.00788087801026199601031472766725263,
        0.14471100717326290753716514797263511,
        -0.58235716545255522501993765201064210,
        0.45808210592918694666163651883255429,
        -1 / 66,
    ),
    dense=(
        _product(
            -1.0530884977290216,
            (0.0, 1.0),
            (-1.3299890189751412, 1.0),
            (0.7139816917074209, -1.4364028541716351, 1.0),
        ),
        _product(0.1017, (0.0, 0.0, 1.0), (1.2949852507374631, -2.1966568338249754, 1.0)),
        _product(
            2.490627285651252793, (0.0, 0.0, 1.0), (1.57803468208092486, -2.38535645472061657, 1.0)
        ),
        _product(
            -16.54810288924490272,
            (0.0, 0.0, 1.0),
            (-1.21712927295533244, 1.0),
            (-0.61620406037800089, 1.0),
        ),
        _product(
            47.37952196281928122,
            (0.0, 0.0, 1.0),
            (-1.203071208372362603, 1.0),
            (-0.658047292653547382, 1.0),
        ),
        _product(-34.87065786149660974, (0.0, 0.0, 1.0), (-1.2, 1.0), (-2 / 3, 1.0)),
        _product(2.5, (0.0, 0.0, 1.0), (-1.0, 1.0), (-0.6, 1.0)),
    ),
)

_W = (
    14005451 / 335480064,
    0.0,
    0.0,
    0.0,
    0.0,
    -59238493 / 1068277825,
    181606767 / 758867731,
    561292985 / 797845732,
    -1041891430 / 1371343529,
    760417239 / 1151165299,
    118820643 / 751138087,
    -528747749 / 2220607170,
    1 / 4,
    0.0,
)

#: Prince & Dormand, High order embedded Runge-Kutta formulae, J. Comput. Appl. Math. 7 (1981),
#: RK8(7)13M. The dense output, of order 5, is that whose middle torchdiffeq takes.
DOPRI8 = Pair(
    order=8,
    c=(
        0.0,
        1 / 18,
        1 / 12,
        1 / 8,
        5 / 16,
        3 / 8,
        59 / 400,
        93 / 200,
        5490023248 / 9719169821,
        13 / 20,
        1201146811 / 1299019798,
        1.0,
        1.0,
        1.0,
    ),
    a=(
        (),
        (1 / 18,),
        (1 / 48, 1 / 16),
        (1 / 32, 0.0, 3 / 32),
        (5 / 16, 0.0, -75 / 64, 75 / 64),
        (3 / 80, 0.0, 0.0, 3 / 16, 3 / 20),
        (
            29443841 / 614563906,
            0.0,
            0.0,
            77736538 / 692538347,
            -28693883 / 1125000000,
            23124283 / 1800000000,
        ),
        (
            16016141 / 946692911,
            0.0,
            0.0,
            61564180 / 158732637,
            22789713 / 633445777,
            545815736 / 2771057229,
            -180193667 / 1043307555,
        ),
        (
            39632708 / 573591083,
            0.0,
            0.0,
            -433636366 / 683701615,
            -421739975 / 2616292301,
            100302831 / 723423059,
            790204164 / 839813087,
            800635310 / 3783071287,
        ),
        (
            246121993 / 1340847787,
            0.0,
            0.0,
            -37695042795 / 15268766246,
            -309121744 / 1061227803,
            -12992083 / 490766935,
            6005943493 / 2108947869,
            393006217 / 1396673457,
            123872331 / 1001029789,
        ),
        (
            -1028468189 / 846180014,
            0.0,
            0.0,
            8478235783 / 508512852,
            1311729495 / 1432422823,
            -10304129995 / 1701304382,
            -48777925059 / 3047939560,
            15336726248 / 1032824649,
            -45442868181 / 3398467696,
            3065993473 / 597172653,
        ),
        (
            185892177 / 718116043,
            0.0,
            0.0,
            -3185094517 / 667107341,
            -477755414 / 1098053517,
            -703635378 / 230739211,
            5731566787 / 1027545527,
            5232866602 / 850066563,
            -4093664535 / 808688257,
            3962137247 / 1805957418,
            65686358 / 487910083,
        ),
        (
            403863854 / 491063109,
            0.0,
            0.0,
            -5068492393 / 434740067,
            -411421997 / 543043805,
            652783627 / 914296604,
            11173962825 / 925320556,
            -13158990841 / 6184727034,
            3936647629 / 1978049680,
            -160528059 / 685178525,
            248638103 / 1413531060,
            0.0,
        ),
        _W[:-1],
    ),
    b=_W,
    error=(
        14005451 / 335480064 - 13451932 / 455176623,
        0.0,
        0.0,
        0.0,
        0.0,
        -59238493 / 1068277825 + 808719846 / 976000145,
        181606767 / 758867731 - 1757004468 / 5645159321,
        561292985 / 797845732 - 656045339 / 265891186,
        -1041891430 / 1371343529 + 3867574721 / 1518517206,
        760417239 / 1151165299 - 465885868 / 322736535,
        118820643 / 751138087 - 53011238 / 667516719,
        -528747749 / 2220607170 - 2 / 45,
        1 / 4,
        0.0,
    ),
    dense=(
        (
            1.0,
            -6.6910181737837595697,
            19.9990069333683970610,
            -30.0610568289666450593,
            22.1396504998094068976,
            -6.3448349392860401388,
        ),
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (
            0.0,
            -7.6142658045872677172,
            52.2273532792945524050,
            -121.4999627731334642623,
            116.4422149550342161651,
            -39.6107919852202505218,
        ),
        (
            0.0,
            10.7281392630428866124,
            -46.8919164181093621583,
            83.1721004639847717481,
            -67.1451318825957197185,
            20.3761213808791436958,
        ),
        (
            0.0,
            0.5526637063753648783,
            -0.1890893225010595467,
            9.5724507555993664382,
            -16.5672243527496524646,
            7.3347098826795362023,
        ),
        (
            0.0,
            4.2186562625665153803,
            -35.7075975946222072821,
            87.8406057677205645007,
            -89.9916014847245016028,
            32.8801774352459155182,
        ),
        (
            0.0,
            -0.6627209125361597559,
            6.2736448083240352160,
            -17.4152107770762969005,
            22.6237489648532849093,
            -10.1588990526426760954,
        ),
        (
            0.0,
            -1.2636789001135462218,
            10.3160881272450748458,
            -28.5903289514790976966,
            32.2362340167355370113,
            -12.5401268098782561200,
        ),
        (
            0.0,
            5.4106037898590422230,
            -34.7650769866611817349,
            81.6630950584341412934,
            -82.1020315488359848644,
            29.5553001484516038033,
        ),
        (
            0.0,
            -7.0321379067945741781,
            47.7457971078225540396,
            -114.9375291377009418170,
            116.2662185791119533462,
            -41.7923486424390588923,
        ),
        (
            0.0,
            2.3537586759714983486,
            -19.0082099341608028453,
            50.2558364226176017553,
            -53.9020777466385396792,
            20.3006925822100825485,
        ),
    ),
)

#: The pairs by name.
PAIRS: dict[str, Pair] = {
    "adaptive_heun": ADAPTIVE_HEUN,
    "bosh3": BOSH3,
    "dopri5": DOPRI5,
    "dopri8": DOPRI8,
    "fehlberg2": FEHLBERG2,
    "tsit5": TSIT5,
}
