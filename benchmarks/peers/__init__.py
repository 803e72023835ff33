"""Other packages that compute the same. Each module imports its package when it is called.

None of these packages is a dependency. If one is missing, the run goes on without it.
"""
