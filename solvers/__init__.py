"""Solvers for diffusion problems."""
