"""Which solver, at which cost, and can I believe it?

A *cell* is one solver with one budget on one problem: a target (an oracle whose truth is known, a trained run,
anybody's network), a Gaussian path, a time grid, a seed. A *comparison* is the product of some of each,

    from sdegen.comparison import Comparison, compare

    found = compare(Comparison(targets=("mixture16",), solvers=("ddim", "heun", "unipc*"), budgets=(5, 10, 20)))
    found["solver"], found["nfe"], found["error"]
    (problem,) = merge([source(found)]).problems     # sdegen.sweeps: the cells put in order, see sdegen.standings
    problem.ranked(10, "error")

and everybody in it starts from the same noises and, where noise is drawn on the way, sees the same Brownian motion. Two
kinds of number then say how good a solver is with a budget of network calls:

*Pathwise error*: root mean square distance, over noises and coordinates, between where the solver took a noise and
where its equation takes it. It has no floor but the reference's own accuracy, which is measured too, and separates
solvers long after all pictures look alike. It compares solvers of one equation.

*Distances in distribution*: between many endpoints and exact samples, where the truth is known. They are what users
care about, the only numbers that compare ODE with SDE solvers, and they cannot be read below what two sets of exact
samples of the same size differ by. That floor stands beside each of them.

The equation of a solver is the probability-flow ODE, or with ``y = x / alpha`` and ``lam = logsnr / 2``

    dy = -(1 + eta^2) (y - x0) dlam + sqrt(2) eta exp(-lam) dW(lam),

whose solution :mod:`sdegen.comparison.truth` computes from the same noise as accurately as one likes.

The same product as a *sweep* (:func:`sweep`, ``sdegen compare``) lies in a folder: each cell is on the disk as soon as
it is done, in any order, from any number of processes, and a sweep that was killed goes on where it was.

    results.h5         the table, for ``sdegen report``, xarray and anybody; results.csv says the same; made again from
                       the journal when it is damaged
    comparison.json    what the cells of this folder have in common: targets and sample sizes
    journal/*.jsonl    the cells as they were measured, one checksummed line each, one file for each process
    references/*.h5    the converged solutions

**results.h5** (see :data:`COLUMNS` for every column with its unit and meaning):

    comparison     axis ``cell``, one row for each cell
                   which     target, path, grid, solver, seed, budget (0 where a tolerance is given), tol (NaN else)
                   what      stochastic, order, start_order (declared; what the first steps leave to the whole),
                             equation ("ODE", "SDE", "SDE 0.5": with eta; "own": no such equation is known, the solver's
                             own limit; "none": it has no limit, and so no error)
                   spent     steps, nfe (network calls, counted), nfe_mean (the same where samples differ in it)
                   accuracy  error with its 95 % interval error_low, error_high; error_median, which a few noises that
                             end in another mode do not rule, with its; reference_error, reference_error_median
                   law       sliced_w2, w2, energy, mode_error, mean_error, cov_error, log_density; for each of them
                             NAME_floor, what exact samples of the same size have, and NAME_floor_high, the end of
                             their 95 % range: a distance below it cannot be told from zero. NaN where truth is unknown
                   cost      seconds, network_seconds and noise_seconds in it, overhead_us (the solver's own, per step),
                             peak_mib (tensors that the solver holds beyond the network)
                   samples, cloud (how many noises and endpoints), code (mark of the code that measured the cell:
                   :mod:`sdegen.comparison.code`), status ("ok", or why there are no numbers)
                   attributes: schema, settings (JSON), targets (JSON: name -> what it is), versions, commit, created,
                   command, platform
    orders         axis ``row``, one for each target, path, grid and solver with fixed steps: target, path, grid,
                   solver, stochastic, order (declared; of strong convergence where stochastic), start_order, measured,
                   measured_low, measured_high (95 %), steps_from, steps_to: the slope of the median error between the
                   two finest budgets whose error is well above that of the reference
    samples/N      pictures of the N-th target (attribute ``target``): ``cell`` (row numbers of ``comparison``),
                   ``x`` (cell, noise, ...) endpoints of the first noises, decoded to data, float32; ``exact``
                   (equation, noise, ...) where the ODE and the SDE take them, with the coordinate ``equation``

Everything but the four timings (:data:`TIMINGS`) is the same, bit for bit, however often a sweep is interrupted and
however many processes share it. A sweep that finds cells of other code asks whether to keep them or to measure them
anew (:mod:`sdegen.comparison.folder`).

References: Bonneel et al. 2015, doi:10.1007/s10851-014-0506-3 (sliced Wasserstein distance); Flamary et al. 2021,
jmlr.org/papers/v22/20-451 (POT: exact transport); Szekely and Rizzo 2013, doi:10.1016/j.jspi.2013.03.018 (energy
distance).
"""

from sdegen.comparison.distances import sliced_wasserstein
from sdegen.comparison.settings import Cell, Comparison
from sdegen.comparison.sweep import compare, sweep
from sdegen.comparison.table import COLUMNS, GROUP, SCHEMA, TIMINGS
from sdegen.comparison.targets import Target
from sdegen.comparison.truth import LazyBrownianMotion, exact_ode, exact_sde

__all__ = [
    "COLUMNS",
    "GROUP",
    "SCHEMA",
    "TIMINGS",
    "Cell",
    "Comparison",
    "LazyBrownianMotion",
    "Target",
    "compare",
    "exact_ode",
    "exact_sde",
    "sliced_wasserstein",
    "sweep",
]
