"""One short entry point for each stage: `python -m ray_jobs.<stage> …`.  The only code that imports Ray."""
