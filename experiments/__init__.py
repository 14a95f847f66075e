"""Experiments: one question, one file, one frozen configuration, one command.

Each module has a dataclass ``Config`` whose defaults are the experiment as it is reported, a function ``run(config)``
that computes everything from scratch and returns the path of its results, and ``python -m experiments.NAME`` that calls
it. Results are HDF5 with a CSV table and figures beside it.

    solver_comparison    which solver, at which cost, on which kind of data?
    weighting            which objective for the bound, and which for looks?
"""
