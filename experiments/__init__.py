"""Experiments: one question, one file, one frozen configuration, one command.

Each module has a dataclass ``Config`` whose defaults are the experiment as it is reported, a function ``run(config)``
that computes everything from scratch and returns the path of its results, and ``python -m experiments.NAME`` that calls
it. Results are HDF5 with a CSV table and figures beside it.

    solver_comparison    which solver, at which cost, on which kind of data?
    time_grids           which time grid for which solver?
    stochasticity        when does noise help?
    discretization       what is lost by T levels, from the VAE's one to the SDE?
    likelihood_table     how likely are held-out digits, by every method and model?
    weighting            which objective for the bound, and which for looks?
"""
